#include "storage/committer/committer.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "storage/committer/mark.h"
#include "storage/disk/aligned_memory.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

/// A committer on a simulated machine.
struct Fixture {
  explicit Fixture(std::uint64_t seed = 1, PlantedBugs b = {}) : machine(seed), bugs(b) { attach(); }
  ~Fixture() { detach(); }
  void attach() {
    disk = *machine.disk();
    index = *machine.index();
  }
  void detach() {
    committer.reset();
    index.reset();
    disk.reset();
  }
  Result<void> try_open() {
    auto opened = run_on(machine, Committer::open(machine.runtime(), *disk, *index, bugs));
    if (!opened) return fail(opened.error());
    committer = *std::move(opened);
    return {};
  }
  void open() {
    auto opened = try_open();
    INFO((opened ? "" : opened.error().message));
    REQUIRE(opened);
  }
  void crash(sim::Death death) {
    detach();
    machine.node.kill(death);
    machine.node.restart();
    attach();
  }
  Result<void> commit(std::string key, std::string value, std::vector<std::shared_ptr<File>> files = {}) {
    return run_on(machine, committer->commit(one(std::move(key), std::move(value)), std::move(files)));
  }
  static Batch one(std::string key, std::string value) {
    Batch batch;
    batch.put(Table::kRecords, std::move(key), std::move(value));
    return batch;
  }
  std::optional<std::string> get(std::string key) {
    auto value = run_on(machine, index->get(Table::kRecords, std::move(key)));
    REQUIRE(value);
    return *value;
  }
  std::shared_ptr<File> file(const std::string& name) {
    auto made = run_on(machine, disk->create(name, 64 * kKiB));
    REQUIRE(made);
    REQUIRE(run_on(machine, disk->sync_directory()));
    return *made;
  }
  static Buffer sector(char fill) {
    auto memory = aligned_memory(kSectorBytes);
    std::ranges::fill(memory.bytes, static_cast<std::byte>(fill));
    return std::move(memory).freeze(kSectorBytes);
  }
  void write(File& file, char fill) { REQUIRE(run_on(machine, file.write(0, sector(fill)))); }

  SimMachine machine;
  PlantedBugs bugs;
  std::unique_ptr<Disk> disk;
  std::unique_ptr<Index> index;
  std::unique_ptr<Committer> committer;
};

}  // namespace

TEST_CASE("mark: a slot survives its codec, and any damage to it is seen", "[storage]") {
  std::vector<std::byte> slot(kMarkSlotBytes);
  encode_mark(slot, 0x1122334455667788);
  CHECK(decode_mark(slot) == 0x1122334455667788);
  for (std::size_t at : {0, 7, 8, 15, 16, 2000, 4091, 4092, 4095}) {
    slot[at] ^= std::byte{16};
    CHECK_FALSE(decode_mark(slot));
    slot[at] ^= std::byte{16};
  }
  CHECK(decode_mark(slot));
  CHECK_FALSE(decode_mark(std::vector<std::byte>(kMarkSlotBytes)));
  CHECK_FALSE(decode_mark(std::span(slot).first(100)));
}

TEST_CASE("committer: what was committed survives the loss of power, data and index", "[storage]") {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Fixture f(seed);
    f.open();
    auto data = f.file("data");
    f.write(*data, 'x');
    REQUIRE(f.commit("a", "1", {data}));
    data.reset();
    f.crash(sim::Death::kPowerLoss);
    f.open();
    CHECK(f.get("a") == "1");
    CHECK(f.machine.image.contents("data")->substr(0, kSectorBytes) == std::string(kSectorBytes, 'x'));
  }
}

TEST_CASE("committer: everything that waits shares one round, and each file is flushed once", "[storage]") {
  Fixture f;
  f.open();
  auto a = f.file("a"), b = f.file("b");
  const auto flushes = f.machine.image.counts.flushes, syncs = f.machine.index_image.counts.syncs;
  std::size_t done = 0;
  rt::Scope scope(f.machine.node);
  for (int i = 0; i < 20; ++i)
    scope.spawn(f.committer->commit(Fixture::one("k" + std::to_string(i), "v"), {i % 2 ? a : b, a}),
                [&](Result<void> result) { done += result.has_value(); });
  REQUIRE(
      f.machine.world.run_until([&] { return scope.running() == 0; }, f.machine.world.now() + std::chrono::hours(1)));
  CHECK(done == 20);
  CHECK(f.committer->rounds() == 1);
  CHECK(f.committer->commits() == 20);
  CHECK(f.machine.image.counts.flushes == flushes + 3);  // two files and the mark
  CHECK(f.machine.index_image.counts.syncs == syncs + 1);
}

