#include "server/chunks/shared_blocks.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <optional>

#include "proto/common/units.h"

namespace cairn::server {
namespace {

// Of all readers together: what a peer can make us remember by asking.
constexpr std::size_t kWantsMax = 16 * 1024;

}  // namespace

class SharedBlocks::Reader {
 public:
  Reader(SharedBlocks& all, std::vector<Key> order) : all_(all), order_(std::move(order)) {
    moved_at_ = all_.runtime_.loop.now();
    for (std::size_t i = 0; i < order_.size() && all_.wants_count_ < kWantsMax; ++i, ++all_.wants_count_, ++end_)
      all_.wants_[order_[i]].push_back({this, i});
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { pass(end_); }

  /// Wants nothing before `index` any more.
  void pass(std::size_t index) {
    for (; next_ < index; ++next_) {
      const auto found = all_.wants_.find(order_[next_]);
      std::erase_if(found->second, [this](const Want& w) { return w.reader == this && w.index == next_; });
      if (found->second.empty()) all_.wants_.erase(found);
      --all_.wants_count_;
    }
    moved_at_ = all_.runtime_.loop.now();
    all_.room_.notify_all();
  }
  /// Where it will come for this piece; nothing: it will not.
  std::optional<std::size_t> index_of(const Key& key) const {
    const auto found = all_.wants_.find(key);
    if (found == all_.wants_.end()) return std::nullopt;
    for (const auto& want : found->second)  // rising
      if (want.reader == this) return want.index;
    return std::nullopt;
  }

 private:
  friend class SharedBlocks;
  SharedBlocks& all_;
  std::vector<Key> order_;
  std::size_t next_ = 0, end_ = 0;  // order_[next_ .. end_) stand in wants_
  rt::TimePoint moved_at_;
  bool waits_ = false;  // for those behind: not of its own choice
  std::uint64_t from_disk_ = 0;
};

/// One read of neighbouring blocks.
struct SharedBlocks::Fetch {
  std::uint64_t blocks = 0;
  std::optional<Result<void>> end;
};

struct SharedBlocks::Piece {
  Piece(rt::Loop& loop, Key k) : key(k), changed(loop) {}
  Key key;
  rt::MutableBuffer unit;  // none before the first fetch has got it
  bool unit_coming = false;
  std::uint64_t valid = 0;  // blocks that are there, or of which it is known that the chunk ends before
  std::uint32_t chunk_length = 0;
  std::vector<std::shared_ptr<Fetch>> fetches;  // under way
  std::size_t users = 0;                        // who wait for it
  rt::TimePoint used_at;
  rt::Signal changed;

