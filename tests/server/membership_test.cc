#include "server/membership/membership.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>

#include "server/coordinator/changes.h"
#include "server/daemon/daemon.h"
#include "storage/record_store/layout.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

using namespace cairn;
using namespace cairn::server;
using namespace std::chrono_literals;

namespace {

/// One daemon with several data directories, any of which may be given at a start. Records only.
class Directories {
 public:
  explicit Directories(std::size_t count, std::uint64_t seed = 1) : world(seed), node(world.make_node("daemon")) {
    for (std::size_t i = 0; i < count; ++i) add_disk();
    std::vector<std::size_t> all(count);
    for (std::size_t i = 0; i < count; ++i) all[i] = i;
    start(all);
  }
  ~Directories() { crash(sim::Death::kProcess); }

  std::size_t add_disk() {
    const auto name = "d" + std::to_string(disks.size());
    disks.push_back(&world.make_disk(name, {}));
    indexes.push_back(&world.make_index(name + "/index"));
    return disks.size() - 1;
  }
  Result<void> try_start(std::vector<std::size_t> which, std::set<Uuid> lost = {}) {
    TRY(units, rt::UnitPool::create(node, 16, 128 * kKiB));
    targets = std::make_unique<TargetSet>();
    storage::Target::Options target_options;
    target_options.chunks.segment_bytes = 16 * kMiB;
    target_options.chunks.ballast_bytes = 1 * kMiB;
    for (const auto i : which) {
      TRY(auto opened, run(storage::Target::open(node.runtime(), disks[i]->attach(node), indexes[i]->attach(node),
                                                 *units, target_options)));
      ids[i] = opened->uuid();
      targets->add("/d" + std::to_string(i), std::move(opened));
    }
    Daemon::Options options;
    options.node = "n1";
    options.lost_targets = std::move(lost);
    options.membership_bugs = bugs;
    TRY(daemon, run(Daemon::create(node.runtime(), *targets, *units, options)));
    return {};
  }
  void start(std::vector<std::size_t> which, std::set<Uuid> lost = {}) {
    auto started = try_start(std::move(which), std::move(lost));
    INFO((started ? "" : started.error().message));
    REQUIRE(started);
  }
  void crash(sim::Death death) {
    if (units) node.hold(std::move(units));
    if (targets) node.hold(std::move(targets));
    if (daemon) node.hold(std::move(daemon));
    node.kill(death);
    node.restart();
  }
  void restart(std::vector<std::size_t> which, std::set<Uuid> lost = {}) {
    crash(sim::Death::kPowerLoss);
    start(std::move(which), std::move(lost));
  }
  /// The error of a start that is refused; the process has ended.
  Error refused(std::vector<std::size_t> which, std::set<Uuid> lost = {}) {
    crash(sim::Death::kPowerLoss);
    auto started = try_start(std::move(which), std::move(lost));
    REQUIRE_FALSE(started);
    crash(sim::Death::kProcess);
    return started.error();
  }

  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  bool eventually(const std::function<bool()>& done) { return world.run_until(done, world.now() + 10min); }

