#include "storage/chunk_store/block_check.h"

#include <algorithm>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/common/units.h"

namespace cairn::storage {

Task<std::vector<ChunkStore::BadBlock>> check_blocks(std::shared_ptr<File> file, BlocksAt blocks,
                                                     rt::MutableBuffer memory) {
  std::vector<ChunkStore::BadBlock> bad;
  const auto part = [&memory](std::uint64_t begin, std::uint64_t size) {
    return rt::MutableBuffer{memory.owner, memory.bytes.subspan(begin, round_up(size, kSectorBytes))};
  };
  auto whole = co_await file->read(blocks.at, part(0, blocks.size));
  if (!whole && whole.error().code == Errc::kUnavailable) co_return fail(std::move(whole).error());
  for (std::uint32_t begin = 0; begin < blocks.size; begin += kBlockBytes) {
    const auto size = std::min<std::uint32_t>(kBlockBytes, blocks.size - begin);
    const auto offset = blocks.offset + begin;
    const auto where = blocks.in + " at offset " + std::to_string(blocks.at + begin) + ": ";
    if (!whole) {
      auto alone = co_await file->read(blocks.at + begin, part(begin, size));
      if (!alone && alone.error().code == Errc::kUnavailable) co_return fail(std::move(alone).error());
      if (!alone) {
        bad.push_back({offset, where + alone.error().message});
        continue;
      }
    }
    const auto crc = crc32c(memory.bytes.subspan(begin, size),
                            block_seed(blocks.id, static_cast<std::uint32_t>(offset / kBlockBytes)));
    if (crc != blocks.crcs[begin / kBlockBytes]) bad.push_back({offset, where + "bytes do not match their CRC"});
  }
  co_return bad;
}

}  // namespace cairn::storage
