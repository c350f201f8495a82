#include "storage/format/coverage.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>

#include "storage/format/box.h"

namespace cairn::format {
namespace {

/// "rank 3", "ranks 3, 5 and 9", "ranks 0, 1, ... (64 ranks)"
std::string ranks_text(std::vector<std::uint32_t> ranks) {
  constexpr std::size_t kNamedMax = 8;
  std::ranges::sort(ranks);
  ranks.erase(std::ranges::unique(ranks).begin(), ranks.end());
  if (ranks.size() == 1) return fmt::format("rank {}", ranks[0]);
  if (ranks.size() > kNamedMax)
    return fmt::format("ranks {}, ... ({} ranks)", fmt::join(std::span(ranks).first(kNamedMax), ", "), ranks.size());
  return fmt::format("ranks {} and {}", fmt::join(std::span(ranks).first(ranks.size() - 1), ", "), ranks.back());
}

std::string ranks_text(std::span<const ShardEntry> shards) {
  std::vector<std::uint32_t> ranks;
  for (const auto& shard : shards) ranks.push_back(shard.rank);
  return ranks_text(std::move(ranks));
}

std::string shape_text(const ShardEntry& shard) {
  return fmt::format("{}[{}]", name_of(shard.dtype), fmt::join(shard.global_shape, ", "));
}

Result<void> check_same_tensor(std::span<const ShardEntry> shards) {
  const auto& first = shards.front();
  for (const auto& shard : shards.subspan(1))
    if (shard.dtype != first.dtype || shard.global_shape != first.global_shape)
      return fail(Errc::kConflict, fmt::format("tensor '{}': rank {} says {}, rank {} says {}", first.tensor,
                                               first.rank, shape_text(first), shard.rank, shape_text(shard)));
  return {};
}

/// Entries of one box, sorted: copies without holder first, then parts. Returns how many of the first to keep.
Result<std::size_t> check_same_box(std::span<const ShardEntry> shards) {
  const auto& first = shards.front();
  const auto where = [&] { return fmt::format("tensor '{}' box {}", first.tensor, text(first.box)); };
  const auto parts = std::ranges::find_if(shards, [](const auto& shard) { return shard.holder.has_value(); });
  const auto copies = static_cast<std::size_t>(parts - shards.begin());
  if (copies == shards.size()) {
    for (const auto& shard : shards)
      if (shard.crc != first.crc)
        return fail(Errc::kConflict, fmt::format("{}: ranks {} and {} saved different bytes (CRC {:08x} and {:08x}); "
                                                 "copies that differ have drifted apart",
                                                 where(), first.rank, shard.rank, first.crc, shard.crc));
    return 1;
  }
  if (copies != 0)
    return fail(Errc::kConflict, fmt::format("{}: saved whole by {} and in holders' parts by {}", where(),
                                             ranks_text(shards.first(copies)), ranks_text(shards.subspan(copies))));
  for (const auto& shard : shards)
    if (shard.holder->count != first.holder->count)
      return fail(Errc::kConflict, fmt::format("{}: rank {} says {} holders, rank {} says {}", where(), first.rank,
                                               first.holder->count, shard.rank, shard.holder->count));
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const auto index = shards[i].holder->index;
    if (index == i) continue;
    if (index < i)
      return fail(Errc::kConflict, fmt::format("{}: ranks {} and {} both say holder {} of {}", where(),
                                               shards[i - 1].rank, shards[i].rank, index, first.holder->count));
    return fail(Errc::kConflict, fmt::format("{}: holder {} of {} is missing (holders so far: {})", where(), i,
                                             first.holder->count, ranks_text(shards)));
  }
  if (shards.size() != first.holder->count)
    return fail(Errc::kConflict, fmt::format("{}: holder {} of {} is missing (holders so far: {})", where(),
                                             shards.size(), first.holder->count, ranks_text(shards)));
  return shards.size();
}

Failure flaw_error(const Flaw& flaw, std::span<const ShardEntry> shards) {
  const auto& tensor = shards.front().tensor;
  if (flaw.covered == 0)
    return fail(Errc::kConflict,
                fmt::format("tensor '{}': no rank saved {} of {}", tensor, text(flaw.box), shape_text(shards.front())));
  std::vector<std::uint32_t> ranks;
  std::string boxes;
  const Box* last = nullptr;
  for (const auto& shard : shards) {
    if (!inside(flaw.box, shard.box)) continue;
    ranks.push_back(shard.rank);
    if ((last == nullptr || *last != shard.box) && boxes.size() < 200)
      boxes += (boxes.empty() ? "" : ", ") + text(shard.box);
    last = &shard.box;
  }
  return fail(Errc::kConflict, fmt::format("tensor '{}': {} is saved {} times, by {} (boxes {})", tensor,
                                           text(flaw.box), flaw.covered, ranks_text(std::move(ranks)), boxes));
}

Failure order_error(std::string_view what) {
  return fail(Errc::kInvalid, fmt::format("{}: entry out of order", what));
}

Result<bool> same_again(const TokenEntry& token, const TokenEntry& last) {
  if (token.stream != last.stream) return false;
  if (token.bytes == last.bytes) return true;
  return fail(Errc::kConflict,
              fmt::format("stream '{}': the tokens of ranks {} and {} differ", token.stream, last.rank, token.rank));
}
Result<bool> same_again(const MetaEntry& meta, const MetaEntry& last) {
  if (meta.scope != last.scope || meta.key != last.key) return false;
  if (meta.value == last.value) return true;
  return fail(Errc::kConflict, fmt::format("metadata '{}' of '{}': the values of ranks {} and {} differ", meta.key,
                                           meta.scope, last.rank, meta.rank));
}
Result<bool> same_again(const BlobEntry& blob, const BlobEntry& last) {
  if (blob.name != last.name || blob.rank != last.rank) return false;
  return fail(Errc::kConflict, fmt::format("blob '{}': saved twice by rank {}", blob.name, blob.rank));
}
Result<bool> same_again(const ShardEntry&, const ShardEntry&) {
  return false;
}

std::string_view name_in(const Entry& entry) {
  if (const auto* blob = std::get_if<BlobEntry>(&entry)) return blob->name;
  if (const auto* token = std::get_if<TokenEntry>(&entry)) return token->stream;
  if (const auto* meta = std::get_if<MetaEntry>(&entry)) return meta->scope;
  return std::get<ShardEntry>(entry).tensor;
}

}  // namespace

