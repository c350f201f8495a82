#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "proto/common/checksum.h"
#include "storage/format/index_pages.h"
#include "storage/format/page_codec.h"

namespace cairn::format {
namespace {

using namespace pages;

void grow(Box& sum, const Box& next) {
  for (std::size_t d = 0; d < sum.shape.size(); ++d) {
    const auto end = std::max(sum.offset[d] + sum.shape[d], next.offset[d] + next.shape[d]);
    sum.offset[d] = std::min(sum.offset[d], next.offset[d]);
    sum.shape[d] = end - sum.offset[d];
  }
}

/// What a page's fence says of the entries below, gathered from their fences in order.
void widen(std::optional<Fence>& sum, const Fence& next) {
  if (!sum) {
    sum = next;
    return;
  }
  sum->last_kind = next.last_kind;
  sum->last_name = next.last_name;
  sum->entries += next.entries;
  sum->tensors += next.tensors;
  if (sum->bounds && next.bounds && sum->name == next.last_name &&
      sum->bounds->shape.size() == next.bounds->shape.size())
    grow(*sum->bounds, *next.bounds);
  else
    sum->bounds.reset();
}

/// The same for one entry more. Of the millions in an index most are of the tensor before: nothing is copied for them.
void widen(std::optional<Fence>& sum, const Entry& entry, bool new_tensor) {
  const auto* shard = std::get_if<ShardEntry>(&entry);
  const auto name = name_in(entry);
  if (!sum) {
    sum.emplace();
    sum->kind = kind_of(entry);
    sum->name = sum->last_name = name;
    if (shard != nullptr) sum->bounds = shard->box;
  }
  sum->last_kind = kind_of(entry);
  if (sum->last_name != name) sum->last_name = name;
  sum->entries += 1;
  sum->tensors += new_tensor ? 1 : 0;
  if (sum->bounds && shard != nullptr && sum->name == name)
    grow(*sum->bounds, shard->box);
  else
    sum->bounds.reset();
}

/// What order() looks at.
Entry key_of(const Entry& entry) {
  if (const auto* shard = std::get_if<ShardEntry>(&entry)) {
    ShardEntry out{.tensor = shard->tensor,
                   .dtype = shard->dtype,
                   .global_shape = shard->global_shape,
                   .box = shard->box,
                   .holder = shard->holder,
                   .rank = shard->rank,
                   .crc = 0,
                   .extents = {}};
    return out;
  }
  if (const auto* blob = std::get_if<BlobEntry>(&entry))
    return BlobEntry{.name = blob->name, .rank = blob->rank, .size = 0, .crc = 0, .extents = {}};
  if (const auto* token = std::get_if<TokenEntry>(&entry))
    return TokenEntry{.stream = token->stream, .bytes = {}, .rank = token->rank};
  const auto& meta = std::get<MetaEntry>(entry);
  return MetaEntry{.scope = meta.scope, .key = meta.key, .value = {}, .rank = meta.rank};
}

/// last = key_of(entry), cheaply when both are shards of one tensor.
void remember(std::optional<Entry>& last, const Entry& entry) {
  auto* before = last ? std::get_if<ShardEntry>(&*last) : nullptr;
  const auto* shard = std::get_if<ShardEntry>(&entry);
  if (before == nullptr || shard == nullptr || before->tensor != shard->tensor) {
    last = key_of(entry);
    return;
  }
  before->dtype = shard->dtype;
  before->global_shape = shard->global_shape;
  before->box = shard->box;
  before->holder = shard->holder;
  before->rank = shard->rank;
}

/// The fence page of one level that is being filled.
struct Level {
  std::string body;
  std::uint32_t count = 0;
  std::uint64_t begin = 0;  // where the first page below begins
  std::uint64_t end = 0;    // of the last page named
  std::string name;         // of the last fence
  std::optional<Fence> sum;
  bool flushed = false;  // a page of this level has been written
};

}  // namespace

struct IndexWriter::State {
  Out out;
  std::uint64_t position = 0;
  EntriesBuilder page;
  std::optional<Fence> page_sum;
  std::vector<Level> levels;  // [0] names pages of level 0
  std::optional<Entry> last;  // its key only
  Totals totals;

  Result<void> write(std::string_view bytes) {
    position += bytes.size();
    return out(bytes);
  }

  Result<void> flush_entries() {
    if (page.empty()) return {};
    Fence fence = std::move(*std::exchange(page_sum, std::nullopt));
    const auto bytes = seal(PageKind::kEntries, 0, page.count(), page.body(), fence.crc);
    page.clear();
    fence.begin = fence.offset = position;
    fence.size = static_cast<std::uint32_t>(bytes.size());
    CHECK_OK(write(bytes));
    return add_fence(0, std::move(fence));
  }

