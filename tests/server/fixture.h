#pragma once

#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/codec.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"
#include "server/daemon/daemon.h"
#include "server/records/keys.h"
#include "storage/format/manifest.h"
#include "storage/target/target.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

// A small language for tests of the daemon: one simulated machine, called without a network.

namespace cairn::server {

using namespace std::chrono_literals;
using wire::Method;

inline constexpr std::size_t kTestUnitBytes = 128 * kKiB;

/// `size` random bytes, the same for the same seed.
std::string pattern(std::uint64_t seed, std::size_t size);

/// 16 bytes of n.
Uuid uuid(std::uint8_t n);

/// What a test gets back from a call with data frames.
struct Answered {
  Result<std::string> reply;
  std::string bytes;  // of the data frames, each one's CRC checked
  std::size_t frames = 0;
  rt::TimePoint at;  // when exchange_all() had it
};

class Fixture {
 public:
  explicit Fixture(Daemon::Options options = {}, std::uint64_t seed = 1, std::size_t directories = 1);
  ~Fixture();

  void start();
  Result<void> try_start();
  /// As SIGTERM does it.
  void stop();
  void crash(sim::Death death);
  void restart_after(sim::Death death) {
    crash(death);
    start();
  }

  /// Any method; the request is stamped with the group that it belongs to.
  template <class Reply, class Request>
  Result<Reply> call(Method method, Request request) {
    stamp(request);
    auto answered = exchange(method, wire::encode(request), {});
    if (!answered.reply) return fail(answered.reply.error());
    Reply reply;
    REQUIRE(wire::decode(*answered.reply, reply, "reply"));
    return reply;
  }
  /// Starts a call and goes on; its outcome appears later.
  template <class Request>
  std::shared_ptr<std::optional<Result<std::string>>> begin_call(Method method, Request request) {
    stamp(request);
    return spawn(method, wire::encode(request));
  }
  struct Piece {
    std::string message, payload;
  };
  Answered exchange(Method method, std::string request, std::vector<Piece> pieces);
  /// All at the same time, each from a connection of its own; the first one's peer takes no frame for `first_stands`.
  std::vector<Answered> exchange_all(Method method, std::vector<std::string> requests, rt::Duration first_stands = {});

  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  void wait(rt::Duration duration) { world.run_for(duration); }
  /// Lets background work go on until `done`; false when it does not come to that within `limit`.
  bool eventually(const std::function<bool()>& done, rt::Duration limit = 10min) {
    return world.run_until(done, world.now() + limit);
  }

  /// Until nothing removed is kept any more, when nobody reads.
  void let_go() { wait(options.readers.ttl + 2 * options.readers.sweep_every); }

  /// From now on chunks belong to the first group of so many copies, whose members are in the order of the directories.
  void use_group_of(std::size_t copies);

  // ---- Words
  Result<void> make_bucket(const std::string& bucket);
  Result<void> put(ChunkId id, const std::string& bytes);
  Result<std::string> read(ChunkId id, std::uint32_t offset, std::uint32_t size);
  bool has(ChunkId id) { return run(target->chunks().find(id)).value().has_value(); }
  std::uint64_t records(std::string_view prefix);
  /// What /metrics says of `series`: a name, with its labels if it has any.
  double metric(const std::string& series) const;
  wire::Stamp stamp_of(bool home, std::uint32_t group) const;

  Result<OwnerId> begin_object(const std::string& bucket, const std::string& key, bool if_absent = false);
  Result<wire::ObjectInfo> seal_object(const std::string& bucket, const std::string& key, OwnerId owner,
                                       std::uint64_t writer, const std::string& bytes, bool if_absent = false);
  Result<wire::ObjectInfo> put_object(const std::string& bucket, const std::string& key, const std::string& bytes);

  std::uint64_t connection = 1;              // that calls come by
  DataGroup data_group = 1;                  // that chunks are put into
  std::shared_ptr<rt::SharedMemory> memory;  // that it shares
  std::shared_ptr<const void> connection_open = std::make_shared<bool>(true);

