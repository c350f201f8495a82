#include "server/garbage/garbage.h"

#include "proto/common/checksum.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

Daemon::Options garbage_options() {
  Daemon::Options options;
  options.garbage.grace = 10s;
  options.garbage.interval = 1s;
  options.readers.ttl = 2s;
  return options;
}

std::uint64_t orphaned(Fixture& f) {
  return f.daemon->stats().garbage.orphaned_bytes;
}

/// Answers that a test has planted, in front of what the records say.
struct Planted {
  std::map<OwnerId, Answer> answers;
  std::map<OwnerId, int> times;  // how often it is given; absent: always
};

class PlantedLiveness final : public Liveness {
 public:
  PlantedLiveness(std::unique_ptr<Liveness> real, std::shared_ptr<Planted> planted)
      : real_(std::move(real)), planted_(std::move(planted)) {}
  Task<Answer> ask(OwnerId owner) override {
    if (auto planted = planted_->answers.find(owner); planted != planted_->answers.end()) {
      auto times = planted_->times.find(owner);
      if (times == planted_->times.end() || times->second-- > 0) co_return planted->second;
    }
    co_return co_await real_->ask(owner);
  }

 private:
  std::unique_ptr<Liveness> real_;
  std::shared_ptr<Planted> planted_;
};

Daemon::Options with(std::shared_ptr<Planted> planted, SaveBugs bugs = {}) {
  auto options = garbage_options();
  options.bugs = bugs;
  options.wrap_liveness = [planted](std::unique_ptr<Liveness> real) -> std::unique_ptr<Liveness> {
    return std::make_unique<PlantedLiveness>(std::move(real), planted);
  };
  return options;
}

struct StoredObject {
  explicit StoredObject(Fixture& f) {
    REQUIRE(f.make_bucket("b"));
    auto info = f.put_object("b", "k", "hello");
    REQUIRE(info);
    owner = *OwnerId::from_bytes(info->owner());
    chunk = {.owner = owner, .writer = 5, .index = 0};
  }
  OwnerId owner;
  ChunkId chunk;
};

}  // namespace

TEST_CASE("garbage: chunks of a failed save are freed after the grace time, not before, and counted", "[server]") {
  RunFixture f(garbage_options());
  const auto launched = *f.open("a");
  const auto kept = *f.save(launched, 1);
  const auto owner = *f.begin(launched, 2, 0, {.world_size = 2});
  REQUIRE(f.save_rank(owner, 0, 2));
  const ChunkId chunk{.owner = owner, .writer = RunFixture::writer_of(0), .index = 0};
  f.wait(1min);
  CHECK(orphaned(f) == 0);  // open: all its chunks live
  CHECK(f.has(chunk));
  REQUIRE(f.abort(owner, 1, "no"));
  f.wait(3s);
  CHECK(orphaned(f) > 1000);
  CHECK(f.has(chunk));
  f.wait(5s);
  CHECK(f.has(chunk));
  f.wait(5s);
  CHECK_FALSE(f.has(chunk));
  CHECK(orphaned(f) == 0);
  CHECK(f.daemon->stats().garbage.freed_chunks == 2);
  CHECK(f.open_step(1)->owner() == kept.view());
  CHECK(f.has({.owner = kept, .writer = RunFixture::writer_of(0), .index = 0}));
}

