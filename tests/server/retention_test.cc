#include "server/checkpoints/retention.h"

#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

using Steps = std::vector<std::uint64_t>;

Daemon::Options retention_options(SaveBugs bugs = {}) {
  Daemon::Options options;
  options.retention.interval = 1min;
  options.readers.ttl = 2s;
  options.garbage.grace = 1s;
  options.garbage.interval = 1s;
  options.bugs = bugs;
  return options;
}

struct RetentionFixture : RunFixture {
  explicit RetentionFixture(Daemon::Options options = retention_options()) : RunFixture(std::move(options)) {
    launched = *open("a");
  }
  wire::BucketInfo show() {
    wire::BucketShow request;
    request.set_bucket(bucket);
    return *call<wire::BucketInfo>(Method::kBucketShow, request);
  }
  Result<wire::BucketInfo> keep(std::uint32_t last, std::uint64_t every = 0, std::uint32_t days = 0) {
    const auto info = show();
    wire::BucketSet request;
    request.set_bucket(bucket);
    request.set_id(info.id());
    request.set_revision(info.revision());
    request.mutable_change()->set_keep_last(last);
    request.mutable_change()->set_keep_every(every);
    request.mutable_change()->set_keep_days(days);
    return call<wire::BucketInfo>(Method::kBucketSet, request);
  }
  Result<wire::StepInfo> pin(std::uint64_t step, bool pinned = true) {
    TRY(const auto info, open_step(step));
    return pin(step, pinned, info);
  }
  Result<wire::StepInfo> pin(std::uint64_t step, bool pinned, const wire::StepInfo& seen) {
    wire::StepPin request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    request.set_step(step);
    request.set_owner(seen.owner());
    request.set_pinned(pinned);
    request.set_revision(seen.pin_revision());
    return call<wire::StepInfo>(Method::kStepPin, request);
  }
  Result<wire::StepRemoveReply> remove(std::uint64_t step) {
    wire::StepRemove request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    request.mutable_step()->set_step(step);
    return call<wire::StepRemoveReply>(Method::kStepRemove, request);
  }
  void save_all(const Steps& all) {
    for (const auto step : all) REQUIRE(save(launched, step));
  }
  Launched launched;
};

}  // namespace

TEST_CASE("retention: without a policy nothing goes, with one, what it does not keep does, and its space", "[server]") {
  RetentionFixture f;
  f.save_all({1, 2, 3, 4, 5, 6});
  f.wait(10min);
  CHECK(f.steps() == Steps{1, 2, 3, 4, 5, 6});
  REQUIRE(f.keep(2, 3));
  f.wait(10s);
  CHECK(f.steps() == Steps{3, 5, 6});
  CHECK(f.daemon->stats().retention.removed == 3);
  f.wait(20s);
  CHECK(f.daemon->stats().garbage.orphaned_bytes == 0);
  CHECK(f.target->chunks().stats().chunks == 3 * 3);  // data, manifest and index of each
}

TEST_CASE("retention: a commit lets the oldest go at once, and every step is whole at all times", "[server]") {
  RetentionFixture f;
  REQUIRE(f.keep(2));
  for (std::uint64_t step = 1; step <= 6; ++step) {
    REQUIRE(f.save(f.launched, step));
    f.wait(1s);
    CHECK(f.steps().size() <= 2);
    CHECK(f.open_step()->step() == step);
  }
  CHECK(f.steps() == Steps{5, 6});
}

TEST_CASE("retention: days are counted by the wall clock, and end without a commit", "[server]") {
  RetentionFixture f;
  REQUIRE(f.keep(0, 0, 1));
  f.save_all({1, 2});
  f.wait(12h);
  CHECK(f.steps() == Steps{1, 2});
  f.save_all({3});
  f.wait(13h);
  CHECK(f.steps() == Steps{3});
  f.wait(14h);
  CHECK(f.steps() == Steps{3});  // never the newest
}

TEST_CASE("retention: a pinned step stays, is told in listings, and is not removed or replaced by anybody",
          "[server]") {
  RetentionFixture f;
  f.save_all({1, 2, 3});
  CHECK(f.pin(9).error().code == Errc::kNotFound);
  CHECK(f.pin(1)->pinned());
  CHECK(f.open_step(1)->pinned());
  REQUIRE(f.keep(1));
  f.wait(2min);
  CHECK(f.steps() == Steps{1, 3});
  const auto refused = f.remove(1);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kConflict);
  CHECK(refused.error().message == "step 1 of run 'jobs/llama/7b' is pinned: unpin it first");
  wire::StepRemove after;
  after.set_bucket(f.bucket);
  after.set_run(f.run_name);
  after.mutable_after()->set_step(0);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, after).error().code == Errc::kConflict);
  CHECK(f.steps() == Steps{1, 3});
  CHECK(f.begin(f.launched, 1, 0, {.world_size = 1, .overwrite = true}).error().code == Errc::kConflict);
  // Pinned while its replacement is being written: the commit is refused.
  const auto owner = *f.begin(f.launched, 3, 0, {.world_size = 1, .overwrite = true});
  REQUIRE(f.pin(3));
  REQUIRE(f.save_rank(owner, 0, 1));
  CHECK(f.final_status(owner).state() == wire::AttemptStatusReply::FAILED);
  CHECK(f.open("b", 0, 1, true).error().code == Errc::kConflict);  // would drop step 3
  REQUIRE(f.pin(1, false));
  f.wait(5s);
  CHECK(f.steps() == Steps{3});
}

