#include "storage/chunk_store/segments.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace cairn::storage {
namespace {

constexpr std::uint64_t kSegmentBytesMin = 4 * kMiB;
constexpr std::size_t kOpenFilesMax = 512;
constexpr rt::Duration kSpaceAge = std::chrono::seconds(1);

}  // namespace

std::uint64_t segment_bytes_for(std::uint64_t total_bytes, std::uint64_t wished_bytes) {
  return std::min(wished_bytes, std::max(kSegmentBytesMin, round_down(total_bytes / 32, kSegmentBytesMin)));
}

Segments::Segments(rt::Runtime runtime, Disk& disk, Committer& committer, std::uint64_t incarnation,
                   ChunkStore::Options options, PlantedBugs bugs)
    : runtime_(runtime),
      disk_(disk),
      committer_(committer),
      incarnation_(incarnation),
      options_(options),
      bugs_(bugs),
      created_(runtime.loop),
      wake_cleaner_(runtime.loop),
      gave_back_(runtime.loop),
      scope_(runtime.loop) {}

Task<std::unique_ptr<Segments>> Segments::open(rt::Runtime runtime, Disk& disk, Committer& committer,
                                               std::uint64_t incarnation, ChunkStore::Options options,
                                               PlantedBugs bugs) {
  std::unique_ptr<Segments> self(new Segments(runtime, disk, committer, incarnation, options, bugs));
  CO_CHECK_OK(co_await self->refresh_space());
  CO_TRY(auto names, co_await disk.list());
  for (auto& name : names) {
    if (!name.starts_with(kSegmentPrefix)) continue;
    const auto id = parse_segment_name(name);
    if (!id) co_return fail(Errc::kDataLoss, name + ": not a segment name of this store");
    if (id->incarnation >= incarnation)
      co_return fail(Errc::kDataLoss, name + ": made by a later start than " + std::to_string(incarnation) +
                                          ", which the superblock names: the superblock is an old one");
    CO_TRY(auto file, co_await disk.open(name));
    auto segment = std::make_shared<Segment>();
    segment->id = *id;
    segment->size = segment->end = file->size();
    segment->allocated = file->allocated();
    self->segments_.emplace(*id, std::move(segment));
  }
  co_return self;
}

Result<void> Segments::add_live(const Location& location) {
  auto segment = find(location.segment);
  if (!segment) return fail(std::move(segment).error());
  if (location.offset() + location.padded() > (*segment)->size)
    return fail(Errc::kDataLoss, segment_name(location.segment) + " has " + std::to_string((*segment)->size) +
                                     " bytes, the chunk ends at " +
                                     std::to_string(location.offset() + location.padded()));
  auto& loaded = (*segment)->loaded;
  const auto sectors = static_cast<std::uint32_t>(location.padded() / kSectorBytes);
  if (!loaded.empty() && loaded.back().end() == location.sector)
    loaded.back().sectors += sectors;
  else
    loaded.push_back({location.sector, sectors});
  // What a start holds of a segment grows with its holes, not with its chunks.
  if (loaded.size() >= (*segment)->join_at) {
    CHECK_OK(join(**segment));
    (*segment)->join_at = std::max((*segment)->join_at, 2 * loaded.size());
  }
  (*segment)->live += location.padded();
  live_ += location.padded();
  return {};
}

/// Sorts the loaded ranges and makes one of those that touch.
Result<void> Segments::join(Segment& segment) {
  auto& ranges = segment.loaded;
  std::ranges::sort(ranges, {}, &Segment::Range::sector);
  std::size_t joined = 0;
  for (const auto& range : ranges) {
    if (joined > 0 && range.sector < ranges[joined - 1].end())
      return fail(Errc::kDataLoss, segment_name(segment.id) + ": two chunks overlap at offset " +
                                       std::to_string(range.sector * kSectorBytes));
    if (joined > 0 && range.sector == ranges[joined - 1].end())
      ranges[joined - 1].sectors += range.sectors;
    else
      ranges[joined++] = range;
  }
  ranges.resize(joined);
  return {};
}

