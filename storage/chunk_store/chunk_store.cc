#include "storage/chunk_store/chunk_store.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "proto/common/checksum.h"
#include "storage/chunk_store/block_check.h"
#include "storage/chunk_store/block_reader.h"
#include "storage/chunk_store/layout.h"
#include "storage/chunk_store/location_cache.h"
#include "storage/chunk_store/segments.h"

namespace cairn::storage {
namespace {

constexpr std::size_t kScanPage = 4096;

std::string key_of(const ChunkId& id) {
  const auto key = id.key();
  return {key.data(), key.size()};
}

std::string text_of(const ChunkId& id) {
  return "chunk " + id.text();
}

class Store;

/// An upload as the store knows it; outlives the caller's Upload while writes are in flight.
struct Pending {
  ChunkId id;
  std::uint32_t length = 0, digest = 0;
  DataGroup group = 0;
  std::vector<std::uint32_t> crcs;
  std::optional<Location> replaces;  // a repair: the damaged copy
  Extent extent;
  std::shared_ptr<File> file;    // the one File of the segment, which the committer flushes
  std::vector<bool> claimed;     // per piece: written or being written
  std::size_t missing = 0;       // pieces not yet written
  std::size_t in_flight = 0;     // writes under way
  bool finishing = false;        // finish() decides from here on
  bool dropped = false;          // the caller gave it up
  std::optional<Error> failure;  // of a write
};

class Store final : public ChunkStore {
 public:
  Store(rt::Runtime runtime, Index& index, Committer& committer, rt::UnitPool& units,
        std::unique_ptr<Segments> segments, Options options, PlantedBugs bugs)
      : runtime_(runtime),
        index_(index),
        committer_(committer),
        units_(units),
        options_(options),
        bugs_(bugs),
        segments_(std::move(segments)),
        reader_(runtime, *segments_, bugs),
        self_(std::make_shared<Store*>(this)),
        busy_changed_(runtime.loop),
        idle_(runtime.loop),
        scope_(runtime.loop) {}

  Task<void> load();

  Task<std::unique_ptr<Upload>> start(ChunkId id, std::uint32_t length, std::vector<std::uint32_t> block_crcs,
                                      DataGroup group) override;
  Task<std::optional<ChunkInfo>> find(ChunkId id) override;
  Task<CheckedBytes> read(ChunkId id, std::uint32_t offset, std::uint32_t size, Verify verify) override;
  Task<std::uint32_t> read_into(ChunkId id, std::uint32_t offset, std::uint32_t size, rt::MutableBuffer into) override;
  Task<Raw> read_raw(ChunkId id, std::uint32_t offset, std::uint32_t size, rt::MutableBuffer into) override;
  Task<std::optional<Entry>> entry(ChunkId id) override;
  Task<Scan> scan(ChunkId id, std::uint32_t offset) override;
  Task<std::unique_ptr<Upload>> start_repair(ChunkId id, std::string place,
                                             std::vector<std::uint32_t> block_crcs) override;
  std::size_t unit_bytes() const override { return units_.unit_bytes(); }
  Task<void> remove(std::vector<ChunkId> ids) override { return owned(erase_all(*this, std::move(ids))); }
  Task<std::vector<ChunkInfo>> list(std::optional<ChunkId> after, std::size_t limit) override;
  Stats stats() const override;
  Room room() const override {
    const auto space = segments_->last_space();
    return {.total_bytes = space.total_bytes,
            .free_bytes = space.free_bytes,
            .open_bytes = segments_->open_bytes(),
            .ballast_bytes = options_.ballast_bytes};
  }
  Task<void> look() override {
    Operation operation(*this);
    CO_CHECK_OK(check_open());
    CO_CHECK_OK(co_await segments_->space());
    co_return {};
  }
  Task<void> close() override;

 private:
  friend class UploadHandle;

  /// What the process is doing with an id. Whoever wants to do something else waits.
  enum class Busy { kStarting, kUploading, kRemoving, kSwapping };

  /// Holds an id busy.
  class Hold {
   public:
    Hold(Store& store, const ChunkId& id, Busy what) : store_(&store), id_(id) {
      assert(!store.busy_.contains(id));
      store.busy_.emplace(id, what);
    }
    Hold(Hold&& other) noexcept : store_(std::exchange(other.store_, nullptr)), id_(other.id_) {}
    Hold& operator=(Hold&&) = delete;
    ~Hold() {
      if (store_ != nullptr) store_->release(id_);
    }
    /// From now on the upload holds it.
    void hand_to_upload() { std::exchange(store_, nullptr)->busy_[id_] = Busy::kUploading; }

