#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/common/units.h"
#include "storage/disk/disk.h"
#include "tests/sim/world.h"

namespace cairn::sim {

/// Probabilities are per operation. All may be changed while the world runs.
struct DiskFaults {
  double read_error = 0;
  double write_error = 0;  // nothing, a part or all of it may have landed
  double flush_error = 0;  // what it should have covered is never durable, though reads see it until a power loss
  double lost_write = 0;
  double misdirected_write = 0;
  double slow = 0;
  rt::Duration slow_by = std::chrono::milliseconds(500);
};

struct DiskOptions {
  std::uint64_t capacity_bytes = 1 * kGiB;
  rt::Duration latency_min = std::chrono::microseconds(20);
  rt::Duration latency_max = std::chrono::microseconds(200);
  std::uint64_t bytes_per_second = 1 * kGiB;
};

/// The platters of one data directory. Files and names each have a volatile and a durable state:
///
/// * A write reaches the volatile state when it completes; a flush makes durable what had completed when it was
///   submitted. A power loss draws for every other sector of 4 KiB: the old bytes, any of the newer ones, or a mix of
///   two at a multiple of 512; writes in flight count as unsynced ones. The size of a file is durable by its flush,
///   too.
/// * create, rename and unlink are durable by a sync_directory() submitted after they completed. A power loss keeps a
///   prefix of the others (a journalling file system) or any of them (what POSIX allows), in order, each whole.
/// * A punch is a write of zeros that gives space back.
/// * Operations in flight when their process is killed still land.
class DiskImage {
 public:
  DiskImage(World& world, std::string name, DiskOptions options);
  ~DiskImage();

  /// What a process on `node` opens; belongs to the node's present incarnation.
  std::unique_ptr<storage::Disk> attach(Node& node);

  DiskFaults faults;
  /// The next n-th operation of a kind fails (1 = the next one); 0 = none. For directed tests. A directory's sync is a
  /// flush.
  std::uint64_t fail_write_in = 0, fail_flush_in = 0, fail_read_in = 0, fail_punch_in = 0;
  std::uint64_t fail_create_in = 0, fail_open_in = 0, fail_rename_in = 0, fail_unlink_in = 0, fail_list_in = 0,
                fail_space_in = 0;

  void power_loss();
  /// Flips one bit of a durable byte, anywhere in written data of files whose name starts with `prefix`. False when
  /// there is none.
  bool rot(std::string_view prefix = {});
  bool flip(const std::string& name, std::uint64_t offset, unsigned bit);
  void set_capacity(std::uint64_t bytes);
  std::uint64_t used_bytes() const;
  std::uint64_t free_bytes() const;
  /// Names that exist now, sorted; for assertions.
  std::vector<std::string> names() const;
  /// Bytes of a file as a reader sees them now; for assertions.
  std::optional<std::string> contents(const std::string& name) const;
  /// True when a power loss now could change nothing.
  bool all_durable() const;

  struct Counts {
    std::uint64_t reads = 0, writes = 0, flushes = 0, punches = 0, directory_syncs = 0, bytes_read = 0,
                  bytes_written = 0;
  } counts;

  struct State;

 private:
  World& world_;
  std::string name_;
  std::shared_ptr<State> state_;
};

}  // namespace cairn::sim