Task<void> Segments::settle() {
  if (bugs_.append_foreign_segment && !segments_.empty()) {
    auto last = segments_.rbegin()->second;
    CO_TRY(last->file, co_await disk_.open(segment_name(last->id)));
    open_files_++;
    last->end = 0;
    for (auto& range : last->loaded)
      last->end = std::max(last->end, std::uint64_t{range.sector} * kSectorBytes + range.sectors * kSectorBytes);
    last->appending = true;
    active_ = std::move(last);
  }
  for (auto& [id, segment] : segments_) {
    CO_CHECK_OK(join(*segment));
    const auto ranges = std::exchange(segment->loaded, {});
    std::vector<Extent> gaps;
    std::uint64_t at = 0;
    for (const auto& range : ranges) {
      const auto begin = range.sector * kSectorBytes;
      if (begin > at) gaps.push_back({segment, at, begin - at});
      at = begin + range.sectors * kSectorBytes;
    }
    // Also an empty file gets its range, so that it is unlinked.
    if (at < segment->end || segment->size == 0) gaps.push_back({segment, at, segment->end - at});
    // Holes punched by the processes before need no punching again. A file system keeps a list of the pieces of a file
    // in blocks of its own, some 300 to a block, and counts them as the file's: where holes are many, so much is let
    // pass. On one that compresses, what a crash left unpunched stays until the segment is empty.
    const auto of_the_list = gaps.size() / 256 * kSectorBytes;
    if (segment->live > 0 && segment->allocated <= segment->live + of_the_list) continue;
    for (auto& gap : gaps) discard(std::move(gap), std::nullopt);
  }
  scope_.spawn(clean(*this));
  co_return {};
}

Result<std::shared_ptr<Segment>> Segments::find(SegmentId id) const {
  const auto found = segments_.find(id);
  if (found == segments_.end()) return fail(Errc::kDataLoss, segment_name(id) + " is missing");
  return found->second;
}

Task<void> Segments::refresh_space() {
  CO_TRY(space_, co_await disk_.space());
  space_at_ = runtime_.loop.now();
  if (kept_bytes_ > 0 && short_of_space()) give_back_all();
  co_return {};
}

Task<Space> Segments::space() {
  if (!space_at_ || runtime_.loop.now() - *space_at_ >= kSpaceAge) CO_CHECK_OK(co_await refresh_space());
  co_return last_space();
}

Task<Extent> Segments::reserve(std::uint64_t size) {
  assert(size > 0 && size % kSectorBytes == 0);
  for (;;) {
    if (stopping_) co_return fail(Errc::kUnavailable, "the chunk store is closing");
    if (active_ && active_->size - active_->end >= size) {
      Extent extent{active_, active_->end, size};
      active_->end += size;
      active_->reserved += size;
      reserved_ += size;
      // Ahead of need, so that uploads do not wait for the allocation; not where space is scarce.
      if (!next_ && !creating_ && active_->size - active_->end < active_->size / 4 &&
          (!pool_.empty() || space_.free_bytes / 4 > options_.segment_bytes + options_.ballast_bytes))
        start_creating(options_.segment_bytes);
      co_return extent;
    }
    if (next_) {
      if (active_) retire(std::exchange(active_, nullptr));
      if (next_->size >= size)
        active_ = std::exchange(next_, nullptr);
      else
        retire(std::exchange(next_, nullptr));
      continue;
    }
    if (!creating_) start_creating(size);
    while (creating_) co_await created_.wait();
    // The failure of a larger one says nothing about this size.
    if (!next_ && create_error_ && create_size_ <= size) co_return fail(*create_error_);
  }
}

void Segments::start_creating(std::uint64_t size_min) {
  creating_ = true;
  create_size_ = size_min;
  create_error_.reset();
  scope_.spawn(create(*this, size_min), [this](Result<void> created) {
    creating_ = false;
    if (!created) create_error_ = std::move(created).error();
    created_.notify_all();
  });
}

