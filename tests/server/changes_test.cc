#include "server/coordinator/changes.h"

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

std::set<Uuid> set_of(const std::vector<std::uint8_t>& targets) {
  std::set<Uuid> out;
  for (const auto n : targets) out.insert(uuid(n));
  return out;
}

Start start_with(const std::vector<std::uint8_t>& targets, std::uint64_t incarnation = 1,
                 const std::vector<std::uint8_t>& lost = {}, bool forced = false) {
  Start start;
  for (const auto n : targets) start.targets.push_back({uuid(n), incarnation, "/d" + std::to_string(n)});
  start.lost = set_of(lost);
  start.forced = forced;
  start.node = "n1";
  start.fresh_cluster = uuid(99);
  return start;
}
ClusterMap made_with(const std::vector<std::uint8_t>& targets) {
  return *after_start({}, start_with(targets));
}

/// "home: 1 2 +3" for members 1 and 2 serving and 3 syncing; "d4(2): 1 2" for data group 4 of two copies.
std::string text(const GroupRange& range) {
  auto out =
      range.home ? std::string("home:") : "d" + std::to_string(range.first) + "(" + std::to_string(range.copies) + "):";
  for (const auto& member : range.members)
    out += std::string(" ") + (member.serving ? "" : "+") + std::to_string(member.target.bytes[0]);
  if (range.loss > 0) out += " loss " + std::to_string(range.loss);
  return out;
}
std::vector<std::string> text(const ClusterMap& map) {
  std::vector<std::string> out;
  for (const auto& range : map.groups) out.push_back(text(range));
  return out;
}
using Lines = std::vector<std::string>;

/// Every group that differs has another epoch, and only those.
void check_epochs(const ClusterMap& before, const ClusterMap& after) {
  for (const auto& range : after.groups) {
    const auto* old = before.find(range.home, range.first);
    if (old == nullptr) continue;
    INFO(text(range));
    CHECK((old->members != range.members || old->loss != range.loss) == (old->epoch != range.epoch));
    CHECK(old->epoch <= range.epoch);
  }
}

}  // namespace

TEST_CASE("changes: the first start with several targets makes a ring of groups of every size", "[server]") {
  CHECK(text(made_with({1})) == Lines{"home: 1", "d1(1): 1"});
  CHECK(text(made_with({1, 2})) == Lines{"home: 1 2", "d1(1): 1", "d2(1): 2", "d3(2): 1 2", "d4(2): 2 1"});
  CHECK(text(made_with({1, 2, 3})) == Lines{"home: 1 2 3", "d1(1): 1", "d2(1): 2", "d3(1): 3", "d4(2): 1 2",
                                            "d5(2): 2 3", "d6(2): 3 1", "d7(3): 1 2 3", "d8(3): 2 3 1",
                                            "d9(3): 3 1 2"});
  const auto four = made_with({1, 2, 3, 4});
  CHECK(text(four)[0] == "home: 1 2 3");  // records have three copies
  CHECK(four.groups.size() == 1 + 3 * 4);
}

TEST_CASE("changes: what a start does to the map, as a table", "[server]") {
  struct Case {
    const char* what;
    std::vector<std::uint8_t> made, then, lost;
    bool forced;
    Lines expected;
  };
  const auto row = GENERATE(values<Case>({
      {"the same targets: only new incarnations",
       {1, 2},
       {1, 2},
       {},
       false,
       {"home: 1 2", "d1(1): 1", "d2(1): 2", "d3(2): 1 2", "d4(2): 2 1"}},
      {"a directory more enters as syncing where records go, and new groups appear",
       {1},
       {1, 2},
       {},
       false,
       {"home: 1 +2", "d1(1): 1", "d2(1): 2", "d3(2): 1 2", "d4(2): 2 1"}},
      {"a target is missing: out of its groups, but not where it is the last",
       {1, 2, 3},
       {1, 3},
       {},
       false,
       {"home: 1 3", "d1(1): 1", "d2(1): 2", "d3(1): 3", "d4(2): 1", "d5(2): 3", "d6(2): 3 1", "d7(3): 1 3",
        "d8(3): 3 1", "d9(3): 3 1"}},
      {"a target is lost and another in its place: a group that it had alone has lost its chunks",
       {1, 2},
       {1, 7},
       {2},
       false,
       {"home: 1 +7", "d1(1): 1", "d2(1): 7 loss 1", "d3(2): 1 +7", "d4(2): 1 +7"}},
      {"lost, and nothing in its place: what is left takes what nobody else can",
       {1, 2},
       {1},
       {2},
       false,
       {"home: 1", "d1(1): 1", "d2(1): 1 loss 1", "d3(2): 1", "d4(2): 1"}},
      {"by the operator's word alone: every group may have lost something",
       {1, 2},
       {1, 7},
       {2},
       true,
       {"home: 1 +7 loss 1", "d1(1): 1 loss 1", "d2(1): 7 loss 2", "d3(2): 1 +7 loss 1", "d4(2): 1 +7 loss 1"}},
  }));
  INFO(row.what);
  const auto before = made_with(row.made);
  const auto after = after_start(before, start_with(row.then, 2, row.lost, row.forced));
  REQUIRE(after);
  CHECK(text(*after) == row.expected);
  check_epochs(before, *after);
  for (const auto n : row.lost) CHECK(after->target(uuid(n)) == nullptr);
  CHECK(after->generation == (row.forced ? 2 : 1));
  for (const auto& range : after->groups)
    for (const auto& member : range.members)
      if (!after->target(member.target)->out) CHECK(member.incarnation == 2);
}

