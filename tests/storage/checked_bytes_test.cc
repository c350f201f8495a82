#include <catch2/catch.hpp>
#include <string>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "storage/chunk_store/checked_bytes.h"
#include "tests/sim/prng.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

constexpr std::size_t kLength = 4 * kBlockBytes + 777;  // of the chunk; the last block is short

/// [offset, offset + size) of a chunk of `bytes`, as the store hands it out.
CheckedBytes checked(const std::string& bytes, std::size_t offset, std::size_t size) {
  const auto crcs = crcs_of(chunk(3), bytes);
  const auto end = static_cast<std::ptrdiff_t>(round_up(offset + size, kBlockBytes) / kBlockBytes);
  return {.bytes = Buffer::from(bytes.substr(offset, size)),
          .id = chunk(3),
          .offset = static_cast<std::uint32_t>(offset),
          .chunk_length = kLength,
          .block_crcs = {crcs.begin() + static_cast<std::ptrdiff_t>(offset / kBlockBytes), crcs.begin() + end}};
}

}  // namespace

TEST_CASE("checked bytes: the CRC of any part is that of a pass over it", "[storage]") {
  const auto bytes = pattern(1, kLength);
  sim::Prng random(1);
  // Ends at blocks, beside them, at the chunk's end, anywhere.
  const auto place = [&]() -> std::size_t {
    const auto block = random.below(5) * kBlockBytes;
    switch (random.below(4)) {
      case 0:
        return block;
      case 1:
        return block + random.below(3);
      case 2:
        return kLength - random.below(2);
      default:
        return random.below(kLength + 1);
    }
  };
  for (int round = 0; round < 2000; ++round) {
    auto begin = place(), end = place(), at = place(), to = place();
    if (begin > end) std::swap(begin, end);
    at = std::clamp(at, begin, end);
    to = std::clamp(to, begin, end);
    if (at > to) std::swap(at, to);
    const auto before = crc32c(std::string_view(bytes).substr(0, random.below(100)));
    INFO("[" << at << ", " << to << ") of [" << begin << ", " << end << ")");
    REQUIRE(checked(bytes, begin, end - begin).crc_of(at - begin, to - at, before) ==
            crc32c(std::string_view(bytes).substr(at, to - at), before));
  }
}

TEST_CASE("checked bytes: what changes in a whole block after its check does not change the CRC", "[storage]") {
  const auto bytes = pattern(1, kLength);
  for (const auto at : {std::size_t{0}, std::size_t{kBlockBytes + 5}, kLength - 1}) {
    auto changed = checked(bytes, 0, kLength);
    auto memory = bytes;
    memory[at] ^= 1;
    changed.bytes = Buffer::from(memory);
    CHECK(changed.crc_of(0, kLength) == crc32c(bytes));
  }
}