  std::uint64_t coming() const {
    std::uint64_t blocks = 0;
    for (const auto& fetch : fetches) blocks |= fetch->blocks;
    return blocks;
  }
  bool idle() const { return users == 0 && fetches.empty(); }
};

SharedBlocks::SharedBlocks(rt::Runtime runtime, Chunks& chunks, rt::UnitPool& units, Options options)
    : runtime_(runtime), chunks_(chunks), units_(units), options_(options), room_(runtime.loop), scope_(runtime.loop) {
  if (options_.pieces_max == 0) options_.pieces_max = std::max<std::size_t>(units.units() / 4, 1);
  units_.on_shortage([this] { give_way(); });
}

SharedBlocks::~SharedBlocks() {
  units_.on_shortage({});
}

std::shared_ptr<SharedBlocks::Reader> SharedBlocks::reader(std::vector<Key> order) {
  return std::make_shared<Reader>(*this, std::move(order));
}

std::uint64_t SharedBlocks::from_disk(const Reader& reader) {
  return reader.from_disk_;
}

SharedBlocks::Stats SharedBlocks::stats() const {
  auto out = stats_;
  out.pieces = pieces_.size();
  return out;
}

bool SharedBlocks::moves(const Reader& reader) const {
  // One that waits for others moves again when they do; if it does not, two wait for each other.
  return runtime_.loop.now() - reader.moved_at_ < (reader.waits_ ? 4 : 1) * options_.wait;
}

bool SharedBlocks::wanted(const Key& key) const {
  const auto found = wants_.find(key);
  return found != wants_.end() && std::ranges::any_of(found->second, [&](const Want& w) { return moves(*w.reader); });
}

std::size_t SharedBlocks::distance(const Key& victim, const Reader& reader, const Key& key) const {
  const auto found = wants_.find(victim);
  if (found == wants_.end()) return SIZE_MAX;
  auto nearest = SIZE_MAX;
  for (const auto& want : found->second) {
    if (!moves(*want.reader)) continue;
    const auto sooner = want.reader->index_of(key);
    if (want.reader != &reader && (!sooner || *sooner > want.index)) return 0;
    nearest = std::min(nearest, want.index - want.reader->next_ + 1);
  }
  return nearest;
}

/// Of the pieces that nobody wants the one that was not used for the longest time.
bool SharedBlocks::drop_unwanted() {
  auto victim = pieces_.end();
  for (auto it = pieces_.begin(); it != pieces_.end(); ++it)
    if (it->second->idle() && !wanted(it->first) &&
        (victim == pieces_.end() || it->second->used_at < victim->second->used_at))
      victim = it;
  if (victim == pieces_.end()) return false;
  pieces_.erase(victim);
  return true;
}

/// Room for one piece more. Rather than one that somebody wants goes one that nobody does; else the one that is wanted
/// last, but only for the sake of who is behind.
bool SharedBlocks::make_room(const Reader& reader, const Key& key) {
  if (pieces_.size() < options_.pieces_max || drop_unwanted()) return true;
  auto victim = pieces_.end();
  std::size_t farthest = 0;
  for (auto it = pieces_.begin(); it != pieces_.end(); ++it) {
    if (!it->second->idle()) continue;
    const auto far = distance(it->first, reader, key);
    if (far <= farthest) continue;
    farthest = far;
    victim = it;
  }
  if (victim == pieces_.end()) return false;
  pieces_.erase(victim);
  return true;
}

bool SharedBlocks::crowded(const Reader& reader, const Key& key) {
  return !pieces_.contains(key) && !make_room(reader, key);
}

std::shared_ptr<SharedBlocks::Piece> SharedBlocks::add(const Key& key) {
  auto piece = std::make_shared<Piece>(runtime_.loop, key);
  piece->used_at = runtime_.loop.now();
  pieces_.emplace(key, piece);
  if (!std::exchange(sweeping_, true)) scope_.spawn(sweep(this));
  return piece;
}

Task<SharedBlocks::Blocks> SharedBlocks::get(std::shared_ptr<Reader> reader, DataGroup group, Key key,
                                             std::uint64_t blocks) {
  std::shared_ptr<Piece> piece;
  while (!piece) {
    if (const auto found = pieces_.find(key); found != pieces_.end())
      piece = found->second;
    else if (make_room(*reader, key))
      piece = add(key);
    else {
      if (!std::exchange(reader->waits_, true)) ++stats_.waits;
      co_await room_.wait();
    }
  }
  reader->waits_ = false;
  struct Use {
    SharedBlocks& all;
    std::shared_ptr<Piece> piece;
    Use(SharedBlocks& a, std::shared_ptr<Piece> p) : all(a), piece(std::move(p)) { ++piece->users; }
    Use(const Use&) = delete;
    ~Use() {
      if (--piece->users > 0) return;
      all.room_.notify_all();
      // One that could not be read at all is not worth its place.
      if (piece->valid == 0 && piece->fetches.empty())
        if (const auto found = all.pieces_.find(piece->key); found != all.pieces_.end() && found->second == piece)
          all.pieces_.erase(found);
    }
  } const use(*this, piece);
  for (const auto& one : fetch(reader, group, piece, blocks)) {
    while (!one->end) co_await piece->changed.wait();
    if (!*one->end) co_return fail(one->end->error());
  }
  piece->used_at = runtime_.loop.now();
  assert((piece->valid & blocks) == blocks);
  co_return Blocks{.piece = Buffer(piece->unit.owner, piece->unit.bytes), .chunk_length = piece->chunk_length};
}

void SharedBlocks::ahead(const std::shared_ptr<Reader>& reader, DataGroup group, const Key& key, std::uint64_t blocks) {
  const auto found = pieces_.find(key);
  if (found != pieces_.end()) {
    fetch(reader, group, found->second, blocks);
    return;
  }
  // What is read ahead takes half of the room at most, and no place of what somebody wants.
  const auto in_use = std::ranges::count_if(
      pieces_, [this](const auto& entry) { return !entry.second->idle() || wanted(entry.first); });
  if (static_cast<std::size_t>(in_use) > options_.pieces_max / 2) return;
  if (pieces_.size() >= options_.pieces_max && !drop_unwanted()) return;
  fetch(reader, group, add(key), blocks);
}

void SharedBlocks::done_with(Reader& reader, const Key& key, std::uint64_t blocks) {
  stats_.served_bytes += static_cast<std::uint64_t>(std::popcount(blocks)) * kBlockBytes;
  if (const auto index = reader.index_of(key)) reader.pass(*index + 1);
}

std::vector<std::shared_ptr<SharedBlocks::Fetch>> SharedBlocks::fetch(const std::shared_ptr<Reader>& reader,
                                                                      DataGroup group,
                                                                      const std::shared_ptr<Piece>& piece,
                                                                      std::uint64_t blocks) {
  auto out = piece->fetches;
  std::erase_if(out, [blocks](const auto& f) { return (f->blocks & blocks) == 0; });
  auto missing = blocks & ~(piece->valid | piece->coming());
  while (missing != 0) {
    const auto first = std::countr_zero(missing);
    const auto count = std::countr_one(missing >> first);
    auto one = std::make_shared<Fetch>();
    one->blocks = (~std::uint64_t{0} >> (64 - count)) << first;
    missing &= ~one->blocks;
    piece->fetches.push_back(one);
    out.push_back(one);
    scope_.spawn(run_fetch(this, reader, group, piece, std::move(one)));
  }
  return out;
}

Task<void> SharedBlocks::run_fetch(SharedBlocks* self, std::shared_ptr<Reader> reader, DataGroup group,
                                   std::shared_ptr<Piece> piece, std::shared_ptr<Fetch> fetch) {
  auto length = co_await self->read(group, piece, fetch->blocks);
  std::erase(piece->fetches, fetch);
  if (length) {
    piece->valid |= fetch->blocks;
    piece->chunk_length = *length;
    const auto begin = piece->key.second * self->units_.unit_bytes() +
                       static_cast<std::uint64_t>(std::countr_zero(fetch->blocks)) * kBlockBytes;
    const auto bytes =
        std::min(static_cast<std::uint64_t>(std::popcount(fetch->blocks)) * kBlockBytes, *length - begin);
    reader->from_disk_ += bytes;
    self->stats_.read_bytes += bytes;
    fetch->end = Result<void>();
  } else {
    fetch->end = Result<void>(fail(std::move(length).error()));
  }
  piece->changed.notify_all();
  self->room_.notify_all();
  co_return {};
}

Task<std::uint32_t> SharedBlocks::read(DataGroup group, std::shared_ptr<Piece> piece, std::uint64_t blocks) {
  while (!piece->unit.owner) {
    if (piece->unit_coming) {
      co_await piece->changed.wait();
      continue;
    }
    piece->unit_coming = true;
    auto unit = co_await units_.acquire();
    piece->unit_coming = false;
    if (!unit) co_return fail(std::move(unit).error());
    piece->unit = *std::move(unit);
    piece->changed.notify_all();
  }
  const auto first = static_cast<std::uint64_t>(std::countr_zero(blocks)) * kBlockBytes;
  const auto size = static_cast<std::uint64_t>(std::popcount(blocks)) * kBlockBytes;
  rt::MutableBuffer into{.owner = piece->unit.owner, .bytes = piece->unit.bytes.subspan(first, size)};
  const auto offset = piece->key.second * units_.unit_bytes() + first;
  co_return co_await chunks_.read_into(group, piece->key.first, static_cast<std::uint32_t>(offset),
                                       static_cast<std::uint32_t>(size), std::move(into));
}

/// As long as something is held: drops what was not used for a while, and wakes who waits for readers that stand still.
Task<void> SharedBlocks::sweep(SharedBlocks* self) {
  while (!self->pieces_.empty()) {
    co_await self->runtime_.loop.sleep(std::min(self->options_.hold, self->options_.wait) / 2);
    const auto now = self->runtime_.loop.now();
    std::erase_if(self->pieces_, [&](const auto& entry) {
      return entry.second->idle() && now - entry.second->used_at >= self->options_.hold && !self->wanted(entry.first);
    });
    self->room_.notify_all();
  }
  self->sweeping_ = false;
  co_return {};
}

/// Somebody finds the pool empty.
void SharedBlocks::give_way() {
  auto victim = pieces_.end();
  bool victim_wanted = true;
  for (auto it = pieces_.begin(); it != pieces_.end(); ++it) {
    if (!it->second->idle() || !it->second->unit.owner) continue;
    const bool is_wanted = wanted(it->first);
    if (victim == pieces_.end() || is_wanted < victim_wanted ||
        (is_wanted == victim_wanted && it->second->used_at < victim->second->used_at)) {
      victim = it;
      victim_wanted = is_wanted;
    }
  }
  if (victim != pieces_.end()) pieces_.erase(victim);
}

}  // namespace cairn::server
