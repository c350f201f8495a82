#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "proto/common/ids.h"
#include "proto/common/units.h"

namespace cairn::storage {

/// File "superblock": what this directory is. All of it is rewritten under another name and renamed, at every start.
/// Magic, versions and CRC stay where they are in every later version, so that an older program can tell.
///
/// offset size meaning                                   (little-endian)
///      0    8 magic "CAIRNTGT"
///      8    4 format version
///     12    4 oldest format version whose programs may open it
///     16   16 target uuid
///     32    8 segment size in bytes, chosen when formatted
///     40    8 incarnation: the number of the last start
///     48 4044 zero
///   4092    4 CRC32C of bytes 0 .. 4091
struct Superblock {
  static constexpr std::size_t kBytes = kSectorBytes;

  std::uint32_t version = 0;
  std::uint32_t oldest_reader = 0;
  Uuid uuid;
  std::uint64_t segment_bytes = 0;
  std::uint64_t incarnation = 0;
  bool operator==(const Superblock&) const = default;
};

/// Fills kBytes.
void encode_superblock(std::span<std::byte> out, const Superblock& superblock);
/// Reads what a program of format version `reader` understands.
/// errors: kDataLoss  damaged;  kInvalid  of a version that `reader` must not open
Result<Superblock> decode_superblock(std::span<const std::byte> bytes, std::uint32_t reader);

}  // namespace cairn::storage
