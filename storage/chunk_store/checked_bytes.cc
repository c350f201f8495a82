#include "storage/chunk_store/checked_bytes.h"

#include <algorithm>

#include "proto/common/checksum.h"
#include "proto/common/crc_join.h"
#include "proto/common/units.h"

namespace cairn::storage {

std::uint32_t CheckedBytes::crc_of(std::size_t at, std::size_t size, std::uint32_t crc) const {
  const auto first = offset / kBlockBytes;
  const auto end = std::uint64_t{offset} + at + size;  // in the chunk, like all that follow
  for (auto from = std::uint64_t{offset} + at; from < end;) {
    const auto block = from / kBlockBytes;
    const auto block_end = std::min<std::uint64_t>((block + 1) * kBlockBytes, chunk_length);
    const auto to = std::min(end, block_end);
    if (from == block * kBlockBytes && to == block_end) {
      // The seed and what comes before the block are shifted by the same bytes.
      const auto seed = block_seed(id, static_cast<std::uint32_t>(block));
      crc = crc32c_join(crc ^ seed, block_crcs[block - first], to - from);
    } else {
      crc = crc32c(bytes.bytes().subspan(from - offset, to - from), crc);
    }
    from = to;
  }
  return crc;
}

}  // namespace cairn::storage