  sim::World world;
  sim::Node& node;
  sim::DiskImage& disk;
  sim::IndexImage& index;
  std::vector<sim::DiskImage*> disks;  // of all directories; the first is `disk`
  std::vector<sim::IndexImage*> indexes;
  storage::PlantedBugs storage_bugs;
  Daemon::Options options;
  std::unique_ptr<rt::UnitPool> units;
  std::unique_ptr<TargetSet> targets;
  storage::Target* target = nullptr;  // the first
  std::unique_ptr<Daemon> daemon;

 private:
  template <class Request>
  void stamp(Request& request) const {
    if constexpr (requires { request.mutable_stamp(); }) {
      if (request.has_stamp()) return;
      if constexpr (requires { request.home_group(); })
        *request.mutable_stamp() = stamp_of(true, request.home_group());
      else if constexpr (requires { request.key(); })
        *request.mutable_stamp() = stamp_of(true, home_group(request.bucket(), request.key()));
      else if constexpr (requires { request.run(); })
        *request.mutable_stamp() = stamp_of(true, home_group(request.bucket(), request.run()));
      else
        *request.mutable_stamp() = stamp_of(true, bucket_group(request.bucket()));
    }
  }
  std::shared_ptr<std::optional<Result<std::string>>> spawn(Method method, std::string request);
};

/// One run, as its ranks see it.
class RunFixture : public Fixture {
 public:
  explicit RunFixture(Daemon::Options options = {}, std::uint64_t seed = 1, std::size_t directories = 1);

  struct Launched {
    wire::Launch launch;
    wire::Epoch run_epoch;
    std::optional<std::uint64_t> resume;
  };
  Result<Launched> open(const std::string& job, std::uint64_t restart = 0, std::optional<std::uint64_t> resume = {},
                        bool discard_after = false);

  struct Terms {
    std::uint32_t world_size = 1;
    bool overwrite = false;
    bool explicit_commit = false;
  };
  wire::Begin begin_request(const Launched& launched, std::uint64_t step, std::uint32_t rank, Terms terms) const;
  Result<OwnerId> begin(const Launched& launched, std::uint64_t step, std::uint32_t rank, Terms terms) {
    auto reply = call<wire::BeginReply>(Method::kBegin, begin_request(launched, step, rank, terms));
    if (!reply) return fail(reply.error());
    return OwnerId::from_bytes(reply->owner());
  }

  /// A rank's part: rows `rank` of a tensor with a row per rank, unless the test says otherwise.
  format::Contents contents(OwnerId owner, std::uint32_t rank, std::uint32_t world_size) const;
  static std::uint64_t writer_of(std::uint32_t rank) { return 1000 + rank; }
  /// Puts data and manifest, and says what to seal.
  wire::Seal upload(OwnerId owner, std::uint32_t rank, std::uint32_t world_size,
                    std::optional<format::Contents> contents = {});
  /// For a manifest that is chunk 1 of the rank's writer.
  wire::Seal seal_request(OwnerId owner, std::uint32_t rank, const std::string& manifest) const;
  Result<void> seal(const wire::Seal& request) {
    auto reply = call<wire::Empty>(Method::kSeal, request);
    if (!reply) return fail(reply.error());
    return {};
  }
  Result<void> save_rank(OwnerId owner, std::uint32_t rank, std::uint32_t world_size) {
    return seal(upload(owner, rank, world_size));
  }
  /// All ranks, to the commit.
  Result<OwnerId> save(const Launched& launched, std::uint64_t step, Terms terms);
  Result<OwnerId> save(const Launched& launched, std::uint64_t step) { return save(launched, step, Terms{}); }

  Result<void> heartbeat(OwnerId owner, std::uint32_t rank);
  Result<void> abort(OwnerId owner, std::uint32_t rank, const std::string& reason);
  Result<void> commit(OwnerId owner);
  wire::AttemptStatusReply status(OwnerId owner, std::chrono::milliseconds wait = 0ms);
  wire::AttemptStatusReply final_status(OwnerId owner);
  Result<wire::StepInfo> open_step(std::optional<std::uint64_t> step = {});
  std::vector<std::uint64_t> steps();

  std::string bucket = "jobs", run_name = "llama/7b";

 private:
  template <class Request>
  Request named() const {
    Request request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    return request;
  }
};

}  // namespace cairn::server
