#include "proto/common/checksum.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/records.h"
#include "storage/format/index_pages.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

using State = wire::AttemptStatusReply;

/// What lies under the run's keys when nothing of a save is open.
void check_nothing_open(Fixture& f) {
  f.wait(1s);  // seals go after the commit
  CHECK(f.records("a/") == 0);
  CHECK(f.records("l/") == 0);
  CHECK(f.daemon->stats().checkpoints.open == 0);
  CHECK(f.daemon->stats().checkpoints.merging == 0);
}

bool says(const Error& error, std::initializer_list<std::string_view> parts) {
  INFO(error.message);
  for (const auto part : parts) CHECK(error.message.find(part) != std::string::npos);
  return true;
}

std::string read_index(RunFixture& f, const wire::StepInfo& info) {
  std::string out;
  for (const auto& run : info.index())
    for (std::uint32_t i = 0; i < run.count(); ++i) {
      const ChunkId id{
          .owner = *OwnerId::from_bytes(info.owner()), .writer = run.writer(), .index = run.first_index() + i};
      auto bytes = f.read(id, 0, i + 1 == run.count() ? run.last_bytes() : run.chunk_bytes());
      REQUIRE(bytes);
      out += *bytes;
    }
  REQUIRE(out.size() >= info.index_bytes());
  out.resize(info.index_bytes());  // a list of writers may follow
  return out;
}

}  // namespace

// ---- Runs and launches

TEST_CASE("checkpoints: all ranks of a launch get the answer that the first one got", "[server]") {
  RunFixture f;
  const auto first = *f.open("a");
  CHECK_FALSE(first.resume);
  CHECK(first.run_epoch.count() == 1);
  REQUIRE(f.save(first, 10));
  REQUIRE(f.save(first, 20));
  const auto again = *f.open("a");
  CHECK_FALSE(again.resume);  // fixed when the launch opened the run
  CHECK(again.run_epoch.count() == 1);
  const auto second = *f.open("a", 1);
  CHECK(second.resume == 20);
  CHECK(second.run_epoch.count() == 2);
  REQUIRE(f.save(second, 30));
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.open("a", 1)->resume == 20);
  CHECK(f.open("a", 1, 10).error().code == Errc::kConflict);
  CHECK(f.open("a", 1, 20)->resume == 20);
}

TEST_CASE("checkpoints: a past launch is fenced, and the message names both", "[server]") {
  RunFixture f;
  const auto old = *f.open("old-job", 3);
  REQUIRE(f.save(old, 10));
  const auto owner = *f.begin(old, 20, 0, {.world_size = 2});
  const auto seal = f.upload(owner, 0, 2);
  REQUIRE(f.open("new-job", 0));

  const auto opened = f.open("old-job", 3);
  REQUIRE_FALSE(opened);
  CHECK(opened.error().code == Errc::kFenced);
  says(opened.error(), {"old-job/3", "new-job/0"});
  const auto begun = f.begin(old, 20, 1, {.world_size = 2});
  REQUIRE_FALSE(begun);
  CHECK(begun.error().code == Errc::kFenced);
  says(begun.error(), {"old-job/3", "new-job/0", "rank 1"});
  const auto sealed = f.seal(seal);
  REQUIRE_FALSE(sealed);
  CHECK(sealed.error().code == Errc::kFenced);
  says(sealed.error(), {"old-job/3", "new-job/0"});
  CHECK(f.commit(owner).error().code == Errc::kFenced);
  // Its ranks learn it at once, and nothing of it stays.
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error_code() == static_cast<int>(Errc::kFenced));
  check_nothing_open(f);
  CHECK(f.put({.owner = owner, .writer = 1, .index = 0}, "x").error().code == Errc::kFenced);
  CHECK(f.open_step()->step() == 10);
}

TEST_CASE("checkpoints: a run epoch of another launch is fenced even under its own name", "[server]") {
  RunFixture f;
  auto first = *f.open("a", 0);
  auto second = *f.open("a", 1);
  auto mixed = second;
  mixed.run_epoch = first.run_epoch;
  CHECK(f.begin(mixed, 1, 0, {}).error().code == Errc::kFenced);
  mixed = first;
  mixed.run_epoch = second.run_epoch;
  CHECK(f.begin(mixed, 1, 0, {}).error().code == Errc::kFenced);
  REQUIRE(f.begin(second, 1, 0, {}));

  // The planted bug: a stale rank gets into the newer launch's save.
  Daemon::Options bad;
  bad.bugs.begin_unfenced = true;
  RunFixture g(bad);
  const auto stale = *g.open("a", 0);
  const auto owner = *g.begin(*g.open("a", 1), 1, 0, {.world_size = 2});
  CHECK(*g.begin(stale, 1, 1, {.world_size = 2}) == owner);
}

