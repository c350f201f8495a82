#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/common/ids.h"

namespace cairn::storage {

/// Bytes of a chunk, from blocks that all matched their CRCs, and these.
struct CheckedBytes {
  Buffer bytes;
  ChunkId id;
  std::uint32_t offset = 0;  // of the bytes in the chunk
  std::uint32_t chunk_length = 0;
  std::vector<std::uint32_t> block_crcs;  // seeded; of each block that holds some of the bytes

  /// CRC32C of bytes [at, at + size), continued from `crc`. That of a whole block follows from its seeded one, and the
  /// bytes are not looked at: what happens to them after the check shows.
  std::uint32_t crc_of(std::size_t at, std::size_t size, std::uint32_t crc = 0) const;
};

}  // namespace cairn::storage