TEST_CASE("committer: a flush in flight is never joined, for it may not cover the write", "[storage]") {
  // Method: a commit comes while the flush of another on the same file is under way. Its own data was written after
  // that flush was submitted, so only a flush of its own makes it durable. With the bug planted some seed loses it.
  const bool planted = GENERATE(false, true);
  int lost = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    PlantedBugs bugs;
    bugs.join_flush = planted;
    Fixture f(seed, bugs);
    f.open();
    auto data = f.file("data");
    f.write(*data, 'a');
    rt::Scope scope(f.machine.node);
    const auto flushes = f.machine.image.counts.flushes;
    bool second_acked = false;
    struct Second {
      static Task<void> run(std::shared_ptr<File> file, Committer& committer, bool& acked) {
        CO_CHECK_OK(co_await file->write(kSectorBytes, Fixture::sector('b')));
        CO_CHECK_OK(co_await committer.commit(Fixture::one("second", "1"), {file}));
        acked = true;
        co_return {};
      }
    };
    scope.spawn(f.committer->commit(Fixture::one("first", "1"), {data}));
    auto& world = f.machine.world;
    REQUIRE(
        world.run_until([&] { return f.machine.image.counts.flushes > flushes; }, world.now() + std::chrono::hours(1)));
    scope.spawn(Second::run(data, *f.committer, second_acked));
    REQUIRE(world.run_until([&] { return second_acked; }, world.now() + std::chrono::hours(1)));
    scope.cancel();
    data.reset();
    f.crash(sim::Death::kPowerLoss);
    f.open();
    CHECK(f.get("second") == "1");
    lost += f.machine.image.contents("data")->substr(kSectorBytes, kSectorBytes) != std::string(kSectorBytes, 'b');
  }
  if (planted)
    CHECK(lost > 0);
  else
    CHECK(lost == 0);
}

TEST_CASE("committer: an index that comes back older than its mark is refused", "[storage]") {
  Fixture f;
  f.open();
  REQUIRE(f.commit("a", "1"));
  REQUIRE(f.commit("b", "2"));
  f.crash(sim::Death::kProcess);
  REQUIRE(f.machine.index_image.come_back_older(1));
  auto opened = f.try_open();
  REQUIRE_FALSE(opened);
  CHECK(opened.error().code == Errc::kDataLoss);
  CHECK_THAT(opened.error().message, Catch::Contains("older"));
}

TEST_CASE("committer: an index batch without sync is caught by the mark", "[storage]") {
  int caught = 0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    PlantedBugs bugs;
    bugs.no_index_sync = true;
    Fixture f(seed, bugs);
    f.open();
    REQUIRE(f.commit("a", "1"));
    f.crash(sim::Death::kPowerLoss);
    auto opened = f.try_open();
    caught += !opened && opened.error().code == Errc::kDataLoss;
    CHECK((!opened || f.get("a") == "1"));  // lost and not caught is what must never be
  }
  CHECK(caught > 0);
}

TEST_CASE("committer: a damaged mark is refused, one torn slot is not", "[storage]") {
  Fixture f;
  f.open();
  for (int i = 0; i < 5; ++i) REQUIRE(f.commit("a", std::to_string(i)));
  f.crash(sim::Death::kProcess);
  REQUIRE(f.machine.image.flip("mark", 100, 1));
  f.open();
  f.crash(sim::Death::kProcess);
  REQUIRE(f.machine.image.flip("mark", 100, 1));
  REQUIRE(f.machine.image.flip("mark", kMarkSlotBytes + 100, 1));
  auto opened = f.try_open();
  REQUIRE_FALSE(opened);
  CHECK(opened.error().code == Errc::kDataLoss);
}

TEST_CASE("committer: with the newest slot torn, the mark is one batch behind and no more", "[storage]") {
  Fixture f;
  f.open();
  for (int i = 0; i < 6; ++i) REQUIRE(f.commit("a", std::to_string(i)));
  const auto slots = *f.machine.image.contents("mark");
  auto number = [&](std::size_t slot) {
    return decode_mark(std::as_bytes(std::span(slots)).subspan(slot * kMarkSlotBytes, kMarkSlotBytes));
  };
  const std::size_t newest = number(0) > number(1) ? 0 : 1;
  CHECK(*number(newest) == *number(1 - newest) + 1);
  f.crash(sim::Death::kProcess);
  REQUIRE(f.machine.image.flip("mark", newest * kMarkSlotBytes + 100, 1));
  REQUIRE(f.machine.index_image.come_back_older(2));
  CHECK_FALSE(f.try_open());
}

