#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cairn::sim {

enum class Fault {
  kProcessKill,    // kernel and disk go on
  kPowerLoss,      // unsynced bytes, entries and batches are lost by draw
  kSectorDropped,  // by a power loss
  kSectorTorn,     // by a power loss
  kEntryDropped,   // by a power loss: an unsynced create, rename or unlink
  kReadError,      //
  kWriteError,     //
  kFlushError,     //
  kDiskFull,       //
  kSlowDisk,       //
  kBitRot,         //
  kMisdirected,    // a write that landed elsewhere
  kLostWrite,      // acknowledged, nothing written
  kIndexLost,      // by a power loss: unsynced batches
  kIndexError,     //
  kIndexOlder,     // synced batches gone
  kCut,            // connection reset
  kGhost,          // bytes of a cut connection that still arrived
  kClog,           // one direction stands still
  kSlowNet,        //
  kSplitRead,      // fewer bytes than there were
  kSilentDeath,    // peers of a dead node are not told at once
  kDuplicate,      // a request arrives again, late
  kDirectoryGone,  // a data directory is missing at a start
  kDirectoryLost,  // and for good
  kFaults
};
inline constexpr std::size_t kFaultCount = static_cast<std::size_t>(Fault::kFaults);

inline std::string_view name_of(Fault fault) {
  static constexpr std::array<std::string_view, kFaultCount> kNames = {
      "process_kill",  "power_loss",  "sector_dropped", "sector_torn",  "entry_dropped", "read_error",
      "write_error",   "flush_error", "disk_full",      "slow_disk",    "bit_rot",       "misdirected_write",
      "lost_write",    "index_lost",  "index_error",    "index_older",  "cut",           "ghost",
      "clog",          "slow_net",    "split_read",     "silent_death", "duplicate",     "directory_gone",
      "directory_lost"};
  return kNames[static_cast<std::size_t>(fault)];
}

/// What a run was allowed to inject and what it did inject.
class FaultCounts {
 public:
  void enable(Fault fault) { enabled_[static_cast<std::size_t>(fault)] = true; }
  bool enabled(Fault fault) const { return enabled_[static_cast<std::size_t>(fault)]; }
  void add(Fault fault, std::uint64_t n = 1) { counts_[static_cast<std::size_t>(fault)] += n; }
  std::uint64_t count(Fault fault) const { return counts_[static_cast<std::size_t>(fault)]; }
  std::vector<Fault> enabled_but_never() const {
    std::vector<Fault> out;
    for (std::size_t i = 0; i < kFaultCount; ++i)
      if (enabled_[i] && counts_[i] == 0) out.push_back(static_cast<Fault>(i));
    return out;
  }
  /// True when faults were enabled and not one of them happened: such a run proves nothing.
  bool idle() const {
    bool any = false;
    for (std::size_t i = 0; i < kFaultCount; ++i) {
      if (enabled_[i] && counts_[i] > 0) return false;
      any |= enabled_[i];
    }
    return any;
  }
  /// "cut=3 power_loss=1", of those that happened.
  std::string text() const {
    std::string out;
    for (std::size_t i = 0; i < kFaultCount; ++i)
      if (counts_[i] > 0)
        out +=
            (out.empty() ? "" : " ") + std::string(name_of(static_cast<Fault>(i))) + "=" + std::to_string(counts_[i]);
    return out;
  }

 private:
  std::array<bool, kFaultCount> enabled_{};
  std::array<std::uint64_t, kFaultCount> counts_{};
};

}  // namespace cairn::sim
