#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "storage/chunk_store/chunk_store.h"
#include "storage/chunk_store/layout.h"
#include "storage/committer/committer.h"
#include "storage/disk/disk.h"

namespace cairn::storage {

/// One segment file.
struct Segment {
  SegmentId id;
  std::uint64_t size = 0;
  std::uint64_t end = 0;       // handed out so far, from the start; nothing is handed out twice
  bool appending = false;      // false: closed for good
  std::uint64_t live = 0;      // bytes of indexed chunks, padded
  std::uint64_t reserved = 0;  // bytes of uploads on their way, padded
  std::size_t garbage = 0;     // ranges that wait to be punched

  std::shared_ptr<File> file;  // open or not; kept while appending or reserved
  std::uint64_t last_used = 0;

  struct Range {
    std::uint32_t sector, sectors;
  };
  // While the store is being opened:
  std::vector<Range> loaded;    // live ranges
  std::uint64_t allocated = 0;  // bytes of the disk

  bool dead() const { return !appending && live == 0 && reserved == 0; }
};

/// A range of one segment.
struct Extent {
  std::shared_ptr<Segment> segment;
  std::uint64_t offset = 0;
  std::uint64_t size = 0;  // padded
};

/// The segment files of one target: hands out space, accounts for it, gives it back.
///
/// Space is handed out once, in order, and only from segments that this process made: a write of an older process that
/// lands late, or of an abandoned upload, meets nobody. Space given back is punched, or its whole segment unlinked, by
/// one background task, never while a reader of that chunk is pinned.
///
/// Threads:  the loop.
/// Lifetime: await close() before destroying, unless the process dies.
class Segments {
 public:
  /// Lists the files and learns their sizes. Then add_live() for every index entry, then settle().
  /// errors: kDataLoss  a segment file that is not ours or of a later start
  static Task<std::unique_ptr<Segments>> open(rt::Runtime runtime, Disk& disk, Committer& committer,
                                              std::uint64_t incarnation, ChunkStore::Options options, PlantedBugs bugs);

  /// errors: kDataLoss  the segment is missing or too short
  Result<void> add_live(const Location& location);
  /// Whatever no live range covers becomes garbage.
  /// errors: kDataLoss  two chunks overlap
  Task<void> settle();

  /// Room for `size` bytes in one piece, in a segment whose name is durable.
  /// errors: kNoSpace;  kFailed
  Task<Extent> reserve(std::uint64_t size);
  void make_live(const Extent& extent);
  void give_up(const Extent& extent);                       // reserved -> garbage
  void make_dead(const Extent& extent, const ChunkId& id);  // live -> garbage, once the delete is synced
  Task<void> punch(Extent extent);

  Result<std::shared_ptr<Segment>> find(SegmentId id) const;
  Task<std::shared_ptr<File>> file_of(std::shared_ptr<Segment> segment);

  /// While it lives, no extent of `id` is punched or unlinked.
  class Pin {
   public:
    Pin(Segments& segments, const ChunkId& id) : segments_(segments), id_(id) { segments_.pins_[id_]++; }
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;
    ~Pin() { segments_.unpin(id_); }

   private:
    Segments& segments_;
    ChunkId id_;
  };

  /// At most a second old.
  Task<Space> space();
  const Space& last_space() const { return space_; }
  /// Allocated and not yet handed out.
  std::uint64_t open_bytes() const { return (active_ ? active_->size - active_->end : 0) + (next_ ? next_->size : 0); }
  std::uint64_t live_bytes() const { return live_; }
  std::uint64_t reserved_bytes() const { return reserved_; }
  std::size_t count() const { return segments_.size(); }

  /// Stops punching; what is left is found again by the next open.
  Task<void> close();

 private:
  struct Garbage {
    Extent extent;
    std::optional<ChunkId> id;  // whose readers are waited for
  };

  Segments(rt::Runtime runtime, Disk& disk, Committer& committer, std::uint64_t incarnation,
           ChunkStore::Options options, PlantedBugs bugs);
  void start_creating(std::uint64_t size_min);
  static Task<void> create(Segments& self, std::uint64_t size_min);
  Task<void> refresh_space();
  void retire(std::shared_ptr<Segment> segment);
  void retire_if_dead();
  void discard(Extent extent, std::optional<ChunkId> id);
  void unpin(const ChunkId& id);
  static Task<void> clean(Segments& self);
  bool stopped() const { return stopping_ || committer_.failure().has_value(); }
  void limit_open_files();

  rt::Runtime runtime_;
  Disk& disk_;
  Committer& committer_;
  std::uint64_t incarnation_;
  ChunkStore::Options options_;
  PlantedBugs bugs_;

  std::map<SegmentId, std::shared_ptr<Segment>> segments_;
  std::shared_ptr<Segment> active_, next_;
  std::uint32_t next_number_ = 0;
  bool creating_ = false;
  std::uint64_t create_size_ = 0;      // least size asked of the last creation
  std::optional<Error> create_error_;  // and what came of it
  std::uint64_t live_ = 0, reserved_ = 0;
  Space space_;
  std::optional<rt::TimePoint> space_at_;
  std::uint64_t uses_ = 0;
  std::size_t open_files_ = 0;

  std::map<ChunkId, std::uint32_t> pins_;
  std::deque<Garbage> garbage_;
  bool stopping_ = false;
  rt::Signal created_, wake_cleaner_;
  rt::Scope scope_;  // last: its frames use the rest
};

/// Segments of a disk of `total_bytes`: as wished, but at most 1/32 of the disk and at least 4 MiB.
std::uint64_t segment_bytes_for(std::uint64_t total_bytes, std::uint64_t wished_bytes);

}  // namespace cairn::storage