TEST_CASE("checkpoints: resume from an earlier step drops the later ones with the launch, or not at all", "[server]") {
  RunFixture f;
  const auto first = *f.open("a", 0);
  for (const std::uint64_t step : {10, 20, 30, 40}) REQUIRE(f.save(first, step));
  CHECK(f.open("a", 1, 25, true).error().code == Errc::kNotFound);
  CHECK(f.steps() == std::vector<std::uint64_t>{10, 20, 30, 40});
  CHECK(f.open("a", 1, 20, false)->resume == 20);
  CHECK(f.steps() == std::vector<std::uint64_t>{10, 20, 30, 40});
  const auto third = *f.open("a", 2, 20, true);
  CHECK(third.resume == 20);
  CHECK(f.steps() == std::vector<std::uint64_t>{10, 20});
  f.let_go();
  CHECK(f.records("w/") == 2);
  REQUIRE(f.save(third, 30));
  CHECK(f.open_step()->step() == 30);
}

TEST_CASE("checkpoints: a launch that opens while another commits sees the step or prevents it", "[server]") {
  // Goal: the resume step is never one that a commit has just passed. Method: both at once at many moments.
  int prevented = 0, seen = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    RunFixture f({}, seed);
    const auto old = *f.open("a", 0);
    const auto owner = *f.begin(old, 10, 0, {});
    auto request = f.upload(owner, 0, 1);
    auto sealing = f.begin_call(Method::kSeal, request);
    f.wait(std::chrono::microseconds(seed * 60));
    const auto launched = f.open("a", 1);
    REQUIRE(launched);
    REQUIRE(f.eventually([&] { return sealing->has_value(); }));
    const auto status = f.final_status(owner);
    const bool committed = status.state() == State::COMMITTED;
    CHECK(launched->resume.has_value() == committed);
    CHECK(f.steps().empty() == !committed);
    if (!committed) CHECK(status.error_code() == static_cast<int>(Errc::kFenced));
    (committed ? seen : prevented)++;
    check_nothing_open(f);
  }
  CHECK(seen > 0);
  CHECK(prevented > 0);
}

TEST_CASE("checkpoints: without the run's compare at commit an older launch commits late", "[server]") {
  // The planted bug is one that the test above would see.
  int wrong = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    Daemon::Options options;
    options.bugs.commit_unfenced = true;
    RunFixture f(options, seed);
    const auto old = *f.open("a", 0);
    const auto owner = *f.begin(old, 10, 0, {});
    auto sealing = f.begin_call(Method::kSeal, f.upload(owner, 0, 1));
    f.wait(std::chrono::microseconds(seed * 60));
    const auto launched = f.open("a", 1);
    REQUIRE(launched);
    REQUIRE(f.eventually([&] { return sealing->has_value(); }));
    if (f.final_status(owner).state() == State::COMMITTED && !launched->resume) ++wrong;
  }
  CHECK(wrong > 0);
}

// ---- Attempts

TEST_CASE("checkpoints: a step appears at the last seal, whole, and is readable after a power loss", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  OwnerId owner;
  for (std::uint32_t rank = 0; rank < 3; ++rank) {
    owner = *f.begin(launched, 100, rank, {.world_size = 3});
    CHECK(f.steps().empty());
    CHECK(f.status(owner).sealed() == rank);
    CHECK(f.status(owner).state() == State::OPEN);
    REQUIRE(f.save_rank(owner, rank, 3));
  }
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::COMMITTED);
  CHECK(status.step() == 100);
  CHECK(status.world_size() == 3);
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.status(owner).state() == State::COMMITTED);
  const auto info = f.open_step();
  REQUIRE(info);
  CHECK(info->step() == 100);
  CHECK(info->tensors() == 1);
  CHECK(info->data_bytes() == 3000);
  const auto index = read_index(f, *info);
  CHECK(index.size() == info->index_bytes());
  CHECK(sha256(index.substr(index.size() - info->root_bytes())) == info->root_digest());
  const auto contents = format::decode(index);
  REQUIRE(contents);
  REQUIRE(contents->shards.size() == 3);
  for (const auto& shard : contents->shards) {
    const auto& extent = shard.extents.at(0);
    CHECK(f.read(extent.chunk, extent.offset, extent.length).value() ==
          std::string(1000, static_cast<char>('a' + shard.rank)));
  }
  check_nothing_open(f);
}

