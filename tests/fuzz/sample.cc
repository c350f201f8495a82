#include "tests/fuzz/sample.h"

#include "storage/format/page_codec.h"

namespace cairn::fuzz {

using namespace format;

Fence fence_of(std::string_view page, std::uint32_t crc, std::uint8_t level) {
  Fence out;
  out.size = static_cast<std::uint32_t>(page.size());
  out.crc = crc;
  out.level = level;
  return out;
}

Contents sample_contents(std::uint32_t rank, std::uint32_t ranks) {
  const auto extent = [&](std::uint32_t index, std::uint32_t offset, std::uint32_t length) {
    return Extent{.group = 1,
                  .chunk = {.owner = *OwnerId::from_bytes(kSampleOwner), .writer = 1000 + rank, .index = index},
                  .offset = offset,
                  .length = length};
  };
  Contents out;
  out.shards.push_back({.tensor = "model.layers.0.weight",
                        .dtype = DType::kF32,
                        .global_shape = {ranks, 8},
                        .box = {.offset = {rank, 0}, .shape = {1, 8}},
                        .holder = {},
                        .rank = rank,
                        .crc = 1,
                        .extents = {extent(0, 0, 20), extent(1, 0, 12)}});
  const auto part = holder_range(DType::kBF16, 8, {.index = rank, .count = ranks});
  out.shards.push_back({.tensor = "model.norm",
                        .dtype = DType::kBF16,
                        .global_shape = {8},
                        .box = whole({8}),
                        .holder = Holder{.index = rank, .count = ranks},
                        .rank = rank,
                        .crc = 2,
                        .extents = {extent(1, 12, static_cast<std::uint32_t>(2 * (part.last - part.first)))}});
  out.blobs.push_back({.name = "rng", .rank = rank, .size = 5, .crc = 3, .extents = {extent(2, 0, 5)}});
  out.tokens.push_back({.stream = "train", .bytes = "epoch 1", .rank = rank});
  out.meta.push_back({.scope = "a.safetensors", .key = "format", .value = "pt", .rank = rank});
  sort(out);
  return out;
}

std::string entries_body(const Contents& contents) {
  pages::EntriesBuilder builder;
  std::optional<Entry> last;
  for (auto& entry : entries_of(contents)) {
    (void)builder.add(entry, last ? &*last : nullptr);
    last = std::move(entry);
  }
  return builder.body();
}

Result<Contents> contents_of(std::string_view body, std::uint32_t count) {
  std::uint32_t crc = 0;
  const auto bytes = pages::seal(pages::PageKind::kEntries, 0, count, body, crc);
  return decode_entries(bytes, fence_of(bytes, crc, 0));
}

}  // namespace cairn::fuzz