Task<void> Segments::create(Segments& self, std::uint64_t size_min) {
  CO_TRY(self.next_, co_await self.take_from_pool(size_min));
  if (self.next_) co_return {};
  CO_CHECK_OK(co_await self.refresh_space());
  const auto wanted = std::max(self.options_.segment_bytes, size_min), ballast = self.options_.ballast_bytes;
  while (self.space_.free_bytes < wanted + ballast && self.kept_bytes_ > 0 && !self.stopped()) {
    CO_CHECK_OK(co_await self.take_back());
  }
  const auto free = self.space_.free_bytes;
  const auto usable = free > ballast ? round_down(free - ballast, kSectorBytes) : 0;
  auto size = std::min(wanted, usable);
  const auto full = fail(Errc::kNoSpace, "disk full: " + std::to_string(free) + " bytes free, of which " +
                                             std::to_string(ballast) + " are kept for deletes and the index");
  if (size < size_min) co_return full;

  auto segment = std::make_shared<Segment>();
  for (;;) {
    segment->id = {self.incarnation_, self.next_number_++};
    auto file = co_await self.disk_.create(segment_name(segment->id), size);
    if (file) {
      segment->file = *std::move(file);
      break;
    }
    if (file.error().code == Errc::kNoSpace && self.kept_bytes_ > 0 && !self.stopped()) {
      CO_CHECK_OK(co_await self.take_back());
      continue;
    }
    // Free space that a file system reports is not always there to be had: smaller, before giving up.
    const auto smaller = std::max(size_min, round_down(size / 2, kSectorBytes));
    if (file.error().code != Errc::kNoSpace || smaller == size)
      co_return fail(std::move(file).error().with(segment_name(segment->id)));
    size = smaller;
  }
  // Before the first index entry that names the segment.
  auto synced = co_await self.disk_.sync_directory();
  if (!synced) {
    auto error = std::move(synced).error().with("directory sync for " + segment_name(segment->id));
    self.committer_.fail_stop(error);
    co_return fail(std::move(error));
  }
  segment->size = size;
  segment->appending = true;
  // Until the next look: what has been allocated is not free any more.
  self.space_.free_bytes -= std::min(self.space_.free_bytes, size);
  self.segments_.emplace(segment->id, segment);
  self.open_files_++;
  self.limit_open_files();
  self.next_ = std::move(segment);
  co_return {};
}

void Segments::retire(std::shared_ptr<Segment> segment) {
  segment->appending = false;
  const auto end = std::exchange(segment->end, segment->size);
  // Also when nothing is left: a dead segment is unlinked where its last range is handled.
  discard({segment, end, segment->size - end}, std::nullopt);
}

/// An active segment that holds nothing any more, and much of which has been used: better a new one.
void Segments::retire_if_dead() {
  if (active_ && active_->live == 0 && active_->reserved == 0 && active_->end > active_->size / 2)
    retire(std::exchange(active_, nullptr));
}

void Segments::make_live(const Extent& extent) {
  assert(extent.segment->reserved >= extent.size);
  extent.segment->reserved -= extent.size;
  reserved_ -= extent.size;
  extent.segment->live += extent.size;
  live_ += extent.size;
}

void Segments::give_up(const Extent& extent) {
  assert(extent.segment->reserved >= extent.size);
  extent.segment->reserved -= extent.size;
  reserved_ -= extent.size;
  discard(extent, std::nullopt);
  retire_if_dead();
}

void Segments::make_dead(const Extent& extent, const ChunkId& id) {
  assert(extent.segment->live >= extent.size);
  extent.segment->live -= extent.size;
  live_ -= extent.size;
  discard(extent, id);
  retire_if_dead();
}

void Segments::discard(Extent extent, std::optional<ChunkId> id) {
  extent.segment->garbage++;
  garbage_.push_back({std::move(extent), std::move(id)});
  wake_cleaner_.notify_all();
}

