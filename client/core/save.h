#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "client/core/arena.h"
#include "client/core/chunk_writer.h"
#include "client/core/session.h"
#include "storage/format/manifest.h"

namespace cairn::wire {
class BeginReply;
class Seal;
}  // namespace cairn::wire

namespace cairn::client {

struct Launch {
  std::string job;
  std::uint64_t restart = 0;
};

/// A run as this launch opened it.
struct OpenedRun {
  std::string bucket, run;
  Launch launch;
  RunEpoch run_epoch;
  std::optional<std::uint64_t> resume;
};

struct OpenRunRequest {
  std::string bucket, run;
  Launch launch;
  std::optional<std::uint64_t> resume;
  bool discard_after = false;
};
/// errors: kFenced, kNotFound, kInvalid
Task<OpenedRun> open_run(std::shared_ptr<Session> session, OpenRunRequest request, rt::TimePoint deadline);

struct SaveRequest {
  std::uint64_t step = 0;
  std::uint32_t rank = 0, world_size = 1;
  bool overwrite = false, explicit_commit = false;
  std::uint64_t declared_bytes = 0;
  bool stage_first = false;
};
struct SaveTuning {
  std::uint32_t chunks_in_flight = 4;
  bool wait_for_memory = true;
  rt::Duration timeout = std::chrono::seconds(60);  // without an answer from the daemon
};
struct SaveOutcome {
  std::uint64_t step = 0;
  std::uint64_t bytes = 0;
};

enum class AttemptPhase { kUnknown, kOpen, kMerging, kCommitted, kFailed };
struct AttemptReport {
  AttemptPhase phase = AttemptPhase::kUnknown;
  std::uint64_t step = 0;
  std::uint32_t world_size = 0, sealed = 0;
  Error error;  // kFailed: what failed it
};
/// `wait`: how long the daemon may hold the answer back until the attempt has ended.
Task<AttemptReport> attempt_status(std::shared_ptr<Session> session, std::string bucket, std::string run, OwnerId owner,
                                   rt::Duration wait, rt::TimePoint deadline);

/// This rank's part of one save attempt, from begin to commit.
///
/// Threads:  the loop, but for add_*(). Lifetime: the arena and the session outlive it; after stage(last) it lives in
/// the session's
///           background until the outcome is known.
/// source:   protocol.md 4; ARCHITECTURE.md, "A save"
class SaveAttempt : public std::enable_shared_from_this<SaveAttempt> {
 public:
  ~SaveAttempt();
  /// Without waiting for the daemon: stage() copies meanwhile, and returns what the daemon refuses.
  static std::shared_ptr<SaveAttempt> start(std::shared_ptr<Session> session, Arena& arena, OpenedRun run,
                                            SaveRequest request, SaveTuning tuning);
  /// The daemon has begun the attempt, or why not. errors: kFenced, kExists, kInvalid, kNoSpace, kUnavailable
  Task<void> begun();
  bool has_begun() const { return begun_ && *begun_; }
  /// start(), then begun().
  static Task<std::shared_ptr<SaveAttempt>> begin(std::shared_ptr<Session> session, Arena& arena, OpenedRun run,
                                                  SaveRequest request, SaveTuning tuning);

  /// What to save; `bytes` stay valid and unchanged until the next stage() has ended. From any thread: a model has
  /// thousands of tensors, and a turn of the loop for each would cost more than copying a small one.
  /// shapes: bytes hold entry.box row-major (all of it, also with a holder)
  /// errors: kInvalid  names the tensor
  Result<void> add_tensor(format::ShardEntry entry, std::span<const std::byte> bytes);
  Result<void> add_blob(std::string name, std::span<const std::byte> bytes);
  Result<void> add_token(std::string stream, std::string bytes);
  Result<void> add_meta(format::MetaEntry entry);

  /// Copies what was added into the arena. With `last`, nothing more is added: the rest goes on in the background.
  /// Not to be dropped half-way: the copy reads the caller's memory.
  /// errors: kBusy  no room and wait_for_memory is off: nothing was copied, stage again later;  those of begun()
  Task<void> stage(bool last);
  /// After stage(last): this rank's data and manifest are durable and sealed. From here on it may die.
  Task<void> sealed(rt::TimePoint deadline);
  /// After stage(last): this rank's data is durable and the step committed by all ranks.
  Task<SaveOutcome> outcome(rt::TimePoint deadline);
  /// After stage(last): the daemon has taken over what is left to do, so that the step commits also when this process
  /// ends now, if the other ranks come as far and the daemon lives.
  bool survives() const { return survives_; }
  bool ended() const { return outcome_.has_value(); }
  /// With explicit_commit, on one rank: commits once all ranks have sealed.
  Task<void> commit(rt::TimePoint deadline);
  Task<void> abort(std::string reason, rt::TimePoint deadline);
  /// Known once it has begun.
  const OwnerId& owner() const { return owner_; }
  const OpenedRun& run() const { return run_; }

 private:
  struct Item {
    enum class Kind { kShard, kBlob } kind = Kind::kShard;
    std::size_t entry = 0;  // in contents_.shards or .blobs
    std::span<const std::byte> bytes;
  };
  SaveAttempt(std::shared_ptr<Session> session, Arena& arena, OpenedRun run, SaveRequest request, SaveTuning tuning);
  Task<wire::BeginReply> ask_to_begin();
  Task<void> copy_items(bool last);
  /// Of what was copied ahead of begun().
  void place_items();
  /// Encodes the manifest and sends its chunks; after that seal_ is complete.
  Task<void> store_manifest(std::string manifest);
  /// Gives the daemon all that it needs to finish this rank's part; false: it does not have it.
  Task<bool> hand_over();
  Task<SaveOutcome> finish();
  Task<void> seal();
  Task<void> await_commit();
  static Task<void> wait_until(std::shared_ptr<SaveAttempt> attempt, bool sealed_is_enough);
  /// Always an error: when the attempt has ended under this rank, what ended it.
  Task<void> explain(Error error);
  Task<void> send_abort(Errc code, std::string reason, rt::TimePoint deadline);
  static Task<void> beat(std::weak_ptr<SaveAttempt> weak, std::shared_ptr<Session> session, rt::Duration every);
  void end(Result<SaveOutcome> outcome);
  rt::TimePoint soon() const;
  HomeGroup home() const;

  std::shared_ptr<Session> session_;
  Arena& arena_;
  OpenedRun run_;
  SaveRequest request_;
  SaveTuning tuning_;
  OwnerId owner_;
  std::unique_ptr<ChunkWriter> writer_;
  std::mutex adding_;  // over the next four, until staged_ is set; that is only set on the loop
  format::Contents contents_;
  std::vector<Item> items_;  // added, not yet copied
  std::set<std::string> seen_;
  bool staged_ = false;
  bool sealed_ = false;
  bool survives_ = false;
  std::unique_ptr<wire::Seal> seal_;  // once the manifest is on its way
  std::uint64_t bytes_ = 0;
  std::optional<Result<void>> begun_;
  std::optional<Result<SaveOutcome>> outcome_;
  rt::Signal changed_;  // begun_, sealed_ or outcome_
};

}  // namespace cairn::client