TEST_CASE("checkpoints: a rank that does not fit into the attempt is told how", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  REQUIRE(f.begin(launched, 1, 0, {.world_size = 4}));
  const auto other = f.begin(launched, 1, 1, {.world_size = 3});
  REQUIRE_FALSE(other);
  CHECK(other.error().code == Errc::kInvalid);
  says(other.error(), {"world size 3", "world size 4", "rank 1", "step 1"});
  CHECK(f.begin(launched, 1, 1, {.world_size = 4, .overwrite = true}).error().code == Errc::kInvalid);
  CHECK(f.begin(launched, 1, 1, {.world_size = 4, .explicit_commit = true}).error().code == Errc::kInvalid);
  CHECK(f.begin(launched, 1, 4, {.world_size = 4}).error().code == Errc::kInvalid);
  CHECK(f.begin(launched, 1, 0, {.world_size = 0}).error().code == Errc::kInvalid);
  CHECK(f.begin(launched, 1, 0, {.world_size = 1'000'000}).error().code == Errc::kInvalid);
  auto request = f.begin_request(launched, 2, 0, {});
  request.set_declared_bytes(std::uint64_t{1} << 60);
  CHECK(f.call<wire::BeginReply>(Method::kBegin, request).error().code == Errc::kNoSpace);
  request = f.begin_request(launched, 2, 0, {});
  request.set_run("nobody/opened");
  CHECK(f.call<wire::BeginReply>(Method::kBegin, request).error().code == Errc::kNotFound);
  request.set_run("../x");
  CHECK(f.call<wire::BeginReply>(Method::kBegin, request).error().code == Errc::kInvalid);
}

TEST_CASE("checkpoints: ranks that begin at once join one attempt", "[server]") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    RunFixture f({}, seed);
    const auto launched = *f.open("a");
    std::vector<std::shared_ptr<std::optional<Result<std::string>>>> calls;
    for (std::uint32_t rank = 0; rank < 8; ++rank)
      calls.push_back(f.begin_call(Method::kBegin, f.begin_request(launched, 5, rank, {.world_size = 8})));
    REQUIRE(f.eventually([&] { return std::ranges::all_of(calls, [](const auto& c) { return c->has_value(); }); }));
    std::set<std::string> owners;
    for (const auto& call : calls) {
      REQUIRE(**call);
      wire::BeginReply reply;
      REQUIRE(wire::decode(***call, reply, "reply"));
      owners.insert(reply.owner());
    }
    CHECK(owners.size() == 1);
    CHECK(f.records("a/") == 1);
    CHECK(f.records("w/") == 1);
  }
}

TEST_CASE("checkpoints: a seal may be repeated, another one of the same rank may not come", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  const auto seal = f.upload(owner, 0, 2);
  REQUIRE(f.seal(seal));
  REQUIRE(f.seal(seal));
  f.restart_after(sim::Death::kPowerLoss);
  REQUIRE(f.seal(seal));
  CHECK(f.call<wire::BeginReply>(Method::kBegin, f.begin_request(*f.open("a"), 1, 0, {.world_size = 2}))->sealed());
  auto other = seal;
  other.set_digest(sha256("other"));
  CHECK(f.seal(other).error().code == Errc::kConflict);
  REQUIRE(f.begin(*f.open("a"), 1, 1, {.world_size = 2}));
  REQUIRE(f.save_rank(owner, 1, 2));
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  REQUIRE(f.seal(seal));  // its answer was lost; the step is committed by now
}

TEST_CASE("checkpoints: seals that do not fit are refused", "[server]") {
  RunFixture f;
  const auto owner = *f.begin(*f.open("a"), 1, 0, {.world_size = 1});
  const auto good = f.upload(owner, 0, 1);
  const auto refused = [&](auto change) {
    auto wrong = good;
    change(wrong);
    const auto sealed = f.seal(wrong);
    return !sealed && sealed.error().code == Errc::kInvalid;
  };
  CHECK(refused([](auto& s) { s.set_rank(1); }));
  CHECK(refused([](auto& s) { s.set_digest("short"); }));
  CHECK(refused([](auto& s) { s.set_manifest_bytes(s.manifest_bytes() + 1); }));
  CHECK(refused([](auto& s) { s.clear_manifest(); }));
  CHECK(refused([](auto& s) { s.set_writer(s.writer() + 1); }));
  CHECK(refused([](auto& s) { s.mutable_manifest(0)->set_count(0); }));
  CHECK(refused([](auto& s) {  // 320 MiB, consistent in itself
    s.mutable_manifest(0)->set_count(5);
    s.mutable_manifest(0)->set_chunk_bytes(64 << 20);
    s.mutable_manifest(0)->set_last_bytes(64 << 20);
    s.set_manifest_bytes(5ull * (64 << 20));
  }));
  CHECK(refused([](auto& s) { s.set_owner("x"); }));
  CHECK(refused([](auto& s) { s.mutable_abandoned()->Resize(2000, 1); }));
  CHECK(f.seal(good));
  auto unknown = good;
  unknown.set_owner(std::string(OwnerId::make(home_group(f.bucket, f.run_name), 0, 1, 2).view()));
  CHECK(f.seal(unknown).error().code == Errc::kNotFound);
  CHECK(f.status(*OwnerId::from_bytes(unknown.owner())).state() == State::UNKNOWN);
}

