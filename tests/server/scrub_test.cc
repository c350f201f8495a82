#include "server/scrub/scrub.h"

#include <algorithm>
#include <map>

#include "storage/chunk_store/layout.h"
#include "tests/server/fixture.h"
#include "tests/sim/memory.h"

using namespace cairn;
using namespace cairn::server;

namespace {

constexpr std::size_t kBytes = 3 * kTestUnitBytes - 500;  // six blocks

std::string pattern(std::uint64_t seed) {
  return cairn::server::pattern(seed, kBytes);
}

/// A daemon with a bucket of as many copies as it has directories, and words to damage them.
struct ScrubFixture : Fixture {
  explicit ScrubFixture(std::size_t directories, Daemon::Options o = {}) : Fixture(std::move(o), 1, directories) {
    use_group_of(directories);
    REQUIRE(make_bucket("b"));
  }
  /// One chunk.
  ChunkId object(const std::string& key, std::uint64_t seed) {
    auto info = put_object("b", key, pattern(seed));
    REQUIRE(info);
    return {.owner = *OwnerId::from_bytes(info->owner()), .writer = 5, .index = 0};
  }
  storage::ChunkStore& chunks(std::size_t directory) { return targets->all()[directory].target->chunks(); }
  std::optional<storage::ChunkStore::Entry> entry(std::size_t directory, ChunkId id) {
    return *run(chunks(directory).entry(id));
  }
  void flip(std::size_t directory, ChunkId id, std::uint64_t at) {
    const auto location = *storage::decode_location(entry(directory, id)->place);
    REQUIRE(disks[directory]->flip(storage::segment_name(location.segment), location.offset() + at, 3));
  }
  /// Whether a directory's own copy is right, to the byte.
  bool whole(std::size_t directory, ChunkId id, std::uint64_t seed) {
    std::string out;
    for (std::uint32_t at = 0; at < kBytes; at += kTestUnitBytes) {
      auto piece = run(chunks(directory).read(id, at, std::min<std::uint32_t>(kTestUnitBytes, kBytes - at)));
      if (!piece) return false;
      out += piece->bytes.text();
    }
    return out == pattern(seed);
  }

  std::vector<wire::Job> jobs() {
    auto reply = call<wire::JobListReply>(Method::kJobList, wire::JobList());
    REQUIRE(reply);
    return {reply->jobs().begin(), reply->jobs().end()};
  }
  wire::Job job(const std::string& kind, std::size_t directory = 0) {
    const auto id = kind + "-" + targets->all()[directory].target->uuid().text().substr(0, 8);
    for (const auto& one : jobs())
      if (one.id() == id) return one;
    return {};
  }
  Result<wire::Job> control(const std::string& id, wire::JobControl::Action action) {
    wire::JobControl request;
    request.set_id(id);
    request.set_action(action);
    return call<wire::Job>(Method::kJobControl, request);
  }
  void start_scrub(std::optional<std::uint64_t> pace = {}) {
    wire::ScrubStart request;
    if (pace) request.set_pace(*pace);
    REQUIRE(call<wire::JobListReply>(Method::kScrubStart, request));
  }
  bool done() {
    return std::ranges::all_of(
        jobs(), [](const wire::Job& one) { return !one.id().starts_with("scrub-") || one.state() == wire::Job::DONE; });
  }
  void wait_done() {
    for (int i = 0; i < 600 && !done(); ++i) wait(1s);
    REQUIRE(done());
  }
  /// What a pass over every directory found, by directory: damaged chunks and those repaired.
  std::map<std::size_t, std::vector<wire::Damage>> scrub() {
    start_scrub();
    wait_done();
    return damage();
  }
  std::map<std::size_t, std::vector<wire::Damage>> damage() {
    std::map<std::size_t, std::vector<wire::Damage>> out;
    for (std::size_t i = 0; i < targets->all().size(); ++i) {
      wire::DamageList request;
      request.set_target(std::string(targets->all()[i].target->uuid().view()));
      request.set_limit(100);
      auto reply = call<wire::DamageListReply>(Method::kDamageList, request);
      REQUIRE(reply);
      if (reply->damage_size() > 0) out[i].assign(reply->damage().begin(), reply->damage().end());
    }
    return out;
  }
  double metric(const std::string& name, std::size_t directory = 0) const {
    const auto& entry = targets->all()[directory];
    return Fixture::metric(name + "{target=\"" + entry.target->uuid().text() + "\",directory=\"" + entry.directory +
                           "\"}");
  }
};

std::vector<std::uint32_t> offsets_of(const wire::Damage& damage) {
  return {damage.offsets().begin(), damage.offsets().end()};
}

}  // namespace

