#include "server/checkpoints/keep.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

#include "tests/sim/prng.h"

using namespace cairn::server;

namespace {

constexpr std::int64_t kSecond = 1'000'000'000, kDay = 86'400 * kSecond;
constexpr std::int64_t kNow = 20'000 * kDay;

/// Steps 100, 200 .. 1000, committed 9, 8 .. 0 days ago.
std::vector<CommittedStep> ten() {
  std::vector<CommittedStep> out;
  for (std::uint64_t i = 1; i <= 10; ++i)
    out.push_back({.step = 100 * i, .committed_unix_nanos = kNow - static_cast<std::int64_t>(10 - i) * kDay});
  return out;
}

using Steps = std::vector<std::uint64_t>;

}  // namespace

TEST_CASE("keep: each rule keeps what it says, and what no rule keeps goes", "[server]") {
  struct Row {
    KeepPolicy policy;
    Steps removed;
  };
  const Row rows[] = {
      {{}, {}},
      {{.last = 3}, {100, 200, 300, 400, 500, 600, 700}},
      {{.last = 1}, {100, 200, 300, 400, 500, 600, 700, 800, 900}},
      {{.last = 10}, {}},
      {{.last = 4'000'000'000}, {}},
      {{.every = 300}, {100, 200, 400, 500, 700, 800}},  // 1000 is the newest
      {{.every = 1}, {}},
      {{.every = 10'000}, {100, 200, 300, 400, 500, 600, 700, 800, 900}},
      {{.days = 3}, {100, 200, 300, 400, 500, 600, 700}},  // 0, 1 and 2 days old stay, 3 days old goes
      {{.days = 36'500}, {}},
      {{.last = 2, .every = 400, .days = 4}, {100, 200, 300, 500, 600}},
  };
  for (const auto& row : rows) {
    INFO("last " << row.policy.last << " every " << row.policy.every << " days " << row.policy.days);
    CHECK(steps_to_remove(row.policy, ten(), {}, kNow) == row.removed);
  }
}

TEST_CASE("keep: pinned steps, the newest, and the one to resume from stay under any policy", "[server]") {
  auto steps = ten();
  steps[1].pinned = true;
  CHECK(steps_to_remove({.last = 1}, steps, 500, kNow) == Steps{100, 300, 400, 600, 700, 800, 900});
  CHECK(steps_to_remove({.days = 1}, {{.step = 7, .committed_unix_nanos = 0}}, {}, kNow).empty());
  CHECK(steps_to_remove({.every = 5}, {{.step = 7, .committed_unix_nanos = 0}}, {}, kNow).empty());
  CHECK(steps_to_remove({.last = 1}, {}, {}, kNow).empty());
  // Step 0 is divisible by everything.
  CHECK(steps_to_remove({.every = 5}, {{.step = 0}, {.step = 1}, {.step = 2}}, {}, kNow) == Steps{1});
}

TEST_CASE("keep: a wall clock that stands wrong decides about days alone", "[server]") {
  // Ahead by years: everything is old, yet the newest K stay. Behind: everything is of the future, and stays.
  CHECK(steps_to_remove({.last = 3, .days = 30}, ten(), {}, kNow + 4000 * kDay).size() == 7);
  CHECK(steps_to_remove({.last = 3, .days = 30}, ten(), {}, kNow - 4000 * kDay).empty());
  CHECK(steps_to_remove({.last = 3}, ten(), {}, INT64_MIN).size() == 7);
  auto odd = ten();
  odd[0].committed_unix_nanos = INT64_MAX;
  odd[1].committed_unix_nanos = INT64_MIN;
  CHECK(steps_to_remove({.last = 1, .days = 30}, odd, {}, kNow) == Steps{200});
}

TEST_CASE("keep: over random policies and steps, exactly what some rule names is kept", "[server]") {
  cairn::sim::Prng draw(7, "keep");
  for (int round = 0; round < 3000; ++round) {
    KeepPolicy policy;
    if (draw.chance(0.6)) policy.last = static_cast<std::uint32_t>(draw.below(6));
    if (draw.chance(0.5)) policy.every = draw.below(8);
    if (draw.chance(0.5)) policy.days = static_cast<std::uint32_t>(draw.below(6));
    std::vector<CommittedStep> steps;
    std::uint64_t at = draw.below(5);
    for (auto left = draw.below(14); left > 0; --left, at += 1 + draw.below(4))
      steps.push_back({.step = at,
                       .committed_unix_nanos = kNow - static_cast<std::int64_t>(draw.below(8)) * kDay + kDay / 2,
                       .pinned = draw.chance(0.2)});
    std::optional<std::uint64_t> held;
    if (!steps.empty() && draw.chance(0.5)) held = steps[draw.below(steps.size())].step;
    const auto removed = steps_to_remove(policy, steps, held, kNow);
    CHECK(std::is_sorted(removed.begin(), removed.end()));
    const std::set<std::uint64_t> gone(removed.begin(), removed.end());
    CHECK(gone.size() == removed.size());
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const auto& step = steps[i];
      const bool newest = i + std::max<std::size_t>(policy.last, 1) >= steps.size();
      const bool young = policy.days > 0 && kNow - step.committed_unix_nanos < policy.days * kDay;
      const bool divisible = policy.every > 0 && step.step % policy.every == 0;
      const bool kept = !policy.any() || newest || young || divisible || step.pinned || held == step.step;
      INFO("round " << round << " step " << step.step);
      CHECK(gone.contains(step.step) != kept);
    }
    // What is left is left alone the next time.
    std::vector<CommittedStep> rest;
    for (const auto& step : steps)
      if (!gone.contains(step.step)) rest.push_back(step);
    CHECK(steps_to_remove(policy, rest, held, kNow).empty());
  }
}