TEST_CASE("checkpoints: what does not cover a tensor fails for all, and says where", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  REQUIRE(f.save_rank(owner, 0, 2));
  auto contents = f.contents(owner, 1, 2);
  contents.shards[0].box.offset[0] = 0;  // row 0 again, row 1 missing
  REQUIRE(f.seal(f.upload(owner, 1, 2, contents)));
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error_code() == static_cast<int>(Errc::kConflict));
  CHECK(status.error().find("'w'") != std::string::npos);
  CHECK(f.steps().empty());
  check_nothing_open(f);
  // The same step can be saved again, by the same launch.
  REQUIRE(f.save(launched, 1, {.world_size = 2}));

  Daemon::Options bad;
  bad.bugs.coverage_off = true;
  RunFixture g(bad);
  const auto hole = *g.begin(*g.open("a"), 1, 0, {.world_size = 1});
  auto half = g.contents(hole, 0, 2);
  REQUIRE(g.seal(g.upload(hole, 0, 2, half)));
  CHECK(g.final_status(hole).state() == State::COMMITTED);
}

TEST_CASE("checkpoints: a manifest that cannot be read fails the save, not the daemon", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 1});
  auto seal = f.upload(owner, 0, 1);
  SECTION("its chunk is not there") {
    seal.mutable_manifest(0)->set_first_index(9);
  }
  SECTION("its bytes are not those that were sealed") {
    seal.set_digest(sha256("other"));
  }
  SECTION("its bytes are damaged on the disk") {
    for (const auto& name : f.disk.names())
      if (name.starts_with("segment")) REQUIRE(f.disk.flip(name, 4096 + 5, 0));
  }
  REQUIRE(f.seal(seal));
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::FAILED);
  INFO(status.error());
  CHECK((status.error_code() == static_cast<int>(Errc::kDataLoss) ||
         status.error_code() == static_cast<int>(Errc::kNotFound)));
  CHECK(f.steps().empty());
  CHECK_FALSE(f.daemon->failure());
  REQUIRE(f.save(launched, 2));
}

TEST_CASE("checkpoints: manifests longer than the merge memory are merged all the same", "[server]") {
  Daemon::Options options;
  options.checkpoints.merge_memory_bytes = 64 * kKiB;
  options.checkpoints.merge_fan_in = 2;
  RunFixture f(options);
  const auto launched = *f.open("a");
  constexpr std::uint32_t kRanks = 5;
  std::optional<OwnerId> owner;
  std::uint64_t manifests = 0;
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    owner = *f.begin(launched, 1, rank, {.world_size = kRanks});
    auto contents = f.contents(*owner, rank, kRanks);
    for (int i = 0; i < 1500; ++i)
      contents.meta.push_back(
          {.scope = "f", .key = std::to_string(i), .value = "a value that is the same on all ranks", .rank = rank});
    const auto seal = f.upload(*owner, rank, kRanks, contents);
    manifests += seal.manifest_bytes();
    REQUIRE(f.seal(seal));
  }
  CHECK(manifests > 3 * options.checkpoints.merge_memory_bytes);
  const auto status = f.final_status(*owner);
  INFO(status.error());
  CHECK(status.state() == State::COMMITTED);
  const auto index = format::decode(read_index(f, *f.open_step()));
  REQUIRE(index);
  CHECK(index->meta.size() == 1500);
}

