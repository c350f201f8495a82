#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cairn/future.h"
#include "cairn/result.h"
#include "cairn/types.h"

/// libcairn: sharded checkpoints and objects on Cairn daemons.
///
/// All classes are handles: copying shares. Every blocking call `f` has a form `f_async` that returns a Future, which
/// can be waited for, called back or co_awaited (cairn/future.h; with Asio: cairn/asio.h). Threads: any; one Save or
/// Restore from one thread at a time. A client runs one thread of its own.
///
///   auto client = cairn::Client::connect({.servers = {"127.0.0.1:7420"}});
///   auto run = client->open_run({.name = "jobs/llama", .launch = {.job = job_id, .restart = restarts}});
///   auto save = run->begin_save({.step = 1200, .rank = rank, .world_size = n});
///   save->add_tensor({.name = "w", .dtype = cairn::DType::bf16, .global_shape = {4096, 4096},
///                     .box = cairn::Box{{0, 0}, {2048, 4096}}}, bytes);
///   auto ticket = save->stage();            // returns once the bytes are copied: train on
///   auto committed = ticket->wait();        // durable, and committed by all ranks
namespace cairn {

class Client;

/// One attempt's part of this rank. Dropping the last handle before stage() leaves the attempt to time out for all
/// ranks; abort() fails it at once.
class Save {
 public:
  /// Notes what to save; `bytes` must stay unchanged until stage() returns.
  /// errors: kInvalid  names tensor and reason: box outside the shape, wrong size, the same box twice, sizes that
  /// overflow
  Result<void> add_tensor(TensorShard shard, std::span<const std::byte> bytes);
  /// Opaque bytes restored by (name, rank).
  Result<void> add_blob(std::string name, std::span<const std::byte> bytes);
  /// Position of a data stream; every rank that names `stream` must give the same bytes (at most 16 KiB).
  Result<void> add_token(std::string stream, std::span<const std::byte> bytes);
  Result<void> add_meta(MetaItem item);

  class Ticket {
   public:
    /// Waits until this rank's data is durable and the step is committed by all ranks.
    /// errors: kAttemptFailed  another rank failed, by name;  kFenced  a newer launch opened the run
    ///         kConflict  gaps, overlaps or differing tokens: which tensor, where;  kUnknown  ask Run::status
    Result<SaveResult> wait();
    Result<SaveResult> wait_for(std::chrono::milliseconds timeout);
    Future<SaveResult> wait_async();
    bool ready() const;
    /// When stage() returned the daemon had taken over what is left to do: the step commits also when this process
    /// dies, if all ranks come as far and the daemon lives (with explicit_commit: when somebody commits it). Only
    /// wait() speaks of durability. So with a daemon on this host that sees the arena (ClientOptions::shared_memory)
    /// and has room (its handover.memory); else false.
    bool survives() const;

   private:
    friend class Save;
    std::shared_ptr<struct TicketImpl> impl_;
  };

  /// Copies everything added into the arena, with checksums in the same pass, and returns; sending, sealing and (at the
  /// last seal of all ranks) committing go on in the background.
  /// errors: kBusy  the arena is full and arena_wait is off (nothing is lost: try again);  kDeadline
  ///         those of Run::begin_save, after start_save
  Result<Ticket> stage();
  Future<Ticket> stage_async();
  /// Copies what was added so far into the arena; more can be added, and stage() completes and seals.
  Result<void> stage_part();
  /// With explicit_commit: commits once all ranks have sealed. Call on one rank.
  Result<SaveResult> commit();
  Future<SaveResult> commit_async();
  /// Fails the attempt for all ranks, with this rank's name and `reason`.
  Result<void> abort(std::string reason);
  /// Names the attempt for Client::status. After start_save() it waits for the begin (in a callback it does not); empty
  /// if that was refused, or has not ended.
  std::string attempt() const;

 private:
  friend class Run;
  std::shared_ptr<struct SaveImpl> impl_;
};

/// A request for parts of a committed step. want() all, then run().
class Restore {
 public:
  /// Notes what to read; `out` is filled by run() and must stay valid until that returns.
  void want(TensorSlice slice, std::span<std::byte> out);
  /// Reads only the bytes wanted, in parallel, verified; each byte of every `out` is right when it returns ok.
  /// errors: kNotFound  no such tensor;  kInvalid  box outside it, or `out` of another size: both sizes named
  ///         kDataLoss  names tensor and chunk;  kDeleted  the step was removed meanwhile;  kUnavailable
  Result<RestoreResult> run();
  Future<RestoreResult> run_async();

 private:
  friend class Step;
  std::shared_ptr<struct RestoreImpl> impl_;
};

/// A committed step, opened for reading.
class Step {
 public:
  const StepInfo& info() const;
  /// All tensors with their saved boxes, sorted by name.
  Result<std::vector<TensorInfo>> tensors();
  Result<std::vector<BlobInfo>> blobs();
  Result<std::vector<MetaItem>> meta();
  /// errors: kNotFound
  Result<std::vector<std::byte>> blob(std::string name, std::uint32_t rank = 0);
  Result<std::vector<std::byte>> token(std::string stream);
  Restore restore();
  /// Reads everything back and checks every byte. `progress` is told bytes done and in all, from the client's thread.
  /// errors: kDataLoss  the first damage found, named
  Result<RestoreResult> verify(std::function<void(std::uint64_t, std::uint64_t)> progress = {});