   private:
    Store* store_;
    ChunkId id_;
  };
  void release(const ChunkId& id) {
    busy_.erase(id);
    busy_changed_.notify_all();
  }

  /// Keeps close() waiting.
  class Operation {
   public:
    explicit Operation(Store& store) : store_(store) { store_.operations_++; }
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;
    ~Operation() {
      if (--store_.operations_ == 0) store_.idle_.notify_all();
    }

   private:
    Store& store_;
  };

  /// Runs to its end in the store's scope also when the caller's Task is dropped: what the disk was told to do is seen
  /// to complete and accounted for.
  template <class T>
  Task<T> owned(Task<T> task) {
    CO_CHECK_OK(check_open());
    rt::OneShot<Result<T>> done(runtime_.loop);
    scope_.spawn(into(std::move(task), done.setter()));
    co_return co_await done;
  }
  template <class T>
  static Task<void> into(Task<T> task, typename rt::OneShot<Result<T>>::Setter setter) {
    setter.set(co_await std::move(task));
    co_return {};
  }

  Result<void> check_open() const {
    if (closing_) return fail(Errc::kUnavailable, "the chunk store is closing");
    return {};
  }
  Result<void> check_writable() const {
    CHECK_OK(check_open());
    if (const auto& failure = committer_.failure())
      return fail(failure->code == Errc::kNoSpace ? Errc::kNoSpace : Errc::kFailed,
                  "the target has failed and takes nothing more: " + failure->message);
    return {};
  }
  /// In the index perhaps, but not yet acknowledged: as if it were not there.
  bool unacknowledged(const ChunkId& id) const {
    const auto busy = busy_.find(id);
    return (busy != busy_.end() && busy->second == Busy::kUploading) || in_doubt_.contains(id);
  }

  Task<std::optional<Location>> locate(ChunkId id);
  Task<std::vector<std::uint32_t>> block_crcs(ChunkId id, Location location);
  Task<std::shared_ptr<const ChunkEntry>> look_up(ChunkId id);
  /// What the index says of a chunk, at one moment. `crcs`: an error when they are damaged.
  struct Found {
    Location location;
    Result<std::vector<std::uint32_t>> crcs;
  };
  Task<std::optional<Found>> find_entry(ChunkId id);
  Task<std::shared_ptr<Pending>> reserve(ChunkId id, std::uint32_t length, std::vector<std::uint32_t> crcs,
                                         DataGroup group);
  Task<Hold> hold_for_swap(std::shared_ptr<Pending> upload);
  Result<void> whole_blocks(const ChunkId& id, std::uint32_t length, std::uint32_t offset, std::uint32_t size,
                            const rt::MutableBuffer& into) const;

  Result<Buffer> check_piece(const Pending& upload, std::uint32_t offset, rt::MutableBuffer memory,
                             std::uint32_t size) const;
  static Task<void> write_piece(Store& self, std::shared_ptr<Pending> upload, std::uint32_t offset, Buffer checked);
  static Task<void> finish_upload(Store& self, std::shared_ptr<Pending> upload);
  void drop(const std::shared_ptr<Pending>& upload);
  void abandon(Pending& upload);
  Result<void> retire_copy(const ChunkId& id, const Location& location);
  static Task<void> erase_all(Store& self, std::vector<ChunkId> ids);
  static Task<void> erase_some(Store& self, std::vector<ChunkId> ids);

  rt::Runtime runtime_;
  Index& index_;
  Committer& committer_;
  rt::UnitPool& units_;
  Options options_;
  PlantedBugs bugs_;
  std::unique_ptr<Segments> segments_;
  BlockReader reader_;
  std::shared_ptr<Store*> self_;  // how an Upload that outlives the store notices

  std::map<ChunkId, Busy> busy_;
  std::set<ChunkId> in_doubt_;  // their commit failed: only the next open knows
  LocationCache cache_;
  std::uint64_t erasures_ = 0;
  std::uint64_t chunks_ = 0, bytes_written_ = 0, bytes_scanned_ = 0;