TEST_CASE("checkpoints: an entry longer than the merge memory is a clear failure", "[server]") {
  Daemon::Options options;
  options.checkpoints.merge_memory_bytes = 64 * kKiB;
  RunFixture f(options);
  const auto owner = *f.begin(*f.open("a"), 1, 0, {});
  auto contents = f.contents(owner, 0, 1);
  contents.meta.push_back({.scope = "f", .key = "k", .value = std::string(200 * kKiB, 'v'), .rank = 0});
  REQUIRE(f.seal(f.upload(owner, 0, 1, contents)));
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::FAILED);
  INFO(status.error());
  CHECK(status.error().find("than what this daemon merges") != std::string::npos);
}

TEST_CASE("checkpoints: a daemon that dies while manifests are merged in levels merges them again", "[server]") {
  // Goal: runs are remade from the manifests, and what a process before left of them is garbage. Method: fan-in 2, so
  // that nine ranks make levels; the daemon dies after a number of seals and a moment more, drawn from the seed.
  Daemon::Options options;
  options.checkpoints.merge_fan_in = 2;
  options.checkpoints.writers_in_record_max = 3;
  options.garbage.grace = 10s;
  options.garbage.interval = 1s;
  constexpr std::uint32_t kRanks = 9;
  std::uint64_t merges = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    RunFixture f(options, seed);
    const auto launched = *f.open("a");
    OwnerId owner;
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) owner = *f.begin(launched, 1, rank, {.world_size = kRanks});
    for (std::uint32_t i = 0; i < kRanks; ++i) {
      const auto rank = (i * 5 + static_cast<std::uint32_t>(seed)) % kRanks;
      REQUIRE(f.save_rank(owner, rank, kRanks));
      if (i == seed % kRanks) {
        f.wait(std::chrono::microseconds(seed * 150));
        merges += f.daemon->stats().checkpoints.merges;
        f.restart_after(seed % 2 == 0 ? sim::Death::kPowerLoss : sim::Death::kProcess);
      }
    }
    const auto status = f.final_status(owner);
    INFO("seed " << seed << ": " << status.error());
    REQUIRE(status.state() == State::COMMITTED);
    check_nothing_open(f);
    f.wait(1s);
    CHECK(f.records("l/") == 0);
    const auto info = *f.open_step();
    const auto index = format::decode(read_index(f, info));
    REQUIRE(index);
    CHECK(index->shards.size() == kRanks);
    // Left are data and manifest of each rank, and the index.
    f.wait(1min);
    std::uint64_t index_chunks = 0;
    for (const auto& run : info.index()) index_chunks += run.count();
    CHECK(f.target->chunks().stats().chunks == 2 * kRanks + index_chunks);
    CHECK(format::decode(read_index(f, info)));
  }
  CHECK(merges > 0);
}

TEST_CASE("checkpoints: seals that a crash left of an ended attempt are erased at the next start", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  REQUIRE(f.save_rank(owner, 0, 1));
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  // As if it had died between the commit and the end of what follows.
  const auto group = owner.home_group();
  records::SealRecord seal;
  seal.set_writer(7);
  for (const std::uint32_t rank : {0U, 1U, 2U}) {
    Edit edit(group);
    edit.put(seal_key(owner, rank), seal);
    REQUIRE(f.run(edit.apply(f.daemon->records())));
  }
  CHECK(f.records("l/") == 3);
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.records("l/") == 0);
  CHECK(f.steps() == std::vector<std::uint64_t>{1});
}

TEST_CASE("checkpoints: a committed step is refused, or replaced whole when overwrite is said", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto first = *f.save(launched, 5);
  const auto refused = f.begin(launched, 5, 0, {});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kExists);
  const auto second = *f.save(launched, 5, {.world_size = 2, .overwrite = true});
  CHECK(f.open_step(5)->owner() == second.view());
  CHECK(f.open_step(5)->world_size() == 2);
  CHECK(f.steps() == std::vector<std::uint64_t>{5});
  CHECK(f.status(first).state() == State::UNKNOWN);
  f.let_go();
  CHECK(f.records("w/") == 1);
  CHECK(f.status(first).state() == State::UNKNOWN);
  // A failed overwrite leaves what was there.
  const auto third = *f.begin(launched, 5, 0, {.world_size = 1, .overwrite = true});
  REQUIRE(f.abort(third, 0, "no"));
  CHECK(f.open_step(5)->owner() == second.view());
  CHECK(f.status(second).state() == State::COMMITTED);
}

TEST_CASE("checkpoints: of two launches' saves of a step one commits, and it is the newer one's", "[server]") {
  RunFixture f;
  const auto old = *f.open("a", 0);
  const auto old_owner = *f.begin(old, 5, 0, {});
  const auto old_seal = f.upload(old_owner, 0, 1);
  const auto fresh = *f.open("a", 1);
  const auto owner = *f.save(fresh, 5);
  CHECK(f.seal(old_seal).error().code == Errc::kFenced);
  CHECK(f.open_step(5)->owner() == owner.view());
}

