#include <map>

#include "tests/server/fixture.h"

// Quota, and the space of the disk: what is reserved, what is refused, and what comes back.

using namespace cairn;
using namespace cairn::server;

namespace {

struct UsageFixture : RunFixture {
  explicit UsageFixture(Daemon::Options o = {}, std::uint64_t seed = 1) : RunFixture(std::move(o), seed) {}

  wire::BucketInfo show(const std::string& name) {
    wire::BucketShow request;
    request.set_bucket(name);
    auto info = call<wire::BucketInfo>(Method::kBucketShow, request);
    REQUIRE(info);
    return *info;
  }
  wire::BucketInfo show() { return show(bucket); }
  Result<void> set_quota(std::uint64_t bytes) {
    const auto now = show();
    wire::BucketSet request;
    request.set_bucket(bucket);
    request.set_id(now.id());
    request.set_revision(now.revision());
    request.mutable_change()->set_quota_bytes(bytes);
    auto done = call<wire::BucketInfo>(Method::kBucketSet, request);
    if (!done) return fail(done.error());
    return {};
  }
  Result<OwnerId> begin_declared(const std::string& key, std::uint64_t bytes) {
    wire::ObjectBegin request;
    request.set_bucket(bucket);
    request.set_key(key);
    request.set_declared_bytes(bytes);
    auto reply = call<wire::ObjectBeginReply>(Method::kObjectBegin, request);
    if (!reply) return fail(reply.error());
    return OwnerId::from_bytes(reply->owner());
  }
  Result<void> give_up(const std::string& key, OwnerId owner) {
    wire::ObjectAbort request;
    request.set_bucket(bucket);
    request.set_key(key);
    request.set_owner(std::string(owner.view()));
    auto reply = call<wire::Empty>(Method::kObjectAbort, request);
    if (!reply) return fail(reply.error());
    return {};
  }
  Result<void> remove(const std::string& key) {
    wire::ObjectRemove request;
    request.set_bucket(bucket);
    request.set_key(key);
    auto reply = call<wire::Empty>(Method::kObjectRemove, request);
    if (!reply) return fail(reply.error());
    return {};
  }
  Result<void> remove_step(std::uint64_t step) {
    wire::StepRemove request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    request.mutable_step()->set_step(step);
    auto reply = call<wire::StepRemoveReply>(Method::kStepRemove, request);
    if (!reply) return fail(reply.error());
    return {};
  }
  Result<OwnerId> begin_declared(const Launched& launched, std::uint64_t step, std::uint32_t rank,
                                 std::uint32_t world_size, std::uint64_t bytes) {
    auto request = begin_request(launched, step, rank, {.world_size = world_size});
    request.set_declared_bytes(bytes);
    auto reply = call<wire::BeginReply>(Method::kBegin, request);
    if (!reply) return fail(reply.error());
    return OwnerId::from_bytes(reply->owner());
  }

  struct Sum {
    std::uint64_t bytes = 0, objects = 0, steps = 0;
    bool operator==(const Sum&) const = default;
  };
  /// What listings say that the bucket holds.
  Sum listed() {
    Sum sum;
    wire::ObjectList list;
    list.set_bucket(bucket);
    auto objects = call<wire::ObjectListReply>(Method::kObjectList, list);
    REQUIRE(objects);
    for (const auto& object : objects->objects()) {
      sum.bytes += object.size();
      ++sum.objects;
    }
    wire::StepList steps;
    steps.set_bucket(bucket);
    steps.set_run(run_name);
    if (auto found = call<wire::StepListReply>(Method::kStepList, steps))
      for (const auto& step : found->steps()) {
        sum.bytes += step.data_bytes();
        ++sum.steps;
      }
    return sum;
  }
  Sum shown() {
    const auto info = show();
    return {.bytes = info.used_bytes(), .objects = info.objects(), .steps = info.steps()};
  }
};

bool names(const Error& error, std::initializer_list<std::string_view> words) {
  for (const auto word : words)
    if (error.message.find(word) == std::string::npos) {
      UNSCOPED_INFO("'" << word << "' is missing in: " << error.message);
      return false;
    }
  return true;
}

}  // namespace

