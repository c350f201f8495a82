#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "proto/common/result.h"
#include "proto/common/units.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

namespace cairn::rpc {
class ServerCall;
}

namespace cairn::sim {

/// One simulated cairnd: the storage engine and the server logic, unchanged, on one disk and index, with a supervisor
/// that starts it again.
class SimDaemon {
 public:
  struct Options {
    std::uint64_t segment_bytes = 4 * kMiB;
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
  DiskImage& disk() { return disk_; }
  IndexImage& index() { return index_; }
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
  /// From now on every answer about owners is true.
  void stop_lying() { options_.liveness_lies = 0; }
  void stop_duplicates() { options_.duplicates = 0; }
  const std::string& last_error() const { return last_error_; }

 private:
  struct Process;
  class LyingLiveness;
  class LateCall;
  static Task<void> run(SimDaemon* self);
  static Task<void> arrive_late(SimDaemon* self, std::shared_ptr<rpc::ServerCall> call, rt::Duration delay);

  World& world_;
  Options options_;
  Node& node_;
  DiskImage& disk_;
  IndexImage& index_;
  Prng lies_, duplicates_;
  Process* process_ = nullptr;  // held by the node
  std::optional<Error> refused_;
  std::string last_error_;
};

}  // namespace cairn::sim
