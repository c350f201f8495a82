#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {
Result<void> remove_bucket(Fixture& f, const std::string& bucket) {
  wire::BucketRemove request;
  request.set_bucket(bucket);
  auto reply = f.call<wire::Empty>(Method::kBucketRemove, request);
  if (!reply) return fail(reply.error());
  return {};
}
std::vector<std::string> buckets(Fixture& f) {
  auto reply = f.call<wire::BucketListReply>(Method::kBucketList, wire::BucketList());
  REQUIRE(reply);
  std::vector<std::string> out;
  for (const auto& info : reply->buckets()) out.push_back(info.bucket());
  return out;
}
}  // namespace

TEST_CASE("buckets: are listed by name, are made once, and survive a power loss", "[server]") {
  Fixture f;
  for (const auto* name : {"zeta", "a", "m.1", "B_2"}) REQUIRE(f.make_bucket(name));
  CHECK(f.make_bucket("a").error().code == Errc::kExists);
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(buckets(f) == std::vector<std::string>{"B_2", "a", "m.1", "zeta"});
  CHECK(f.make_bucket("a").error().code == Errc::kExists);
}

TEST_CASE("buckets: a request to make one that is sent again succeeds, also after a restart, and only that one",
          "[server]") {
  Fixture f;
  wire::BucketCreate create;
  create.set_bucket("b");
  create.set_id(5);
  REQUIRE(f.call<wire::Empty>(Method::kBucketCreate, create));
  CHECK(f.call<wire::Empty>(Method::kBucketCreate, create));
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.call<wire::Empty>(Method::kBucketCreate, create));
  create.set_id(6);
  CHECK(f.call<wire::Empty>(Method::kBucketCreate, create).error().code == Errc::kExists);
}

TEST_CASE("buckets: bad names and policies that cannot be kept are refused", "[server]") {
  Fixture f;
  for (const auto* name : {"", "..", "a/b", "a b", "\xc3\xa4"})
    CHECK(f.make_bucket(name).error().code == Errc::kInvalid);
  wire::BucketCreate request;
  request.set_bucket("b");
  request.mutable_policy()->set_copies(2);
  CHECK(f.call<wire::Empty>(Method::kBucketCreate, request).error().code == Errc::kInvalid);
  request.mutable_policy()->set_copies(1);
  CHECK(buckets(f).empty());
}

TEST_CASE("buckets: only an empty one is removed", "[server]") {
  RunFixture f;
  CHECK(remove_bucket(f, "none").error().code == Errc::kNotFound);

  REQUIRE(f.put_object(f.bucket, "k", "v"));
  auto refused = remove_bucket(f, f.bucket);
  CHECK(refused.error().code == Errc::kConflict);
  CHECK(refused.error().message.find("object 'jobs/k'") != std::string::npos);
  wire::ObjectRemove remove;
  remove.set_bucket(f.bucket);
  remove.set_key("k");
  REQUIRE(f.call<wire::Empty>(Method::kObjectRemove, remove));

  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 1});
  CHECK(remove_bucket(f, f.bucket).error().code == Errc::kConflict);  // a save is open
  REQUIRE(f.save_rank(owner, 0, 1));
  f.final_status(owner);
  refused = remove_bucket(f, f.bucket);
  CHECK(refused.error().code == Errc::kConflict);
  CHECK(refused.error().message.find("llama/7b") != std::string::npos);

  wire::StepRemove drop;
  drop.set_bucket(f.bucket);
  drop.set_run(f.run_name);
  drop.mutable_step()->set_step(1);
  REQUIRE(f.call<wire::StepRemoveReply>(Method::kStepRemove, drop));
  REQUIRE(remove_bucket(f, f.bucket));
  CHECK(buckets(f).empty());
  CHECK(f.records("r/") == 0);
  CHECK(f.open("b").error().code == Errc::kNotFound);
}