  /// Names a page of level `below` in the fence page above it; full ones are written and named in turn.
  Result<void> add_fence(std::size_t below, Fence fence) {
    for (;; ++below) {
      if (levels.size() <= below) levels.emplace_back();
      auto& level = levels[below];
      if (level.count == 0) level.begin = level.end = fence.begin;
      put_fence(level.body, fence, level.name, level.end);
      ++level.count;
      level.end = fence.offset + fence.size;
      level.name = fence.name;
      widen(level.sum, fence);
      if (level.body.size() < kPageBytes - 4096) return {};  // a fence is at most that long
      TRY(fence, flush_level(below));
    }
  }

  Result<Fence> flush_level(std::size_t below) {
    auto& level = levels[below];
    Fence fence = std::move(*level.sum);
    fence.level = static_cast<std::uint8_t>(below + 1);
    fence.begin = level.begin;
    const auto bytes = seal(PageKind::kFences, fence.level, level.count, level.body, fence.crc);
    fence.offset = position;
    fence.size = static_cast<std::uint32_t>(bytes.size());
    level = {};
    level.flushed = true;
    CHECK_OK(write(bytes));
    return fence;
  }
};

Kind kind_of(const Entry& entry) {
  return static_cast<Kind>(entry.index() + 1);
}

IndexWriter::IndexWriter(Out out) : state_(std::make_unique<State>()) {
  state_->out = std::move(out);
}
IndexWriter::IndexWriter(IndexWriter&&) noexcept = default;
IndexWriter& IndexWriter::operator=(IndexWriter&&) noexcept = default;
IndexWriter::~IndexWriter() = default;

Result<void> IndexWriter::add(const Entry& entry) {
  CHECK_OK(check_entry(entry));
  return add_checked(entry);
}

Result<void> IndexWriter::add_checked(const Entry& entry) {
  auto& s = *state_;
  if (s.last && order(*s.last, entry) >= 0)
    return fail(Errc::kInvalid, fmt::format("index entry '{}': twice, or out of order", name_in(entry)));
  bool new_tensor = false;
  auto& totals = s.totals;
  if (const auto* shard = std::get_if<ShardEntry>(&entry)) {
    const auto* last = s.last ? std::get_if<ShardEntry>(&*s.last) : nullptr;
    new_tensor = last == nullptr || last->tensor != shard->tensor;
    if (!new_tensor && (last->global_shape.size() != shard->global_shape.size()))
      return fail(Errc::kInvalid, fmt::format("tensor '{}': shards of different dimensions", shard->tensor));
    ++totals.shards;
    totals.tensors += new_tensor ? 1 : 0;
    TRY(const auto bytes, saved_bytes(*shard));
    totals.bytes += bytes;
  } else if (const auto* blob = std::get_if<BlobEntry>(&entry)) {
    ++totals.blobs;
    totals.bytes += blob->size;
  } else {
    ++(std::holds_alternative<TokenEntry>(entry) ? totals.tokens : totals.meta);
  }
  const auto* last_entry = s.last ? &*s.last : nullptr;
  TRY(bool added, s.page.add(entry, last_entry));
  if (!added) {
    CHECK_OK(s.flush_entries());
    TRY(added, s.page.add(entry, last_entry));
  }
  widen(s.page_sum, entry, new_tensor);
  remember(s.last, entry);
  return {};
}

Result<IndexWriter::Written> IndexWriter::finish() {
  auto& s = *state_;
  CHECK_OK(s.flush_entries());
  if (s.levels.empty()) s.levels.emplace_back();
  // Levels of which a page is written need a level above; the first other one becomes the root.
  std::size_t top = 0;
  for (; s.levels[top].flushed; ++top) {
    if (s.levels[top].count == 0) {
      if (s.levels.size() == top + 1) s.levels.emplace_back();
      continue;
    }
    TRY(auto fence, s.flush_level(top));
    CHECK_OK(s.add_fence(top + 1, std::move(fence)));
  }
  const auto& level = s.levels[top];
  const auto make = [&](std::uint64_t root_bytes) {
    std::string body;
    put_u32(body, kFormatVersion);
    put_u32(body, kReaderVersionMin);
    put_u64(body, s.position + root_bytes);
    for (const auto value :
         {s.totals.tensors, s.totals.shards, s.totals.blobs, s.totals.tokens, s.totals.meta, s.totals.bytes})
      put_varint(body, value);
    body += level.body;
    put_u32(body, static_cast<std::uint32_t>(root_bytes));
    body += "CnRt";
    std::uint32_t crc = 0;
    return seal(PageKind::kRoot, static_cast<std::uint8_t>(top + 1), level.count, body, crc);
  };
  const auto root = make(make(0).size());  // its length does not depend on the value of its fields of fixed size
  Written out{.index_bytes = s.position + root.size(),
              .root_bytes = static_cast<std::uint32_t>(root.size()),
              .root_digest = sha256(root),
              .totals = s.totals};
  CHECK_OK(s.write(root));
  return out;
}

Result<std::string> encode(Contents contents) {
  sort(contents);
  std::string out;
  IndexWriter writer([&out](std::string_view bytes) -> Result<void> {
    out += bytes;
    return {};
  });
  for (auto& entry : entries_of(std::move(contents))) CHECK_OK(writer.add(entry));
  CHECK_OK(writer.finish());
  return out;
}

}  // namespace cairn::format
