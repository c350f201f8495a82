#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/ids.h"
#include "proto/common/units.h"

// What the chunk store writes into the index and how it names its files.

namespace cairn::storage {

/// Names a segment file for ever: who made it, and its number there. File name: "segment-" then the incarnation in 16
/// and the number in 8 lower-case hex digits, with '-' between. The file holds nothing but chunk bytes, each chunk in
/// one piece from a multiple of 4096, padded with zeros to the next.
struct SegmentId {
  std::uint64_t incarnation = 0;
  std::uint32_t number = 0;
  auto operator<=>(const SegmentId&) const = default;
};
inline constexpr std::string_view kSegmentPrefix = "segment-";
std::string segment_name(SegmentId id);
std::optional<SegmentId> parse_segment_name(std::string_view name);

/// Table kChunks: where a chunk lies. Key: ChunkId::key(). Value, 28 bytes, little-endian:
///
/// offset size meaning
///      0    8 incarnation of the segment
///      8    4 number of the segment
///     12    4 first sector (4096 bytes) in the segment
///     16    4 length in bytes, 1 .. 64 MiB
///     20    4 digest: CRC32C over the little-endian block CRCs
///     24    4 data group: whose members all have the chunk
struct Location {
  SegmentId segment;
  std::uint32_t sector = 0;
  std::uint32_t length = 0;
  std::uint32_t digest = 0;
  DataGroup group = 0;

  std::uint64_t offset() const { return sector * kSectorBytes; }
  std::uint64_t padded() const { return round_up(length, kSectorBytes); }
  bool operator==(const Location&) const = default;
};
inline constexpr std::size_t kLocationBytes = 28;
std::string encode_location(const Location& location);
/// errors: kDataLoss
Result<Location> decode_location(std::string_view value);

/// Table kBlockCrcs. Key: ChunkId::key(). Value: 4 bytes little-endian for each 64 KiB of the chunk:
/// crc32c(block bytes without padding, block_seed(id, block)).
std::string encode_block_crcs(const std::vector<std::uint32_t>& crcs);
/// errors: kDataLoss  not what `location` says of number and digest
Result<std::vector<std::uint32_t>> decode_block_crcs(std::string_view value, const Location& location);

constexpr std::uint32_t blocks_of(std::uint32_t length) {
  return static_cast<std::uint32_t>(round_up(length, kBlockBytes) / kBlockBytes);
}

}  // namespace cairn::storage