Result<void> Coverage::add(Entry entry) {
  CHECK_OK(check_entry(entry));
  if (auto* shard = std::get_if<ShardEntry>(&entry)) {
    if (last_) return order_error(shard->tensor);
    if (!tensor_.empty()) {
      if (order(tensor_.back(), *shard) > 0) return order_error(shard->tensor);
      if (tensor_.back().tensor != shard->tensor) CHECK_OK(end_tensor());
    }
    tensor_.push_back(std::move(*shard));
    return {};
  }
  CHECK_OK(end_tensor());
  if (last_) {
    if (order(*last_, entry) > 0) return order_error(name_in(entry));
    if (last_->index() == entry.index()) {
      TRY(const bool same,
          std::visit(
              [this](const auto& one) { return same_again(one, std::get<std::remove_cvref_t<decltype(one)>>(*last_)); },
              entry));
      if (same) return {};
    }
  }
  if (const auto* blob = std::get_if<BlobEntry>(&entry)) {
    ++totals_.blobs;
    totals_.bytes += blob->size;
  } else if (std::holds_alternative<TokenEntry>(entry)) {
    ++totals_.tokens;
  } else {
    ++totals_.meta;
  }
  last_ = entry;
  return kept_(std::move(entry));
}

Result<void> Coverage::end_tensor() {
  if (tensor_.empty()) return {};
  auto shards = std::exchange(tensor_, {});
  CHECK_OK(check_same_tensor(shards));
  std::vector<bool> keep(shards.size(), false);
  std::vector<const Box*> boxes;
  for (std::size_t begin = 0; begin < shards.size();) {
    std::size_t end = begin + 1;
    while (end < shards.size() && shards[end].box == shards[begin].box) ++end;
    TRY(const auto kept, check_same_box(std::span(shards).subspan(begin, end - begin)));
    std::fill_n(keep.begin() + static_cast<std::ptrdiff_t>(begin), kept, true);
    boxes.push_back(&shards[begin].box);
    begin = end;
  }
  if (const auto flaw = find_flaw(std::move(boxes), whole(shards.front().global_shape)))
    return flaw_error(*flaw, shards);

  ++totals_.tensors;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    if (!keep[i]) continue;
    ++totals_.shards;
    TRY(const auto bytes, saved_bytes(shards[i]));
    totals_.bytes += bytes;
    CHECK_OK(kept_(std::move(shards[i])));
  }
  return {};
}

Result<Totals> Coverage::finish() {
  CHECK_OK(end_tensor());
  return totals_;
}

Result<Contents> merge(std::vector<Contents> by_rank) {
  Contents all, kept;
  for (auto& one : by_rank) {
    std::ranges::move(one.shards, std::back_inserter(all.shards));
    std::ranges::move(one.blobs, std::back_inserter(all.blobs));
    std::ranges::move(one.tokens, std::back_inserter(all.tokens));
    std::ranges::move(one.meta, std::back_inserter(all.meta));
  }
  sort(all);
  Coverage coverage([&kept](Entry entry) -> Result<void> {
    if (auto* shard = std::get_if<ShardEntry>(&entry)) kept.shards.push_back(std::move(*shard));
    if (auto* blob = std::get_if<BlobEntry>(&entry)) kept.blobs.push_back(std::move(*blob));
    if (auto* token = std::get_if<TokenEntry>(&entry)) kept.tokens.push_back(std::move(*token));
    if (auto* meta = std::get_if<MetaEntry>(&entry)) kept.meta.push_back(std::move(*meta));
    return {};
  });
  for (auto& one : all.shards) CHECK_OK(coverage.add(std::move(one)));
  for (auto& one : all.blobs) CHECK_OK(coverage.add(std::move(one)));
  for (auto& one : all.tokens) CHECK_OK(coverage.add(std::move(one)));
  for (auto& one : all.meta) CHECK_OK(coverage.add(std::move(one)));
  CHECK_OK(coverage.finish());
  return kept;
}

}  // namespace cairn::format