TEST_CASE("garbage: a committed step keeps its writers' chunks and no others", "[server]") {
  // In the record, and in a list behind the index.
  auto options = garbage_options();
  options.checkpoints.writers_in_record_max = GENERATE(256U, 1U);
  RunFixture f(options);
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  // A process of the rank that died and came back, and a chunk that was given up.
  const ChunkId stray{.owner = owner, .writer = 77, .index = 0};
  const ChunkId abandoned{.owner = owner, .writer = RunFixture::writer_of(0), .index = 9};
  REQUIRE(f.put(stray, "stray"));
  REQUIRE(f.put(abandoned, "abandoned"));
  auto seal = f.upload(owner, 0, 1);
  seal.add_abandoned(9);
  REQUIRE(f.seal(seal));
  CHECK(f.final_status(owner).state() == wire::AttemptStatusReply::COMMITTED);
  f.wait(3s);
  CHECK(orphaned(f) == 14);
  f.wait(20s);
  CHECK_FALSE(f.has(stray));
  CHECK_FALSE(f.has(abandoned));
  CHECK(f.has({.owner = owner, .writer = RunFixture::writer_of(0), .index = 0}));
  CHECK(f.has({.owner = owner, .writer = RunFixture::writer_of(0), .index = 1}));
  const auto info = *f.open_step();
  CHECK(f.has({.owner = owner, .writer = info.index(0).writer(), .index = 0}));
  CHECK(f.daemon->stats().garbage.freed_chunks == 2);
}

TEST_CASE("garbage: nothing is freed of a step whose list of writers cannot be read", "[server]") {
  auto options = garbage_options();
  options.checkpoints.writers_in_record_max = 1;
  RunFixture f(options);
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  const ChunkId stray{.owner = owner, .writer = 77, .index = 0};
  REQUIRE(f.put(stray, "stray"));
  REQUIRE(f.save_rank(owner, 0, 1));
  CHECK(f.final_status(owner).state() == wire::AttemptStatusReply::COMMITTED);
  const auto info = *f.open_step();
  REQUIRE(f.run(f.target->chunks().remove({{.owner = owner, .writer = info.index(0).writer(), .index = 0}})));
  f.wait(1min);
  CHECK(f.has(stray));
  CHECK(f.has({.owner = owner, .writer = RunFixture::writer_of(0), .index = 0}));
  CHECK(f.daemon->stats().garbage.freed_chunks == 0);
}

TEST_CASE("garbage: removed and replaced things are freed, their successors are not", "[server]") {
  RunFixture f(garbage_options());
  const auto launched = *f.open("a");
  const auto first = *f.save(launched, 1);
  const auto second = *f.save(launched, 1, {.world_size = 1, .overwrite = true});
  REQUIRE(f.put_object(f.bucket, "k", "one"));
  REQUIRE(f.put_object(f.bucket, "k", "two"));
  f.wait(30s);
  CHECK_FALSE(f.has({.owner = first, .writer = RunFixture::writer_of(0), .index = 0}));
  CHECK(f.has({.owner = second, .writer = RunFixture::writer_of(0), .index = 0}));
  CHECK(f.daemon->stats().garbage.freed_chunks == 4);
  wire::ObjectRemove remove;
  remove.set_bucket(f.bucket);
  remove.set_key("k");
  REQUIRE(f.call<wire::Empty>(Method::kObjectRemove, remove));
  f.wait(30s);
  CHECK(f.daemon->stats().garbage.freed_chunks == 5);
  CHECK(f.target->chunks().stats().chunks == 3);
}

TEST_CASE("garbage: a pass makes room for others after each page of owners, and of chunks removed", "[server]") {
  auto options = garbage_options();
  options.garbage.page = 2;
  options.garbage.pause = 3s;
  Fixture f(options);
  REQUIRE(f.make_bucket("b"));
  for (int i = 0; i < 6; ++i) REQUIRE(f.put_object("b", "k" + std::to_string(i), "one"));
  REQUIRE(f.eventually([&] { return f.daemon->stats().garbage.owners == 6; }));
  CHECK(f.daemon->stats().garbage.pass_time >= 9s);  // three pages
  CHECK(f.daemon->stats().garbage.pass_time < 10s);
  CHECK(f.daemon->stats().garbage.pass_unix_nanos > 0);
  const auto owner = *f.begin_object("b", "given-up");
  for (std::uint32_t i = 0; i < 5; ++i) REQUIRE(f.put({.owner = owner, .writer = 7, .index = i}, "bytes"));
  f.wait(9min);  // it is dropped when idle for ten
  REQUIRE(f.eventually([&] { return f.daemon->stats().garbage.freed_chunks > 0; }));
  CHECK(f.daemon->stats().garbage.freed_chunks == 2);
  const auto began = f.world.now();
  REQUIRE(f.eventually([&] { return f.daemon->stats().garbage.freed_chunks == 5; }));
  CHECK(f.world.now() - began >= 6s);
}