TEST_CASE("checkpoints: explicit commit waits for all seals and then for the step", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const RunFixture::Terms terms{.world_size = 3, .explicit_commit = true};
  const auto owner = *f.begin(launched, 1, 0, terms);
  for (std::uint32_t rank = 1; rank < 3; ++rank) REQUIRE(f.begin(launched, 1, rank, terms));
  REQUIRE(f.save_rank(owner, 1, 3));
  const auto early = f.commit(owner);
  REQUIRE_FALSE(early);
  CHECK(early.error().code == Errc::kConflict);
  says(early.error(), {"2 of 3", "0, 2"});
  REQUIRE(f.save_rank(owner, 0, 3));
  REQUIRE(f.save_rank(owner, 2, 3));
  CHECK(f.status(owner, 5s).state() == State::OPEN);
  REQUIRE(f.commit(owner));
  CHECK(f.status(owner).state() == State::COMMITTED);
  REQUIRE(f.commit(owner));
  CHECK(f.abort(owner, 0, "too late").error().code == Errc::kConflict);
}

TEST_CASE("checkpoints: an explicit commit that never comes fails the attempt", "[server]") {
  RunFixture f;
  const auto owner = *f.begin(*f.open("a"), 1, 0, {.world_size = 1, .explicit_commit = true});
  REQUIRE(f.save_rank(owner, 0, 1));
  f.wait(9min);
  CHECK(f.status(owner).state() == State::OPEN);
  f.wait(2min);
  CHECK(f.status(owner).state() == State::FAILED);
}

TEST_CASE("checkpoints: a commit before all seals is one that the tests see", "[server]") {
  Daemon::Options bad;
  bad.bugs.commit_early = true;
  RunFixture f(bad);
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  REQUIRE(f.seal(f.upload(owner, 0, 2, f.contents(owner, 0, 1))));
  CHECK(f.final_status(owner).state() == State::COMMITTED);
}

// ---- Failure

TEST_CASE("checkpoints: a silent rank fails the save for all, by name, within 30 s and not before", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 3});
  for (std::uint32_t rank = 1; rank < 3; ++rank) REQUIRE(f.begin(launched, 1, rank, {.world_size = 3}));
  REQUIRE(f.save_rank(owner, 2, 3));  // sealed: it may die
  for (int i = 0; i < 5; ++i) {
    f.wait(5s);
    REQUIRE(f.heartbeat(owner, 0));
  }
  CHECK(f.status(owner).state() == State::OPEN);  // rank 1 has been silent for 25 s
  for (int i = 0; i < 2; ++i) {
    f.wait(5s);
    (void)f.heartbeat(owner, 0);
  }
  const auto status = f.status(owner);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error_code() == static_cast<int>(Errc::kAttemptFailed));
  CHECK(status.error().find("rank 1 silent for 30 s") != std::string::npos);
  CHECK(status.error().find("rank 0") == std::string::npos);
  const auto beat = f.heartbeat(owner, 0);
  REQUIRE_FALSE(beat);
  CHECK(beat.error().code == Errc::kAttemptFailed);
  CHECK(f.seal(f.upload(*f.begin(launched, 2, 0, {.world_size = 1}), 0, 1)));
  check_nothing_open(f);
}

TEST_CASE("checkpoints: a rank that never joins fails the save after ten minutes", "[server]") {
  RunFixture f;
  const auto owner = *f.begin(*f.open("a"), 1, 0, {.world_size = 3});
  for (int i = 0; i < 58; ++i) {
    f.wait(10s);
    REQUIRE(f.heartbeat(owner, 0));
  }
  for (int i = 0; i < 3; ++i) {
    f.wait(10s);
    (void)f.heartbeat(owner, 0);
  }
  const auto status = f.status(owner);
  CHECK(status.state() == State::FAILED);
  INFO(status.error());
  CHECK(status.error().find("2 ranks (1, 2) never joined within 600 s") != std::string::npos);
}