  bool closing_ = false;
  std::size_t operations_ = 0;
  rt::Signal busy_changed_, idle_;
  rt::Scope scope_;  // last: its frames use the rest
};

class UploadHandle final : public ChunkStore::Upload {
 public:
  UploadHandle(std::weak_ptr<Store*> store, std::shared_ptr<Pending> pending)
      : store_(std::move(store)), pending_(std::move(pending)) {}
  ~UploadHandle() override {
    if (auto store = store_.lock()) (*store)->drop(pending_);
  }
  Result<Buffer> check(std::uint32_t offset, rt::MutableBuffer memory, std::uint32_t size) override {
    auto store = store_.lock();
    if (!store) return gone();
    return (*store)->check_piece(*pending_, offset, std::move(memory), size);
  }
  Task<void> write_checked(std::uint32_t offset, Buffer checked) override {
    auto store = store_.lock();
    if (!store) co_return gone();
    co_return co_await (*store)->owned(Store::write_piece(**store, pending_, offset, std::move(checked)));
  }
  Task<void> finish() override {
    auto store = store_.lock();
    if (!store) co_return gone();
    co_return co_await (*store)->owned(Store::finish_upload(**store, pending_));
  }

 private:
  static Failure gone() { return fail(Errc::kUnavailable, "the chunk store is closed"); }
  std::weak_ptr<Store*> store_;
  std::shared_ptr<Pending> pending_;
};

Task<void> Store::load() {
  std::string from;
  for (;;) {
    CO_TRY(auto page, co_await index_.scan(Table::kChunks, from, "", kScanPage));
    for (auto& entry : page) {
      auto id = ChunkId::from_key(entry.key);
      if (!id) co_return fail(Errc::kDataLoss, "index: a chunk key of " + std::to_string(entry.key.size()) + " bytes");
      auto location = decode_location(entry.value);
      auto added = location ? segments_->add_live(*location) : Result<void>(fail(location.error()));
      if (!added) co_return fail(Errc::kDataLoss, text_of(*id) + ": " + added.error().message);
    }
    chunks_ += page.size();
    if (page.size() < kScanPage) break;
    from = std::move(page.back().key);
    from.push_back('\0');
  }
  co_return co_await segments_->settle();
}

Task<std::optional<Location>> Store::locate(ChunkId id) {
  CO_TRY(auto value, co_await index_.get(Table::kChunks, key_of(id)));
  if (!value) co_return std::nullopt;
  auto location = decode_location(*value);
  if (!location) co_return fail(std::move(location).error().with(text_of(id)));
  co_return *location;
}

Task<std::vector<std::uint32_t>> Store::block_crcs(ChunkId id, Location location) {
  CO_TRY(auto value, co_await index_.get(Table::kBlockCrcs, key_of(id)));
  if (!value) co_return fail(Errc::kDataLoss, text_of(id) + ": its block CRCs are missing in the index");
  auto crcs = decode_block_crcs(*value, location);
  if (!crcs) co_return fail(std::move(crcs).error().with(text_of(id)));
  co_return *std::move(crcs);
}

Task<std::unique_ptr<ChunkStore::Upload>> Store::start(ChunkId id, std::uint32_t length,
                                                       std::vector<std::uint32_t> crcs, DataGroup group) {
  if (length == 0 || length > kChunkBytesMax)
    co_return fail(Errc::kInvalid, text_of(id) + ": length " + std::to_string(length) + ", allowed are 1 to " +
                                       std::to_string(kChunkBytesMax));
  if (crcs.size() != blocks_of(length))
    co_return fail(Errc::kInvalid, text_of(id) + ": " + std::to_string(crcs.size()) + " block CRCs for " +
                                       std::to_string(length) + " bytes");
  Operation operation(*this);
  CO_CHECK_OK(check_writable());
  while (busy_.contains(id)) {
    co_await busy_changed_.wait();
    CO_CHECK_OK(check_writable());
  }
  Hold hold(*this, id, Busy::kStarting);

  const auto digest = chunk_digest(crcs);
  CO_TRY(auto existing, co_await locate(id));
  if (existing) {
    bool same = existing->length == length && existing->digest == digest;
    if (same) {
      CO_TRY(auto stored, co_await block_crcs(id, *existing));
      same = stored == crcs;
    }
    if (same) co_return nullptr;
    co_return fail(Errc::kConflict, text_of(id) + " exists with other bytes");
  }

  CO_TRY(auto pending, co_await reserve(id, length, std::move(crcs), group));
  hold.hand_to_upload();
  co_return std::make_unique<UploadHandle>(self_, std::move(pending));
}

/// An upload with room on the disk.
Task<std::shared_ptr<Pending>> Store::reserve(ChunkId id, std::uint32_t length, std::vector<std::uint32_t> crcs,
                                              DataGroup group) {
  CO_TRY(auto space, co_await segments_->space());
  // New segments leave the whole ballast; what the index takes since comes out of it.
  if (space.free_bytes < options_.ballast_bytes / 2)
    co_return fail(Errc::kNoSpace,
                   "disk full: " + std::to_string(space.free_bytes) + " bytes free, kept for deletes and the index");
  auto pending = std::make_shared<Pending>();
  pending->id = id;
  pending->length = length;
  pending->digest = chunk_digest(crcs);
  pending->group = group;
  pending->crcs = std::move(crcs);
  pending->missing = (length + unit_bytes() - 1) / unit_bytes();
  pending->claimed.resize(pending->missing);
  CO_TRY(pending->extent, co_await segments_->reserve(round_up(length, kSectorBytes)));
  pending->file = pending->extent.segment->file;
  assert(pending->file);
  co_return std::move(pending);
}

Task<std::unique_ptr<ChunkStore::Upload>> Store::start_repair(ChunkId id, std::string place,
                                                              std::vector<std::uint32_t> crcs) {
  auto seen = decode_location(place);
  if (!seen) co_return fail(Errc::kInvalid, text_of(id) + ": not a place that entry() or scan() told");
  Operation operation(*this);
  CO_CHECK_OK(check_writable());
  if (crcs.size() != blocks_of(seen->length) || chunk_digest(crcs) != seen->digest)
    co_return fail(Errc::kConflict, text_of(id) + ": the bytes that are to repair it are not its own");
  CO_TRY(const auto now, co_await locate(id));
  if (now != *seen) co_return fail(Errc::kNotFound, text_of(id) + ": removed or repaired meanwhile");
  CO_TRY(auto pending, co_await reserve(id, seen->length, std::move(crcs), seen->group));
  pending->replaces = *seen;
  co_return std::make_unique<UploadHandle>(self_, std::move(pending));
}

Result<Buffer> Store::check_piece(const Pending& upload, std::uint32_t offset, rt::MutableBuffer memory,
                                  std::uint32_t size) const {
  const auto unit = unit_bytes();
  const auto padded = round_up(size, kSectorBytes);
  if (offset % unit != 0 || offset >= upload.length || size != std::min<std::uint64_t>(unit, upload.length - offset) ||
      memory.bytes.size() < padded)
    return fail(Errc::kInvalid, text_of(upload.id) + ": a piece of " + std::to_string(size) + " bytes at " +
                                    std::to_string(offset) + " does not fit a chunk of " +
                                    std::to_string(upload.length));
  for (std::uint32_t done = 0; done < size; done += kBlockBytes) {
    const auto block = static_cast<std::uint32_t>((offset + done) / kBlockBytes);
    const auto bytes = memory.bytes.subspan(done, std::min<std::size_t>(kBlockBytes, size - done));
    if (crc32c(bytes, block_seed(upload.id, block)) != upload.crcs[block] &&
        !(upload.replaces && bugs_.repair_unchecked))
      return fail(Errc::kDataLoss, text_of(upload.id) + " block " + std::to_string(block) +
                                       ": the bytes that arrived do not match their CRC");
  }
  std::ranges::fill(memory.bytes.subspan(size, padded - size), std::byte{0});
  return std::move(memory).freeze(padded);
}

Task<void> Store::write_piece(Store& self, std::shared_ptr<Pending> upload, std::uint32_t offset, Buffer checked) {
  CO_CHECK_OK(self.check_writable());
  const auto unit = self.unit_bytes();
  const auto padded = checked.size();
  if (offset % unit != 0 || offset >= upload->length ||
      padded != round_up(std::min<std::uint64_t>(unit, upload->length - offset), kSectorBytes))
    co_return fail(Errc::kInvalid, text_of(upload->id) + ": a piece of " + std::to_string(padded) + " bytes at " +
                                       std::to_string(offset) + " does not fit a chunk of " +
                                       std::to_string(upload->length));
  const auto piece = offset / unit;
  if (upload->claimed[piece] || upload->finishing)
    co_return fail(Errc::kInvalid, text_of(upload->id) + ": bytes at " + std::to_string(offset) + " written twice");
  if (upload->failure) co_return fail(*upload->failure);

  upload->claimed[piece] = true;
  upload->in_flight++;
  auto written = co_await upload->file->write(upload->extent.offset + offset, std::move(checked));
  upload->in_flight--;
  if (written) {
    upload->missing--;
    self.bytes_written_ += padded;
  } else {
    upload->failure = std::move(written).error().with("write of " + text_of(upload->id) + " to " +
                                                      segment_name(upload->extent.segment->id));
    // A full disk is the upload's bad luck; anything else means that the disk cannot be trusted any more.
    if (upload->failure->code != Errc::kNoSpace) self.committer_.fail_stop(*upload->failure);
  }
  if (upload->dropped && upload->in_flight == 0) self.abandon(*upload);
  if (upload->failure) co_return fail(*upload->failure);
  co_return {};
}

Task<void> Store::finish_upload(Store& self, std::shared_ptr<Pending> upload) {
  CO_CHECK_OK(self.check_writable());
  if (upload->failure) co_return fail(*upload->failure);
  if (upload->finishing) co_return fail(Errc::kInvalid, text_of(upload->id) + ": finished twice");
  if (upload->missing > 0)
    co_return fail(Errc::kInvalid,
                   text_of(upload->id) + ": " + std::to_string(upload->missing) + " pieces have not been written");
  upload->finishing = true;
  std::optional<Hold> hold;
  if (upload->replaces) {
    auto held = co_await self.hold_for_swap(upload);
    if (!held) {
      self.segments_->give_up(upload->extent);
      co_return fail(std::move(held).error());
    }
    hold.emplace(*std::move(held));
  }

  const Location location{.segment = upload->extent.segment->id,
                          .sector = static_cast<std::uint32_t>(upload->extent.offset / kSectorBytes),
                          .length = upload->length,
                          .digest = upload->digest,
                          .group = upload->group};
  Batch batch;
  batch.put(Table::kChunks, key_of(upload->id), encode_location(location));
  batch.put(Table::kBlockCrcs, key_of(upload->id), encode_block_crcs(upload->crcs));
  std::vector<std::shared_ptr<File>> flush_first{upload->file};
  auto committing = self.committer_.commit(std::move(batch), std::move(flush_first));
  Result<void> committed;
  if (upload->replaces && self.bugs_.repair_early)
    self.scope_.spawn(std::move(committing));
  else
    committed = co_await std::move(committing);
  if (committed) self.segments_->make_live(upload->extent);
  if (upload->replaces) {
    // When it has failed the index may say the one or the other: both stay.
    if (committed) CO_CHECK_OK(self.retire_copy(upload->id, *upload->replaces));
  } else {
    if (committed)
      self.chunks_++;
    else  // perhaps it is in the index: its space stays as it is
      self.in_doubt_.insert(upload->id);
    self.release(upload->id);
  }
  if (!committed) co_return fail(std::move(committed).error().with(text_of(upload->id)));
  co_return {};
}

/// The id, while nothing else happens to it and its copy is still the one that is to be replaced.
Task<Store::Hold> Store::hold_for_swap(std::shared_ptr<Pending> upload) {
  while (busy_.contains(upload->id)) {
    co_await busy_changed_.wait();
    CO_CHECK_OK(check_writable());
  }
  Hold hold(*this, upload->id, Busy::kSwapping);
  CO_TRY(const auto now, co_await locate(upload->id));
  if (bugs_.repair_blind)
    upload->replaces = now;
  else if (now != upload->replaces)
    co_return fail(Errc::kNotFound, text_of(upload->id) + ": removed or repaired meanwhile");
  co_return std::move(hold);
}

/// The index says that the chunk lies elsewhere: what it was read from before goes.
Result<void> Store::retire_copy(const ChunkId& id, const Location& location) {
  erasures_++;
  cache_.erase(id);
  TRY(auto segment, segments_->find(location.segment));
  segments_->make_dead({std::move(segment), location.offset(), location.padded()}, id);
  return {};
}

/// The caller's handle is gone. Runs in destructors: books only, the background task touches the disk.
void Store::drop(const std::shared_ptr<Pending>& upload) {
  if (upload->finishing || upload->dropped) return;
  upload->dropped = true;
  if (upload->in_flight == 0) abandon(*upload);
}

void Store::abandon(Pending& upload) {
  segments_->give_up(upload.extent);
  if (!upload.replaces) release(upload.id);
}

Task<std::optional<ChunkInfo>> Store::find(ChunkId id) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  CO_TRY(auto location, co_await locate(id));
  if (!location || unacknowledged(id)) co_return std::nullopt;
  co_return ChunkInfo{.id = id, .length = location->length, .digest = location->digest, .group = location->group};
}

Task<std::vector<ChunkInfo>> Store::list(std::optional<ChunkId> after, std::size_t limit) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  std::string from = after ? key_of(*after) + '\0' : std::string();
  std::vector<ChunkInfo> out;
  while (out.size() < limit) {
    const auto wanted = std::min(limit - out.size(), kScanPage);
    CO_TRY(auto page, co_await index_.scan(Table::kChunks, from, "", wanted));
    for (auto& entry : page) {
      CO_TRY(auto id, ChunkId::from_key(entry.key));
      auto location = decode_location(entry.value);
      if (!location) co_return fail(std::move(location).error().with(text_of(id)));
      if (!unacknowledged(id))
        out.push_back({.id = id, .length = location->length, .digest = location->digest, .group = location->group});
    }
    if (page.size() < wanted) break;
    from = std::move(page.back().key);
    from.push_back('\0');
  }
  co_return out;
}

