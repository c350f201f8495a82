#include "storage/format/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "proto/common/units.h"
#include "storage/format/box.h"

namespace cairn::format {
namespace {

constexpr std::size_t kTokenBytesMax = 16 * kKiB;
constexpr std::size_t kMetaBytesMax = 100'000'000;

/// Fewest elements that fill whole bytes: 1, for F4 2, for the 6-bit types 4.
std::uint64_t elements_per_unit(DType dtype) {
  const auto bits = bits_of(dtype);
  return bits == 4 ? 2 : bits == 6 ? 4 : 1;
}

std::strong_ordering order(const std::optional<Holder>& a, const std::optional<Holder>& b) {
  if (a.has_value() != b.has_value()) return a.has_value() <=> b.has_value();
  if (!a) return std::strong_ordering::equal;
  return std::tie(a->index, a->count) <=> std::tie(b->index, b->count);
}

/// `what` names the entry; it is called only for a message, because millions of entries are right.
template <class What>
Result<void> check_extents(What what, std::uint64_t bytes, const std::vector<Extent>& extents) {
  std::uint64_t sum = 0;
  for (const auto& extent : extents) {
    const std::uint64_t end = std::uint64_t{extent.offset} + extent.length;
    if (extent.length == 0 || end > kChunkBytesMax)
      return fail(Errc::kInvalid, fmt::format("{}: extent of {} bytes at {} of chunk {} is outside a chunk", what(),
                                              extent.length, extent.offset, extent.chunk.text()));
    sum += extent.length;  // as many extents as would overflow this do not fit in memory
  }
  if (sum != bytes) return fail(Errc::kInvalid, fmt::format("{}: extents hold {} bytes, not {}", what(), sum, bytes));
  return {};
}

Failure named(const ShardEntry& shard, Error error) {
  return fail(std::move(error).with(fmt::format("tensor '{}' rank {}", shard.tensor, shard.rank)));
}

Result<void> check(const ShardEntry& shard) {
  CHECK_OK(check_free_name("tensor", shard.tensor));
  if (auto dtype = dtype_of(static_cast<std::uint8_t>(shard.dtype)); !dtype)
    return named(shard, std::move(dtype).error());
  if (auto count = elements(shard.global_shape); !count) return named(shard, std::move(count).error());
  return check_part(shard);
}

Result<void> check(const BlobEntry& blob) {
  CHECK_OK(check_free_name("blob", blob.name));
  return check_extents([&] { return fmt::format("blob '{}' rank {}", blob.name, blob.rank); }, blob.size, blob.extents);
}

Result<void> check(const TokenEntry& token) {
  CHECK_OK(check_free_name("stream", token.stream));
  if (token.bytes.size() > kTokenBytesMax)
    return fail(Errc::kInvalid, fmt::format("token of stream '{}': {} bytes, at most {} are possible", token.stream,
                                            token.bytes.size(), kTokenBytesMax));
  return {};
}

Result<void> check(const MetaEntry& meta) {
  CHECK_OK(check_free_name("metadata scope", meta.scope));
  if (meta.key.size() > 1024 && meta.value.size() + meta.key.size() > kMetaBytesMax)
    return fail(Errc::kInvalid, fmt::format("metadata of '{}': key and value are too long", meta.scope));
  if (meta.value.size() > kMetaBytesMax)
    return fail(Errc::kInvalid, fmt::format("metadata of '{}': value of {} bytes, at most {} are possible", meta.scope,
                                            meta.value.size(), kMetaBytesMax));
  return {};
}

template <class T>
void sort_list(std::vector<T>& list) {
  const auto less = [](const T& a, const T& b) { return format::order(a, b) < 0; };
  if (!std::is_sorted(list.begin(), list.end(), less)) std::sort(list.begin(), list.end(), less);
}

}  // namespace

// Parts of a box of `count` elements among n holders. A unit is the fewest elements that fill whole bytes (F4: 2, 6-bit
// types: 4, else 1), so that every part is whole bytes. units = count / elements_per_unit, rounded down:
//
//   first(i) = floor(units * i / n) * elements_per_unit      last(i) = first(i + 1), for the last holder `count`
//
// Parts differ by at most one unit. Holders may be more than units: some parts are empty then.
LinearRange holder_range(DType dtype, std::uint64_t box_elements, Holder holder) {
  const std::uint64_t unit = elements_per_unit(dtype), units = box_elements / unit;
  const auto begin = [&](std::uint64_t i) {
    return static_cast<std::uint64_t>(static_cast<unsigned __int128>(units) * i / holder.count) * unit;
  };
  return {.first = begin(holder.index),
          .last = holder.index + 1 == holder.count ? box_elements : begin(std::uint64_t{holder.index} + 1)};
}

Result<LinearRange> saved_range(const ShardEntry& shard) {
  auto count = elements(shard.box.shape);
  if (!count) return fail(std::move(count.error()).with(fmt::format("tensor '{}'", shard.tensor)));
  if (!shard.holder) return LinearRange{.first = 0, .last = *count};
  if (shard.holder->count == 0 || shard.holder->index >= shard.holder->count)
    return fail(Errc::kInvalid,
                fmt::format("tensor '{}': holder {} of {}", shard.tensor, shard.holder->index, shard.holder->count));
  return holder_range(shard.dtype, *count, *shard.holder);
}

Result<std::uint64_t> saved_bytes(const ShardEntry& shard) {
  TRY(const auto part, saved_range(shard));
  auto bytes = bytes_of(shard.dtype, part.last - part.first);
  if (!bytes) return fail(std::move(bytes.error()).with(fmt::format("tensor '{}'", shard.tensor)));
  return *bytes;
}

std::strong_ordering order(const ShardEntry& a, const ShardEntry& b) {
  if (const auto c = a.tensor <=> b.tensor; c != 0) return c;
  if (const auto c = a.box <=> b.box; c != 0) return c;
  return order_of_parts(a.holder, a.rank, b.holder, b.rank);
}
std::strong_ordering order_of_parts(const std::optional<Holder>& a, std::uint32_t a_rank,
                                    const std::optional<Holder>& b, std::uint32_t b_rank) {
  if (const auto c = order(a, b); c != 0) return c;
  return a_rank <=> b_rank;
}
std::strong_ordering order(const BlobEntry& a, const BlobEntry& b) {
  return std::tie(a.name, a.rank) <=> std::tie(b.name, b.rank);
}
std::strong_ordering order(const TokenEntry& a, const TokenEntry& b) {
  return std::tie(a.stream, a.rank) <=> std::tie(b.stream, b.rank);
}
std::strong_ordering order(const MetaEntry& a, const MetaEntry& b) {
  return std::tie(a.scope, a.key, a.rank) <=> std::tie(b.scope, b.key, b.rank);
}
std::strong_ordering order(const Entry& a, const Entry& b) {
  if (a.index() != b.index()) return a.index() <=> b.index();
  return std::visit([&b](const auto& left) { return order(left, std::get<std::remove_cvref_t<decltype(left)>>(b)); },
                    a);
}

void sort(Contents& contents) {
  sort_list(contents.shards);
  sort_list(contents.blobs);
  sort_list(contents.tokens);
  sort_list(contents.meta);
}

Result<void> check_part(const ShardEntry& shard) {
  if (auto ok = check_box(shard.box, shard.global_shape); !ok) return named(shard, std::move(ok).error());
  if (shard.holder && (shard.holder->count == 0 || shard.holder->index >= shard.holder->count))
    return named(shard, {Errc::kInvalid, fmt::format("holder {} of {}", shard.holder->index, shard.holder->count)});
  TRY(const auto bytes, saved_bytes(shard));
  return check_extents(
      [&] { return fmt::format("tensor '{}' rank {} box {}", shard.tensor, shard.rank, text(shard.box)); }, bytes,
      shard.extents);
}

Result<void> check_entry(const Entry& entry) {
  return std::visit([](const auto& one) { return check(one); }, entry);
}

}  // namespace cairn::format
