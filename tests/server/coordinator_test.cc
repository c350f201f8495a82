#include <catch2/catch.hpp>
#include <functional>

#include "server/coordinator/changes.h"
#include "server/coordinator/coordinator.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

Start start_of(std::uint8_t target, std::uint64_t incarnation, std::string node = "n1") {
  Start start;
  start.targets = {{uuid(target), incarnation, "/d" + std::to_string(target)}};
  start.node = node;
  start.addresses = {node + ":7420"};
  start.fresh_cluster = uuid(9);
  return start;
}

}  // namespace

TEST_CASE("map: the first start makes a cluster of one target", "[server]") {
  auto map = after_start({}, start_of(1, 4));
  REQUIRE(map);
  CHECK(map->cluster == uuid(9));
  for (const std::uint32_t group : {0u, 1u, 255u}) {
    const auto* home = map->find(true, group);
    REQUIRE(home);
    CHECK(home->epoch == GroupEpoch{1, 1});
    CHECK(home->loss == 0);
    REQUIRE(home->members.size() == 1);
    CHECK(home->members[0].serving);
    CHECK(home->members[0].incarnation == 4);
  }
  CHECK(map->find(true, 256) == nullptr);
  CHECK(map->find(false, 0) == nullptr);
  CHECK(map->find(false, kFirstDataGroup) != nullptr);
  REQUIRE(data_groups(*map, 1).size() == 1);
}

TEST_CASE("map: starts of a member, as a table", "[server]") {
  const auto map = *after_start({}, start_of(1, 4));
  struct Case {
    const char* what;
    Start start;
    std::optional<Errc> error;
    std::uint64_t epoch;
  };
  const auto row = GENERATE(values<Case>({
      {"a new incarnation: a new epoch of every group", start_of(1, 5), {}, 2},
      {"incarnations may be skipped", start_of(1, 50), {}, 2},
      {"the same incarnation, again", start_of(1, 4), {}, 1},
      {"the same incarnation at another address: a new map, no new epoch", start_of(1, 4, "n2"), {}, 1},
      {"an older incarnation: the directory went back", start_of(1, 3), Errc::kDataLoss, 0},
  }));
  INFO(row.what);
  const auto next = after_start(map, row.start);
  if (row.error) {
    REQUIRE_FALSE(next);
    CHECK(next.error().code == *row.error);
    return;
  }
  REQUIRE(next);
  CHECK(next->cluster == uuid(9));  // never the fresh one
  for (const auto& range : next->groups) {
    CHECK(range.epoch == GroupEpoch{1, row.epoch});
    CHECK(range.members[0].incarnation == row.start.targets[0].incarnation);
  }
  REQUIRE(next->nodes.size() == 1);
  CHECK(next->nodes[0].name == row.start.node);
}

TEST_CASE("map: survives its encoding", "[server]") {
  auto map = *after_start({}, start_of(1, 4));
  map.targets.push_back({.uuid = uuid(3), .incarnation = 8, .node = "n3", .directory = "/d3", .out = true});
  map.groups[1].members.push_back({.target = uuid(3), .incarnation = 8, .serving = false, .node = "n3", .joined = 17});
  map.groups[1].loss = 2;
  const auto back = decode_map(encode_map(map));
  REQUIRE(back);
  CHECK(*back == map);
  CHECK(decode_map("\xff\xff").error().code == Errc::kDataLoss);
  CHECK(decode_map("").error().code == Errc::kDataLoss);
}

TEST_CASE("map: one that does not make sense is damage, not a map", "[server]") {
  // Goal: starts and changes go by what a map names without a second look. Method: one thing wrong at a time.
  const auto whole = *after_start({}, start_of(1, 4));
  REQUIRE(decode_map(encode_map(whole)));
  const auto damaged_by = [&](const std::function<void(ClusterMap&)>& change) {
    auto map = whole;
    change(map);
    const auto read = decode_map(encode_map(map));
    return !read && read.error().code == Errc::kDataLoss;
  };
  CHECK(damaged_by([](ClusterMap& map) { map.groups[0].members[0].target = uuid(7); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].placement[0] = uuid(7); }));
  CHECK(damaged_by([](ClusterMap& map) { map.targets.push_back(map.targets[0]); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].members.push_back(map.groups[1].members[0]); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].placement.push_back(map.groups[1].placement[0]); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[0].count = 255; }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[0].count = 257; }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups.erase(map.groups.begin()); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups.push_back(map.groups[0]); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups.push_back(map.groups[1]); }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].copies = 4; }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].count = 0; }));
  // The memory for the losses of all groups is taken by the highest number.
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].count = 0xfffffff0; }));
  CHECK(damaged_by([](ClusterMap& map) { map.groups[1].first = 0x7fffffff; }));
}

TEST_CASE("coordinator: every start of a daemon raises every group's epoch, durably", "[server]") {
  Fixture f;
  const auto cluster = f.daemon->cluster();
  for (std::uint64_t epoch = 1; epoch < 4; ++epoch) {
    CHECK(f.daemon->map().find(true, 17)->epoch.count == epoch);
    CHECK(f.daemon->map().find(false, kFirstDataGroup)->epoch.count == epoch);
    CHECK(f.daemon->cluster() == cluster);
    f.restart_after(sim::Death::kPowerLoss);
  }
}

TEST_CASE("coordinator: a proposal on an old version changes nothing", "[server]") {
  Fixture f;
  auto local = *f.run(open_local_coordinator(*f.targets));
  auto& coordinator = local.coordinator;
  const auto version = coordinator->map()->version;
  auto next = *coordinator->map();
  next.nodes[0].name = "other";
  CHECK(f.run(coordinator->propose(next, version - 1)).error().code == Errc::kConflict);
  CHECK(coordinator->map()->nodes[0].name == "n1");
  REQUIRE(f.run(coordinator->propose(next, version)));
  CHECK(coordinator->map()->version == version + 1);
  CHECK(f.run(open_local_coordinator(*f.targets))->coordinator->map()->nodes[0].name == "other");
}