Task<std::shared_ptr<const ChunkEntry>> Store::look_up(ChunkId id) {
  for (;;) {
    if (auto cached = cache_.find(id)) co_return cached;
    const auto erasures = erasures_;
    CO_TRY(auto location, co_await locate(id));
    if (!location || unacknowledged(id)) co_return fail(Errc::kNotFound, text_of(id) + ": not on this target");
    auto crcs = co_await block_crcs(id, *location);
    if (crcs) {
      auto entry = std::make_shared<const ChunkEntry>(*location, *std::move(crcs));
      if (erasures == erasures_ && !busy_.contains(id)) cache_.insert(id, entry);
      co_return entry;
    }
    // Erased between the two look-ups, and perhaps written again? Then this is no damage.
    if (erasures != erasures_) continue;
    if (busy_.contains(id)) co_return fail(Errc::kNotFound, text_of(id) + ": being removed");
    co_return fail(std::move(crcs).error());
  }
}

Task<CheckedBytes> Store::read(ChunkId id, std::uint32_t offset, std::uint32_t size, Verify verify) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  // Before the look-up: an extent that it finds is not punched until this frame ends.
  Segments::Pin pin(*segments_, id);
  CO_TRY(auto entry, co_await look_up(id));
  const auto& location = entry->location;
  const auto unit = unit_bytes();
  if (size == 0 || offset >= location.length || size > location.length - offset ||
      offset / unit != (std::uint64_t{offset} + size - 1) / unit)
    co_return fail(Errc::kInvalid, text_of(id) + ": a read of " + std::to_string(size) + " bytes at " +
                                       std::to_string(offset) + " of " + std::to_string(location.length) +
                                       ", in pieces of at most " + std::to_string(unit));
  const auto begin = round_down(offset, kBlockBytes);
  const auto end = std::min<std::uint64_t>(round_up(std::uint64_t{offset} + size, kBlockBytes), location.length);
  CO_TRY(auto memory, co_await units_.acquire());
  CO_TRY(auto filled, co_await reader_.read(id, *entry, begin, end, std::move(memory)));
  // All but the blocks between these two, which are wanted whole.
  auto whole_begin = end, whole_end = end;
  if (verify == Verify::kPartlyWanted) {
    const auto wanted_end = std::uint64_t{offset} + size;
    whole_begin = std::min<std::uint64_t>(round_up(offset, kBlockBytes), end);
    whole_end = std::max(whole_begin, wanted_end == location.length ? end : round_down(wanted_end, kBlockBytes));
  }
  const std::span<const std::byte> bytes = filled.bytes;
  CO_CHECK_OK(reader_.verify(id, *entry, begin, bytes.first(whole_begin - begin)));
  CO_CHECK_OK(reader_.verify(id, *entry, whole_end, bytes.subspan(whole_end - begin, end - whole_end)));
  const auto crcs = entry->crcs.begin();
  co_return CheckedBytes{.bytes = std::move(filled).freeze(end - begin).slice(offset - begin, size),
                         .id = id,
                         .offset = offset,
                         .chunk_length = location.length,
                         .block_crcs = {crcs + static_cast<std::ptrdiff_t>(begin / kBlockBytes),
                                        crcs + static_cast<std::ptrdiff_t>(round_up(end, kBlockBytes) / kBlockBytes)}};
}

