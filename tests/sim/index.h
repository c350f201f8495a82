#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "storage/index/index.h"
#include "tests/sim/world.h"

namespace cairn::sim {

/// Probabilities are per operation.
struct IndexFaults {
  double commit_error = 0;  // the batch may have been applied or not
  double read_error = 0;    // reported as damage
};

/// What an index keeps across restarts. A synced batch makes itself and all before it durable (one log). A power loss
/// loses a suffix of the batches that are not; a killed process loses none that returned, and its commit in flight by
/// draw. Batches are never reordered and never torn.
class IndexImage {
 public:
  IndexImage(World& world, std::string name);
  ~IndexImage();

  std::unique_ptr<storage::Index> attach(Node& node);

  IndexFaults faults;
  /// The n-th next one fails; 0 = none.
  std::uint64_t fail_commit_in = 0, fail_get_in = 0, fail_scan_in = 0, fail_verify_in = 0;
  rt::Duration latency_min = std::chrono::microseconds(5);
  rt::Duration latency_max = std::chrono::microseconds(100);

  void power_loss();
  void process_gone();
  /// Takes back up to `batches` of the newest batches, synced or not: an index that comes back older, as RocksDB's
  /// default recovery leaves it after a damaged log record. False when there was none to take back.
  bool come_back_older(std::size_t batches);

  std::size_t unsynced_batches() const;
  std::size_t size(storage::Table table) const;
  std::vector<std::string> keys(storage::Table table) const;               // sorted; for assertions
  std::map<std::string, std::string> entries(storage::Table table) const;  // the same

  struct Counts {
    std::uint64_t commits = 0, syncs = 0, gets = 0, scans = 0;
  } counts;

  struct State;

 private:
  World& world_;
  std::string name_;
  std::shared_ptr<State> state_;
};

}  // namespace cairn::sim
