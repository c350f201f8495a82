#include "storage/chunk_store/block_reader.h"

#include <algorithm>
#include <string>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "storage/chunk_store/layout.h"

namespace cairn::storage {

Failure BlockReader::bad(Error why) {
  blocks_bad_++;
  runtime_.log.write(rt::Level::kError, "block_bad", {{"reason", why.message}});
  return fail(std::move(why));
}

Task<rt::MutableBuffer> BlockReader::read(ChunkId id, const ChunkEntry& entry, std::uint64_t begin, std::uint64_t end,
                                          rt::MutableBuffer memory) {
  const auto& location = entry.location;
  const auto padded = round_up(end - begin, kSectorBytes);
  memory.bytes = memory.bytes.first(padded);
  CO_TRY(auto segment, segments_.find(location.segment));
  CO_TRY(auto file, co_await segments_.file_of(segment));
  auto filled = co_await file->read(location.offset() + begin, std::move(memory));
  if (!filled) {
    auto error = std::move(filled).error().with("chunk " + id.text() + " in " + segment_name(location.segment) +
                                                " at offset " + std::to_string(location.offset() + begin));
    // What the disk did not do is damage for whoever wants the bytes.
    if (error.code == Errc::kFailed) error.code = Errc::kDataLoss;
    if (error.code == Errc::kDataLoss) co_return bad(std::move(error));
    co_return fail(std::move(error));
  }
  bytes_read_ += padded;
  co_return filled;
}

Result<void> BlockReader::verify(const ChunkId& id, const ChunkEntry& entry, std::uint64_t begin,
                                 std::span<const std::byte> bytes) {
  for (std::size_t done = 0; done < bytes.size() && !bugs_.no_read_check; done += kBlockBytes) {
    const auto at = begin + done;
    const auto block = static_cast<std::uint32_t>(at / kBlockBytes);
    const auto one = bytes.subspan(done, std::min<std::size_t>(kBlockBytes, bytes.size() - done));
    if (crc32c(one, block_seed(id, block)) == entry.crcs[block]) continue;
    const auto& location = entry.location;
    return bad({Errc::kDataLoss, "chunk " + id.text() + " block " + std::to_string(block) + " in " +
                                     segment_name(location.segment) + " at offset " +
                                     std::to_string(location.offset() + at) + ": bytes do not match their CRC"});
  }
  return {};
}

}  // namespace cairn::storage
