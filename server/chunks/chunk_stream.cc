#include "server/chunks/chunk_stream.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "proto/common/checksum.h"

namespace cairn::server {
namespace {

Task<void> store_chunk(Chunks& chunks, rt::UnitPool& units, DataGroup group, ChunkId id, std::string bytes) {
  const auto length = static_cast<std::uint32_t>(bytes.size());
  std::vector<std::uint32_t> crcs;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    crcs.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                          block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  CO_TRY(auto upload, co_await chunks.start(group, id, length, std::move(crcs)));
  if (!upload) co_return {};
  for (std::uint32_t at = 0; at < length;) {
    CO_TRY(auto memory, co_await units.acquire());
    const auto size = std::min(length - at, static_cast<std::uint32_t>(memory.bytes.size()));
    std::memcpy(memory.bytes.data(), bytes.data() + at, size);
    CO_CHECK_OK(co_await upload->write(at, std::move(memory), size));
    at += size;
  }
  co_return co_await upload->finish();
}

}  // namespace

Task<void> read_stored(Chunks& chunks, OwnerId owner, std::vector<StoredRun> runs, std::uint64_t offset,
                       std::uint64_t size, std::string& out) {
  out.reserve(out.size() + size);
  for (const auto& run : runs) {
    const auto bytes = run.bytes();
    if (offset >= bytes) {
      offset -= bytes;
      continue;
    }
    while (size > 0 && offset < bytes) {
      const auto number = static_cast<std::uint32_t>(offset / run.chunk_bytes);
      const auto at = static_cast<std::uint32_t>(offset % run.chunk_bytes);
      const auto length = number + 1 == run.count ? run.last_bytes : run.chunk_bytes;
      const auto unit = static_cast<std::uint32_t>(chunks.unit_bytes());
      const auto piece = static_cast<std::uint32_t>(std::min<std::uint64_t>({size, length - at, unit - at % unit}));
      const ChunkId id{.owner = owner, .writer = run.writer, .index = run.first_index + number};
      CO_TRY(const auto read, co_await chunks.read(run.group, id, at, piece));
      out += read.bytes.text();
      offset += piece;
      size -= piece;
    }
    offset = 0;
    if (size == 0) co_return {};
  }
  if (size > 0)
    co_return fail(Errc::kDataLoss, "chunks of owner " + owner.hex() + " end " + std::to_string(size) +
                                        " bytes before what is to be read from them");
  co_return {};
}

Task<void> ChunkStream::flush(bool all) {
  while (waiting_.size() >= stored_.chunk_bytes || (all && !waiting_.empty())) {
    auto bytes = waiting_.substr(0, stored_.chunk_bytes);
    waiting_.erase(0, bytes.size());
    const auto length = static_cast<std::uint32_t>(bytes.size());
    const ChunkId id{.owner = owner_, .writer = stored_.writer, .index = stored_.count};
    CO_CHECK_OK(co_await store_chunk(chunks_, units_, stored_.group, id, std::move(bytes)));
    ++stored_.count;
    stored_.last_bytes = length;
  }
  if (all && stored_.count == 1) stored_.chunk_bytes = stored_.last_bytes;
  co_return {};
}

}  // namespace cairn::server
