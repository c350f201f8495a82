#include "storage/record_store/record_store.h"

#include <catch2/catch.hpp>
#include <map>
#include <set>

#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

std::string any_machine() {
  static const auto kinds = machine_kinds();
  return GENERATE(from_range(kinds));
}

Transaction put(HomeGroup group, std::string key, std::string value) {
  Transaction out;
  out.group = group;
  out.puts = {{std::move(key), std::move(value)}};
  return out;
}

Transaction swap(HomeGroup group, std::string key, std::string value, Version expected) {
  auto out = put(group, key, std::move(value));
  out.compares = {{std::move(key), expected}};
  return out;
}

struct Fixture : Engine {
  explicit Fixture(const std::string& kind) : Engine(kind) { open_records(); }
  explicit Fixture(std::uint64_t seed) : Engine(std::make_unique<SimMachine>(seed)) { open_records(); }
  void open_records() {
    Engine::open();
    records().set_epoch(2, 5);
  }
  Result<Version> apply(Transaction transaction) { return run(records().apply(std::move(transaction))); }
  std::optional<Record> record(HomeGroup group, std::string key) {
    auto found = run(records().get(group, std::move(key)));
    REQUIRE(found);
    return *found;
  }
  std::string value(HomeGroup group, std::string key) {
    auto found = record(group, std::move(key));
    return found ? found->value : "(absent)";
  }
  std::vector<std::string> keys(HomeGroup group, std::string prefix, std::string after = "", std::size_t limit = 100) {
    auto found = run(records().scan(group, std::move(prefix), std::move(after), limit));
    REQUIRE(found);
    std::vector<std::string> out;
    for (auto& one : *found) out.push_back(one.key);
    return out;
  }
};

}  // namespace

TEST_CASE("record_store: a record is read back with the version that wrote it, also by the next process", "[storage]") {
  Fixture f(any_machine());
  auto first = f.apply(put(7, "a", "1"));
  REQUIRE(first);
  CHECK(*first == Version{.loss = 2, .epoch = 5, .seq = 1});
  auto second = f.apply(put(7, "b", std::string("\0\xff", 2)));
  REQUIRE(second);
  CHECK(*second == Version{.loss = 2, .epoch = 5, .seq = 2});
  for (int start = 0; start < 2; ++start) {
    CHECK(f.value(7, "a") == "1");
    CHECK(f.record(7, "a")->version == *first);
    CHECK(f.value(7, "b") == std::string("\0\xff", 2));
    CHECK(f.value(8, "a") == "(absent)");  // another group
    f.close();
    f.open_records();
  }
  auto third = f.apply(put(7, "c", ""));
  REQUIRE(third);
  CHECK(third->seq == 3);  // no version is used twice
  CHECK(f.value(7, "c").empty());
}

TEST_CASE("record_store: a transaction is applied whole or not at all", "[storage]") {
  Fixture f(any_machine());
  const auto version = *f.apply(put(1, "a", "1"));
  Transaction both;
  both.group = 1;
  both.compares = {{"a", version}, {"b", {}}};
  both.puts = {{"a", "2"}, {"b", "2"}};
  REQUIRE(f.apply(both));
  CHECK(f.value(1, "a") == "2");
  CHECK(f.value(1, "b") == "2");
  CHECK(f.record(1, "a")->version == f.record(1, "b")->version);

  both.puts = {{"a", "3"}, {"c", "3"}};
  auto refused = f.apply(both);
  REQUIRE(code_of(refused) == Errc::kConflict);
  CHECK_THAT(refused.error().message, Catch::Contains("record a") && Catch::Contains("2.5.2"));
  CHECK(f.value(1, "a") == "2");
  CHECK(f.value(1, "c") == "(absent)");

  Transaction removal;
  removal.group = 1;
  removal.compares = {{"a", f.record(1, "a")->version}};
  removal.deletes = {"a", "never there"};
  REQUIRE(f.apply(removal));
  CHECK(f.value(1, "a") == "(absent)");
  CHECK(code_of(f.apply(swap(1, "a", "4", version))) == Errc::kConflict);
  CHECK(f.apply(swap(1, "a", "4", {})));  // absent, as asked
}

TEST_CASE("record_store: a transaction that only compares changes nothing", "[storage]") {
  Fixture f("sim");
  const auto version = *f.apply(put(1, "a", "1"));
  Transaction only;
  only.group = 1;
  only.compares = {{"a", version}};
  CHECK(*f.apply(only) == version);
  only.compares = {{"a", {}}};
  CHECK(code_of(f.apply(only)) == Errc::kConflict);
  CHECK(f.apply(put(1, "b", "1"))->seq == version.seq + 1);
}