 private:
  friend class Client;
  friend class Run;
  std::shared_ptr<struct StepImpl> impl_;
};

/// A training job's place on the store, opened by one launch.
class Run {
 public:
  /// The step to resume from, the same answer for all ranks of this launch; nullopt: nothing committed yet.
  std::optional<std::uint64_t> resume_step() const;
  /// Creates or joins the attempt of this launch at `step`.
  /// errors: kFenced  a newer launch opened the run;  kExists  the step is committed (see overwrite)
  ///         kInvalid  another world size than the attempt's;  kNoSpace  would not fit
  Result<Save> begin_save(SaveOptions options);
  Future<Save> begin_save_async(SaveOptions options);
  /// The same without waiting for the daemon: add and stage() at once, and the copy hides the time that the begin
  /// takes. What begin_save() would have returned, stage() does then, and nothing is saved.
  Result<Save> start_save(SaveOptions options);
  Result<Step> open_step(std::optional<std::uint64_t> step = {});
  /// open_step(step)->restore().
  Result<Restore> restore(std::optional<std::uint64_t> step = {});
  const std::string& name() const;

 private:
  friend class Client;
  Future<Save> save_async(SaveOptions options, bool wait);
  std::shared_ptr<struct RunImpl> impl_;
};

/// An object on its way in: write() as often as wanted, then finish(). Nothing is visible before finish() has
/// returned; abort(), or dropping the last handle, leaves nothing, and its space comes back.
///
/// Up to chunk_bytes of the arena belong to it until they are full or it ends; memory does not grow with its size.
class ObjectWriter {
 public:
  /// Returns when the bytes are copied: several chunks travel at once.
  /// errors: kNoSpace;  kUnavailable  also of bytes written before;  kInvalid  more than size_bytes
  Result<void> write(std::span<const std::byte> bytes);
  /// `bytes` must stay valid until it ends. Writes that overlap are carried out in order.
  Future<void> write_async(std::span<const std::byte> bytes);
  /// Durable and visible, whole, in place of what was there.
  /// errors: kExists, kConflict  see PutOptions;  kNoSpace  quota
  Result<ObjectInfo> finish();
  Future<ObjectInfo> finish_async();
  Result<void> abort();
  Future<void> abort_async();

 private:
  friend class Client;
  std::shared_ptr<struct ObjectWriterImpl> impl_;
};

/// One version of an object, opened for reading. It can be read to the end also when the key is replaced or removed
/// meanwhile; after a minute without contact to the daemon it may be gone (kDeleted).
class ObjectReader {
 public:
  static constexpr std::uint64_t npos = ~0ull;
  const ObjectInfo& info() const;
  /// Fills `out` with the bytes at `offset`, verified block by block; fewer only at the end of the object.
  /// errors: kInvalid  offset beyond the end;  kDataLoss  names chunk and block;  kDeleted
  Result<std::size_t> read(std::uint64_t offset, std::span<std::byte> out);
  /// `out` must stay valid until it ends.
  Future<std::size_t> read_async(std::uint64_t offset, std::span<std::byte> out);
  /// Bytes [first, last) (npos: to the end), in order, to `write`, several pieces on their way at once. The whole
  /// object is checked against its CRC too, before the last piece is handed over.
  Result<void> stream(std::uint64_t first, std::uint64_t last,
                      std::function<Result<void>(std::span<const std::byte>)> write);

 private:
  friend class Client;
  std::shared_ptr<struct ObjectReaderImpl> impl_;
};

class Client {
 public:
  /// errors: kUnavailable  no server answered: each is named with its reason;  kInvalid  an option, by name
  static Result<Client> connect(ClientOptions options = {});

  // Buckets.
  Result<void> create_bucket(BucketOptions options);
  Result<BucketInfo> bucket(std::string name);
  Result<std::vector<BucketInfo>> buckets();
  /// Once it returns, nothing is removed by the policy before any more.
  Result<BucketInfo> set_bucket(std::string name, BucketChange change);
  /// errors: kConflict  not empty
  Result<void> remove_bucket(std::string name);

  // Objects.
  using PutOptions = cairn::PutOptions;
  Result<ObjectInfo> put(std::string bucket, std::string key, std::span<const std::byte> bytes, PutOptions options);
  Result<ObjectInfo> put(std::string bucket, std::string key, std::span<const std::byte> bytes) {
    return put(std::move(bucket), std::move(key), bytes, PutOptions{});
  }
  Future<ObjectInfo> put_async(std::string bucket, std::string key, std::span<const std::byte> bytes,
                               PutOptions options);
  /// An object of any size, written piece by piece.
  /// errors: kExists, kConflict  see PutOptions;  kNoSpace  quota or disk;  kNotFound  no such bucket
  Result<ObjectWriter> create_object(std::string bucket, std::string key, PutOptions options);
  Future<ObjectWriter> create_object_async(std::string bucket, std::string key, PutOptions options);
  /// Streams: `read` fills its argument and returns how much it wrote, 0 at the end. Memory stays inside the arena.
  /// When `read` fails nothing is stored.
  Result<ObjectInfo> put_stream(std::string bucket, std::string key,
                                std::function<Result<std::size_t>(std::span<std::byte>)> read, PutOptions options);

