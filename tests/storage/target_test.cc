#include "storage/target/target.h"

#include <catch2/catch.hpp>

#include "storage/disk/aligned_memory.h"
#include "storage/target/superblock.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

std::string any_machine() {
  static const auto kinds = machine_kinds();
  return GENERATE(from_range(kinds));
}

/// Writes `bytes` (padded to 4096) as the whole of a file, durably.
void write_file(Engine& e, const std::string& name, std::vector<std::byte> bytes) {
  auto disk = *e.machine().disk();
  auto names = e.run(disk->list());
  REQUIRE(names);
  if (std::ranges::find(*names, name) != names->end()) REQUIRE(e.run(disk->unlink(name)));
  auto memory = aligned_memory(round_up(std::max<std::size_t>(bytes.size(), 1), kSectorBytes));
  std::ranges::fill(memory.bytes, std::byte{0});
  std::ranges::copy(bytes, memory.bytes.begin());
  const auto size = memory.bytes.size();
  auto file = e.run(disk->create(name, size));
  REQUIRE(file);
  REQUIRE(e.run((*file)->write(0, std::move(memory).freeze(size))));
  REQUIRE(e.run((*file)->flush()));
  REQUIRE(e.run(disk->sync_directory()));
}

std::vector<std::byte> superblock_bytes(const Superblock& superblock) {
  std::vector<std::byte> out(Superblock::kBytes);
  encode_superblock(out, superblock);
  return out;
}

std::map<std::string, std::string> everything(SimMachine& machine) {
  std::map<std::string, std::string> out;
  for (auto& name : machine.image.names()) out[name] = *machine.image.contents(name);
  return out;
}

}  // namespace

TEST_CASE("superblock: it survives its codec, and any flipped byte is seen", "[storage]") {
  const Superblock superblock{
      .version = 1, .oldest_reader = 1, .uuid = {{1, 2, 3}}, .segment_bytes = 1 * kGiB, .incarnation = 0x1122334455};
  auto bytes = superblock_bytes(superblock);
  CHECK(*decode_superblock(bytes, 1) == superblock);
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    bytes[at] ^= std::byte{64};
    CHECK_FALSE(decode_superblock(bytes, 1));
    bytes[at] ^= std::byte{64};
  }
  CHECK(code_of(decode_superblock(std::span(bytes).first(512), 1)) == Errc::kDataLoss);
}

TEST_CASE("superblock: a newer version is refused unless it says that older programs may open it", "[storage]") {
  Superblock newer;
  newer.version = newer.oldest_reader = 2;
  CHECK(code_of(decode_superblock(superblock_bytes(newer), 1)) == Errc::kInvalid);
  newer.oldest_reader = 1;
  CHECK(decode_superblock(superblock_bytes(newer), 1));
}

TEST_CASE("target: each open is a new incarnation of the same target", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto uuid = e.target().uuid();
  CHECK(uuid != Uuid{});
  for (std::uint64_t start = 1; start <= 4; ++start) {
    CHECK(e.target().incarnation() == start);
    CHECK(e.target().uuid() == uuid);
    e.reopen();
  }
}

TEST_CASE("target: an incarnation is never used twice, whatever crash comes", "[storage]") {
  // Method: crash at every event of an open; whoever got open had a number of its own.
  for (std::uint64_t events = 0; events < 60; ++events) {
    Engine e(std::make_unique<SimMachine>(events));
    e.open();
    std::uint64_t last = e.target().incarnation();
    e.crash(sim::Death::kPowerLoss);
    for (int round = 0; round < 3; ++round) {
      auto& machine = e.sim();
      auto units = rt::UnitPool::create(machine.node, 4, kTestUnitBytes);
      auto& pool = machine.node.hold(*std::move(units));
      std::uint64_t reached = 0;
      struct Opening {
        static Task<void> run(SimMachine& machine, rt::UnitPool& pool, Target::Options options, std::uint64_t& out) {
          CO_TRY(auto target,
                 co_await Target::open(machine.runtime(), *machine.disk(), *machine.index(), pool, options));
          out = target->incarnation();
          machine.node.hold(std::move(target));
          co_return {};
        }
      };
      machine.node.spawn(Opening::run(machine, pool, e.options, reached));
      for (std::uint64_t i = 0; i < events; ++i) machine.world.step();
      if (reached != 0) {
        CHECK(reached > last);
        last = reached;
      }
      e.crash(round % 2 ? sim::Death::kProcess : sim::Death::kPowerLoss);
    }
    e.open();
    CHECK(e.target().incarnation() > last);
  }
}

TEST_CASE("target: formatting that was interrupted anywhere is done again", "[storage]") {
  for (std::uint64_t events = 0; events < 60; ++events) {
    Engine e(std::make_unique<SimMachine>(events));
    auto& machine = e.sim();
    auto& pool = machine.node.hold(*rt::UnitPool::create(machine.node, 4, kTestUnitBytes));
    struct Opening {
      static Task<void> run(SimMachine& machine, rt::UnitPool& pool, Target::Options options) {
        CO_TRY(auto target, co_await Target::open(machine.runtime(), *machine.disk(), *machine.index(), pool, options));
        machine.node.hold(std::move(target));
        co_return {};
      }
    };
    machine.node.spawn(Opening::run(machine, pool, e.options));
    for (std::uint64_t i = 0; i < events; ++i) machine.world.step();
    e.crash(events % 3 ? sim::Death::kPowerLoss : sim::Death::kProcess);
    e.open();
    CHECK(e.put(chunk(0), pattern(0, 5000)));
    CHECK(e.machine().runtime().loop.now() > rt::TimePoint{});
    for (auto& name : machine.image.names()) CHECK_THAT(name, !Catch::EndsWith(".new"));
  }
}