TEST_CASE("retention: pins that arrive late, or cross, do not undo newer ones", "[server]") {
  RetentionFixture f;
  f.save_all({1});
  const auto before = *f.open_step(1);
  REQUIRE(f.pin(1, true, before));
  CHECK(f.pin(1, true, before)->pinned());  // sent again: done already
  const auto pinned = *f.open_step(1);
  REQUIRE(f.pin(1, false, pinned));
  CHECK(f.pin(1, true, before).error().code == Errc::kConflict);  // the late copy of the first
  CHECK_FALSE(f.open_step(1)->pinned());
  REQUIRE(f.save(f.launched, 1, {.world_size = 1, .overwrite = true}));
  CHECK(f.pin(1, true, before).error().code == Errc::kNotFound);
}

TEST_CASE("retention: the step to resume from stays until its launch has committed a later one or is past",
          "[server]") {
  RetentionFixture f;
  f.save_all({1, 2, 3, 4});
  REQUIRE(f.keep(1));
  const auto second = *f.open("a", 1, 2);  // before the look at the new policy
  f.wait(5min);
  CHECK(f.steps() == Steps{2, 4});
  SECTION("a later step of this launch frees it") {
    REQUIRE(f.save(second, 3));
    f.wait(5s);
    CHECK(f.steps() == Steps{4});
  }
  SECTION("a newer launch has a step of its own to resume from") {
    CHECK(f.open("a", 2)->resume == 4);
    f.wait(2min);
    CHECK(f.steps() == Steps{4});
  }
}

TEST_CASE("retention: a launch that opens while steps are removed finds its step", "[server]") {
  // Goal: whoever comes between deciding and removing wins or is waited for. Method: every moment before the removal.
  const bool blind = GENERATE(false, true);
  const auto set_policy = [](RetentionFixture& f) {
    const auto info = f.show();
    wire::BucketSet set;
    set.set_bucket(f.bucket);
    set.set_id(info.id());
    set.set_revision(info.revision());
    set.mutable_change()->set_keep_last(1);
    return f.begin_call(Method::kBucketSet, set);
  };
  rt::Duration takes{};
  {
    RetentionFixture f(retention_options({.retention_blind = blind}));
    f.save_all({1, 2, 3});
    const auto began = f.world.now();
    const auto changed = set_policy(f);
    REQUIRE(f.eventually([&] { return f.daemon->stats().retention.removed > 0; }));
    takes = f.world.now() - began;
  }
  constexpr int kMoments = 250;
  int lost = 0, refused = 0, found = 0;
  for (int moment = 0; moment <= kMoments; ++moment) {
    RetentionFixture f(retention_options({.retention_blind = blind}));
    f.save_all({1, 2, 3});
    const auto changed = set_policy(f);
    f.world.run_for(takes * moment / kMoments);
    const auto opened = f.open("a", 1, 2);
    f.wait(5s);
    if (!opened) {
      CHECK(opened.error().code == Errc::kNotFound);
      ++refused;
    } else {
      ++(f.open_step(2) ? found : lost);
    }
  }
  CHECK(refused > 0);
  CHECK(found > 0);
  CHECK((lost > 0) == blind);
}

TEST_CASE("retention: the planted bugs remove what must stay", "[server]") {
  RetentionFixture pins(retention_options({.retention_unpinned = true}));
  pins.save_all({1, 2});
  REQUIRE(pins.pin(1));
  REQUIRE(pins.keep(1));
  pins.wait(5s);
  CHECK(pins.steps() == Steps{2});
  RetentionFixture last(retention_options({.retention_one_fewer = true}));
  last.save_all({1, 2, 3});
  REQUIRE(last.keep(2));
  last.wait(5s);
  CHECK(last.steps() == Steps{3});
}

TEST_CASE("retention: steps that are removed by number and owner go together, and only those", "[server]") {
  RetentionFixture f;
  f.save_all({1, 2, 3, 4});
  wire::StepRemove request;
  request.set_bucket(f.bucket);
  request.set_run(f.run_name);
  request.add_steps(2);
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request).error().code == Errc::kInvalid);
  request.add_owners(f.open_step(2)->owner());
  for (const std::uint64_t step : {3, 3, 9}) {
    request.add_steps(step);
    request.add_owners(f.open_step(3)->owner());
  }
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request)->removed() == 2);
  CHECK(f.steps() == Steps{1, 4});
  REQUIRE(f.save(f.launched, 2));
  CHECK(f.call<wire::StepRemoveReply>(Method::kStepRemove, request)->removed() == 0);  // the late copy
  CHECK(f.steps() == Steps{1, 2, 4});
}