void Segments::unpin(const ChunkId& id) {
  const auto pin = pins_.find(id);
  if (--pin->second > 0) return;
  pins_.erase(pin);
  wake_cleaner_.notify_all();
}

Task<std::shared_ptr<File>> Segments::file_of(std::shared_ptr<Segment> segment) {
  segment->last_used = ++uses_;
  if (segment->file) co_return segment->file;
  auto opened = co_await disk_.open(segment_name(segment->id));
  if (!opened) co_return fail(std::move(opened).error().with(segment_name(segment->id)));
  if (!segment->file) {  // another reader may have been faster
    segment->file = *opened;
    open_files_++;
    limit_open_files();
  }
  co_return *std::move(opened);
}

void Segments::limit_open_files() {
  while (open_files_ > kOpenFilesMax) {
    Segment* oldest = nullptr;
    for (auto& [id, segment] : segments_)
      if (segment->file && !segment->appending && segment->reserved == 0 &&
          (oldest == nullptr || segment->last_used < oldest->last_used))
        oldest = segment.get();
    if (oldest == nullptr) return;
    oldest->file.reset();  // operations on it hold it
    open_files_--;
  }
}

Task<void> Segments::punch(Extent extent) {
  if (extent.size == 0) co_return {};
  CO_TRY(auto file, co_await file_of(extent.segment));
  co_return co_await file->punch(extent.offset, extent.size);
}

// ---- Recycling

bool Segments::keeps(const Segment& segment) const {
  return options_.recycle_bytes > 0 && segment.id.incarnation == incarnation_ && !segment.holed &&
         segment.size >= options_.segment_bytes && !giving_back_ && !short_of_space();
}

void Segments::keep(const Extent& extent) {
  auto& segment = *extent.segment;
  if (extent.size == 0) return;
  if (segment.kept.empty()) keepers_.push_back(extent.segment);
  segment.kept.push_back({static_cast<std::uint32_t>(extent.offset / kSectorBytes),
                          static_cast<std::uint32_t>(extent.size / kSectorBytes)});
  segment.kept_bytes += extent.size;
  kept_bytes_ += extent.size;
}

void Segments::pool(std::shared_ptr<Segment> segment) {
  assert(segment->dead() && segment->garbage == 0);
  kept_bytes_ += segment->size - std::exchange(segment->kept_bytes, 0);
  if (!std::exchange(segment->kept, {}).empty()) std::erase(keepers_, segment);
  pool_.push_back(std::move(segment));
}

Task<std::shared_ptr<Segment>> Segments::take_from_pool(std::uint64_t size_min) {
  const auto fits = std::ranges::find_if(pool_, [&](const auto& segment) { return segment->size >= size_min; });
  if (fits == pool_.end()) co_return nullptr;
  auto segment = *fits;
  pool_.erase(fits);
  kept_bytes_ -= segment->size;
  segment->appending = true;  // before the wait: the file stays open
  CO_CHECK_OK(co_await file_of(segment));
  segment->end = 0;
  recycled_++;
  co_return segment;
}

Task<void> Segments::give_back_one() {
  space_at_.reset();  // what came back is seen at the next look
  if (keepers_.empty()) {
    auto segment = std::move(pool_.front());
    pool_.pop_front();
    CO_CHECK_OK(co_await unlink(segment));
    kept_bytes_ -= segment->size;
    co_return {};
  }
  auto segment = std::move(keepers_.front());
  keepers_.pop_front();
  segment->holed = true;
  auto ranges = std::exchange(segment->kept, {});
  segment->kept_bytes = 0;
  std::ranges::sort(ranges, {}, &Segment::Range::sector);
  for (std::size_t i = 0; i < ranges.size();) {
    auto all = ranges[i++];
    while (i < ranges.size() && ranges[i].sector == all.sector + all.sectors) all.sectors += ranges[i++].sectors;
    const Extent extent{segment, all.sector * kSectorBytes, all.sectors * kSectorBytes};
    if (!stopped()) CO_CHECK_OK(co_await punch_or_warn(extent));
    kept_bytes_ -= extent.size;
  }
  co_return {};
}

