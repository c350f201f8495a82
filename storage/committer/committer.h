#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "storage/disk/disk.h"
#include "storage/index/index.h"

namespace cairn::storage {

/// Faults that tests plant to prove that the checkers see them. All off in a daemon.
struct PlantedBugs {
  bool no_flush = false;                // acknowledge without fdatasync of data
  bool no_index_sync = false;           // index batch without WAL sync
  bool join_flush = false;              // join a flush already in flight
  bool punch_before_sync = false;       // punch before the delete batch is synced
  bool no_read_check = false;           // CRC not checked on read
  bool append_foreign_segment = false;  // append to a segment of an earlier process
  bool repair_blind = false;            // a repair replaces whatever the index says by then
  bool repair_unchecked = false;        // a repair writes what its source has, good or bad
  bool repair_early = false;            // a repair is acknowledged before it is durable
  bool recycle_while_read = false;      // write a segment again while an extent of it is being read
};

/// The one way to durable: data flushed, then the index batch synced, then the mark, then the caller is told.
/// Everything that waits meanwhile shares the next round (group commit).
///
/// The mark is a small file outside the index that holds the number of the last synced batch: an index that comes back
/// older than its mark has lost acknowledged data, and the target is refused. Format: mark.h.
///
/// After the first failed write, flush or batch the target is fail-stop: every commit fails, nothing is retried.
///
/// Threads: the loop.
/// source:  protocol.md 6; ARCHITECTURE.md, "A write"
class Committer {
 public:
  /// Reads index sequence and mark, compares them, and makes a mark of its own.
  /// errors: kDataLoss  the index is older than its mark, or the mark is damaged
  static Task<std::unique_ptr<Committer>> open(rt::Runtime runtime, Disk& disk, Index& index, PlantedBugs bugs);
  ~Committer();

  /// Durable when it returns ok: all completed writes of `flush_first`, then `batch`, atomically. A call whose Task is
  /// dropped may still be carried out.
  /// errors: kFailed, kNoSpace  the target has failed (fail-stop)
  Task<void> commit(Batch batch, std::vector<std::shared_ptr<File>> flush_first = {});

  /// Makes the target fail-stop: called by whoever sees a failed data write.
  void fail_stop(Error why);
  /// Why the target has failed, if it has.
  const std::optional<Error>& failure() const;
  /// Waits until nothing is queued or under way.
  Task<void> close();
  std::uint64_t commits() const;  // batches committed since open (metric)
  std::uint64_t rounds() const;   // flush + sync rounds since open (metric)

 private:
  struct State;
  explicit Committer(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

}  // namespace cairn::storage
