#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "proto/rpc/rpc.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/rt/unit_pool.h"
#include "server/checkpoints/checkpoints.h"
#include "server/checkpoints/retention.h"
#include "server/daemon/chunk_service.h"
#include "server/daemon/handovers.h"
#include "server/garbage/garbage.h"
#include "server/membership/membership.h"
#include "server/membership/replicated_records.h"
#include "server/objects/objects.h"
#include "server/readers/readers.h"
#include "server/scrub/scrub.h"
#include "server/targets/target_set.h"

namespace cairn::server {

/// What a daemon does between its network and its disk: answers calls, looks after attempts, collects garbage.
///
///   CO_TRY(auto daemon, co_await Daemon::create(runtime, targets, units, options));
///   auto server = rpc::Server::create(runtime, units, {.node = ..., .cluster = daemon->cluster()},
///                                     daemon->handler(), daemon->stale_map());
///   ...                                  // serve
///   daemon->drain();                     // nobody waits for saves any more
///   co_await server->close(deadline);    // no call comes any more
///   co_await daemon->close();
///
/// Threads:  the loop.
/// Lifetime: runtime, targets and units outlive it; it outlives the server that calls its handler.
class Daemon {
 public:
  struct Options {
    std::string node;                    // name
    std::vector<std::string> addresses;  // where clients reach it
    Checkpoints::Options checkpoints;
    Objects::Options objects;
    Readers::Options readers;
    Retention::Options retention;
    Garbage::Options garbage;
    ChunkService::Options chunks;
    Handovers::Options handovers;
    Usage::Options usage;
    Scrub::Options scrub;
    std::uint64_t repair_pace = 0;  // bytes a second that are copied from directory to directory; 0: no limit
    std::set<Uuid> lost_targets;    // the operator asserts that they are lost for good
    SaveBugs bugs;                  // planted by tests; handed to the parts
    MembershipBugs membership_bugs;
    /// Tests put their own answers in front of what records say; empty: none.
    std::function<std::unique_ptr<Liveness>(std::unique_ptr<Liveness>)> wrap_liveness;
  };

  /// Makes these targets, at least one, a new cluster, or goes on with new incarnations of them: every group gets a new
  /// epoch, durable before the first call is answered.
  /// errors: kInvalid, kDataLoss, kUnavailable  the targets and their map do not belong together, or too few are here
  static Task<std::unique_ptr<Daemon>> create(rt::Runtime runtime, TargetSet& targets, rt::UnitPool& units,
                                              Options options);
  virtual ~Daemon() = default;

  virtual rpc::Server::Handler handler() = 0;
  virtual std::function<std::string()> stale_map() = 0;
  virtual std::string cluster() const = 0;  // 16 bytes
  virtual const ClusterMap& map() const = 0;

  /// The records of all home groups.
  virtual storage::RecordStore& records() = 0;
  /// Why it can serve no more: too many targets have failed.
  virtual std::optional<Error> failure() const = 0;
  /// Its metrics in Prometheus' text format; `rpc` adds those of the server.
  virtual std::string metrics(const rpc::Server::Stats& rpc) const = 0;

  struct Stats {
    Checkpoints::Stats checkpoints;
    Readers::Stats readers;
    Retention::Stats retention;
    Garbage::Stats garbage;
  };
  virtual Stats stats() const = 0;

  /// What can change while it runs; waits under way keep their length.
  struct Paces {
    rt::Duration garbage_grace, garbage_interval, retention_interval;
    rt::Duration scrub_interval;
    std::uint64_t scrub_pace, repair_pace;
    std::uint64_t handover_memory;
  };
  virtual void set(const Paces& paces) = 0;

  virtual void drain() = 0;
  /// Waits for record calls that their callers gave up, ends background work. Then the targets may be closed.
  virtual Task<void> close() = 0;
};

}  // namespace cairn::server