  Result<Version> put(HomeGroup group, const std::string& key, const std::string& value) {
    storage::Transaction transaction;
    transaction.group = group;
    transaction.puts = {{key, value}};
    return run(daemon->records().apply(std::move(transaction)));
  }
  Result<Version> erase(HomeGroup group, const std::string& key) {
    storage::Transaction transaction;
    transaction.group = group;
    transaction.deletes = {key};
    return run(daemon->records().apply(std::move(transaction)));
  }
  std::string get(HomeGroup group, const std::string& key) {
    auto found = run(daemon->records().get(group, key));
    REQUIRE(found);
    return *found ? (*found)->value : "(absent)";
  }
  /// The home groups' members: "0 1 +2".
  std::string home() const {
    std::string out;
    for (const auto& member : daemon->map().find(true, 0)->members)
      for (const auto& [i, uuid] : ids)
        if (uuid == member.target)
          out += (out.empty() ? "" : " ") + std::string(member.serving ? "" : "+") + std::to_string(i);
    return out;
  }
  storage::Target& target(std::size_t i) { return *targets->find(ids.at(i)); }
  /// All records of a target, as they lie there, with the groups' sequences.
  std::map<std::string, std::string> lying_on(std::size_t i) {
    std::map<std::string, std::string> out;
    for (const auto table : {storage::Table::kRecords, storage::Table::kMeta}) {
      const auto from = table == storage::Table::kMeta ? "group." : "";
      const auto to = table == storage::Table::kMeta ? "group/" : "";
      for (auto& entry : run(target(i).index().scan(table, from, to, 100'000)).value())
        out[std::to_string(static_cast<int>(table)) + entry.key] = entry.value;
    }
    return out;
  }

  sim::World world;
  sim::Node& node;
  std::vector<sim::DiskImage*> disks;
  std::vector<sim::IndexImage*> indexes;
  std::map<std::size_t, Uuid> ids;
  MembershipBugs bugs;
  std::unique_ptr<rt::UnitPool> units;
  std::unique_ptr<TargetSet> targets;
  std::unique_ptr<Daemon> daemon;
};

}  // namespace

TEST_CASE("membership: records lie on every member, with the same versions", "[server]") {
  Directories d(3);
  CHECK(d.home() == "0 1 2");
  for (int i = 0; i < 50; ++i) REQUIRE(d.put(static_cast<HomeGroup>(i % 7), "k" + std::to_string(i), "v"));
  REQUIRE(d.erase(3, "k3"));
  CHECK(d.lying_on(0).size() == 49 + 7);
  CHECK(d.lying_on(1) == d.lying_on(0));
  CHECK(d.lying_on(2) == d.lying_on(0));
  d.restart({2, 0, 1});  // the order of the command line is no matter
  CHECK(d.home() == "0 1 2");
  CHECK(d.get(4, "k4") == "v");
}

TEST_CASE("membership: a directory that fails is left out before anybody hears of it, and the rest serves",
          "[server]") {
  Directories d(2);
  REQUIRE(d.put(1, "a", "1"));
  const auto epoch = d.daemon->map().find(true, 1)->epoch;
  const auto which = GENERATE(0U, 1U);
  d.indexes[which]->fail_commit_in = 1;
  REQUIRE(d.put(1, "a", "2"));
  CHECK(d.home() == std::to_string(1 - which));
  CHECK(d.daemon->map().find(true, 1)->epoch > epoch);
  CHECK_FALSE(d.daemon->failure());
  CHECK(d.get(1, "a") == "2");
  REQUIRE(d.put(2, "b", "1"));
  CHECK(d.get(2, "b") == "1");

  SECTION("back at the next start: brought up to date, and serving") {
    d.restart({0, 1});
    CHECK(d.get(1, "a") == "2");
    CHECK(d.eventually([&] { return d.home().find('+') == std::string::npos; }));
    CHECK(d.lying_on(0) == d.lying_on(1));
  }
  SECTION("the one that stayed may start alone, the other may not") {
    const auto error = d.refused({which});
    CHECK(error.code == Errc::kUnavailable);
    CHECK(error.message.find(d.ids[1 - which].text()) != std::string::npos);
    d.start({1 - which});
    CHECK(d.get(1, "a") == "2");
  }
  SECTION("the other fails, too: nothing is left") {
    d.indexes[1 - which]->fail_commit_in = 1;
    CHECK_FALSE(d.put(1, "a", "3"));
    CHECK(d.daemon->failure());
  }
}

TEST_CASE("membership: an idle directory that fails is noticed, too", "[server]") {
  Directories d(2);
  d.target(0).committer().fail_stop({Errc::kFailed, "a chunk's write failed"});
  CHECK(d.eventually([&] { return d.home() == "1"; }));
  CHECK_FALSE(d.daemon->failure());
}

TEST_CASE("membership: of three, two that fail one after the other are done without, and both come back", "[server]") {
  Directories d(3);
  for (const std::size_t i : {0U, 2U}) {
    d.indexes[i]->fail_commit_in = 1;
    REQUIRE(d.put(1, "a", std::to_string(i)));
  }
  CHECK(d.home() == "1");
  d.restart({0, 1, 2});
  CHECK(d.get(1, "a") == "2");
  CHECK(d.eventually([&] { return d.home() == "1 0 2"; }));
  CHECK(d.lying_on(0) == d.lying_on(1));
  CHECK(d.lying_on(2) == d.lying_on(1));
}

TEST_CASE("membership: a directory more is brought up while records change, page by page", "[server]") {
  Directories d(1, GENERATE(range(1U, 6U)));
  for (int i = 0; i < 500; ++i) REQUIRE(d.put(5, "k" + std::to_string(i), std::to_string(i)));
  REQUIRE(d.put(255, "last", "group"));
  d.add_disk();
  d.indexes[1]->latency_max = 5ms;  // time for a round between reading a page and writing it
  d.restart({0, 1});
  CHECK(d.home() == "0 +1");
  struct Writer {
    static Task<void> run(sim::Node& node, storage::RecordStore& records, int first) {
      for (int i = first; i < 500; i += 8) {  // each key once: nothing heals what is lost
        storage::Transaction transaction;
        transaction.group = 5;
        const auto key = "k" + std::to_string(i * 37 % 500);
        if (i % 3 == 0)
          transaction.deletes = {key};
        else
          transaction.puts = {{key, "new " + std::to_string(i)}};
        if (auto done = co_await records.apply(std::move(transaction)); !done) co_return fail(done.error());
        co_await node.sleep(100us);
      }
      co_return {};
    }
  };
  int running = 8;
  for (int i = 0; i < 8; ++i)
    d.node.spawn(Writer::run(d.node, d.daemon->records(), i), [&](Result<void> done) {
      CHECK(done);
      --running;
    });
  CHECK(d.eventually([&] { return d.home() == "0 1"; }));
  CHECK(d.eventually([&] { return running == 0; }));
  CHECK(d.lying_on(1) == d.lying_on(0));
  REQUIRE(d.put(5, "k1", "after"));
  CHECK(d.lying_on(1) == d.lying_on(0));
}

TEST_CASE("membership: what was removed while a directory was away is removed there", "[server]") {
  Directories d(2);
  for (int i = 0; i < 300; ++i) REQUIRE(d.put(5, "k" + std::to_string(i), "old"));
  d.indexes[1]->fail_commit_in = 1;
  for (int i = 0; i < 300; i += 2) REQUIRE(d.erase(5, "k" + std::to_string(i)));
  d.restart({0, 1});
  CHECK(d.eventually([&] { return d.home() == "0 1"; }));
  CHECK(d.lying_on(1) == d.lying_on(0));
}

TEST_CASE("membership: an empty directory takes the place of a lost one", "[server]") {
  Directories d(2);
  REQUIRE(d.put(1, "a", "1"));
  d.indexes[1]->fail_commit_in = 1;
  REQUIRE(d.put(1, "a", "2"));
  const auto lost = d.ids[1];
  const auto replacement = d.add_disk();
  d.restart({0, replacement}, {lost});
  CHECK(d.get(1, "a") == "2");
  CHECK(d.daemon->map().find(true, 1)->loss == 0);  // the one that is left had gone on alone
  CHECK(d.eventually([&] { return d.home() == "0 2"; }));
  CHECK(d.lying_on(2) == d.lying_on(0));
  CHECK(d.daemon->map().target(lost) == nullptr);
  // It is not taken back, whatever it holds.
  CHECK(d.refused({0, 1, replacement}).message.find("declared lost") != std::string::npos);
  d.start({0, replacement});
  CHECK(d.get(1, "a") == "2");
}

TEST_CASE("membership: going on by the operator's word raises loss everywhere", "[server]") {
  Directories d(2);
  REQUIRE(d.put(1, "a", "1"));
  const auto error = d.refused({0});
  CHECK(error.message.find("--lost-target " + d.ids[1].text()) != std::string::npos);
  d.start({0}, {d.ids[1]});
  for (const auto& range : d.daemon->map().groups) {
    CHECK(range.loss >= 1);
    CHECK(range.epoch.generation == 2);
  }
  CHECK(d.get(1, "a") == "1");
  REQUIRE(d.put(1, "a", "2"));
}

TEST_CASE("membership: two starts with different targets never take each other's maps for their own", "[server]") {
  // 0 writes a map that nobody else gets; 1 and 2 go on; then all are there.
  Directories d(3);
  REQUIRE(d.put(1, "a", "1"));
  d.indexes[1]->fail_commit_in = 1;
  d.indexes[2]->fail_commit_in = 1;
  CHECK_FALSE(d.put(1, "a", "2"));  // two of three at once: nobody goes on
  CHECK(d.daemon->failure());
  d.restart({1, 2});
  REQUIRE(d.put(1, "a", "3"));
  d.restart({0, 1, 2});
  CHECK(d.get(1, "a") == "3");
  CHECK(d.eventually([&] { return d.home() == "1 2 0"; }));
  CHECK(d.lying_on(0) == d.lying_on(1));
  d.restart({0, 2});
  CHECK(d.get(1, "a") == "3");
}

TEST_CASE("membership: a crash in the middle of a round leaves the members equal after the start", "[server]") {
  std::set<std::string> outcomes;
  for (std::uint64_t seed = 1; seed <= 80; ++seed) {
    Directories d(3, seed);
    REQUIRE(d.put(1, "a", "before"));
    for (auto* index : d.indexes) index->latency_max = 5ms;
    struct Writer {
      static Task<void> run(storage::RecordStore& records, bool& answered) {
        storage::Transaction transaction;
        transaction.group = 1;
        transaction.puts = {{"a", "after"}, {"b", "new"}};
        answered = (co_await records.apply(std::move(transaction))).has_value();
        co_return {};
      }
    };
    auto answered = std::make_shared<bool>(false);
    d.node.spawn(Writer::run(d.daemon->records(), *answered));
    d.world.run_for(std::chrono::microseconds(2 * seed * seed));
    d.crash(sim::Death::kPowerLoss);
    d.start({0, 1, 2});
    INFO("seed " << seed);
    CHECK(d.home() == "0 1 2");
    CHECK(d.lying_on(1) == d.lying_on(0));
    CHECK(d.lying_on(2) == d.lying_on(0));
    const auto now = d.get(1, "a");
    if (*answered) CHECK(now == "after");
    CHECK(d.get(1, "b") == (now == "after" ? "new" : "(absent)"));
    outcomes.insert(now + (*answered ? " answered" : ""));
    REQUIRE(d.put(1, "a", "next"));
    CHECK(d.lying_on(1) == d.lying_on(0));
  }
  CHECK(outcomes == std::set<std::string>{"before", "after", "after answered"});
}

TEST_CASE("membership: a member that is damaged is read around", "[server]") {
  Directories d(2);
  REQUIRE(d.put(1, "a", "1"));
  d.indexes[0]->faults.read_error = 1;
  CHECK(d.get(1, "a") == "1");
  CHECK(d.eventually([&] { return d.home() == "1"; }));
  CHECK_FALSE(d.daemon->failure());
}

TEST_CASE("membership: directories of two clusters are refused", "[server]") {
  Directories a(1);
  a.crash(sim::Death::kProcess);
  a.add_disk();
  a.start({1});  // a cluster of its own
  const auto error = a.refused({0, 1});
  CHECK(error.code == Errc::kInvalid);
  CHECK(error.message.find("belongs to cluster") != std::string::npos);
}
