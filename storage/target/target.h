#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"
#include "storage/chunk_store/chunk_store.h"
#include "storage/committer/committer.h"
#include "storage/disk/disk.h"
#include "storage/index/index.h"
#include "storage/record_store/record_store.h"

namespace cairn::storage {

/// One data directory: superblock, committer, chunks and records.
///
/// Superblock (file "superblock", 4096 bytes, written by create + flush + rename + directory sync): superblock.h.
/// The index carries the target's uuid too, so that an index of another target is not taken for this one's.
class Target {
 public:
  struct Options {
    ChunkStore::Options chunks;
    PlantedBugs bugs;
  };
  static constexpr std::uint32_t kFormatVersion = 1;

  /// Whether `disk` is a target, which this version may open; false: it is empty. Only reads: call it before the index
  /// is opened, which makes or changes files. errors: as open()
  static Task<bool> check(Disk& disk);

  /// Formats an empty directory, else checks the superblock. Every open is a new incarnation (superblock rewritten,
  /// synced). errors: kInvalid   a newer format version, or files that are not ours (nothing is changed)
  ///         kDataLoss  damaged superblock, index older than its mark
  static Task<std::unique_ptr<Target>> open(rt::Runtime runtime, std::unique_ptr<Disk> disk,
                                            std::unique_ptr<Index> index, rt::UnitPool& units, Options options);
  virtual ~Target() = default;

  virtual Uuid uuid() const = 0;
  virtual std::uint64_t incarnation() const = 0;
  virtual Disk& disk() = 0;
  virtual Index& index() = 0;
  virtual Committer& committer() = 0;
  virtual ChunkStore& chunks() = 0;
  /// Records that lie on this target alone; not for groups with a map, whose members are several targets.
  virtual RecordStore& records() = 0;
  /// Reads superblock and index files and checks them. errors: kDataLoss  what is damaged
  virtual Task<void> verify() = 0;
  /// Waits for operations in flight. Await it before destroying, unless the process dies.
  virtual Task<void> close() = 0;
};

}  // namespace cairn::storage