TEST_CASE("checkpoints: a rank that had joined and dies with the daemon fails the save 30 s after the restart",
          "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 20});
  for (const std::uint32_t rank : {1, 9, 19}) REQUIRE(f.begin(launched, 1, rank, {.world_size = 20}));
  f.wait(3s);
  f.restart_after(sim::Death::kPowerLoss);
  const auto beat = [&](rt::Duration duration) {  // all but rank 9
    for (const auto until = f.world.now() + duration; f.world.now() < until; f.wait(5s))
      for (const std::uint32_t rank : {0, 1, 19}) (void)f.heartbeat(owner, rank);
  };
  beat(25s);
  CHECK(f.status(owner).state() == State::OPEN);
  beat(10s);
  const auto status = f.status(owner);
  CHECK(status.state() == State::FAILED);
  INFO(status.error());
  CHECK(status.error().ends_with(": rank 9 silent for 30 s"));
  CHECK(f.records("j/") == 0);
  check_nothing_open(f);
}

TEST_CASE("checkpoints: a rank that has not joined before a restart has its ten minutes", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  f.wait(3s);
  f.restart_after(sim::Death::kProcess);
  for (int i = 0; i < 50; ++i) {
    REQUIRE(f.heartbeat(owner, 0));
    f.wait(10s);
  }
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  f.wait(2s);
  CHECK(f.records("j/") == 1);
  REQUIRE(f.save_rank(owner, 0, 2));
  REQUIRE(f.save_rank(owner, 1, 2));
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  CHECK(f.records("j/") == 0);
}

TEST_CASE("checkpoints: waiting for the outcome ends when there is one", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  wire::AttemptStatus ask;
  ask.set_bucket(f.bucket);
  ask.set_run(f.run_name);
  ask.set_owner(std::string(owner.view()));
  ask.set_wait_millis(25'000);
  auto waiting = f.begin_call(Method::kAttemptStatus, ask);
  f.wait(1s);
  CHECK_FALSE(waiting->has_value());
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  REQUIRE(f.abort(owner, 1, "out of memory"));
  REQUIRE(f.eventually([&] { return waiting->has_value(); }, 1s));
  REQUIRE(**waiting);
  State reply;
  REQUIRE(wire::decode(***waiting, reply, "reply"));
  CHECK(reply.state() == State::FAILED);
  CHECK(reply.error().find("rank 1 gave up: out of memory") != std::string::npos);
  REQUIRE(f.abort(owner, 0, "me too"));  // may be repeated
}

TEST_CASE("checkpoints: the outcome of a failed save is kept for an hour, then nothing of it is", "[server]") {
  RunFixture f;
  const auto owner = *f.begin(*f.open("a"), 1, 0, {.world_size = 2});
  REQUIRE(f.save_rank(owner, 0, 2));
  REQUIRE(f.abort(owner, 1, "no"));
  CHECK(f.records("w/") == 0);  // its chunks are garbage at once
  f.wait(50min);
  CHECK(f.status(owner).state() == State::FAILED);
  f.restart_after(sim::Death::kPowerLoss);
  f.wait(50min);
  CHECK(f.status(owner).state() == State::FAILED);
  f.wait(11min);
  CHECK(f.status(owner).state() == State::UNKNOWN);
  CHECK(f.records("f/") == 0);
  check_nothing_open(f);
}

TEST_CASE("checkpoints: a restarted daemon commits what was fully sealed, at whatever moment it died", "[server]") {
  int recovered = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    RunFixture f({}, seed);
    const auto launched = *f.open("a");
    const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
    REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
    REQUIRE(f.save_rank(owner, 0, 2));
    const auto last = f.upload(owner, 1, 2);
    auto sealing = f.begin_call(Method::kSeal, last);
    f.wait(std::chrono::microseconds(seed * 80));
    const bool acknowledged = sealing->has_value() && (*sealing)->has_value();
    if (acknowledged && f.daemon->stats().checkpoints.merging > 0) ++recovered;
    f.restart_after(seed % 2 == 0 ? sim::Death::kPowerLoss : sim::Death::kProcess);
    if (!acknowledged) REQUIRE(f.seal(last));
    CHECK(f.final_status(owner).state() == State::COMMITTED);
    CHECK(f.steps() == std::vector<std::uint64_t>{1});
    check_nothing_open(f);
    // What an earlier try to merge left is named by nobody; the index that is named can be read.
    CHECK(format::decode(read_index(f, *f.open_step())));
  }
  CHECK(recovered > 0);
}

TEST_CASE("checkpoints: an ordinary stop leaves an open save open", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  REQUIRE(f.save_rank(owner, 0, 2));
  f.stop();
  f.start();
  CHECK(f.status(owner).state() == State::OPEN);
  CHECK(f.status(owner).sealed() == 1);
  REQUIRE(f.heartbeat(owner, 1));
  REQUIRE(f.save_rank(owner, 1, 2));
  CHECK(f.final_status(owner).state() == State::COMMITTED);
}