TEST_CASE("garbage: no answer means alive", "[server]") {
  auto planted = std::make_shared<Planted>();
  for (const bool bug : {false, true}) {
    Fixture f(with(planted, {.absence_is_death = bug}));
    const StoredObject object(f);
    planted->answers = {{object.owner, Answer{}}};
    f.wait(2min);
    CHECK(f.has(object.chunk) == !bug);
  }
}

TEST_CASE("garbage: absence after a loss means alive", "[server]") {
  auto planted = std::make_shared<Planted>();
  for (const bool bug : {false, true}) {
    Fixture f(with(planted, {.absence_is_death = bug}));
    const StoredObject object(f);
    planted->answers = {
        {object.owner, Answer{.kind = Answer::Kind::kAbsent, .loss = 1, .writers = {}, .abandoned = {}}}};
    f.wait(2min);
    CHECK(f.has(object.chunk) == !bug);
  }
}

TEST_CASE("garbage: an answer that is not given again frees nothing", "[server]") {
  auto planted = std::make_shared<Planted>();
  for (const bool bug : {false, true}) {
    Fixture f(with(planted, {.ask_once = bug}));
    const StoredObject object(f);
    planted->answers = {
        {object.owner, Answer{.kind = Answer::Kind::kAbsent, .loss = 0, .writers = {}, .abandoned = {}}}};
    planted->times = {{object.owner, bug ? 11 : 5}};
    f.wait(2min);
    CHECK(f.has(object.chunk) == !bug);
  }
}

TEST_CASE("garbage: owners that no group can have made are left alone", "[server]") {
  Fixture f(garbage_options());
  const ChunkId id{.owner = OwnerId::make(999, 0, 1, 2), .writer = 1, .index = 0};
  struct Put {
    static Task<void> it(storage::ChunkStore& chunks, rt::UnitPool& units, ChunkId chunk) {
      std::vector<std::uint32_t> crcs = {crc32c("hello", block_seed(chunk, 0))};
      CO_TRY(auto upload, co_await chunks.start(chunk, 5, std::move(crcs)));
      CO_TRY(auto memory, co_await units.acquire());
      std::memcpy(memory.bytes.data(), "hello", 5);
      CO_CHECK_OK(co_await upload->write(0, std::move(memory), 5));
      co_return co_await upload->finish();
    }
  };
  REQUIRE(f.run(Put::it(f.target->chunks(), *f.units, id)));
  f.wait(2min);
  CHECK(f.has(id));
}

TEST_CASE("garbage: goes on where it was after restarts, page by page", "[server]") {
  auto options = garbage_options();
  options.garbage.page = 3;
  Fixture f(options);
  REQUIRE(f.make_bucket("b"));
  std::vector<ChunkId> chunks;
  for (int i = 0; i < 5; ++i) {
    const auto owner = *f.begin_object("b", "k" + std::to_string(i));
    for (std::uint32_t k = 0; k < 10; ++k) {
      chunks.push_back({.owner = owner, .writer = 5 + k % 2, .index = k});
      REQUIRE(f.put(chunks.back(), "v"));
    }
    wire::ObjectSeal seal;
    if (i % 2 == 0) continue;
    REQUIRE(f.seal_object("b", "k" + std::to_string(i), owner, 5, "v"));
  }
  f.wait(11min);  // the unsealed ones are dropped
  f.restart_after(sim::Death::kPowerLoss);
  f.wait(1min);
  CHECK(orphaned(f) == 0);
  CHECK(f.target->chunks().stats().chunks == 2 * 5);  // of the sealed ones what their writer wrote
}
