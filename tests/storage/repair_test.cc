#include <algorithm>
#include <catch2/catch.hpp>

#include "storage/chunk_store/chunk_store.h"
#include "storage/chunk_store/layout.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

/// An engine with one chunk of three pieces, and words to damage and repair it.
struct Damaged {
  explicit Damaged(PlantedBugs bugs = {}) : e(std::make_unique<SimMachine>(), Engine::small(bugs)) {
    e.open();
    REQUIRE(e.put(chunk(0), pattern(9, 5'000)));
    REQUIRE(e.put(id, bytes));
  }
  ChunkStore::Entry entry() {
    auto found = e.run(e.chunks().entry(id));
    REQUIRE(found);
    REQUIRE(*found);
    return **found;
  }
  void flip(std::uint64_t at) {
    const auto location = decode_location(entry().place);
    REQUIRE(e.sim().image.flip(segment_name(location->segment), location->offset() + at, 5));
  }
  /// Offsets of the bad blocks of all pieces.
  std::vector<std::uint32_t> bad() {
    std::vector<std::uint32_t> out;
    for (std::uint32_t at = 0; at < bytes.size(); at += kTestUnitBytes) {
      auto scan = e.run(e.chunks().scan(id, at));
      REQUIRE(scan);
      CHECK(scan->place == entry().place);
      for (const auto& block : scan->bad) out.push_back(block.offset);
    }
    return out;
  }
  Result<std::unique_ptr<ChunkStore::Upload>> start() {
    return e.run(e.chunks().start_repair(id, entry().place, crcs_of(id, bytes)));
  }
  Result<void> write(ChunkStore::Upload& upload) { return e.run(write_pieces(upload, e.units(), bytes)); }

  Engine e;
  const ChunkId id = chunk(1);
  const std::string bytes = pattern(1, 3 * kTestUnitBytes - 1000);
};

}  // namespace

TEST_CASE("repair: a scan tells every bad block, and nothing else", "[storage]") {
  Damaged f;
  CHECK(f.bad().empty());
  f.flip(0);
  f.flip(70'000);
  f.flip(kTestUnitBytes + 65'535);
  f.flip(f.bytes.size() - 1);
  // One that was read before the damage is not known any better: no cache is asked.
  CHECK(f.bad() == std::vector<std::uint32_t>{0, 65'536, kTestUnitBytes, 2 * kTestUnitBytes + 65'536});
  auto scan = f.e.run(f.e.chunks().scan(f.id, 0));
  const auto location = decode_location(f.entry().place);
  for (const auto& part : {segment_name(location->segment), std::to_string(location->offset() + 65'536)})
    CHECK_THAT(scan->bad[1].reason, Catch::Contains(part));

  CHECK(code_of(f.e.run(f.e.chunks().scan(chunk(7), 0))) == Errc::kNotFound);
  CHECK(code_of(f.e.run(f.e.chunks().scan(f.id, 65'536))) == Errc::kInvalid);
  CHECK(code_of(f.e.run(f.e.chunks().scan(f.id, 4 * kTestUnitBytes))) == Errc::kInvalid);
}

TEST_CASE("repair: where a read fails, only the blocks that cannot be read are bad", "[storage]") {
  Damaged f;
  f.e.sim().image.fail_read_in = 1;  // the read of the whole piece; those of its blocks do well
  CHECK(f.bad().empty());
  f.e.sim().image.faults.read_error = 1;
  auto scan = f.e.run(f.e.chunks().scan(f.id, 0));
  REQUIRE(scan);
  CHECK(scan->bad.size() == 2);
}

TEST_CASE("repair: good bytes take the place of damaged ones, for good", "[storage]") {
  Damaged f;
  f.flip(70'000);
  const auto before = f.entry();
  const auto live = f.e.chunks().stats().live_bytes;
  CHECK_FALSE(f.e.holds(f.id, f.bytes));  // now the location cache knows the damaged copy
  auto upload = f.start();
  REQUIRE(upload);
  REQUIRE(f.write(**upload));
  CHECK(f.entry().place == before.place);  // up to here nothing has changed
  REQUIRE(f.e.run((*upload)->finish()));
  const auto after = f.entry();
  CHECK(after.place != before.place);
  CHECK(after.block_crcs == before.block_crcs);
  CHECK(after.info.group == before.info.group);
  CHECK(f.bad().empty());
  CHECK(f.e.holds(f.id, f.bytes));
  CHECK(f.e.chunks().stats().live_bytes == live);
  CHECK(f.e.chunks().stats().chunks == 2);
  CHECK(f.e.chunks().stats().uploading_bytes == 0);

  f.e.crash(sim::Death::kPowerLoss);
  f.e.open();
  CHECK(f.entry().place == after.place);
  CHECK(f.e.holds(f.id, f.bytes));
  CHECK(f.e.holds(chunk(0), pattern(9, 5'000)));
  CHECK(f.e.chunks().stats().live_bytes == live);
}

TEST_CASE("repair: an acknowledged repair survives a power loss", "[storage]") {
  PlantedBugs bugs;
  bugs.repair_early = GENERATE(false, true);
  Damaged f(bugs);
  f.flip(70'000);
  auto upload = f.start();
  REQUIRE(f.write(**upload));
  f.e.sim().index_image.latency_min = f.e.sim().index_image.latency_max = std::chrono::milliseconds(50);
  REQUIRE(f.e.run((*upload)->finish()));
  upload->reset();
  f.e.crash(sim::Death::kPowerLoss);
  f.e.open();
  CHECK(f.e.holds(f.id, f.bytes) == !bugs.repair_early);  // the planted bug is one that this test sees
}

TEST_CASE("repair: the space of the damaged copy comes back, but not under a reader", "[storage]") {
  Damaged f;
  f.flip(70'000);
  const auto used = f.e.sim().image.used_bytes();
  auto upload = f.start();
  REQUIRE(f.write(**upload));
  REQUIRE(f.e.run((*upload)->finish()));
  CHECK(f.e.eventually([&] { return f.e.sim().image.used_bytes() == used; }));
}

TEST_CASE("repair: a chunk that is removed or repaired meanwhile stays as it is then", "[storage]") {
  PlantedBugs bugs;
  bugs.repair_blind = GENERATE(false, true);
  Damaged f(bugs);
  f.flip(70'000);
  const auto before = f.entry();
  auto first = f.start();
  auto second = f.start();
  REQUIRE(f.write(**first));
  REQUIRE(f.write(**second));
  SECTION("removed") {
    REQUIRE(f.e.remove({f.id}));
    auto finished = f.e.run((*first)->finish());
    if (bugs.repair_blind) {  // the planted bug is one that this test sees
      CHECK(f.e.run(f.e.chunks().find(f.id))->has_value());
      return;
    }
    CHECK(code_of(finished) == Errc::kNotFound);
    CHECK_FALSE(f.e.run(f.e.chunks().find(f.id))->has_value());
    CHECK(code_of(f.e.run(f.e.chunks().start_repair(f.id, before.place, before.block_crcs))) == Errc::kNotFound);
    CHECK(f.e.chunks().stats().chunks == 1);
  }
  SECTION("repaired") {
    REQUIRE(f.e.run((*first)->finish()));
    const auto repaired = f.entry();
    auto finished = f.e.run((*second)->finish());
    if (bugs.repair_blind) {
      CHECK(f.entry().place != repaired.place);
      return;
    }
    CHECK(code_of(finished) == Errc::kNotFound);
    CHECK(f.entry().place == repaired.place);
    CHECK(f.e.holds(f.id, f.bytes));
  }
  SECTION("removed while it is being replaced") {
    if (bugs.repair_blind) return;
    struct Both {
      static Task<void> run(rt::Loop& loop, ChunkStore& store, ChunkStore::Upload& upload, ChunkId id) {
        std::vector<Task<void>> tasks;
        tasks.push_back(upload.finish());
        tasks.push_back(store.remove({id}));
        co_return co_await rt::all(loop, std::move(tasks));
      }
    };
    CHECK(f.e.run(Both::run(f.e.loop(), f.e.chunks(), **first, f.id)));
    CHECK_FALSE(f.e.run(f.e.chunks().find(f.id))->has_value());
    CHECK(f.e.chunks().stats().chunks == 1);
  }
  second->reset();
  CHECK(f.e.eventually([&] { return f.e.chunks().stats().uploading_bytes == 0; }));
}

TEST_CASE("repair: bytes that are not the chunk's are refused", "[storage]") {
  PlantedBugs bugs;
  bugs.repair_unchecked = GENERATE(false, true);
  Damaged f(bugs);
  f.flip(70'000);
  const auto before = f.entry();
  auto other = f.bytes;
  other[10] ^= 1;
  CHECK(code_of(f.e.run(f.e.chunks().start_repair(f.id, before.place, crcs_of(f.id, other)))) == Errc::kConflict);
  CHECK(code_of(f.e.run(f.e.chunks().start_repair(f.id, "nowhere", before.block_crcs))) == Errc::kInvalid);
  auto upload = f.start();
  auto written = f.e.run(write_pieces(**upload, f.e.units(), other));
  if (bugs.repair_unchecked) {  // the planted bug is one that this test sees
    REQUIRE(written);
    REQUIRE(f.e.run((*upload)->finish()));
    CHECK(f.bad() == std::vector<std::uint32_t>{0});
    return;
  }
  CHECK(code_of(written) == Errc::kDataLoss);
  upload->reset();
  CHECK(f.entry().place == before.place);
  CHECK(f.e.eventually([&] { return f.e.chunks().stats().uploading_bytes == 0; }));
}

TEST_CASE("repair: one that is interrupted leaves the damaged copy, and its own space comes back", "[storage]") {
  Damaged f;
  f.flip(70'000);
  const auto before = f.entry();
  const auto live = f.e.chunks().stats().live_bytes;
  auto upload = f.start();
  REQUIRE(f.write(**upload));
  upload->reset();
  f.e.crash(GENERATE(sim::Death::kPowerLoss, sim::Death::kProcess));
  f.e.open();
  CHECK(f.entry().place == before.place);
  CHECK(f.bad() == std::vector<std::uint32_t>{65'536});
  CHECK(f.e.chunks().stats().live_bytes == live);
}

TEST_CASE("repair: block CRCs that are damaged in the index make every block bad, and are repaired too", "[storage]") {
  Damaged f;
  const auto key = f.id.key();
  Batch batch;
  batch.put(Table::kBlockCrcs, {key.data(), key.size()}, "rubbish");
  REQUIRE(f.e.run(f.e.target().committer().commit(std::move(batch))));
  CHECK(f.bad().size() == 6);
  CHECK(f.entry().block_crcs.empty());
  auto upload = f.start();
  REQUIRE(upload);
  REQUIRE(f.write(**upload));
  REQUIRE(f.e.run((*upload)->finish()));
  CHECK(f.bad().empty());
  CHECK(f.e.holds(f.id, f.bytes));
}

TEST_CASE("target: verify reads superblock and index", "[storage]") {
  Damaged f;
  CHECK(f.e.run(f.e.target().verify()));
  SECTION("superblock") {
    REQUIRE(f.e.sim().image.flip("superblock", 20, 1));
    CHECK(code_of(f.e.run(f.e.target().verify())) == Errc::kDataLoss);
  }
  SECTION("index") {
    f.e.sim().index_image.faults.read_error = 1;
    CHECK(code_of(f.e.run(f.e.target().verify())) == Errc::kDataLoss);
  }
}