// ---- Steps

TEST_CASE("checkpoints: removed steps are gone together with their owners", "[server]") {
  RunFixture f;
  const auto launched = *f.open("a");
  for (const std::uint64_t step : {1, 2, 3, 4, 5}) REQUIRE(f.save(launched, step));
  wire::StepRemove request;
  request.set_bucket(f.bucket);
  request.set_run(f.run_name);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request).error().code == Errc::kInvalid);
  request.mutable_step()->set_step(9);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request).error().code == Errc::kNotFound);
  request.mutable_step()->set_step(2);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request)->removed() == 1);
  request.clear_step();
  request.mutable_after()->set_step(3);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request)->removed() == 2);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request)->removed() == 0);
  CHECK(f.steps() == std::vector<std::uint64_t>{1, 3});
  CHECK(f.open_step()->step() == 3);
  CHECK(f.open_step(5).error().code == Errc::kNotFound);
  f.let_go();
  CHECK(f.records("w/") == 2);
}

TEST_CASE("checkpoints: a removal that names its steps spares what was saved after them", "[server]") {
  // Goal: a copy of the request that arrives late, after the step was removed and saved again, removes nothing.
  RunFixture f;
  const auto launched = *f.open("a");
  for (const std::uint64_t step : {1, 2}) REQUIRE(f.save(launched, step));
  wire::StepRemove one;
  one.set_bucket(f.bucket);
  one.set_run(f.run_name);
  wire::StepRemove rest = one;
  one.mutable_step()->set_step(2);
  rest.mutable_after()->set_step(0);
  for (const std::uint64_t step : {1, 2}) rest.add_owners(f.open_step(step)->owner());
  one.add_owners(f.open_step(2)->owner());
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, one)->removed() == 1);
  REQUIRE(f.save(*f.open("b"), 2));
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, one).error().code == Errc::kNotFound);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, rest)->removed() == 1);
  CHECK(f.steps() == std::vector<std::uint64_t>{2});
}

TEST_CASE("checkpoints: listings page through steps and runs", "[server]") {
  RunFixture f;
  std::vector<std::uint64_t> expected;
  const auto launched = *f.open("a");
  for (std::uint64_t step = 0; step < 10; ++step) {
    REQUIRE(f.save(launched, step * 7));
    expected.push_back(step * 7);
  }
  std::vector<std::uint64_t> seen;
  wire::StepList request;
  request.set_bucket(f.bucket);
  request.set_run(f.run_name);
  request.set_limit(3);
  for (bool more = true; more;) {
    const auto reply = f.call<wire::StepListReply>(Method::kStepList, request);
    REQUIRE(reply);
    for (const auto& step : reply->steps()) seen.push_back(step.step());
    more = reply->more();
    request.mutable_after()->set_step(seen.back());
  }
  CHECK(seen == expected);

  std::vector<std::string> names = {f.run_name};
  for (int i = 0; i < 9; ++i) {
    f.run_name = "run-" + std::to_string(i);
    names.push_back(f.run_name);
    REQUIRE(f.open("a"));
  }
  std::sort(names.begin(), names.end());
  std::vector<std::string> runs;
  wire::RunList list;
  list.set_bucket(f.bucket);
  list.set_limit(4);
  for (bool more = true; more;) {
    const auto reply = f.call<wire::RunListReply>(Method::kRunList, list);
    REQUIRE(reply);
    runs.insert(runs.end(), reply->runs().begin(), reply->runs().end());
    more = reply->more();
    list.set_after(runs.back());
  }
  CHECK(runs == names);
  f.run_name = "never-opened";
  CHECK(f.open_step().error().code == Errc::kNotFound);
}

TEST_CASE("checkpoints: activity is what ranks of an open save showed lately", "[server]") {
  RunFixture f;
  wire::RunActivity request;
  request.set_bucket(f.bucket);
  request.set_run(f.run_name);
  const auto activity = [&] { return *f.call<wire::RunActivityReply>(Method::kRunActivity, request); };
  CHECK_FALSE(activity().active());
  const auto launched = *f.open("a", 4);
  const auto owner = *f.begin(launched, 7, 0, {.world_size = 2});
  CHECK(activity().active());
  CHECK(activity().launch().job() == "a");
  CHECK(activity().launch().restart() == 4);
  CHECK(activity().step() == 7);
  CHECK(activity().ranks() == 1);
  REQUIRE(f.abort(owner, 0, "no"));
  CHECK_FALSE(activity().active());
}
