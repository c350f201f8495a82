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
  std::uint64_t end = 0;       // handed out so far, from the start
  bool appending = false;      // false: closed for good
  std::uint64_t live = 0;      // bytes of indexed chunks, padded
  std::uint64_t reserved = 0;  // bytes of uploads on their way, padded
  std::size_t garbage = 0;     // ranges that wait to be given back or kept
  bool holed = false;          // some of it was given back: it is not written again

  std::shared_ptr<File> file;  // open or not; kept while appending or reserved
  std::uint64_t last_used = 0;

  struct Range {
    std::uint32_t sector, sectors;
    std::uint32_t end() const { return sector + sectors; }
  };
  std::vector<Range> kept;       // ranges that nobody has any more, still allocated
  std::uint64_t kept_bytes = 0;  // of them
  // While the store is being opened:
  std::vector<Range> loaded;    // live ranges; neighbours are one
  std::size_t join_at = 4096;   // of them: then they are sorted and joined
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
/// Space is handed out in order, and only from segments that this process made: a write of an older process that lands
/// late meets nobody. Space given back is punched, or its whole segment unlinked, by one background task, never while a
/// reader of that chunk is pinned.
///
/// With Options::recycle_bytes, what would be punched is kept instead, and a segment of this process of which nothing
/// is left goes into a pool, to be written again: overwriting is cheaper than allocating. That needs no more than what
/// the hole needs: the delete is synced, no reader is pinned, and every write of this process into it was seen to
/// complete, also that of an upload which was given up. Old bytes are no chunk: only the index says where one lies, and
/// the CRCs are seeded with its id. What is kept counts as free, and is given back, oldest first, beyond the bound and
/// all of it when the disk runs short. The next process knows nothing of writes before it, and unlinks what is empty.
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

  /// At most a second old. Free is also what is kept.
  Task<Space> space();
  Space last_space() const {
    return {.total_bytes = space_.total_bytes, .free_bytes = space_.free_bytes + kept_bytes_};
  }
  std::uint64_t kept_bytes() const { return kept_bytes_; }
  std::uint64_t recycled() const { return recycled_; }  // segments written again
  /// Allocated and not yet handed out.
  std::uint64_t open_bytes() const { return (active_ ? active_->size - active_->end : 0) + (next_ ? next_->size : 0); }
  std::uint64_t live_bytes() const { return live_; }
  std::uint64_t reserved_bytes() const { return reserved_; }
  std::size_t count() const { return segments_.size(); }

  /// Stops punching; what is left is found again by the next open. Segments in the pool are unlinked.
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
  static Result<void> join(Segment& segment);
  void discard(Extent extent, std::optional<ChunkId> id);
  void unpin(const ChunkId& id);
  static Task<void> clean(Segments& self);
  Task<void> punch_or_warn(Extent extent);
  Task<void> unlink(std::shared_ptr<Segment> segment);

  bool short_of_space() const { return space_.free_bytes < options_.ballast_bytes + options_.segment_bytes; }
  /// Whether what is garbage in it is kept.
  bool keeps(const Segment& segment) const;
  void keep(const Extent& extent);
  void pool(std::shared_ptr<Segment> segment);
  Task<std::shared_ptr<Segment>> take_from_pool(std::uint64_t size_min);
  /// Gives back the oldest of what is kept.
  Task<void> give_back_one();
  void give_back_all();
  Task<void> take_back();  // waits until all is given back
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
  std::deque<std::shared_ptr<Segment>> keepers_;  // that keep ranges; oldest first
  std::deque<std::shared_ptr<Segment>> pool_;     // empty and whole
  std::uint64_t kept_bytes_ = 0;                  // in both
  std::uint64_t recycled_ = 0;
  bool giving_back_ = false;    // until nothing is kept
  bool unlinked_some_ = false;  // and the directory is not synced since
  bool stopping_ = false;
  rt::Signal created_, wake_cleaner_, gave_back_;
  rt::Scope scope_;  // last: its frames use the rest
};

/// Segments of a disk of `total_bytes`: as wished, but at most 1/32 of the disk or, where that is less, 4 MiB.
std::uint64_t segment_bytes_for(std::uint64_t total_bytes, std::uint64_t wished_bytes);

}  // namespace cairn::storage