TEST_CASE("usage: a declared put beyond the quota is refused before data flows", "[server]") {
  UsageFixture f;
  REQUIRE(f.set_quota(1000));
  REQUIRE(f.put_object(f.bucket, "a", std::string(600, 'x')));
  const auto refused = f.begin_declared("b", 500);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  CHECK(names(refused.error(), {"limit 1000", "used 600", "asked 500", "jobs"}));
  CHECK(f.show().reserved_bytes() == 0);
  REQUIRE(f.begin_declared("b", 400));
  CHECK(f.show().reserved_bytes() == 400);
  // Nothing is left for another one.
  CHECK(f.begin_declared("c", 1).error().code == Errc::kNoSpace);
}

TEST_CASE("usage: an undeclared put is refused at its seal, or when far too much has come", "[server]") {
  UsageFixture f;
  REQUIRE(f.set_quota(1000));
  const auto owner = *f.begin_declared("a", 0);
  REQUIRE(f.put({.owner = owner, .writer = 5, .index = 0}, std::string(1001, 'x')));
  const auto refused = f.seal_object(f.bucket, "a", owner, 5, std::string(1001, 'x'));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  CHECK(names(refused.error(), {"limit 1000", "asked 1001"}));
  const auto more = f.put({.owner = owner, .writer = 5, .index = 1}, std::string(2 * kMiB, 'x'));
  REQUIRE_FALSE(more);
  CHECK(more.error().code == Errc::kNoSpace);
  CHECK(f.listed() == UsageFixture::Sum{});
  REQUIRE(f.give_up("a", owner));
  REQUIRE(f.give_up("a", owner));  // again
  CHECK(f.show().reserved_bytes() == 0);
  CHECK(f.records("w/") == 0);
  REQUIRE(f.put_object(f.bucket, "a", std::string(1000, 'x')));
}

TEST_CASE("usage: uploads at the same time do not exceed the quota together", "[server]") {
  UsageFixture f;
  REQUIRE(f.set_quota(1000));
  const auto first = *f.begin_declared("a", 0), second = *f.begin_declared("b", 0);
  REQUIRE(f.put({.owner = first, .writer = 5, .index = 0}, std::string(600, 'x')));
  REQUIRE(f.put({.owner = second, .writer = 5, .index = 0}, std::string(600, 'x')));
  // Either alone would fit, so the first to be sealed must wait for the other to be given up or sealed.
  CHECK(f.seal_object(f.bucket, "a", first, 5, std::string(600, 'x')).error().code == Errc::kNoSpace);
  REQUIRE(f.give_up("b", second));
  REQUIRE(f.seal_object(f.bucket, "a", first, 5, std::string(600, 'x')));
  CHECK(f.shown() == UsageFixture::Sum{.bytes = 600, .objects = 1, .steps = 0});
}

TEST_CASE("usage: what a put or a save replaces does not count twice", "[server]") {
  UsageFixture f;
  REQUIRE(f.set_quota(1000));
  REQUIRE(f.put_object(f.bucket, "a", std::string(900, 'x')));
  const auto owner = f.begin_declared("a", 1000);
  REQUIRE(owner);
  REQUIRE(f.put({.owner = *owner, .writer = 5, .index = 0}, std::string(1000, 'y')));
  REQUIRE(f.seal_object(f.bucket, "a", *owner, 5, std::string(1000, 'y')));
  CHECK(f.shown() == f.listed());
  REQUIRE(f.remove("a"));

  const auto launched = *f.open("a");
  REQUIRE(f.save(launched, 1));
  CHECK(f.show().used_bytes() == 1000);
  REQUIRE(f.save(launched, 1, {.world_size = 1, .overwrite = true}));
  const auto refused = f.save(launched, 2);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  CHECK(names(refused.error(), {"limit 1000", "used 1000", "asked 1000"}));
  CHECK(f.shown() == f.listed());
  CHECK(f.show().reserved_bytes() == 0);
}