TEST_CASE("changes: a target that comes back enters as syncing, and serves when it has everything", "[server]") {
  const auto made = made_with({1, 2});
  const auto alone = *after_failures(made, set_of({2}));
  CHECK(text(alone) == Lines{"home: 1", "d1(1): 1", "d2(1): 2", "d3(2): 1", "d4(2): 1"});
  check_epochs(made, alone);
  CHECK(alone.target(uuid(2))->out);

  const auto back = *after_start(alone, start_with({1, 2}, 2));
  CHECK(text(back) == Lines{"home: 1 +2", "d1(1): 1", "d2(1): 2", "d3(2): 1 +2", "d4(2): 1 +2"});
  const auto joined = back.find(true, 0)->member(uuid(2))->joined;
  CHECK(joined == back.find(true, 0)->epoch.count);
  CHECK(after_sync(back, true, 0, uuid(2), joined - 1) == back);  // said of an earlier time
  CHECK(after_sync(back, true, 0, uuid(3), joined) == back);
  const auto serving = after_sync(back, true, 0, uuid(2), joined);
  CHECK(text(serving)[0] == "home: 1 2");
  CHECK(text(serving)[3] == "d3(2): 1 +2");  // each group by itself
  check_epochs(back, serving);
  CHECK(after_sync(serving, true, 0, uuid(2), joined) == serving);
  // And the other way: found to lack something.
  CHECK(text(after_lack(serving, true, 0, uuid(2)))[0] == "home: 1 +2");
  CHECK(after_lack(alone, true, 0, uuid(1)) == alone);  // the last one stays
}

TEST_CASE("changes: a syncing member does not replace the last that serves", "[server]") {
  const auto syncing = *after_start(made_with({1}), start_with({1, 2}, 2));
  CHECK(after_failures(syncing, set_of({1})).error().code == Errc::kUnavailable);
  CHECK(after_start(syncing, start_with({2}, 3)).error().code == Errc::kUnavailable);
  const auto lost = after_start(syncing, start_with({2}, 3, {1}, true));
  CHECK(lost.error().code == Errc::kUnavailable);
}

TEST_CASE("changes: failures take away a minority, or one of two", "[server]") {
  struct Case {
    std::vector<std::uint8_t> made, failed;
    bool possible;
  };
  const auto row = GENERATE(values<Case>({{{1}, {1}, false},
                                          {{1, 2}, {1}, true},
                                          {{1, 2}, {1, 2}, false},
                                          {{1, 2, 3}, {3}, true},
                                          {{1, 2, 3}, {2, 3}, false},
                                          {{1, 2, 3, 4}, {4}, true},
                                          {{1, 2, 3, 4}, {3, 4}, false},
                                          {{1, 2, 3, 4, 5}, {4, 5}, true},
                                          {{1, 2, 3, 4, 5}, {1, 2, 3}, false}}));
  CAPTURE(row.made, row.failed);
  const auto made = made_with(row.made);
  const auto after = after_failures(made, set_of(row.failed));
  CHECK(after.has_value() == row.possible);
  if (after) {
    check_epochs(made, *after);
    CHECK(*after_failures(*after, set_of(row.failed)) == *after);
    // One after the other, down to the last.
    CHECK(text(*after)[0].find(std::to_string(row.failed[0])) == std::string::npos);
  }
}