TEST_CASE("record_store: scans keep to group and prefix, in key order and in pages", "[storage]") {
  Fixture f(any_machine());
  for (const char* key : {"run/b/1", "run/a/1", "run/a/2", "run/a/10", "run0", "run", "s", "run/\xff", "run/\xff\xff"})
    REQUIRE(f.apply(put(3, key, "x")));
  REQUIRE(f.apply(put(2, "run/a/9", "x")));
  REQUIRE(f.apply(put(255, "run/a/9", "x")));
  using Keys = std::vector<std::string>;
  CHECK(f.keys(3, "run/a/") == Keys{"run/a/1", "run/a/10", "run/a/2"});
  CHECK(f.keys(3, "run/a/", "", 2) == Keys{"run/a/1", "run/a/10"});
  CHECK(f.keys(3, "run/a/", "run/a/10") == Keys{"run/a/2"});
  CHECK(f.keys(3, "run/a/", "run/a/2").empty());
  CHECK(f.keys(3, "run/a/", "run/z").empty());
  CHECK(f.keys(3, "run/a/", "a").size() == 3);  // before the prefix
  CHECK(f.keys(3, "run/\xff") == Keys{"run/\xff", "run/\xff\xff"});
  CHECK(f.keys(3, "").size() == 9);
  CHECK(f.keys(255, "") == Keys{"run/a/9"});
  CHECK(f.keys(0, "").empty());
}

TEST_CASE("record_store: sizes out of bounds and double changes are refused", "[storage]") {
  Fixture f("sim");
  const std::string big(RecordStore::kValueBytesMax, 'v'), key(RecordStore::kKeyBytesMax, 'k');
  CHECK(f.apply(put(0, key, big)));
  CHECK(f.value(0, key) == big);
  CHECK(code_of(f.apply(put(0, "a", big + "v"))) == Errc::kInvalid);
  CHECK(code_of(f.apply(put(0, key + "k", "v"))) == Errc::kInvalid);
  CHECK(code_of(f.apply(put(0, "", "v"))) == Errc::kInvalid);
  CHECK(code_of(f.apply(put(kHomeGroups, "a", "v"))) == Errc::kInvalid);
  CHECK(code_of(f.run(f.records().get(kHomeGroups, "a"))) == Errc::kInvalid);
  auto twice = put(0, "a", "1");
  twice.deletes = {"a"};
  CHECK(code_of(f.apply(twice)) == Errc::kInvalid);
  Transaction huge;
  for (int i = 0; i < 257; ++i) huge.puts.emplace_back("k" + std::to_string(i), big);
  CHECK(code_of(f.apply(huge)) == Errc::kInvalid);
}

TEST_CASE("record_store: of many that swap one version exactly one wins", "[storage]") {
  Fixture f(any_machine());
  const auto version = *f.apply(put(4, "a", "0"));
  std::vector<Result<Version>> outcomes;
  rt::Scope scope(f.loop());
  struct Swapper {
    static Task<void> run(RecordStore& records, Transaction t, std::vector<Result<Version>>& out) {
      out.push_back(co_await records.apply(std::move(t)));
      co_return {};
    }
  };
  for (int i = 0; i < 30; ++i)
    scope.spawn(Swapper::run(f.records(), swap(4, "a", std::to_string(i + 1), version), outcomes));
  REQUIRE(f.eventually([&] { return outcomes.size() == 30; }));
  std::size_t won = 0;
  for (auto& outcome : outcomes) {
    won += outcome.has_value();
    if (!outcome) CHECK(outcome.error().code == Errc::kConflict);
  }
  CHECK(won == 1);
  CHECK(f.record(4, "a")->version.seq == version.seq + 1);
}

TEST_CASE("record_store: transactions of one group and of several share commit rounds", "[storage]") {
  Fixture f("sim");
  const auto rounds = f.target().committer().rounds();
  std::size_t done = 0;
  rt::Scope scope(f.loop());
  struct One {
    static Task<void> run(RecordStore& records, HomeGroup group, int i, std::size_t& done) {
      CO_TRY(auto version, co_await records.apply(put(group, "k" + std::to_string(i), "v")));
      done += version.exists();
      co_return {};
    }
  };
  for (int i = 0; i < 400; ++i) scope.spawn(One::run(f.records(), static_cast<HomeGroup>(i % 4), i, done));
  REQUIRE(f.eventually([&] { return scope.running() == 0; }));
  CHECK(done == 400);
  CHECK(f.target().committer().rounds() - rounds <= 4);
  CHECK(f.keys(2, "", "", 1000).size() == 100);
}

