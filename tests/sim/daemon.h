#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/common/result.h"
#include "proto/common/units.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

namespace cairn::rpc {
class ServerCall;
}
namespace cairn::rt {
class UnitPool;
}
namespace cairn::server {
class Daemon;
}

namespace cairn::sim {

/// One simulated cairnd: the storage engine and the server logic, unchanged, on one disk and index, with a supervisor
/// that starts it again.
class SimDaemon {
 public:
  struct Options {
    std::size_t directories = 1;
    std::uint64_t segment_bytes = 4 * kMiB;  // half of the seeds recycle segments, and those are smaller
    std::uint64_t capacity_bytes = 256 * kMiB;
    rt::Duration garbage_grace = std::chrono::seconds(20);
    rt::Duration garbage_interval = std::chrono::seconds(5);
    rt::Duration readers_ttl = std::chrono::seconds(60);
    rt::Duration retention_interval = std::chrono::minutes(1);
    double liveness_lies = 0;  // of owners: no answer, that of a group that lost records, or once "absent"
    double duplicates = 0;     // of requests: they arrive again, up to five seconds later
    std::string bug;           // a planted one, by name
  };
  SimDaemon(World& world, Options options);

  Node& node() { return node_; }
  struct Directory {
    std::string name;
    DiskImage* disk = nullptr;
    IndexImage* index = nullptr;
    std::optional<Uuid> uuid;  // once it has been opened
  };
  std::vector<Directory>& directories() { return directories_; }
  DiskImage& disk() { return *directories_.front().disk; }
  IndexImage& index() { return *directories_.front().index; }
  /// The next start misses a directory.
  void leave_out(std::size_t directory) { left_out_ = directory; }
  /// A directory is lost for good, and an empty one takes its place at the next start, which is told. Only while the
  /// process is down, and when every group of two copies and more has another member that serves; else false.
  bool lose(std::size_t directory);
  /// Every group of two copies and more has all its members, and they serve.
  bool redundant() const;
  bool any_failed() const;  // directory, or missing; the daemon may go on without it
  /// Of the home groups. What is left of uploads from before a loss is never freed: nobody can tell whether it is dead.
  std::uint32_t loss() const;
  /// That a data group should have; 0: there is no such group.
  std::uint32_t copies_of(DataGroup group) const;
  std::string address() const { return node_.host() + ":7420"; }

  /// Opens the target and serves: ready() follows, or refused(). An opening that fails otherwise is tried again.
  void start();
  /// Ends the process, or the power; it starts again after `down`.
  void kill(Death death, bool silent, rt::Duration down);
  bool ready() const { return process_ != nullptr; }
  /// The target will not open: said with DATA_LOSS, which no restart heals.
  const std::optional<Error>& refused() const { return refused_; }
  /// The target has failed (a write or flush did) and acknowledges nothing until a restart.
  bool fail_stopped() const;
  /// Of the disks' space, what is kept to be written again.
  std::uint64_t kept_bytes() const;
  /// Of the process that is ready: its buffers, and what it counts.
  rt::UnitPool& units();
  server::Daemon& process();
  /// From now on every answer about owners is true.
  void stop_lying() { options_.liveness_lies = 0; }
  void stop_duplicates() { options_.duplicates = 0; }
  const std::string& last_error() const { return last_error_; }

 private:
  struct Process;
  Directory make_directory();
  class LyingLiveness;
  class LateCall;
  static Task<void> run(SimDaemon* self);
  static Task<void> arrive_late(SimDaemon* self, std::shared_ptr<rpc::ServerCall> call, rt::Duration delay);

  World& world_;
  Options options_;
  std::uint64_t recycle_bytes_ = 0;
  Node& node_;
  std::vector<Directory> directories_;
  std::size_t made_ = 0;
  std::optional<std::size_t> left_out_;
  std::set<Uuid> lost_;
  Prng lies_, duplicates_;
  Process* process_ = nullptr;  // held by the node
  std::optional<Error> refused_;
  std::string last_error_;
};

}  // namespace cairn::sim