void Segments::give_back_all() {
  giving_back_ = true;
  wake_cleaner_.notify_all();
}

Task<void> Segments::take_back() {
  give_back_all();
  co_await gave_back_.wait();
  co_return co_await refresh_space();
}

Task<void> Segments::punch_or_warn(Extent extent) {
  auto punched = co_await punch(extent);
  if (!punched)  // the next open finds the range again
    runtime_.log.write(rt::Level::kWarning, "punch_failed",
                       {{"segment", segment_name(extent.segment->id)},
                        {"offset", std::to_string(extent.offset)},
                        {"bytes", std::to_string(extent.size)},
                        {"reason", punched.error().message}});
  co_return {};
}

Task<void> Segments::unlink(std::shared_ptr<Segment> segment) {
  kept_bytes_ -= std::exchange(segment->kept_bytes, 0);
  if (!std::exchange(segment->kept, {}).empty()) std::erase(keepers_, segment);
  if (segment->file) open_files_--;
  segment->file.reset();
  segments_.erase(segment->id);
  unlinked_some_ = true;
  auto unlinked = co_await disk_.unlink(segment_name(segment->id));
  if (!unlinked)
    runtime_.log.write(rt::Level::kWarning, "unlink_failed",
                       {{"segment", segment_name(segment->id)}, {"reason", unlinked.error().message}});
  co_return {};
}

/// One at a time: a background task must not crowd out the foreground.
Task<void> Segments::clean(Segments& self) {
  while (!self.stopped()) {
    bool progress = false;
    for (auto left = self.garbage_.size(); left > 0 && !self.stopped(); --left) {
      auto garbage = std::move(self.garbage_.front());
      self.garbage_.pop_front();
      auto segment = garbage.extent.segment;
      const bool keeps = self.keeps(*segment);
      if (garbage.id && self.pins_.contains(*garbage.id) && !(self.bugs_.recycle_while_read && keeps)) {
        self.garbage_.push_back(std::move(garbage));
        continue;
      }
      progress = true;
      if (keeps)
        self.keep(garbage.extent);
      else if (!segment->dead()) {
        segment->holed = true;
        CO_CHECK_OK(co_await self.punch_or_warn(std::move(garbage.extent)));
      }
      if (--segment->garbage > 0 || !segment->dead() || self.stopped()) continue;
      if (self.keeps(*segment))
        self.pool(std::move(segment));
      else
        CO_CHECK_OK(co_await self.unlink(std::move(segment)));
    }
    while (self.kept_bytes_ > (self.giving_back_ ? 0 : self.options_.recycle_bytes) && !self.stopped()) {
      progress = true;
      CO_CHECK_OK(co_await self.give_back_one());
    }
    if (std::exchange(self.unlinked_some_, false)) {  // a file system keeps the space until the name is gone for good
      auto synced = co_await self.disk_.sync_directory();
      if (!synced) self.committer_.fail_stop(std::move(synced).error().with("directory sync after unlinking segments"));
    }
    if (self.giving_back_ && self.kept_bytes_ == 0) {
      self.giving_back_ = false;
      self.gave_back_.notify_all();
    }
    if (progress) self.space_at_.reset();  // what came back is seen at the next look
    if (!progress && !self.stopped()) co_await self.wake_cleaner_.wait();
  }
  self.gave_back_.notify_all();
  co_return {};
}

Task<void> Segments::close() {
  stopping_ = true;
  wake_cleaner_.notify_all();
  created_.notify_all();
  CO_CHECK_OK(co_await scope_.join());
  if (committer_.failure()) co_return {};
  if (pool_.empty()) co_return {};
  for (auto& segment : std::exchange(pool_, {})) CO_CHECK_OK(co_await unlink(std::move(segment)));
  // Nothing is at stake any more: names that come back are unlinked by the next open.
  (void)co_await disk_.sync_directory();
  co_return {};
}

}  // namespace cairn::storage
