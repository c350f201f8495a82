#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/common/ids.h"

namespace cairn::storage {

/// Which blocks are verified before their bytes are handed on.
enum class Verify {
  kAll,
  kPartlyWanted,  // one that is wanted whole is left to whoever compares CheckedBytes::crc_of() with the bytes
};

/// Bytes of a chunk, from blocks that all matched their CRCs (see Verify), and these.
struct CheckedBytes {
  Buffer bytes;
  ChunkId id;
  std::uint32_t offset = 0;  // of the bytes in the chunk
  std::uint32_t chunk_length = 0;
  std::vector<std::uint32_t> block_crcs;  // seeded; of each block that holds some of the bytes

  /// CRC32C that bytes [at, at + size) must have, continued from `crc`. That of a whole block follows from its seeded
  /// one, and the bytes are not looked at: whatever happens to them shows. Of blocks that nobody has verified, only
  /// whole ones.
  std::uint32_t crc_of(std::size_t at, std::size_t size, std::uint32_t crc = 0) const;
};

}  // namespace cairn::storage