TEST_CASE("usage: counts equal what is listed, whatever happens, and stay within the quota", "[server]") {
  constexpr std::uint64_t kQuota = 12'000;
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    UsageFixture f({}, seed);
    INFO("seed " << seed);
    REQUIRE(f.set_quota(kQuota));
    sim::Prng draw(seed);
    std::map<std::string, OwnerId> open;
    std::uint64_t job = 0, refused = 0;
    auto launched = *f.open("job", job);
    for (int i = 0; i < 150; ++i) {
      const auto key = "k" + std::to_string(draw.below(6));
      const auto bytes = std::string(draw.between(1, 4000), 'x');
      switch (draw.below(9)) {
        case 0:
        case 1:
        case 2: {
          const auto owner = f.begin_declared(key, draw.chance(0.5) ? bytes.size() : 0);
          if (!owner) {
            REQUIRE(owner.error().code == Errc::kNoSpace);
            ++refused;
            break;
          }
          REQUIRE(f.put({.owner = *owner, .writer = 5, .index = 0}, bytes));
          if (draw.chance(0.2)) break;  // its client is gone
          const auto sealed = f.seal_object(f.bucket, key, *owner, 5, bytes);
          REQUIRE((sealed || sealed.error().code == Errc::kNoSpace));
          refused += !sealed;
          if (!sealed) REQUIRE(f.give_up(key, *owner));
          break;
        }
        case 3:
          (void)f.remove(key);
          break;
        case 4:
        case 5: {
          const auto saved = f.save(launched, draw.between(1, 5), {.world_size = 2, .overwrite = true});
          REQUIRE((saved || saved.error().code == Errc::kNoSpace));
          refused += !saved;
          break;
        }
        case 6:
          (void)f.remove_step(draw.between(1, 5));
          break;
        case 7: {
          const auto steps = f.steps();
          if (steps.empty()) break;
          launched = *f.open("job", ++job, steps[draw.below(steps.size())], true);
          break;
        }
        default:
          if (draw.chance(0.5)) f.wait(15min);  // uploads that nobody touches are dropped
          f.restart_after(draw.chance(0.5) ? sim::Death::kPowerLoss : sim::Death::kProcess);
      }
      REQUIRE(f.shown() == f.listed());
      REQUIRE(f.shown().bytes <= kQuota);
    }
    CHECK(refused > 0);
    f.wait(30min);
    CHECK(f.show().reserved_bytes() == 0);
  }
}

TEST_CASE("usage: a removed bucket with an open upload leaves no counts", "[server]") {
  UsageFixture f;
  REQUIRE(f.make_bucket("other"));
  f.bucket = "other";
  const auto owner = *f.begin_declared("a", 500);
  wire::BucketRemove remove;
  remove.set_bucket("other");
  REQUIRE(f.call<wire::Empty>(Method::kBucketRemove, remove));
  REQUIRE(f.make_bucket("other"));
  CHECK(f.show().reserved_bytes() == 500);
  REQUIRE(f.give_up("a", owner));
  CHECK(f.show().reserved_bytes() == 0);
}

TEST_CASE("usage: saves and uploads are refused when the disk has no room beside what is reserved", "[server]") {
  UsageFixture f;
  f.disk.set_capacity(64 * kMiB);
  f.wait(10s);
  const auto available = f.metric("cairn_usage_available_bytes");
  CHECK(available > 40 * kMiB);
  CHECK(available < 64 * kMiB);

  const auto launched = *f.open("a");
  REQUIRE(f.begin_declared(launched, 1, 0, 3, available / 2));
  CHECK(f.metric("cairn_usage_reserved_bytes") == available / 2);
  // An upload beside it does not get what the save will need.
  const auto upload = f.begin_declared("k", available / 2 + kMiB);
  REQUIRE_FALSE(upload);
  CHECK(upload.error().code == Errc::kNoSpace);
  CHECK(names(upload.error(), {"asked", "free", "reserved", "kept for deletes"}));

  const auto owner = *f.begin_declared(launched, 1, 1, 3, available / 4);
  // The third rank does not fit: the save fails for all, also for who comes later.
  const auto third = f.begin_declared(launched, 1, 2, 3, available / 2);
  REQUIRE_FALSE(third);
  CHECK(third.error().code == Errc::kNoSpace);
  const auto status = f.final_status(owner);
  CHECK(status.state() == wire::AttemptStatusReply::FAILED);
  CHECK(static_cast<Errc>(status.error_code()) == Errc::kNoSpace);
  CHECK(names({Errc::kNoSpace, status.error()}, {"rank 2", "step 1"}));
  CHECK(f.metric("cairn_usage_reserved_bytes") == 0);

  // Now the first to come is refused: the others need not wait for it.
  CHECK(f.begin_declared(launched, 2, 0, 3, 2 * available).error().code == Errc::kNoSpace);
  const auto told = f.begin_declared(launched, 2, 1, 3, 10);
  REQUIRE_FALSE(told);
  CHECK(told.error().code == Errc::kNoSpace);
  CHECK(names(told.error(), {"rank 0"}));
  // It tries again with less, and all goes well.
  REQUIRE(f.begin_declared(launched, 2, 0, 3, 1000));
  REQUIRE(f.begin_declared(launched, 2, 1, 3, 1000));
}

