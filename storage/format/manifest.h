#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "proto/common/ids.h"
#include "storage/format/tensor.h"

namespace cairn::format {

/// Where bytes lie: `length` bytes at `offset` of one chunk.
struct Extent {
  DataGroup group = 0;
  ChunkId chunk;
  std::uint32_t offset = 0;
  std::uint32_t length = 0;
  bool operator==(const Extent&) const = default;
};

/// A rank that says "holder i of n" saves only the i-th part of the elements of its box (row-major order).
struct Holder {
  std::uint32_t index = 0;
  std::uint32_t count = 1;
  bool operator==(const Holder&) const = default;
};

/// Elements [first, last) of a box in row-major order that holder i of n saves: equal parts in whole bytes, the same
/// rule for ever (drawn in the .cc).
struct LinearRange {
  std::uint64_t first = 0, last = 0;
};
LinearRange holder_range(DType dtype, std::uint64_t box_elements, Holder holder);

/// One saved tensor shard.
struct ShardEntry {
  std::string tensor;
  DType dtype = DType::kF32;
  Shape global_shape;
  Box box;
  std::optional<Holder> holder;
  std::uint32_t rank = 0;
  std::uint32_t crc = 0;        // plain CRC32C of the saved bytes (this holder's part)
  std::vector<Extent> extents;  // in order; together exactly the saved bytes; empty for a zero-size shard
  bool operator==(const ShardEntry&) const = default;
};

struct BlobEntry {
  std::string name;
  std::uint32_t rank = 0;
  std::uint64_t size = 0;
  std::uint32_t crc = 0;
  std::vector<Extent> extents;
  bool operator==(const BlobEntry&) const = default;
};

/// Position of a data stream: all ranks that name a stream must say the same bytes.
struct TokenEntry {
  std::string stream;
  std::string bytes;       // up to 16 KiB
  std::uint32_t rank = 0;  // who named it; in the index the lowest rank that did
  bool operator==(const TokenEntry&) const = default;
};

/// String metadata that foreign formats carry (safetensors __metadata__, saved file names), by scope and key.
struct MetaEntry {
  std::string scope;  // for example the saved file's name
  std::string key;
  std::string value;       // up to 100,000,000 bytes: a safetensors header may be that long
  std::uint32_t rank = 0;  // who named it; in the index the lowest rank that did
  bool operator==(const MetaEntry&) const = default;
};

/// What one rank saved (its manifest), or all ranks together (the index).
struct Contents {
  std::vector<ShardEntry> shards;
  std::vector<BlobEntry> blobs;
  std::vector<TokenEntry> tokens;
  std::vector<MetaEntry> meta;
  bool operator==(const Contents&) const = default;
};

/// One entry of any kind; the alternatives stand in the order in which the kinds are sorted.
using Entry = std::variant<ShardEntry, BlobEntry, TokenEntry, MetaEntry>;

/// The order of manifests and of the index: kind; then for shards (tensor, box origin, box shape, holder, rank), for
/// blobs (name, rank), for tokens (stream, rank), for metadata (scope, key, rank).
std::strong_ordering order(const ShardEntry& a, const ShardEntry& b);
std::strong_ordering order(const BlobEntry& a, const BlobEntry& b);
std::strong_ordering order(const TokenEntry& a, const TokenEntry& b);
std::strong_ordering order(const MetaEntry& a, const MetaEntry& b);
std::strong_ordering order(const Entry& a, const Entry& b);
/// Of two shards of one box.
std::strong_ordering order_of_parts(const std::optional<Holder>& a, std::uint32_t a_rank,
                                    const std::optional<Holder>& b, std::uint32_t b_rank);
void sort(Contents& contents);

/// Bytes this entry saved: its holder's part of the box. errors: kInvalid  names the tensor: overflow, not whole bytes
Result<std::uint64_t> saved_bytes(const ShardEntry& shard);
/// Everything one entry alone can be wrong about: names, dtype, box inside the shape, holder, extents in chunk limits
/// and together exactly the saved bytes. errors: kInvalid  names the tensor or blob
Result<void> check_entry(const Entry& entry);
/// The same of a shard whose name, dtype and global shape are those of one that was checked before.
Result<void> check_part(const ShardEntry& shard);

}  // namespace cairn::format