  Result<std::vector<std::byte>> get(std::string bucket, std::string key);
  Future<std::vector<std::byte>> get_async(std::string bucket, std::string key);
  /// The version that is there now, to be read at any offset. errors: kNotFound;  kBusy  too much is open for reading
  Result<ObjectReader> open_object(std::string bucket, std::string key);
  Future<ObjectReader> open_object_async(std::string bucket, std::string key);
  /// Opens and streams bytes [first, last), as ObjectReader::stream() does.
  static constexpr std::uint64_t npos = ObjectReader::npos;
  Result<ObjectInfo> get_stream(std::string bucket, std::string key, std::uint64_t first, std::uint64_t last,
                                std::function<Result<void>(std::span<const std::byte>)> write);
  Result<ObjectInfo> stat(std::string bucket, std::string key);
  /// Sorted by key, keys > after, at most `limit` (1,000 at most). A key that is there throughout a listing is in it.
  Result<Page<ObjectInfo>> list(std::string bucket, std::string prefix = {}, std::string after = {},
                                std::uint32_t limit = 1000);
  Result<Listing> list(std::string bucket, ListOptions options);
  /// errors: kNotFound;  kConflict  see RemoveOptions
  Result<void> remove(std::string bucket, std::string key, RemoveOptions options = {});

  // Checkpoints.
  /// Fences every older launch of the run and fixes the step to resume from.
  /// errors: kFenced  a newer launch was here;  kInvalid  no launch id;  kNotFound  bucket, or the step to resume
  Result<Run> open_run(RunOptions options);
  Future<Run> open_run_async(RunOptions options);
  /// To read only: no launch, nothing fenced. Default: the highest committed step. As long as a handle lives, the step
  /// can be read, also when it is removed meanwhile; after a minute without contact to the daemon it may be gone
  /// (kDeleted). errors: kNotFound;  kBusy  this client, or all, have too much open
  Result<Step> open_step(std::string run, std::optional<std::uint64_t> step = {});
  Future<Step> open_step_async(std::string run, std::optional<std::uint64_t> step = {});
  Result<Page<std::string>> runs(std::string bucket, std::string after = {}, std::uint32_t limit = 1000);
  Result<Page<StepInfo>> steps(std::string run, std::optional<std::uint64_t> after = {}, std::uint32_t limit = 1000);
  /// Who has the step open can read it to the end. errors: kNotFound;  kConflict  it is pinned
  Result<void> remove_step(std::string run, std::uint64_t step);
  /// From the highest down, many in one transaction; when it is interrupted, call it again. Returns how many were
  /// removed; `progress` is told done and in all, from the client's thread.
  /// errors: kConflict  some are pinned: nothing is removed
  Result<std::uint64_t> remove_steps_after(std::string run, std::uint64_t step,
                                           std::function<void(std::uint64_t, std::uint64_t)> progress = {});
  /// A pinned step is neither removed, by anybody or by retention, nor replaced, until it is unpinned.
  Result<void> pin_step(std::string run, std::uint64_t step);
  Result<void> unpin_step(std::string run, std::uint64_t step);
  Result<RunActivity> activity(std::string run);
  /// What became of an attempt (Save::attempt()): answers while the step lives, for failed attempts one hour.
  Result<AttemptStatus> status(std::string run, std::string attempt);

  // Data directories, and looking after the copies that they hold.
  Result<std::vector<TargetInfo>> targets();
  /// Starts to look at every copy of these data directories (ids; none: all of the daemon), from the first on, and
  /// returns the jobs that do it; one that somebody has asked for before and still runs is that one. What is damaged is
  /// repaired where a good copy exists. `pace`: bytes a second of each directory, 0: no limit; absent: as the daemon is
  /// configured. errors: kNotFound  no such directory;  kFailed  it has failed
  Result<std::vector<JobInfo>> start_scrub(std::vector<std::string> targets = {},
                                           std::optional<std::uint64_t> pace = {});
  Result<std::vector<JobInfo>> jobs();
  /// errors: kNotFound;  kConflict  not in a state for that;  kInvalid  a job that cannot be cancelled
  Result<JobInfo> control_job(std::string id, JobAction action);
  /// What is damaged in a directory, and what was repaired since its last scrub began.
  Result<std::vector<DamageInfo>> damage(std::string target);

  /// Address and transport in use, for people.
  std::string description() const;

 private:
  std::shared_ptr<struct ClientImpl> impl_;
};

}  // namespace cairn