Task<std::uint32_t> Store::read_into(ChunkId id, std::uint32_t offset, std::uint32_t size, rt::MutableBuffer into) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  Segments::Pin pin(*segments_, id);
  CO_TRY(auto entry, co_await look_up(id));
  const auto length = entry->location.length;
  CO_CHECK_OK(whole_blocks(id, length, offset, size, into));
  const auto end = std::min<std::uint64_t>(std::uint64_t{offset} + size, length);
  CO_TRY(const auto filled, co_await reader_.read(id, *entry, offset, end, std::move(into)));
  CO_CHECK_OK(reader_.verify(id, *entry, offset, filled.bytes.first(end - offset)));
  co_return length;
}

/// Are these whole blocks of the chunk, in one aligned piece, with room for them?
Result<void> Store::whole_blocks(const ChunkId& id, std::uint32_t length, std::uint32_t offset, std::uint32_t size,
                                 const rt::MutableBuffer& into) const {
  if (size == 0 || offset % kBlockBytes != 0 || offset >= length ||
      offset / unit_bytes() != (std::uint64_t{offset} + size - 1) / unit_bytes() ||
      into.bytes.size() < round_up(size, kSectorBytes))
    return fail(Errc::kInvalid, text_of(id) + ": a read of blocks, " + std::to_string(size) + " bytes at " +
                                    std::to_string(offset) + " of " + std::to_string(length));
  return {};
}