TEST_CASE("record_store: nobody sees a change before it is answered, nor half of one", "[storage]") {
  // Method: a writer moves two records in step and notes when each was answered; readers note when they saw it. All on
  // virtual time, where an answer and whoever hears of it share one instant.
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Fixture f(seed);
    struct Notes {
      std::vector<rt::TimePoint> answered{rt::TimePoint{}};            // by value
      std::vector<std::pair<std::uint64_t, rt::TimePoint>> seen = {};  // value, when
      bool stop = false;
    };
    struct Actors {
      static Task<void> writer(rt::Loop& loop, RecordStore& records, Notes& notes) {
        for (std::uint64_t i = 1; i <= 40; ++i) {
          Transaction t;
          t.group = 9;
          t.puts = {{"x", std::to_string(i)}, {"y", std::to_string(i)}};
          CO_TRY(auto version, co_await records.apply(std::move(t)));
          notes.answered.push_back(loop.now());
          CHECK(version.seq == i);
        }
        notes.stop = true;
        co_return {};
      }
      static Task<void> reader(rt::Loop& loop, RecordStore& records, Notes& notes) {
        while (!notes.stop) {
          const auto before = notes.answered.size() - 1;
          CO_TRY(auto both, co_await records.scan(9, "", "", 10));
          REQUIRE((both.size() == 2 || (both.empty() && before == 0)));
          if (both.empty()) continue;
          CHECK(both[0].value == both[1].value);
          CHECK(std::stoull(both[0].value) >= before);
          notes.seen.emplace_back(std::stoull(both[0].value), loop.now());
        }
        co_return {};
      }
    };
    Notes notes;
    rt::Scope scope(f.loop());
    for (int i = 0; i < 3; ++i) scope.spawn(Actors::reader(f.loop(), f.records(), notes));
    scope.spawn(Actors::writer(f.loop(), f.records(), notes));
    REQUIRE(f.eventually([&] { return scope.running() == 0; }));
    REQUIRE(notes.answered.size() == 41);
    CHECK(notes.seen.size() > 40);
    for (auto& [value, when] : notes.seen) CHECK(when >= notes.answered[value]);
  }
}

TEST_CASE("record_store: what was answered survives the loss of power, what was not is whole or absent", "[storage]") {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Fixture f(seed);
    struct Writer {
      static Task<void> run(RecordStore& records, std::uint64_t& answered) {
        for (std::uint64_t i = 1;; ++i) {
          Transaction t;
          t.group = 1;
          t.puts = {{"x", std::to_string(i)}, {"y" + std::to_string(i), "v"}};
          if (i > 1) t.deletes = {"y" + std::to_string(i - 1)};
          CO_TRY(auto version, co_await records.apply(std::move(t)));
          answered = version.seq;
        }
      }
    };
    std::uint64_t answered = 0;
    f.sim().node.spawn(Writer::run(f.records(), answered));
    for (std::uint64_t i = 0; i < 20 + 7 * seed; ++i) f.sim().world.step();
    f.crash(seed % 2 ? sim::Death::kPowerLoss : sim::Death::kProcess);
    f.open_records();
    const auto all = f.keys(1, "");
    if (all.empty()) {
      CHECK(answered == 0);
      continue;
    }
    REQUIRE(all.size() == 2);
    const auto x = f.value(1, "x");
    CHECK(all[1] == "y" + x);
    CHECK(std::stoull(x) >= answered);
    CHECK(std::stoull(x) <= answered + 1);
    CHECK(f.apply(put(1, "z", "1"))->seq == std::stoull(x) + 1);
  }
}

TEST_CASE("record_store: after a failed change its group is not read, for nobody knows what is durable", "[storage]") {
  Fixture f("sim");
  REQUIRE(f.apply(put(1, "a", "1")));
  REQUIRE(f.apply(put(2, "a", "1")));
  f.sim().index_image.fail_commit_in = 1;
  CHECK(code_of(f.apply(put(1, "a", "2"))) == Errc::kFailed);
  CHECK(code_of(f.run(f.records().get(1, "a"))) == Errc::kFailed);
  CHECK(code_of(f.run(f.records().scan(1, "", "", 10))) == Errc::kFailed);
  CHECK(code_of(f.apply(put(2, "a", "2"))) == Errc::kFailed);
  CHECK(f.value(2, "a") == "1");  // never in doubt
  f.crash(sim::Death::kPowerLoss);
  f.open_records();
  CHECK((f.value(1, "a") == "1" || f.value(1, "a") == "2"));
  CHECK(f.apply(put(1, "a", "3")));
}

TEST_CASE("record_store: close waits for transactions under way and refuses later ones", "[storage]") {
  Fixture f(any_machine());
  rt::Scope scope(f.loop());
  std::optional<Result<Version>> outcome;
  struct One {
    static Task<void> run(RecordStore& records, std::optional<Result<Version>>& out) {
      out = co_await records.apply(put(1, "a", "1"));
      co_return {};
    }
  };
  scope.spawn(One::run(f.records(), outcome));
  REQUIRE(f.run(f.records().close()));
  REQUIRE(f.eventually([&] { return outcome.has_value(); }));
  CHECK(*outcome);
  CHECK(code_of(f.apply(put(1, "b", "1"))) == Errc::kUnavailable);
}
