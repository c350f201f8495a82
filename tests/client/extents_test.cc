#include <catch2/catch.hpp>
#include <random>

#include "client/core/chunk_writer.h"
#include "proto/wire/wire.pb.h"

using namespace cairn;
using namespace cairn::client;
using format::Extent;

namespace {

const OwnerId kOwner = OwnerId::make(3, 0, 11, 12);

std::vector<Extent> chunks(std::mt19937_64& random) {
  std::vector<Extent> out;
  std::uint32_t index = 0;
  const std::uint32_t usual = 1 + random() % 1000;
  for (std::uint64_t n = random() % 20; n-- > 0;) {
    if (random() % 6 == 0) index += 2;  // an index that was given up
    const std::uint32_t length = random() % 4 == 0 ? 1 + random() % 1000 : usual;
    out.push_back({random() % 8 == 0 ? 2u : 1u, {.owner = kOwner, .writer = 77, .index = index++}, 0, length});
  }
  return out;
}

}  // namespace

TEST_CASE("extents: runs of chunks give back every byte range exactly", "[client]") {
  // Goal: any list of chunks survives its compressed form. Method: random lists, every range against the plain list.
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    const auto plain = chunks(random);
    std::vector<wire::ExtentRun> runs;
    to_runs(plain, kOwner, runs);
    std::uint64_t total = 0;
    for (const auto& e : plain) total += e.length;
    const auto offset = total ? random() % total : 0;
    const auto length = total ? random() % (total - offset + 1) : 0;
    const auto found = extents_in(runs, kOwner, offset, length);
    REQUIRE(found);
    std::vector<Extent> expected;
    std::uint64_t start = 0;
    for (const auto& e : plain) {
      const auto from = std::max(start, offset), to = std::min<std::uint64_t>(start + e.length, offset + length);
      if (from < to)
        expected.push_back(
            {e.group, e.chunk, static_cast<std::uint32_t>(from - start), static_cast<std::uint32_t>(to - from)});
      start += e.length;
    }
    REQUIRE(*found == expected);
    CHECK_FALSE(extents_in(runs, kOwner, offset, total - offset + 1));
  }
}

TEST_CASE("extents: malformed runs are data loss, not a crash", "[client]") {
  wire::ExtentRun run;
  run.set_count(2);
  run.set_chunk_bytes(100);
  run.set_last_bytes(101);
  CHECK(extents_in(std::vector{run}, kOwner, 0, 150).error().code == Errc::kDataLoss);
  run.set_last_bytes(0);
  CHECK(extents_in(std::vector{run}, kOwner, 0, 150).error().code == Errc::kDataLoss);
  run.set_last_bytes(10);
  run.set_owner("short");
  CHECK_FALSE(extents_in(std::vector{run}, kOwner, 0, 50));
  CHECK(extents_in(std::vector<wire::ExtentRun>{}, kOwner, 0, 1).error().code == Errc::kDataLoss);
}