TEST_CASE("committer: a missing mark is refused once the index was used", "[storage]") {
  Fixture f;
  f.open();
  REQUIRE(f.commit("a", "1"));
  f.crash(sim::Death::kProcess);
  REQUIRE(run_on(f.machine, f.disk->unlink("mark")));
  auto opened = f.try_open();
  REQUIRE_FALSE(opened);
  CHECK(opened.error().code == Errc::kDataLoss);
}

TEST_CASE("committer: after the first failure nothing is acknowledged and nothing retried", "[storage]") {
  Fixture f;
  f.open();
  auto data = f.file("data");
  REQUIRE(f.commit("a", "1", {data}));
  std::string reason;
  SECTION("flush of data") {
    f.machine.image.fail_flush_in = 1;
    reason = "fdatasync";
  }
  SECTION("index batch") {
    f.machine.index_image.fail_commit_in = 1;
    reason = "index";
  }
  SECTION("write of the mark") {
    f.machine.image.fail_write_in = 1;
    reason = "mark";
  }
  SECTION("flush of the mark") {
    f.machine.image.fail_flush_in = 2;
    reason = "mark";
  }
  SECTION("somebody's data write") {
    f.committer->fail_stop({Errc::kFailed, "write segment-1: Input/output error"});
    reason = "segment-1";
  }
  auto failed = f.commit("b", "2", {data});
  REQUIRE_FALSE(failed);
  CHECK(failed.error().code == Errc::kFailed);
  CHECK_THAT(failed.error().message, Catch::Contains(reason));
  REQUIRE(f.committer->failure());
  const auto writes = f.machine.image.counts.writes, commits = f.machine.index_image.counts.commits;
  auto later = f.commit("c", "3", {data});
  REQUIRE_FALSE(later);
  CHECK_THAT(later.error().message, Catch::Contains(reason));
  CHECK(f.machine.image.counts.writes == writes);
  CHECK(f.machine.index_image.counts.commits == commits);
  data.reset();
  f.crash(sim::Death::kPowerLoss);
  f.open();
  CHECK(f.get("a") == "1");
  CHECK_FALSE(f.get("c"));
}

TEST_CASE("committer: a failed data write during a round keeps that round from being acknowledged", "[storage]") {
  Fixture f;
  f.open();
  rt::Scope scope(f.machine.node);
  std::optional<Result<void>> outcome;
  scope.spawn(f.committer->commit(Fixture::one("a", "1")), [&](Result<void> result) { outcome = std::move(result); });
  f.machine.world.step();  // the round begins
  f.committer->fail_stop({Errc::kNoSpace, "disk full"});
  REQUIRE(
      f.machine.world.run_until([&] { return outcome.has_value(); }, f.machine.world.now() + std::chrono::hours(1)));
  REQUIRE_FALSE(*outcome);
  CHECK(outcome->error().code == Errc::kNoSpace);
}

TEST_CASE("committer: a batch that was read back without having been synced is synced before it is shown",
          "[storage]") {
  // A process dies in its commit; the next one sees the batch; then the power goes. What was seen must stay.
  int seen = 0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Fixture f(seed);
    f.open();
    rt::Scope scope(f.machine.node);
    const auto commits = f.machine.index_image.counts.commits;
    scope.spawn(f.committer->commit(Fixture::one("a", "1")));
    REQUIRE(f.machine.world.run_until([&] { return f.machine.index_image.counts.commits > commits; },
                                      f.machine.world.now() + std::chrono::hours(1)));
    scope.cancel();
    f.crash(sim::Death::kProcess);
    f.open();
    const bool before = f.get("a").has_value();
    f.crash(sim::Death::kPowerLoss);
    f.open();
    seen += before;
    CHECK((!before || f.get("a")));
  }
  CHECK(seen > 0);
}

TEST_CASE("committer: close waits for the round under way", "[storage]") {
  Fixture f;
  f.open();
  rt::Scope scope(f.machine.node);
  bool done = false;
  scope.spawn(f.committer->commit(Fixture::one("a", "1")), [&](Result<void> result) { done = result.has_value(); });
  REQUIRE(run_on(f.machine, f.committer->close()));
  CHECK(f.committer->commits() == 1);
  f.machine.world.run_for(std::chrono::seconds(1));
  CHECK(done);
}