TEST_CASE("target: a directory that is not ours is refused and nothing in it changed", "[storage]") {
  Engine e("sim");
  write_file(e, "thesis.tex", std::vector<std::byte>(100, std::byte{'x'}));
  const auto before = everything(e.sim());
  auto opened = e.try_open();
  REQUIRE(code_of(opened) == Errc::kInvalid);
  CHECK_THAT(opened.error().message, Catch::Contains("thesis.tex"));
  CHECK(everything(e.sim()) == before);
}

TEST_CASE("target: a directory of a newer version is refused and nothing in it changed", "[storage]") {
  Engine e("sim");
  e.open();
  Superblock superblock{
      .version = 9, .oldest_reader = 7, .uuid = e.target().uuid(), .segment_bytes = 4 * kMiB, .incarnation = 5};
  e.close();
  write_file(e, "superblock", superblock_bytes(superblock));
  const auto before = everything(e.sim());
  auto opened = e.try_open();
  REQUIRE(code_of(opened) == Errc::kInvalid);
  CHECK_THAT(opened.error().message, Catch::Contains("version 9") && Catch::Contains("7"));
  CHECK(everything(e.sim()) == before);
  // The same without the check before the index is opened.
  auto units = rt::UnitPool::create(e.loop(), 4, kTestUnitBytes);
  CHECK(code_of(e.run(Target::open(e.machine().runtime(), *e.machine().disk(), *e.machine().index(), **units,
                                   e.options))) == Errc::kInvalid);
  CHECK(everything(e.sim()) == before);
}

TEST_CASE("target: damage to its small files is refused, by name", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 5000)));
  e.close();
  std::string expected;
  auto disk = *e.machine().disk();
  SECTION("superblock flipped") {
    REQUIRE(e.sim().image.flip("superblock", 40, 0));
    expected = "superblock";
  }
  SECTION("superblock missing") {
    REQUIRE(e.run(disk->unlink("superblock")));
    expected = "superblock";
  }
  SECTION("superblock of another size") {
    write_file(e, "superblock", std::vector<std::byte>(8192));
    expected = "superblock";
  }
  SECTION("mark missing") {
    REQUIRE(e.run(disk->unlink("mark")));
    expected = "mark";
  }
  SECTION("index older") {
    REQUIRE(e.sim().index_image.come_back_older(1));
    expected = "older";
  }
  SECTION("index empty") {
    REQUIRE(e.sim().index_image.come_back_older(1000));
    expected = "older";
  }
  auto opened = e.try_open();
  REQUIRE(code_of(opened) == Errc::kDataLoss);
  CHECK_THAT(opened.error().message, Catch::Contains(expected));
}

TEST_CASE("target: a lost superblock is not taken for an empty directory", "[storage]") {
  Engine e("sim");
  e.open();
  Transaction transaction;
  transaction.puts = {{"a", "1"}};
  REQUIRE(e.run(e.records().apply(transaction)));
  e.close();
  auto disk = *e.machine().disk();
  for (auto& name : e.sim().image.names()) REQUIRE(e.run(disk->unlink(name)));
  CHECK(code_of(e.try_open()) == Errc::kDataLoss);
}

TEST_CASE("target: an index of another target is refused", "[storage]") {
  Engine e("sim");
  e.open();
  for (int i = 0; i < 5; ++i) REQUIRE(e.put(chunk(0, static_cast<std::uint64_t>(i)), "x"));
  const auto uuid = e.target().uuid();
  e.close();
  Uuid other = uuid;
  other.bytes[0] ^= 1;
  write_file(e, "superblock",
             superblock_bytes(
                 {.version = 1, .oldest_reader = 1, .uuid = other, .segment_bytes = 4 * kMiB, .incarnation = 50}));
  auto opened = e.try_open();
  REQUIRE(code_of(opened) == Errc::kDataLoss);
  CHECK_THAT(opened.error().message, Catch::Contains(uuid.text()) && Catch::Contains(other.text()));
}

TEST_CASE("target: small disks get smaller segments, and keep the size they were formatted with", "[storage]") {
  sim::DiskOptions disk;
  disk.capacity_bytes = 256 * kMiB;
  Target::Options options;
  options.chunks.ballast_bytes = 1 * kMiB;
  Engine e(std::make_unique<SimMachine>(1, disk), options);
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 5000)));
  CHECK(e.sim().image.used_bytes() <= 8 * kMiB + 3 * kSectorBytes);  // 256 MiB / 32
  e.close();
  e.open();
  CHECK(e.holds(chunk(0), pattern(0, 5000)));
}