TEST_CASE("changes: a daemon may start with a majority, of two with both, else by the operator's word", "[server]") {
  struct Case {
    const char* what;
    std::vector<std::uint8_t> made, failed, present, lost;
    std::optional<Errc> error;
    bool forced;
  };
  const auto row = GENERATE(values<Case>({
      {"one", {1}, {}, {1}, {}, {}, false},
      {"both", {1, 2}, {}, {1, 2}, {}, {}, false},
      {"one of two", {1, 2}, {}, {1}, {}, Errc::kUnavailable, false},
      {"one of two, the other said to be lost", {1, 2}, {}, {1}, {2}, {}, true},
      {"the one that went on alone", {1, 2}, {2}, {1}, {}, {}, false},
      {"the one that went on alone, the other said to be lost", {1, 2}, {2}, {1}, {2}, {}, false},
      {"the one that was left behind", {1, 2}, {1}, {1}, {}, Errc::kUnavailable, false},
      {"two of three", {1, 2, 3}, {}, {1, 3}, {}, {}, false},
      {"two of three, with a new one", {1, 2, 3}, {}, {1, 3, 9}, {}, {}, false},
      {"one of three and new ones", {1, 2, 3}, {}, {1, 8, 9}, {}, Errc::kUnavailable, false},
      {"one of three, one said to be lost", {1, 2, 3}, {}, {1}, {2}, Errc::kUnavailable, false},
      {"one of three, both said to be lost", {1, 2, 3}, {}, {1}, {2, 3}, {}, true},
      {"two of three, the third said to be lost", {1, 2, 3}, {}, {1, 2}, {3}, {}, false},
      {"two of four", {1, 2, 3, 4}, {}, {1, 2}, {}, Errc::kUnavailable, false},
      {"one said to be lost that is here", {1, 2}, {}, {1, 2}, {2}, Errc::kInvalid, false},
      {"one said to be lost that nobody knows any more", {1, 2}, {}, {1, 2}, {5}, {}, false},
  }));
  INFO(row.what);
  auto map = made_with(row.made);
  if (!row.failed.empty()) map = *after_failures(map, set_of(row.failed));
  const auto may = may_start(map, set_of(row.present), set_of(row.lost));
  if (row.error) {
    REQUIRE_FALSE(may);
    CHECK(may.error().code == *row.error);
    return;
  }
  REQUIRE(may);
  CHECK(*may == row.forced);
}

TEST_CASE("changes: a refusal names the missing target, where it was, and the flag", "[server]") {
  const auto refused = may_start(made_with({1, 2}), set_of({1}), {});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().message.find(uuid(2).text() + " (last at /d2)") != std::string::npos);
  CHECK(refused.error().message.find("--lost-target " + uuid(2).text()) != std::string::npos);
}

TEST_CASE("changes: a map of before there were several targets goes on, and gets its groups", "[server]") {
  auto old = made_with({1});
  old.targets.clear();
  for (auto& range : old.groups) {
    range.copies = 0;
    range.placement.clear();
  }
  const auto read = decode_map(encode_map(old));
  REQUIRE(read);
  CHECK(read->targets.size() == 1);
  CHECK(read->find(true, 0)->copies == 3);
  const auto same = *after_start(*read, start_with({1}, 2));
  CHECK(text(same) == Lines{"home: 1", "d1(1): 1"});
  const auto more = *after_start(*read, start_with({1, 2, 3}, 2));
  CHECK(text(more) == Lines{"home: 1 +2 +3", "d1(1): 1", "d2(1): 2", "d3(1): 3", "d4(2): 1 2", "d5(2): 2 3",
                            "d6(2): 3 1", "d7(3): 1 2 3", "d8(3): 2 3 1", "d9(3): 3 1 2"});
}

TEST_CASE("changes: a bucket's chunks go to whole groups of its size, else to those with the most left", "[server]") {
  const auto numbers = [](const ClusterMap& map, std::uint32_t copies) {
    std::vector<DataGroup> out;
    for (const auto& entry : data_groups(map, copies)) out.push_back(entry.group);
    return out;
  };
  const auto three = made_with({1, 2, 3});
  CHECK(numbers(three, 1) == std::vector<DataGroup>{1, 2, 3});
  CHECK(numbers(three, 2) == std::vector<DataGroup>{4, 5, 6});
  CHECK(numbers(three, 3) == std::vector<DataGroup>{7, 8, 9});
  CHECK(numbers(three, 4).empty());
  CHECK(copies_max(three) == 3);
  CHECK(copies_max(made_with({1, 2})) == 2);
  const auto two = *after_failures(three, set_of({2}));
  CHECK(numbers(two, 1) == std::vector<DataGroup>{1, 3});
  CHECK(numbers(two, 2) == std::vector<DataGroup>{6});  // the one without the failed target
  CHECK(numbers(two, 3) == std::vector<DataGroup>{7, 8, 9});
  CHECK(data_losses(three) == std::vector<std::uint32_t>(9, 0));
}