TEST_CASE("usage: a daemon that starts anew learns again what is reserved", "[server]") {
  UsageFixture f;
  f.disk.set_capacity(64 * kMiB);
  const auto launched = *f.open("a");
  const auto upload = *f.begin_declared("k", 5 * kMiB);
  REQUIRE(f.put({.owner = upload, .writer = 5, .index = 0}, std::string(2 * kMiB, 'x')));
  const auto save = *f.begin_declared(launched, 1, 0, 1, 7 * kMiB);
  REQUIRE(f.put({.owner = save, .writer = 5, .index = 0}, std::string(1 * kMiB, 'x')));
  CHECK(f.metric("cairn_usage_reserved_bytes") == 9 * kMiB);
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.metric("cairn_usage_reserved_bytes") == 3 * kMiB);  // of the upload; ranks speak again
  wire::Heartbeat beat;
  beat.set_bucket(f.bucket);
  beat.set_run(f.run_name);
  beat.set_owner(std::string(save.view()));
  beat.set_declared_bytes(7 * kMiB);
  for (int i = 0; i < 2; ++i) REQUIRE(f.call<wire::Empty>(Method::kHeartbeat, beat));
  CHECK(f.metric("cairn_usage_reserved_bytes") == 9 * kMiB);
  CHECK(f.show().reserved_bytes() == 12 * kMiB);
}

TEST_CASE("usage: a disk that fills fails that upload alone, and a hundred times nothing is lost", "[server]") {
  Daemon::Options options;
  options.garbage.grace = 1s;
  options.garbage.interval = 500ms;
  UsageFixture f(options);
  REQUIRE(f.put_object(f.bucket, "before", std::string(300'000, 'b')));
  const auto kept = f.call<wire::ObjectInfo>(Method::kObjectStat, [&] {
    wire::ObjectStat stat;
    stat.set_bucket(f.bucket);
    stat.set_key("before");
    return stat;
  }());
  REQUIRE(kept);
  const ChunkId before{.owner = *OwnerId::from_bytes(kept->owner()), .writer = 5, .index = 0};
  f.disk.set_capacity(f.disk.used_bytes() + 24 * kMiB);
  const auto launched = *f.open("a");
  std::uint64_t most = 0, least = UINT64_MAX;
  for (int cycle = 0; cycle < 100; ++cycle) {
    const auto owner = *f.begin_declared(launched, static_cast<std::uint64_t>(cycle) + 1, 0, 1, 0);
    std::uint64_t stored = 0;
    Result<void> put;
    for (std::uint32_t i = 0; put; ++i) {
      put =
          f.put({.owner = owner, .writer = 5, .index = i}, std::string(1 * kMiB, static_cast<char>('a' + cycle % 26)));
      stored += put ? 1 : 0;
      REQUIRE(i < 100);
    }
    CHECK(put.error().code == Errc::kNoSpace);
    most = std::max(most, stored);
    least = std::min(least, stored);
    // Full: what was there before is read, and the target has not failed.
    REQUIRE(f.read(before, 0, 10).value() == "bbbbbbbbbb");
    REQUIRE_FALSE(f.daemon->failure());
    wire::Abort abort;
    abort.set_bucket(f.bucket);
    abort.set_run(f.run_name);
    abort.set_owner(std::string(owner.view()));
    abort.set_reason(put.error().message);
    abort.set_code(static_cast<int>(Errc::kNoSpace));
    REQUIRE(f.call<wire::Empty>(Method::kAbort, abort));
    CHECK(static_cast<Errc>(f.final_status(owner).error_code()) == Errc::kNoSpace);
    REQUIRE(f.eventually([&] { return f.target->chunks().stats().chunks == 1; }));
    f.wait(3s);
  }
  CHECK(least > 15);
  CHECK(least == most);
  CHECK(f.metric("cairn_usage_reserved_bytes") == 0);
}