Task<ChunkStore::Raw> Store::read_raw(ChunkId id, std::uint32_t offset, std::uint32_t size, rt::MutableBuffer into) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  Segments::Pin pin(*segments_, id);
  CO_TRY(auto entry, co_await look_up(id));
  const auto& location = entry->location;
  CO_CHECK_OK(whole_blocks(id, location.length, offset, size, into));
  Raw raw;
  raw.size = std::min(size, location.length - offset);
  CO_CHECK_OK(co_await reader_.read(id, *entry, offset, std::uint64_t{offset} + raw.size, std::move(into)));
  const auto first = entry->crcs.begin() + offset / kBlockBytes;
  raw.block_crcs.assign(first, first + static_cast<std::ptrdiff_t>(round_up(raw.size, kBlockBytes) / kBlockBytes));
  co_return raw;
}

Task<std::optional<Store::Found>> Store::find_entry(ChunkId id) {
  for (;;) {
    const auto erasures = erasures_;
    CO_TRY(const auto location, co_await locate(id));
    if (!location || unacknowledged(id)) co_return std::nullopt;
    auto crcs = co_await block_crcs(id, *location);
    // Erased or swapped between the two look-ups, or about to be: once more.
    if (erasures != erasures_) continue;
    if (!crcs && busy_.contains(id)) {
      co_await busy_changed_.wait();
      CO_CHECK_OK(check_open());
      continue;
    }
    if (!crcs && crcs.error().code != Errc::kDataLoss) co_return fail(std::move(crcs).error());
    co_return Found{*location, std::move(crcs)};
  }
}

