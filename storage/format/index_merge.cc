#include "storage/format/index_merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "storage/format/page_codec.h"

namespace cairn::format {

using namespace pages;

struct EntryStream::State {
  std::uint64_t index_bytes = 0;
  std::uint64_t position = 0;  // of the first buffered byte, in the index
  std::string buffer;
  std::size_t used = 0;  // bytes at the front of the buffer that were read
  std::uint64_t wanted = kHeaderBytes;
  std::uint64_t entries = 0;
  std::string page;  // being read; its own memory, so that the buffer may grow meanwhile
  std::optional<EntriesReader> reader;
  bool ended = false;

  std::string what() const { return fmt::format("index page at {}", position); }

  std::string_view rest() const { return std::string_view(buffer).substr(used); }
  void take(std::size_t size) {
    used += size;
    position += size;
  }

  /// Opens the next page of entries. False: hungry, or the root was read.
  Result<bool> open_page() {
    for (;;) {
      if (position == index_bytes) return fail(Errc::kDataLoss, "index: does not end with a root page");
      const auto left = index_bytes - position;
      wanted = kHeaderBytes;
      if (rest().size() >= kHeaderBytes) {
        Reader header(rest().substr(12, 4));
        wanted += header.u32();
      }
      if (wanted > left || (rest().size() >= kHeaderBytes && wanted > kEntryBytesMax))
        return fail(Errc::kDataLoss, fmt::format("{}: longer than the index", what()));
      if (rest().size() < wanted) return false;
      const auto bytes = rest().substr(0, wanted);
      TRY(const auto opened, pages::open(bytes, what()));
      switch (opened.kind) {
        case PageKind::kFences:
          take(wanted);
          continue;
        case PageKind::kRoot: {
          if (wanted != left) return fail(Errc::kDataLoss, fmt::format("{}: bytes after the root", what()));
          TRY(const auto root, decode_root(bytes, index_bytes));
          const auto& totals = root.totals;
          if (totals.shards + totals.blobs + totals.tokens + totals.meta != entries)
            return fail(Errc::kDataLoss, "index: its root counts other entries than its pages hold");
          take(wanted);
          ended = true;
          return false;
        }
        case PageKind::kEntries:
          break;
        default:
          return fail(Errc::kDataLoss, fmt::format("{}: of an unknown kind", what()));
      }
      if (opened.level != 0 || (opened.count > 1 && bytes.size() > kPageBytesMax))
        return fail(Errc::kDataLoss, fmt::format("{}: {} bytes are too many", what(), bytes.size()));
      page.assign(bytes);
      take(wanted);
      reader.emplace(Page{.kind = opened.kind,
                          .level = opened.level,
                          .count = opened.count,
                          .crc = opened.crc,
                          .body = std::string_view(page).substr(kHeaderBytes)});
      return true;
    }
  }
};

EntryStream::EntryStream(std::uint64_t index_bytes) : state_(std::make_unique<State>()) {
  state_->index_bytes = index_bytes;
}
EntryStream::EntryStream(EntryStream&&) noexcept = default;
EntryStream& EntryStream::operator=(EntryStream&&) noexcept = default;
EntryStream::~EntryStream() = default;

void EntryStream::supply(std::string_view bytes) {
  auto& s = *state_;
  s.buffer.erase(0, std::exchange(s.used, 0));
  s.buffer += bytes;
}
std::uint64_t EntryStream::buffered() const {
  return state_->buffer.size() - state_->used;
}
std::uint64_t EntryStream::wanted() const {
  return state_->wanted;
}
const Entry& EntryStream::entry() const {
  return state_->reader->entry();
}
Entry& EntryStream::entry() {
  return state_->reader->entry();
}

Result<EntryStream::Next> EntryStream::next() {
  auto& s = *state_;
  for (;;) {
    if (s.ended) return Next::kEnd;
    if (!s.reader) {
      TRY(const bool opened, s.open_page());
      if (!opened) return s.ended ? Next::kEnd : Next::kHungry;
    }
    auto more = s.reader->next();
    if (!more) return fail(std::move(more).error().with(s.what()));
    if (*more) {
      ++s.entries;
      return Next::kEntry;
    }
    s.reader.reset();
  }
}

IndexMerge::IndexMerge(const std::vector<std::uint64_t>& index_bytes, Check check)
    : check_(std::move(check)), losers_(index_bytes.size()), over_(index_bytes.size(), false) {
  for (const auto bytes : index_bytes) streams_.emplace_back(bytes);
}

Result<bool> IndexMerge::advance(std::size_t source) {
  auto next = streams_[source].next();
  Result<void> checked;
  if (next && *next == EntryStream::Next::kEntry && check_) checked = check_(source, streams_[source].entry());
  if (!next || !checked) {
    failed_ = source;
    return next ? fail(std::move(checked).error()) : fail(std::move(next).error());
  }
  hungry_.reset();
  if (*next == EntryStream::Next::kHungry) hungry_ = source;
  if (*next == EntryStream::Next::kEnd) {
    over_[source] = true;
    ++ended_;
  }
  return !hungry_;
}

bool IndexMerge::before(std::uint32_t a, std::uint32_t b) const {
  if (over_[a] || over_[b]) return over_[a] == over_[b] ? a < b : over_[b];
  const auto c = order(streams_[a].entry(), streams_[b].entry());
  return c != 0 ? c < 0 : a < b;
}

// Node i has the children 2i and 2i + 1; nodes n .. 2n - 1 are the sources. Works for any n.
std::uint32_t IndexMerge::build(std::size_t node) {
  if (node >= streams_.size()) return static_cast<std::uint32_t>(node - streams_.size());
  const auto left = build(2 * node), right = build(2 * node + 1);
  const bool left_wins = before(left, right);
  losers_[node] = left_wins ? right : left;
  return left_wins ? left : right;
}

void IndexMerge::replay(std::uint32_t source) {
  for (auto node = (source + streams_.size()) / 2; node >= 1; node /= 2)
    if (before(losers_[node], source)) std::swap(losers_[node], source);
  winner_ = source;
}

Result<const Entry*> IndexMerge::next() {
  if (!built_) {
    for (; begun_ < streams_.size(); ++begun_) {
      TRY(const bool has, advance(begun_));
      if (!has) return nullptr;
    }
    built_ = true;
    if (!streams_.empty()) winner_ = build(1);
  } else if (taken_) {
    TRY(const bool has, advance(winner_));
    if (!has) return nullptr;
    taken_ = false;
    replay(winner_);
  }
  if (ended()) return nullptr;
  taken_ = true;
  return &std::as_const(streams_[winner_]).entry();
}

}  // namespace cairn::format
