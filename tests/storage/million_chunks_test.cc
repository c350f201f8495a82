#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "storage/chunk_store/layout.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

constexpr std::uint32_t kChunks = 1'000'000;
constexpr std::uint32_t kPerSegment = 250'000;
constexpr std::uint32_t kLength = 100;

ChunkId nth(std::uint32_t i) {
  return chunk(i % 1000, i / 1000);  // a thousand owners
}

/// Chunks of zeros in sparse segment files, as if an earlier start had written them; every tenth thousand was removed.
Task<void> fill(Index& index) {
  const std::string zeros(kLength, '\0');
  for (std::uint32_t i = 0; i < kChunks;) {
    Batch batch;
    for (const auto end = i + 10'000; i < end; ++i) {
      const auto id = nth(i);
      const auto raw = id.key();
      const auto crcs = crcs_of(id, zeros);
      const Location location{.segment = {.incarnation = 1, .number = 100 + i / kPerSegment},
                              .sector = i % kPerSegment + i % kPerSegment / 10'000,  // one unused after ten thousand
                              .length = kLength,
                              .digest = chunk_digest(crcs)};
      batch.put(Table::kChunks, {raw.data(), raw.size()}, encode_location(location));
      batch.put(Table::kBlockCrcs, {raw.data(), raw.size()}, encode_block_crcs(crcs));
    }
    CO_CHECK_OK(co_await index.commit(std::move(batch), i == kChunks));
  }
  co_return {};
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("chunk_store: a million chunks are opened and served", "[storage][slow]") {
  Target::Options options;
  Engine e("threads", options);
  e.open();
  e.close();
  const std::filesystem::path top(e.machine().path());
  for (std::uint32_t number = 100; number < 100 + kChunks / kPerSegment; ++number) {
    const auto name = top / segment_name({.incarnation = 1, .number = number});
    std::ofstream(name).close();
    std::filesystem::resize_file(name, 1 * kGiB);
  }
  {
    auto index = e.machine().index();
    REQUIRE(index);
    REQUIRE(e.run(fill(**index)));
  }
  auto start = std::chrono::steady_clock::now();
  {
    auto index = e.machine().index();
    REQUIRE(index);
  }
  std::printf("index alone opened in %.2f s\n", seconds_since(start));
  start = std::chrono::steady_clock::now();
  e.open();
  std::printf("%u chunks opened in %.2f s\n", kChunks, seconds_since(start));
  CHECK(e.chunks().stats().chunks == kChunks);
  CHECK(e.chunks().stats().live_bytes == kChunks * kSectorBytes);
  CHECK(e.chunks().stats().segments == kChunks / kPerSegment);
  start = std::chrono::steady_clock::now();
  constexpr std::uint32_t kReads = 1000;
  for (std::uint32_t i = 0; i < kReads; ++i) {
    auto got = e.get(nth(static_cast<std::uint32_t>(std::uint64_t{i} * 7'919'777 % kChunks)));
    INFO((got ? "" : got.error().message));
    REQUIRE(got);
    REQUIRE(*got == std::string(kLength, '\0'));
  }
  std::printf("%u chunks found and read, one at a time, in %.2f s\n", kReads, seconds_since(start));
  CHECK(e.put(chunk(5000, 1), pattern(1, 100'000)));
  CHECK(e.holds(chunk(5000, 1), pattern(1, 100'000)));
  REQUIRE(e.remove({nth(0), nth(123'456)}));
  CHECK(e.chunks().stats().chunks == kChunks - 1);
  CHECK(e.list().size() == 1000);
}
