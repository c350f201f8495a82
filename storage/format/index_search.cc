#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "storage/format/box.h"
#include "storage/format/index_pages.h"
#include "storage/format/page_codec.h"

namespace cairn::format {
namespace {

using namespace pages;

std::string what_of(const Fence& ref) {
  return fmt::format("index page at {}", ref.offset);
}

Result<Page> open_named(std::string_view bytes, const Fence& ref) {
  TRY(auto page, pages::open(bytes, what_of(ref)));
  const auto kind = ref.level == 0 ? PageKind::kEntries : PageKind::kFences;
  if (bytes.size() != ref.size || page.crc != ref.crc || page.kind != kind || page.level != ref.level)
    return fail(Errc::kDataLoss, fmt::format("{}: not the page that its fence names", what_of(ref)));
  return page;
}

/// `found` is called for the entries of a page, in order.
template <class Found>
Result<void> each_entry(std::string_view bytes, const Fence& ref, Found found) {
  TRY(const auto page, open_named(bytes, ref));
  if (page.count > 1 && bytes.size() > kPageBytesMax)
    return fail(Errc::kDataLoss, fmt::format("{}: {} bytes are too many", what_of(ref), bytes.size()));
  EntriesReader entries(page);
  for (;;) {
    auto next = entries.next();
    if (!next) return fail(std::move(next).error().with(what_of(ref)));
    if (!*next) return {};
    found(entries.entry());
  }
}

/// May `query` match an entry between the first and last one of `fence`?
bool may_match(const Query& query, const Fence& fence) {
  const auto key = std::tie(query.kind, query.name);
  if (key > std::tie(fence.last_kind, fence.last_name)) return false;
  if (key < std::tie(fence.kind, fence.name) &&
      !(query.prefix && query.kind == fence.kind && fence.name.starts_with(query.name)))
    return false;
  const bool whole_box = !query.box || empty(*query.box);
  if (whole_box || !fence.bounds || fence.bounds->shape.size() != query.box->shape.size()) return true;
  return intersect(*fence.bounds, *query.box).has_value();
}

bool matches(const Query& query, const Entry& entry) {
  if (query.kind != kind_of(entry)) return false;
  const auto name = name_in(entry);
  if (query.prefix ? !name.starts_with(query.name) : name != query.name) return false;
  const auto* shard = std::get_if<ShardEntry>(&entry);
  if (shard == nullptr || !query.box || empty(*query.box)) return true;
  if (shard->box.shape.size() != query.box->shape.size()) return true;  // the plan will refuse it with a reason
  return empty(shard->box) || intersect(shard->box, *query.box).has_value();
}

/// Queries of equal or greater (kind, name) begin here.
auto first_from(const std::vector<Query>& queries, Kind kind, std::string_view name) {
  return std::ranges::lower_bound(queries, std::pair(kind, name), {},
                                  [](const Query& q) { return std::pair(q.kind, std::string_view(q.name)); });
}

}  // namespace

Result<Root> decode_root(std::string_view bytes, std::uint64_t index_bytes) {
  TRY(const auto page, pages::open(bytes, "index root"));
  Reader reader(page.body);
  const auto version = reader.u32(), reader_version = reader.u32();
  Root out;
  out.index_bytes = reader.u64();
  if (page.kind != PageKind::kRoot || reader.failed()) return fail(Errc::kDataLoss, "index root: not a root page");
  if (reader_version > kFormatVersion)
    return fail(Errc::kInvalid,
                fmt::format("index of format {} needs a reader of version {}; this program is version {}: "
                            "upgrade it",
                            version, reader_version, kFormatVersion));
  if (out.index_bytes != index_bytes || bytes.size() > index_bytes || page.level == 0 || page.level > kLevelsMax)
    return fail(Errc::kDataLoss, fmt::format("index root: names {} bytes and {} levels in an index of {} bytes",
                                             out.index_bytes, page.level, index_bytes));
  for (auto* total : {&out.totals.tensors, &out.totals.shards, &out.totals.blobs, &out.totals.tokens, &out.totals.meta,
                      &out.totals.bytes})
    *total = reader.varint();
  out.levels = page.level;
  TRY(out.fences, fences_in(reader, page.count, static_cast<std::uint8_t>(page.level - 1), 0,
                            index_bytes - bytes.size(), "index root"));
  if (reader.u32() != bytes.size() || reader.raw(4) != "CnRt" || reader.left() != 0)
    return fail(Errc::kDataLoss, "index root: does not end as a root");
  return out;
}

Result<std::vector<Fence>> decode_fences(std::string_view bytes, const Fence& ref) {
  TRY(const auto page, open_named(bytes, ref));
  if (ref.level == 0) return fail(Errc::kDataLoss, fmt::format("{}: holds no fences", what_of(ref)));
  Reader reader(page.body);
  TRY(auto out,
      fences_in(reader, page.count, static_cast<std::uint8_t>(ref.level - 1), ref.begin, ref.offset, what_of(ref)));
  if (reader.left() != 0) return fail(Errc::kDataLoss, fmt::format("{}: bytes after its fences", what_of(ref)));
  return out;
}

Result<Contents> decode_entries(std::string_view bytes, const Fence& ref) {
  Contents out;
  CHECK_OK(each_entry(bytes, ref, [&out](const Entry& entry) { append(out, entry); }));
  return out;
}

std::vector<Entry> entries_of(Contents contents) {
  std::vector<Entry> out;
  out.reserve(contents.shards.size() + contents.blobs.size() + contents.tokens.size() + contents.meta.size());
  for (auto& one : contents.shards) out.emplace_back(std::move(one));
  for (auto& one : contents.blobs) out.emplace_back(std::move(one));
  for (auto& one : contents.tokens) out.emplace_back(std::move(one));
  for (auto& one : contents.meta) out.emplace_back(std::move(one));
  return out;
}

void append(Contents& to, Entry entry) {
  switch (entry.index()) {
    case 0:
      return to.shards.push_back(std::get<ShardEntry>(std::move(entry)));
    case 1:
      return to.blobs.push_back(std::get<BlobEntry>(std::move(entry)));
    case 2:
      return to.tokens.push_back(std::get<TokenEntry>(std::move(entry)));
    default:
      return to.meta.push_back(std::get<MetaEntry>(std::move(entry)));
  }
}

IndexSearch::IndexSearch(Root root, std::vector<Query> queries)
    : queries_(std::move(queries)), everything_(queries_.empty()) {
  std::ranges::sort(queries_, {}, [](const Query& q) { return std::tie(q.kind, q.name); });
  prefixes_ = std::ranges::any_of(queries_, &Query::prefix);
  for (auto& fence : root.fences)
    if (may_hold(fence)) wanted_.push_back(std::move(fence));
}

bool IndexSearch::may_hold(const Fence& fence) const {
  if (everything_) return true;
  // Without prefixes only queries between the fence's first and last name count.
  auto query = prefixes_ ? queries_.begin() : first_from(queries_, fence.kind, fence.name);
  for (; query != queries_.end(); ++query) {
    if (std::tie(query->kind, query->name) > std::tie(fence.last_kind, fence.last_name)) return false;
    if (may_match(*query, fence)) return true;
  }
  return false;
}

bool IndexSearch::is_wanted(const Entry& entry) const {
  if (everything_) return true;
  if (prefixes_) return std::ranges::any_of(queries_, [&](const Query& query) { return matches(query, entry); });
  const auto name = name_in(entry);
  for (auto query = first_from(queries_, kind_of(entry), name);
       query != queries_.end() && query->kind == kind_of(entry) && query->name == name; ++query)
    if (matches(*query, entry)) return true;
  return false;
}

std::vector<Fence> IndexSearch::wanted() {
  std::ranges::sort(wanted_, {}, &Fence::offset);
  return std::exchange(wanted_, {});
}

Result<void> IndexSearch::supply(const Fence& page, std::string_view bytes) {
  if (page.level != 0) {
    TRY(auto fences, decode_fences(bytes, page));
    for (auto& fence : fences)
      if (may_hold(fence)) wanted_.push_back(std::move(fence));
    return {};
  }
  return each_entry(bytes, page, [this](const Entry& entry) {
    if (is_wanted(entry)) append(found_, entry);
  });
}

Contents IndexSearch::take() {
  sort(found_);
  return std::exchange(found_, {});
}

Result<std::string_view> root_of(std::string_view whole) {
  if (whole.size() >= kHeaderBytes + kTrailerBytes) {
    Reader reader(whole.substr(whole.size() - kTrailerBytes));
    const auto size = reader.u32();
    if (reader.raw(4) == "CnRt" && size <= whole.size()) return whole.substr(whole.size() - size);
  }
  return fail(Errc::kDataLoss, "index: does not end with a root page");
}

Result<Contents> decode(std::string_view whole) {
  TRY(const auto root_page, root_of(whole));
  TRY(auto root, decode_root(root_page, whole.size()));
  const auto totals = root.totals;
  IndexSearch search(std::move(root), {});
  for (auto pages = search.wanted(); !pages.empty(); pages = search.wanted())
    for (const auto& page : pages) CHECK_OK(search.supply(page, whole.substr(page.offset, page.size)));
  auto out = search.take();
  Totals found;
  const Entry* before = nullptr;
  const auto entries = entries_of(out);
  for (const auto& entry : entries) {
    if (before != nullptr && order(*before, entry) >= 0)
      return fail(Errc::kDataLoss, fmt::format("index: entry '{}' stands twice", name_in(entry)));
    if (const auto* shard = std::get_if<ShardEntry>(&entry)) {
      ++found.shards;
      if (before == nullptr || std::get<ShardEntry>(*before).tensor != shard->tensor) ++found.tensors;
      TRY(const auto bytes, saved_bytes(*shard));
      found.bytes += bytes;
    } else if (const auto* blob = std::get_if<BlobEntry>(&entry)) {
      ++found.blobs;
      found.bytes += blob->size;
    } else {
      ++(std::holds_alternative<TokenEntry>(entry) ? found.tokens : found.meta);
    }
    before = &entry;
  }
  if (found != totals) return fail(Errc::kDataLoss, "index: its root counts other entries than its pages hold");
  return out;
}

}  // namespace cairn::format
