#include "storage/format/coverage.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>

#include "storage/format/box.h"
#include "storage/format/page_codec.h"

namespace cairn::format {
namespace {

constexpr std::size_t kSeenNumbersMax = 1 << 20;

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

std::string shape_text(const ShardEntry& shard) {
  return fmt::format("{}[{}]", name_of(shard.dtype), fmt::join(shard.global_shape, ", "));
}

/// Makes `box` part of the box before it when both together are a box.
bool adjoin(Box& before, const Box& box) {
  std::size_t along = box.shape.size();
  for (std::size_t d = 0; d < box.shape.size(); ++d) {
    if (before.offset[d] == box.offset[d] && before.shape[d] == box.shape[d]) continue;
    if (along != box.shape.size() || before.offset[d] + before.shape[d] != box.offset[d]) return false;
    along = d;
  }
  if (along == box.shape.size()) return false;  // the same box: covered twice
  before.shape[along] += box.shape[along];
  return true;
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

}  // namespace

Result<void> Coverage::add(const Entry& entry) {
  CHECK_OK(check_entry(entry));
  return add_checked(entry);
}

Result<void> Coverage::add_checked(const Entry& entry) {
  if (const auto* shard = std::get_if<ShardEntry>(&entry)) {
    if (last_) return order_error(shard->tensor);
    return add_shard(entry, *shard);
  }
  CHECK_OK(end_tensor());
  if (last_) {
    if (order(*last_, entry) > 0) return order_error(pages::name_in(entry));
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
  return kept_(entry);
}

Result<void> Coverage::add_shard(const Entry& entry, const ShardEntry& shard) {
  if (in_tensor_) {
    const auto name = box_.first.tensor <=> shard.tensor;
    if (name > 0) return order_error(shard.tensor);
    if (name < 0) CHECK_OK(end_tensor());
  }
  if (!in_tensor_) {
    in_tensor_ = true;
    first_rank_ = shard.rank;
    CHECK_OK(begin_box(shard));
  } else {
    const auto& first = box_.first;
    if (shard.dtype != first.dtype || shard.global_shape != first.global_shape)
      return fail(Errc::kConflict, fmt::format("tensor '{}': rank {} says {}, rank {} says {}", shard.tensor,
                                               first_rank_, shape_text(first), shard.rank, shape_text(shard)));
    const auto box = first.box <=> shard.box;
    if (box > 0 || (box == 0 && order_of_parts(box_.last_holder, box_.last_rank, shard.holder, shard.rank) > 0))
      return order_error(shard.tensor);
    if (box < 0) {
      CHECK_OK(end_box());
      CHECK_OK(begin_box(shard));
    }
  }
  if (seen_boxes_.size() < kSeenNumbersMax) {
    seen_.push_back({.rank = shard.rank, .box = seen_boxes_.size()});
    seen_boxes_.insert(seen_boxes_.end(), shard.box.offset.begin(), shard.box.offset.end());
    seen_boxes_.insert(seen_boxes_.end(), shard.box.shape.begin(), shard.box.shape.end());
  }
  TRY(const bool keep, add_to_box(shard));
  if (!keep) return {};
  ++totals_.shards;
  TRY(const auto bytes, saved_bytes(shard));
  totals_.bytes += bytes;
  return kept_(entry);
}

Result<void> Coverage::begin_box(const ShardEntry& shard) {
  auto& first = box_.first;  // assigned part by part, so that its memory is used again
  if (joined_.empty()) {     // else of the same tensor
    first.tensor = shard.tensor;
    first.dtype = shard.dtype;
    first.global_shape = shard.global_shape;
  }
  first.box = shard.box;
  first.holder = shard.holder;
  first.rank = shard.rank;
  first.crc = shard.crc;
  box_.copies = box_.parts = 0;
  box_.ranks.clear();
  return join(shard.box);
}

Result<bool> Coverage::add_to_box(const ShardEntry& shard) {
  const auto& first = box_.first;
  const auto where = [&] { return fmt::format("tensor '{}' box {}", first.tensor, text(first.box)); };
  const auto last_rank = std::exchange(box_.last_rank, shard.rank);
  box_.last_holder = shard.holder;
  if (!shard.holder) {
    // Copies come before parts.
    if (shard.crc != first.crc)
      return fail(Errc::kConflict, fmt::format("{}: ranks {} and {} saved different bytes (CRC {:08x} and {:08x}); "
                                               "copies that differ have drifted apart",
                                               where(), first.rank, shard.rank, first.crc, shard.crc));
    box_.ranks.push_back(shard.rank);
    return ++box_.copies == 1;
  }
  if (box_.copies != 0)
    return fail(Errc::kConflict, fmt::format("{}: saved whole by {} and in holders' parts by rank {}", where(),
                                             ranks_text(box_.ranks), shard.rank));
  if (shard.holder->count != first.holder->count)
    return fail(Errc::kConflict, fmt::format("{}: rank {} says {} holders, rank {} says {}", where(), first.rank,
                                             first.holder->count, shard.rank, shard.holder->count));
  const auto index = shard.holder->index;
  if (index < box_.parts)
    return fail(Errc::kConflict, fmt::format("{}: ranks {} and {} both say holder {} of {}", where(), last_rank,
                                             shard.rank, index, first.holder->count));
  box_.ranks.push_back(shard.rank);
  if (index > box_.parts)
    return fail(Errc::kConflict, fmt::format("{}: holder {} of {} is missing (holders so far: {})", where(), box_.parts,
                                             first.holder->count, ranks_text(box_.ranks)));
  ++box_.parts;
  return true;
}

Result<void> Coverage::end_box() {
  const auto& first = box_.first;
  if (!first.holder || box_.parts == first.holder->count) return {};
  return fail(Errc::kConflict,
              fmt::format("tensor '{}' box {}: holder {} of {} is missing (holders so far: {})", first.tensor,
                          text(first.box), box_.parts, first.holder->count, ranks_text(box_.ranks)));
}

// Boxes come by rising origin, so parts of one row, then rows, then slabs adjoin the one before. Joining two boxes that
// touch changes no element's count: what is left is the same question with fewer boxes.
Result<void> Coverage::join(const Box& box) {
  if (empty(box)) return {};
  if (joined_.empty() || !adjoin(joined_.back(), box)) {
    if (joined_.size() == kBoxesMax)
      return fail(Errc::kInvalid, fmt::format("tensor '{}': more than {} boxes that do not adjoin each other",
                                              box_.first.tensor, kBoxesMax));
    joined_.push_back(box);
    return {};
  }
  while (joined_.size() > 1 && adjoin(joined_[joined_.size() - 2], joined_.back())) joined_.pop_back();
  return {};
}

Result<void> Coverage::end_tensor() {
  if (!in_tensor_) return {};
  CHECK_OK(end_box());
  const auto all = whole(box_.first.global_shape);
  if (joined_.size() != 1 || joined_.front() != all) {
    std::vector<const Box*> boxes;
    for (const auto& box : joined_) boxes.push_back(&box);
    if (const auto flaw = find_flaw(std::move(boxes), all)) return fail(flawed(*flaw));
  }
  ++totals_.tensors;
  in_tensor_ = false;
  joined_.clear();
  seen_.clear();
  seen_boxes_.clear();
  return {};
}

Error Coverage::flawed(const Flaw& flaw) const {
  const auto& tensor = box_.first.tensor;
  if (flaw.covered == 0)
    return {Errc::kConflict,
            fmt::format("tensor '{}': no rank saved {} of {}", tensor, text(flaw.box), shape_text(box_.first))};
  std::vector<std::uint32_t> ranks;
  std::string boxes;
  Box last;
  for (const auto& seen : seen_) {
    const auto dimensions = static_cast<std::ptrdiff_t>(flaw.box.shape.size());
    const auto begin = seen_boxes_.begin() + static_cast<std::ptrdiff_t>(seen.box);
    const Box box{.offset = {begin, begin + dimensions}, .shape = {begin + dimensions, begin + 2 * dimensions}};
    if (!inside(flaw.box, box)) continue;
    if ((ranks.empty() || last != box) && boxes.size() < 200) boxes += (boxes.empty() ? "" : ", ") + text(box);
    ranks.push_back(seen.rank);
    last = box;
  }
  auto message = fmt::format("tensor '{}': {} is saved {} times", tensor, text(flaw.box), flaw.covered);
  if (ranks.size() > 1) message += fmt::format(", by {} (boxes {})", ranks_text(std::move(ranks)), boxes);
  return {Errc::kConflict, std::move(message)};
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
  Coverage coverage([&kept](const Entry& entry) -> Result<void> {
    if (const auto* shard = std::get_if<ShardEntry>(&entry)) kept.shards.push_back(*shard);
    if (const auto* blob = std::get_if<BlobEntry>(&entry)) kept.blobs.push_back(*blob);
    if (const auto* token = std::get_if<TokenEntry>(&entry)) kept.tokens.push_back(*token);
    if (const auto* meta = std::get_if<MetaEntry>(&entry)) kept.meta.push_back(*meta);
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