TEST_CASE("buckets: what is added while one is being removed is added before or not at all", "[server]") {
  // Method: both at once, under many seeds, either first. The object's group is one that the removal looks at early.
  std::string key = "k";
  while (home_group("b", key) > 2) key += "k";
  int added = 0, removed = 0;
  for (std::uint64_t seed = 1; seed <= 80; ++seed) {
    Fixture f({}, seed);
    REQUIRE(f.make_bucket("b"));
    const auto owner = *f.begin_object("b", key);
    wire::ObjectSeal seal;
    seal.set_bucket("b");
    seal.set_key(key);
    seal.set_owner(std::string(owner.view()));
    wire::BucketRemove remove;
    remove.set_bucket("b");
    std::shared_ptr<std::optional<Result<std::string>>> sealing, removing;
    const auto pause = std::chrono::microseconds(seed / 2 * 15);
    if (seed % 2 == 0) {
      removing = f.begin_call(Method::kBucketRemove, remove);
      f.wait(pause);
      sealing = f.begin_call(Method::kObjectSeal, seal);
    } else {
      sealing = f.begin_call(Method::kObjectSeal, seal);
      f.wait(pause);
      removing = f.begin_call(Method::kBucketRemove, remove);
    }
    REQUIRE(f.eventually([&] { return removing->has_value() && sealing->has_value(); }));
    const bool sealed = (*sealing)->has_value();
    CHECK(sealed != (*removing)->has_value());
    CHECK(f.records("o/") == (sealed ? 1 : 0));
    (sealed ? added : removed)++;
  }
  CHECK(added > 0);
  CHECK(removed > 0);
}

TEST_CASE("buckets: a removal or change that arrives late does not touch a bucket that was made since", "[server]") {
  Fixture f;
  REQUIRE(f.make_bucket("b"));
  wire::BucketShow show;
  show.set_bucket("b");
  const auto first = *f.call<wire::BucketInfo>(Method::kBucketShow, show);
  wire::BucketRemove remove;
  remove.set_bucket("b");
  remove.set_id(first.id());
  wire::BucketSet set;
  set.set_bucket("b");
  set.set_id(first.id());
  set.mutable_change()->set_keep_last(1);
  REQUIRE(f.call<wire::Empty>(Method::kBucketRemove, remove));
  CHECK(f.call<wire::Empty>(Method::kBucketRemove, remove).error().code == Errc::kNotFound);
  REQUIRE(f.make_bucket("b"));
  CHECK(f.call<wire::Empty>(Method::kBucketRemove, remove).error().code == Errc::kNotFound);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, set).error().code == Errc::kNotFound);
  const auto second = *f.call<wire::BucketInfo>(Method::kBucketShow, show);
  CHECK(second.id() != first.id());
  CHECK(second.policy().keep_last() == 0);
}

TEST_CASE("buckets: a policy is changed in parts, against the revision that was seen", "[server]") {
  Fixture f;
  wire::BucketCreate create;
  create.set_bucket("b");
  create.mutable_policy()->set_keep_last(3);
  REQUIRE(f.call<wire::Empty>(Method::kBucketCreate, create));
  wire::BucketSet set;
  set.set_bucket("b");
  set.mutable_change()->set_keep_every(10);
  const auto changed = *f.call<wire::BucketInfo>(Method::kBucketSet, set);
  CHECK(changed.policy().keep_last() == 3);
  CHECK(changed.policy().keep_every() == 10);
  CHECK(changed.revision() == 1);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, set)->revision() == 1);  // sent again: done already
  auto other = set;
  other.mutable_change()->set_keep_every(20);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, other).error().code == Errc::kConflict);
  other.set_revision(1);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, other)->policy().keep_every() == 20);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, set).error().code == Errc::kConflict);  // the late copy
  other.set_revision(2);
  other.mutable_change()->set_keep_days(40'000);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketSet, other).error().code == Errc::kInvalid);
  f.restart_after(sim::Death::kPowerLoss);
  wire::BucketShow show;
  show.set_bucket("b");
  CHECK(f.call<wire::BucketInfo>(Method::kBucketShow, show)->policy().keep_every() == 20);
}