Task<std::optional<ChunkStore::Entry>> Store::entry(ChunkId id) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  CO_TRY(auto found, co_await find_entry(id));
  if (!found) co_return std::nullopt;
  const auto& location = found->location;
  co_return Entry{.info = {.id = id, .length = location.length, .digest = location.digest, .group = location.group},
                  .place = encode_location(location),
                  .block_crcs = std::move(found->crcs).value_or(std::vector<std::uint32_t>())};
}

Task<ChunkStore::Scan> Store::scan(ChunkId id, std::uint32_t offset) {
  Operation operation(*this);
  CO_CHECK_OK(check_open());
  Segments::Pin pin(*segments_, id);
  CO_TRY(const auto found, co_await find_entry(id));
  if (!found) co_return fail(Errc::kNotFound, text_of(id) + ": not on this target");
  const auto& location = found->location;
  if (offset % unit_bytes() != 0 || offset >= location.length)
    co_return fail(Errc::kInvalid, text_of(id) + ": a scan at " + std::to_string(offset) + " of " +
                                       std::to_string(location.length) + " bytes");
  Scan scan{.place = encode_location(location),
            .size = static_cast<std::uint32_t>(std::min<std::uint64_t>(unit_bytes(), location.length - offset)),
            .bad = {}};
  const auto all_bad = [&](const std::string& reason) {
    for (std::uint32_t at = 0; at < scan.size; at += kBlockBytes) scan.bad.push_back({offset + at, reason});
  };
  if (!found->crcs) {
    all_bad(found->crcs.error().message);
    co_return scan;
  }
  CO_TRY(auto segment, segments_->find(location.segment));
  auto file = co_await segments_->file_of(segment);
  if (!file) {
    all_bad(file.error().message);
    co_return scan;
  }
  CO_TRY(auto memory, co_await units_.acquire());
  const auto first = found->crcs->begin() + offset / kBlockBytes;
  BlocksAt blocks{.id = id,
                  .offset = offset,
                  .size = scan.size,
                  .at = location.offset() + offset,
                  .in = segment_name(location.segment),
                  .crcs = {first, first + blocks_of(scan.size)}};
  CO_TRY(scan.bad, co_await check_blocks(*file, std::move(blocks), std::move(memory)));
  bytes_scanned_ += round_up(scan.size, kSectorBytes);
  co_return scan;
}