TEST_CASE("scrub: damage is told by object, chunk and offset, and repaired from the other copy", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  f.object("other", 2);
  CHECK(f.scrub().empty());
  CHECK(f.job("scrub").chunks() == 2);
  CHECK(f.job("scrub").bytes() == 2 * kBytes);

  f.flip(1, id, 70'000);
  f.flip(1, id, kTestUnitBytes);
  const auto found = f.scrub();
  REQUIRE(found.size() == 1);
  REQUIRE(found.at(1).size() == 1);
  const auto& damage = found.at(1).front();
  CHECK(wire::from_wire(damage.chunk()).value() == id);
  CHECK(offsets_of(damage) == std::vector<std::uint32_t>{65'536, kTestUnitBytes});
  CHECK(damage.kind() == wire::Damage::OBJECT);
  CHECK(damage.bucket() == "b");
  CHECK(damage.name() == "k");
  CHECK(damage.length() == kBytes);
  CHECK(damage.repaired_unix_nanos() >= damage.found_unix_nanos());
  CHECK(damage.found_unix_nanos() > 0);
  CHECK(f.job("scrub", 1).damaged() == 1);
  CHECK(f.job("scrub", 1).repaired() == 1);
  CHECK(f.job("scrub", 1).left() == 0);
  CHECK(f.job("scrub", 0).damaged() == 0);
  CHECK(f.metric("cairn_scrub_repaired_chunks_total", 1) == 1);
  CHECK(f.metric("cairn_scrub_damaged_chunks", 1) == 0);
  CHECK(f.metric("cairn_scrub_last_full_pass_timestamp_seconds", 1) > 0);
  CHECK(f.metric("cairn_scrub_read_bytes_total", 1) >= 4 * kBytes);
  CHECK(f.whole(1, id, 1));

  // Durable, and clean: what was repaired is forgotten by the next pass.
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.whole(1, id, 1));
  CHECK(f.damage().at(1).front().repaired_unix_nanos() != 0);
  CHECK(f.scrub().empty());
}

TEST_CASE("scrub: without a good copy the damage is told, stays, and is not made worse", "[server]") {
  const std::size_t directories = GENERATE(1, 2);
  ScrubFixture f(directories);
  const auto id = f.object("k", 1);
  const auto good = f.object("good", 2);
  for (std::size_t i = 0; i < directories; ++i) f.flip(i, id, 70'000 + i);
  const auto places = f.entry(0, id)->place;
  for (int pass = 0; pass < 2; ++pass) {
    const auto found = f.scrub();
    REQUIRE(found.size() == directories);
    for (const auto& [directory, list] : found) {
      REQUIRE(list.size() == 1);
      CHECK(offsets_of(list.front()) == std::vector<std::uint32_t>{65'536});
      CHECK(list.front().name() == "k");
      CHECK(list.front().repaired_unix_nanos() == 0);
      CHECK_THAT(list.front().unrepaired(), Catch::Contains("65536"));
      CHECK(f.job("scrub", directory).left() == 1);
      CHECK(f.job("repair", directory).state() == wire::Job::RUNNING);
      CHECK(f.metric("cairn_scrub_damaged_chunks", directory) == 1);
    }
    CHECK(f.entry(0, id)->place == places);
    if (pass == 0) f.restart_after(sim::Death::kPowerLoss);
    CHECK(f.metric("cairn_scrub_damaged_chunks") == 1);
  }
  CHECK(f.whole(0, good, 2));
  CHECK(f.read(id, 0, 65'536).value() == pattern(1).substr(0, 65'536));  // the rest is as good as ever
  CHECK(f.read(id, 65'536, 10).error().code == Errc::kDataLoss);
}

TEST_CASE("scrub: copies that are damaged in different blocks make a whole one", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  f.flip(0, id, 10);
  f.flip(1, id, 70'000);  // of the same piece
  const auto found = f.scrub();
  CHECK(found.size() == 2);
  for (const auto& [directory, list] : found) CHECK(list.front().repaired_unix_nanos() != 0);
  CHECK(f.whole(0, id, 1));
  CHECK(f.whole(1, id, 1));
}

TEST_CASE("scrub: a damaged copy is never the source of a repair", "[server]") {
  Daemon::Options options;
  options.membership_bugs.repair_unchecked = GENERATE(false, true);
  const bool planted = options.membership_bugs.repair_unchecked;
  ScrubFixture f(2, options);
  f.storage_bugs.repair_unchecked = planted;
  f.restart_after(sim::Death::kPowerLoss);
  const auto id = f.object("k", 1);
  f.flip(0, id, 70'000);
  f.flip(1, id, 70'001);
  const auto found = f.scrub();
  const bool claimed =
      std::ranges::any_of(found, [](const auto& entry) { return entry.second.front().repaired_unix_nanos() != 0; });
  CHECK(claimed == planted);  // the planted bug is one that this test sees
  CHECK_FALSE(f.whole(0, id, 1));
}

TEST_CASE("scrub: a copy that the index has lost is put back", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  const auto key = id.key();
  storage::Batch batch;
  batch.erase(storage::Table::kChunks, {key.data(), key.size()});
  batch.erase(storage::Table::kBlockCrcs, {key.data(), key.size()});
  REQUIRE(f.run(f.targets->all()[1].target->committer().commit(std::move(batch))));
  f.restart_after(sim::Death::kProcess);
  REQUIRE_FALSE(f.entry(1, id));
  const auto found = f.scrub();
  REQUIRE(found.size() == 1);
  CHECK(found.at(1).front().offsets_size() == 0);
  CHECK(found.at(1).front().repaired_unix_nanos() != 0);
  CHECK(f.whole(1, id, 1));
  CHECK(f.scrub().empty());
}

TEST_CASE("copier: no answer of an index is not taken for a chunk that is gone", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  const auto info = f.entry(0, id)->info;
  const auto key = id.key();
  storage::Batch batch;
  batch.erase(storage::Table::kChunks, {key.data(), key.size()});
  batch.erase(storage::Table::kBlockCrcs, {key.data(), key.size()});
  REQUIRE(f.run(f.targets->all()[1].target->committer().commit(std::move(batch))));
  f.restart_after(sim::Death::kProcess);
  Copier copier(*f.targets, *f.units, false);
  Pace pace(f.node, 0);
  auto& lacking = *f.targets->all()[1].target;
  auto gone = info;
  gone.id.index = 9;
  CHECK_FALSE(f.run(copier.copy(gone, lacking, std::nullopt, pace)).value());
  f.indexes[0]->faults.read_error = 1;
  // Whoever brings up a member would let it serve without the chunk.
  auto unknown = f.run(copier.copy(info, lacking, std::nullopt, pace));
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == Errc::kDataLoss);
  f.indexes[0]->faults.read_error = 0;
  CHECK(f.run(copier.copy(info, lacking, std::nullopt, pace)).value());
  CHECK(f.whole(1, id, 1));
}

TEST_CASE("scrub: a read that goes round damage has it repaired", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  f.flip(0, id, 10);
  f.flip(1, id, 200'000);
  CHECK(f.read(id, 0, 100).value() == pattern(1).substr(0, 100));  // the first copy is asked first
  CHECK(f.eventually([&] { return f.metric("cairn_scrub_repaired_chunks_total", 0) == 1; }));
  CHECK(f.whole(0, id, 1));
  CHECK(f.damage().at(0).front().name() == "k");
  CHECK_FALSE(f.whole(1, id, 1));  // nobody has looked there
}

TEST_CASE("scrub: a read that finds no good copy puts it on the list", "[server]") {
  ScrubFixture f(1);
  const auto id = f.object("k", 1);
  f.flip(0, id, 10);
  CHECK(f.read(id, 0, 100).error().code == Errc::kDataLoss);
  CHECK(f.eventually([&] { return f.metric("cairn_scrub_damaged_chunks") == 1; }));
  CHECK(offsets_of(f.damage().at(0).front()) == std::vector<std::uint32_t>{0});
}

TEST_CASE("scrub: what no record names is nobody's damage", "[server]") {
  ScrubFixture f(1);
  const auto id = f.object("k", 1);
  const auto open = f.begin_object("b", "open");
  const ChunkId unsealed{.owner = *open, .writer = 5, .index = 0};
  REQUIRE(f.put(unsealed, pattern(2)));
  f.flip(0, unsealed, 0);
  f.flip(0, id, 0);
  auto found = f.scrub();
  REQUIRE(found.at(0).size() == 2);
  CHECK(std::ranges::count(found.at(0), wire::Damage::OPEN, &wire::Damage::kind) == 1);

  wire::ObjectRemove remove;
  remove.set_bucket("b");
  remove.set_key("k");
  REQUIRE(f.call<wire::Empty>(Method::kObjectRemove, remove));
  wire::ObjectAbort abort;
  abort.set_bucket("b");
  abort.set_key("open");
  abort.set_owner(std::string(open->view()));
  REQUIRE(f.call<wire::Empty>(Method::kObjectAbort, abort));
  f.let_go();
  SECTION("before they are freed") {
    CHECK(f.has(id));
    CHECK(f.scrub().empty());
  }
  SECTION("and they leave the list by themselves") {
    CHECK(f.eventually([&] { return f.metric("cairn_scrub_damaged_chunks") == 0; }, 1h));
    CHECK(f.damage().empty());
  }
}

TEST_CASE("scrub: a pass can be paused, resumed and cancelled, and goes on after a restart", "[server]") {
  ScrubFixture f(1);
  std::vector<ChunkId> ids;
  for (std::uint64_t i = 0; i < 10; ++i) ids.push_back(f.object("k" + std::to_string(i), i));
  const auto last = *std::ranges::max_element(ids);
  f.flip(0, last, 0);
  f.start_scrub(kBytes / 10);  // ten seconds a chunk
  f.wait(35s);
  auto job = f.job("scrub");
  CHECK(job.state() == wire::Job::RUNNING);
  CHECK(job.chunks() >= 2);
  CHECK(job.chunks() <= 4);
  CHECK(job.chunks_total() == 10);

  SECTION("over a crash, a few seconds are lost") {
    f.restart_after(sim::Death::kPowerLoss);
    CHECK(f.job("scrub").state() == wire::Job::RUNNING);
    CHECK(f.job("scrub").chunks() + 1 >= job.chunks());
    CHECK(f.job("scrub").chunks() > 0);
    f.wait_done();
    CHECK(f.job("scrub").chunks() == 10);
    CHECK(f.metric("cairn_scrub_read_bytes_total") < 10 * kBytes);  // not from the beginning
    CHECK(f.damage().at(0).size() == 1);
  }
  SECTION("over an orderly restart, nothing") {
    f.stop();
    f.start();
    CHECK(f.job("scrub").chunks() == job.chunks());
    f.wait_done();
    CHECK(f.job("scrub").chunks() == 10);
  }
  SECTION("paused, also over a restart") {
    REQUIRE(f.control(job.id(), wire::JobControl::PAUSE)->state() == wire::Job::PAUSED);
    CHECK(f.control(job.id(), wire::JobControl::PAUSE));  // once more: the answer to the first was lost
    f.wait(60s);
    const auto paused = f.job("scrub").chunks();
    CHECK(paused <= job.chunks() + 1);  // the one that was being read
    f.restart_after(sim::Death::kPowerLoss);
    f.wait(60s);
    CHECK(f.job("scrub").state() == wire::Job::PAUSED);
    CHECK(f.job("scrub").chunks() == paused);
    REQUIRE(f.control(job.id(), wire::JobControl::RESUME)->state() == wire::Job::RUNNING);
    CHECK(f.control(job.id(), wire::JobControl::RESUME));
    f.wait_done();
    CHECK(f.control(job.id(), wire::JobControl::PAUSE).error().code == Errc::kConflict);
    CHECK(f.job("scrub").chunks() == 10);
    CHECK(f.damage().at(0).size() == 1);
  }
  SECTION("cancelled") {
    REQUIRE(f.control(job.id(), wire::JobControl::CANCEL)->state() == wire::Job::CANCELLED);
    f.restart_after(sim::Death::kPowerLoss);
    f.wait(10min);
    CHECK(f.job("scrub").state() == wire::Job::CANCELLED);
    CHECK(f.control(job.id(), wire::JobControl::RESUME).error().code == Errc::kConflict);
    CHECK(f.metric("cairn_scrub_last_full_pass_timestamp_seconds") == 0);
    CHECK(f.scrub().at(0).size() == 1);
    CHECK(f.metric("cairn_scrub_last_full_pass_timestamp_seconds") > 0);
  }
  SECTION("asked for again, it is the same, at the pace asked for last") {
    f.start_scrub(0);
    CHECK(f.job("scrub").chunks() >= job.chunks());
    f.wait(5s);
    CHECK(f.job("scrub").state() == wire::Job::DONE);
  }
  CHECK(f.control("scrub-00000000", wire::JobControl::PAUSE).error().code == Errc::kNotFound);
}

TEST_CASE("scrub: passes begin by themselves, and one that is asked for begins anew", "[server]") {
  Daemon::Options options;
  options.scrub.interval = 24h;
  options.scrub.pace = kBytes / 10;
  ScrubFixture f(1, options);
  for (std::uint64_t i = 0; i < 5; ++i) f.object("k" + std::to_string(i), i);
  CHECK(f.jobs().empty());
  f.wait(23h);
  CHECK(f.jobs().empty());
  f.restart_after(sim::Death::kPowerLoss);  // an interval does not begin anew with the process
  f.wait(1h + 25s);
  CHECK(f.job("scrub").state() == wire::Job::RUNNING);
  CHECK(f.job("scrub").chunks() > 0);
  f.start_scrub(0);
  CHECK(f.job("scrub").chunks() == 0);
  f.wait(5s);
  CHECK(f.job("scrub").state() == wire::Job::DONE);
  f.daemon->set({.garbage_grace = 10min,
                 .garbage_interval = 1min,
                 .retention_interval = 1min,
                 .scrub_interval = 1h,
                 .scrub_pace = 0,
                 .repair_pace = 0,
                 .handover_memory = 0});
  const auto first = f.metric("cairn_scrub_last_full_pass_timestamp_seconds");
  f.wait(61min);
  CHECK(f.metric("cairn_scrub_last_full_pass_timestamp_seconds") >= first + 3500);
}

TEST_CASE("scrub: repair can be paused, and goes on when it may", "[server]") {
  ScrubFixture f(2);
  const auto id = f.object("k", 1);
  f.flip(0, id, 70'000);
  f.flip(1, id, 70'000);
  REQUIRE(f.scrub().size() == 2);
  const auto repair = f.job("repair");
  CHECK(repair.left() == 1);
  CHECK(f.control(repair.id(), wire::JobControl::CANCEL).error().code == Errc::kInvalid);
  REQUIRE(f.control(repair.id(), wire::JobControl::PAUSE)->state() == wire::Job::PAUSED);
  f.flip(1, id, 70'000);  // the same bit: the other copy is good again, as after a disk that had answered wrongly
  f.wait(1h);
  CHECK(f.metric("cairn_scrub_damaged_chunks", 1) == 0);
  CHECK(f.metric("cairn_scrub_damaged_chunks", 0) == 1);
  REQUIRE(f.control(repair.id(), wire::JobControl::RESUME));
  CHECK(f.eventually([&] { return f.metric("cairn_scrub_damaged_chunks", 0) == 0; }));
  CHECK(f.whole(0, id, 1));
  CHECK(f.job("repair").id().empty());
}

TEST_CASE("scrub: a damaged index or superblock is told", "[server]") {
  ScrubFixture f(2);
  f.object("k", 1);
  REQUIRE(f.disks[1]->flip("superblock", 20, 1));
  CHECK(f.scrub().empty());
  CHECK(f.job("scrub", 0).errors_size() == 0);
  REQUIRE(f.job("scrub", 1).errors_size() == 1);
  CHECK_THAT(f.job("scrub", 1).errors(0), Catch::Contains("superblock"));
}

TEST_CASE("scrub: requests about targets that are not here are refused", "[server]") {
  ScrubFixture f(1);
  wire::ScrubStart start;
  start.add_targets(std::string(16, 'x'));
  CHECK(f.call<wire::JobListReply>(Method::kScrubStart, start).error().code == Errc::kNotFound);
  start.set_targets(0, "short");
  CHECK_FALSE(f.call<wire::JobListReply>(Method::kScrubStart, start));
  wire::DamageList list;
  list.set_target(std::string(16, 'x'));
  CHECK(f.call<wire::DamageListReply>(Method::kDamageList, list).error().code == Errc::kNotFound);
  CHECK(f.control("", wire::JobControl::PAUSE).error().code == Errc::kNotFound);
}
