#include "tests/sim/history.h"

#include <catch2/catch.hpp>

using namespace cairn::sim;
using namespace std::chrono_literals;

namespace {

/// A history written in a line per event; time goes on by one second with each call.
struct Story {
  History h{"job"};
  int seconds = 0;
  History::Time t() { return History::Time(1h) + std::chrono::seconds(++seconds); }

  void open(std::uint32_t launch, std::optional<std::uint64_t> resume) {
    const auto called = t();
    h.open_called(launch, {}, called);
    h.open_answered(launch, resume, called, t());
  }
  void begin(std::uint64_t step, Tag tag, History::SaveKind kind = {}) {
    const auto called = t();
    h.begin_called(step, tag, kind, called);
    h.begin_answered(step, tag, id(step, tag), called, t());
  }
  static std::string id(std::uint64_t step, Tag tag) {
    return std::to_string(step) + "/" + std::to_string(tag.launch) + "/" + std::to_string(tag.operation);
  }
  void commit(std::uint64_t step, Tag tag) { h.committed(step, tag, id(step, tag), t()); }
  void save(std::uint64_t step, Tag tag, History::SaveKind kind = {}) {
    begin(step, tag, kind);
    commit(step, tag);
  }
  void remove(std::uint64_t step, History::Deleted outcome, bool after = false) {
    const auto n = h.delete_called(step, after, t());
    h.delete_ended(n, outcome, t());
  }
  void see(std::uint64_t step, Tag tag) {
    const auto asked = t();
    h.saw(step, tag, asked, t());
  }
  void see_absent(std::uint64_t step) {
    const auto asked = t();
    h.saw_absent(step, asked, t());
  }
  void highest(std::optional<std::uint64_t> step) {
    const auto asked = t();
    h.saw_highest(step, asked, t());
  }
  std::string broken() const { return h.violations().empty() ? "" : h.violations().front().promise; }
};

}  // namespace

TEST_CASE("history: an honest run breaks nothing", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  s.save(10, {1, 1});
  s.begin(20, {1, 2});
  s.open(2, 10);
  s.see(10, {1, 1});
  s.save(20, {2, 1});
  s.save(20, {2, 2}, {.overwrite = true});
  s.see(20, {2, 2});
  s.highest(20);
  s.remove(20, History::Deleted::kYes);
  s.highest(10);
  s.open(3, 10);
  s.save(20, {3, 1});
  s.remove(10, History::Deleted::kMaybe, true);
  s.see(20, {3, 1});
  s.see_absent(20);
  CHECK(s.broken() == "");
}

TEST_CASE("history: a launch may find a step that its saver never heard of", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  s.begin(10, {1, 1});
  s.open(2, 10);
  s.see(10, {1, 1});
  s.commit(10, {1, 1});  // told late
  CHECK(s.broken() == "");
}

TEST_CASE("history: P1, an acknowledged step that is absent, or shows what it replaced", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  s.save(10, {1, 1});
  SECTION("absent") {
    s.see_absent(10);
  }
  SECTION("not the highest") {
    s.highest(std::nullopt);
  }
  SECTION("a launch resumes before it") {
    s.open(2, std::nullopt);
  }
  SECTION("a refused removal does not excuse it") {
    s.remove(10, History::Deleted::kNo);
    s.see_absent(10);
  }
  SECTION("old bytes") {
    s.save(10, {1, 2}, {.overwrite = true});
    s.see(10, {1, 1});
  }
  CHECK(s.broken() == "P1");
}

TEST_CASE("history: P2, a step that is visible and must not be", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  SECTION("bad boxes") {
    s.save(10, {1, 1}, {.bad = true});
  }
  SECTION("never begun") {
    s.see(10, {1, 1});
  }
  SECTION("resumed from, then gone, though nobody was told of its commit") {
    s.begin(10, {1, 1});
    s.open(2, 10);
    s.see_absent(10);
  }
  SECTION("removed") {
    s.save(10, {1, 1});
    s.remove(5, History::Deleted::kYes, true);
    s.see(10, {1, 1});
  }
  CHECK(s.broken() == "P2");
}

TEST_CASE("history: P4, older launches and second commits", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  SECTION("two commits") {
    s.save(10, {1, 1});
    s.save(10, {1, 2});
  }
  SECTION("begin after a newer launch opened") {
    s.open(2, std::nullopt);
    s.begin(10, {1, 1});
  }
  SECTION("committed after a newer launch opened without it") {
    s.begin(10, {1, 1});
    s.open(2, std::nullopt);
    s.commit(10, {1, 1});
  }
  SECTION("visible after a newer launch opened without it") {
    s.begin(10, {1, 1});
    s.open(2, std::nullopt);
    s.see(10, {1, 1});
  }
  SECTION("an overwrite of an older launch shows later") {
    s.save(10, {1, 1});
    s.begin(10, {1, 2}, {.overwrite = true});
    s.open(2, 10);
    s.see(10, {1, 1});
    s.see(10, {1, 2});
  }
  SECTION("opened by an older launch") {
    s.open(3, std::nullopt);
    s.open(2, std::nullopt);
  }
  SECTION("two answers to one launch") {
    s.h.open_answered(1, 7, s.t(), s.t());
  }
  CHECK(s.broken() == "P4");
}

TEST_CASE("history: P7, an attempt told two outcomes", "[sim]") {
  Story s;
  s.open(1, std::nullopt);
  s.begin(10, {1, 1});
  s.h.failed(10, {1, 1}, Story::id(10, {1, 1}), s.t());
  SECTION("committed as well") {
    s.commit(10, {1, 1});
  }
  SECTION("visible all the same") {
    s.h.gave_up(10, {1, 1}, s.t());
    s.see(10, {1, 1});
  }
  CHECK(s.broken() == "P7");
}