Task<void> Store::erase_all(Store& self, std::vector<ChunkId> ids) {
  std::ranges::sort(ids);  // one order for all: two calls cannot wait for each other
  ids.erase(std::ranges::unique(ids).begin(), ids.end());
  const auto step = std::max<std::size_t>(self.options_.deletes_per_batch, 1);
  for (std::size_t done = 0; done < ids.size(); done += step) {
    const auto first = ids.begin() + static_cast<std::ptrdiff_t>(done);
    const auto count = static_cast<std::ptrdiff_t>(std::min(step, ids.size() - done));
    CO_CHECK_OK(co_await erase_some(self, {first, first + count}));
  }
  co_return {};
}

Task<void> Store::erase_some(Store& self, std::vector<ChunkId> ids) {
  struct Erased {
    ChunkId id;
    Extent extent;
  };
  std::vector<Hold> holds;
  std::vector<Erased> erased;
  Batch batch;
  for (auto& id : ids) {
    CO_CHECK_OK(self.check_writable());
    auto busy = self.busy_.find(id);
    while (busy != self.busy_.end() && busy->second != Busy::kUploading) {
      co_await self.busy_changed_.wait();
      CO_CHECK_OK(self.check_writable());
      busy = self.busy_.find(id);
    }
    if (busy != self.busy_.end()) continue;  // not yet durable: as unknown as an id that comes a moment later
    holds.emplace_back(self, id, Busy::kRemoving);
    CO_TRY(auto location, co_await self.locate(id));
    if (!location) continue;
    CO_TRY(auto segment, self.segments_->find(location->segment));
    erased.push_back({id, {std::move(segment), location->offset(), location->padded()}});
    batch.erase(Table::kChunks, key_of(id));
    batch.erase(Table::kBlockCrcs, key_of(id));
  }
  if (erased.empty()) co_return {};
  if (self.bugs_.punch_before_sync)
    for (auto& one : erased) CO_CHECK_OK(co_await self.segments_->punch(one.extent));
  CO_CHECK_OK(co_await self.committer_.commit(std::move(batch)));
  self.erasures_++;
  for (auto& one : erased) {
    self.cache_.erase(one.id);
    self.segments_->make_dead(one.extent, one.id);
    self.chunks_--;
  }
  co_return {};
}

ChunkStore::Stats Store::stats() const {
  return {.chunks = chunks_,
          .live_bytes = segments_->live_bytes(),
          .uploading_bytes = segments_->reserved_bytes(),
          .segments = segments_->count(),
          .free_bytes = segments_->last_space().free_bytes,
          .kept_bytes = segments_->kept_bytes(),
          .total_bytes = segments_->last_space().total_bytes,
          .bytes_written = bytes_written_,
          .bytes_read = reader_.bytes_read() + bytes_scanned_,
          .blocks_bad = reader_.blocks_bad(),
          .segments_recycled = segments_->recycled()};
}

Task<void> Store::close() {
  closing_ = true;
  busy_changed_.notify_all();  // who waits for an id gives up
  CO_CHECK_OK(co_await scope_.join());
  while (operations_ > 0) co_await idle_.wait();
  co_return co_await segments_->close();
}

}  // namespace

Task<std::unique_ptr<ChunkStore>> ChunkStore::open(rt::Runtime runtime, Disk& disk, Index& index, Committer& committer,
                                                   rt::UnitPool& units, std::uint64_t incarnation, Options options,
                                                   PlantedBugs bugs) {
  if (options.segment_bytes < 64 * kKiB || options.segment_bytes > 4 * kGiB ||
      options.segment_bytes % kSectorBytes != 0)
    co_return fail(Errc::kInvalid, "segment_bytes " + std::to_string(options.segment_bytes) +
                                       ": allowed are 64 KiB to 4 GiB in multiples of 4096");
  if (units.unit_bytes() % kBlockBytes != 0)
    co_return fail(Errc::kInvalid,
                   "buffer units of " + std::to_string(units.unit_bytes()) + " bytes: a multiple of 64 KiB is needed");
  CO_TRY(auto space, co_await disk.space());
  options.segment_bytes = segment_bytes_for(space.total_bytes, options.segment_bytes);
  CO_TRY(auto segments, co_await Segments::open(runtime, disk, committer, incarnation, options, bugs));
  auto store = std::make_unique<Store>(runtime, index, committer, units, std::move(segments), options, bugs);
  CO_CHECK_OK(co_await store->load());
  co_return store;
}

}  // namespace cairn::storage
