#include "proto/common/checksum.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

Result<wire::ObjectInfo> stat(Fixture& f, const std::string& key) {
  wire::ObjectStat request;
  request.set_bucket("b");
  request.set_key(key);
  return f.call<wire::ObjectInfo>(Method::kObjectStat, request);
}

Result<void> remove(Fixture& f, const std::string& key) {
  wire::ObjectRemove request;
  request.set_bucket("b");
  request.set_key(key);
  auto reply = f.call<wire::Empty>(Method::kObjectRemove, request);
  if (!reply) return fail(reply.error());
  return {};
}

/// Page by page.
std::vector<std::string> list(Fixture& f, const std::string& prefix, std::uint32_t page) {
  std::vector<std::string> out;
  wire::ObjectList request;
  request.set_bucket("b");
  request.set_prefix(prefix);
  request.set_limit(page);
  for (;;) {
    auto reply = f.call<wire::ObjectListReply>(Method::kObjectList, request);
    REQUIRE(reply);
    for (const auto& object : reply->objects()) out.push_back(object.key());
    if (!reply->more()) return out;
    REQUIRE(reply->objects_size() > 0);
    request.set_after(out.back());
  }
}

struct ObjectFixture : Fixture {
  explicit ObjectFixture(Daemon::Options o = {}) : Fixture(std::move(o)) { REQUIRE(make_bucket("b")); }
};

}  // namespace

TEST_CASE("objects: one is visible from its seal on, whole, and after a power loss", "[server]") {
  ObjectFixture f;
  const auto owner = *f.begin_object("b", "k/1");
  REQUIRE(f.put({.owner = owner, .writer = 5, .index = 0}, "hello"));
  CHECK(stat(f, "k/1").error().code == Errc::kNotFound);
  CHECK(list(f, "", 10).empty());
  REQUIRE(f.seal_object("b", "k/1", owner, 5, "hello"));
  f.restart_after(sim::Death::kPowerLoss);
  const auto info = stat(f, "k/1");
  REQUIRE(info);
  CHECK(info->size() == 5);
  CHECK(info->crc32c() == crc32c("hello"));
  REQUIRE(info->runs_size() == 1);
  CHECK(f.read({.owner = owner, .writer = info->runs(0).writer(), .index = 0}, 0, 5).value() == "hello");
}

TEST_CASE("objects: a repeated seal is done, also after a restart", "[server]") {
  ObjectFixture f;
  const auto owner = *f.begin_object("b", "k");
  REQUIRE(f.put({.owner = owner, .writer = 5, .index = 0}, "v"));
  REQUIRE(f.seal_object("b", "k", owner, 5, "v", true));
  REQUIRE(f.seal_object("b", "k", owner, 5, "v", true));
  f.restart_after(sim::Death::kProcess);
  REQUIRE(f.seal_object("b", "k", owner, 5, "v", true));
}

TEST_CASE("objects: the last seal wins, and only the last owner is named", "[server]") {
  ObjectFixture f;
  const auto first = *f.begin_object("b", "k");
  const auto second = *f.begin_object("b", "k");
  REQUIRE(f.seal_object("b", "k", second, 5, ""));
  REQUIRE(f.seal_object("b", "k", first, 5, ""));
  CHECK(stat(f, "k")->owner() == first.view());
  f.let_go();
  CHECK(f.records("w/") == 1);
  // The replaced one cannot come back: its outcome is told honestly.
  CHECK(f.seal_object("b", "k", second, 5, "").error().code == Errc::kConflict);
  REQUIRE(remove(f, "k"));
  CHECK(remove(f, "k").error().code == Errc::kNotFound);
  f.let_go();
  CHECK(f.records("w/") == 0);
  CHECK(f.seal_object("b", "k", first, 5, "").error().code == Errc::kConflict);
}

TEST_CASE("objects: of two with if_absent one is sealed", "[server]") {
  ObjectFixture f;
  const auto first = *f.begin_object("b", "k", true);
  const auto second = *f.begin_object("b", "k", true);
  REQUIRE(f.seal_object("b", "k", second, 5, "", true));
  CHECK(f.seal_object("b", "k", first, 5, "", true).error().code == Errc::kExists);
  CHECK(f.begin_object("b", "k", true).error().code == Errc::kExists);
  CHECK(stat(f, "k")->owner() == second.view());
}

TEST_CASE("objects: seals that do not fit are refused and change nothing", "[server]") {
  ObjectFixture f;
  const auto owner = *f.begin_object("b", "k");
  const auto other = *f.begin_object("b", "other");
  wire::ObjectSeal request;
  request.set_bucket("b");
  request.set_key("k");
  request.set_owner(std::string(owner.view()));
  request.set_size(10);
  auto& run = *request.add_runs();
  run.set_group(kFirstDataGroup);
  run.set_count(1);
  run.set_chunk_bytes(10);
  run.set_last_bytes(10);
  const auto refused = [&](auto change) {
    auto wrong = request;
    change(wrong);
    auto reply = f.call<wire::ObjectInfo>(Method::kObjectSeal, wrong);
    return !reply && reply.error().code == Errc::kInvalid;
  };
  CHECK(refused([](auto& r) { r.set_size(11); }));
  CHECK(refused([](auto& r) { r.mutable_runs(0)->set_count(0); }));
  CHECK(refused([](auto& r) { r.mutable_runs(0)->set_chunk_bytes(0); }));
  CHECK(refused([](auto& r) { r.mutable_runs(0)->set_chunk_bytes(UINT32_MAX); }));
  CHECK(refused([](auto& r) { r.mutable_runs(0)->set_last_bytes(11); }));
  CHECK(refused([](auto& r) { r.mutable_runs(0)->set_group(77); }));
  CHECK(refused([](auto& r) {
    r.mutable_runs(0)->set_first_index(UINT32_MAX);
    r.mutable_runs(0)->set_count(2);
    r.set_size(20);
  }));
  CHECK(refused([&](auto& r) { r.mutable_runs(0)->set_owner(std::string(other.view())); }));
  CHECK(refused([&](auto& r) { r.set_owner(std::string(other.view())); }));
  CHECK(refused([](auto& r) { r.set_owner("short"); }));
  CHECK(refused([](auto& r) { r.set_key(""); }));
  CHECK(refused([](auto& r) { r.set_key(std::string("a\0b", 3)); }));
  CHECK(list(f, "", 10).empty());
  REQUIRE(f.call<wire::ObjectInfo>(Method::kObjectSeal, request));
  CHECK(f.begin_object("none", "k").error().code == Errc::kNotFound);
}

TEST_CASE("objects: listings are sorted, complete, and cut by prefix and page", "[server]") {
  ObjectFixture f;
  std::vector<std::string> keys, under;
  sim::Prng random(3);
  for (int i = 0; i < 120; ++i) {
    keys.push_back((i % 3 == 0 ? "x/" : "y/") + std::to_string(random.below(1'000'000)));
    REQUIRE(f.put_object("b", keys.back(), ""));
  }
  REQUIRE(f.begin_object("b", "x/never-sealed"));
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  for (const auto& key : keys)
    if (key.starts_with("x/")) under.push_back(key);
  CHECK(list(f, "", 1000) == keys);
  CHECK(list(f, "", 7) == keys);
  CHECK(list(f, "x/", 7) == under);
  CHECK(list(f, "z", 7).empty());
}

TEST_CASE("objects: an upload that nobody touches is dropped, one that is touched is not", "[server]") {
  ObjectFixture f;
  const auto idle = *f.begin_object("b", "idle");
  const auto busy = *f.begin_object("b", "busy");
  for (std::uint32_t i = 0; i < 8; ++i) {
    f.wait(2min);
    REQUIRE(f.put({.owner = busy, .writer = 5, .index = i}, "v"));
  }
  CHECK(f.records("w/") == 1);
  CHECK(f.put({.owner = idle, .writer = 5, .index = 0}, "v").error().code == Errc::kFenced);
  CHECK(f.seal_object("b", "idle", idle, 5, "").error().code == Errc::kConflict);
  // After a restart the clock starts anew, and then runs out, too.
  f.restart_after(sim::Death::kProcess);
  f.wait(9min);
  CHECK(f.records("w/") == 1);
  f.wait(2min);
  CHECK(f.records("w/") == 0);
}

namespace {

Result<void> remove_version(Fixture& f, const std::string& key, const OwnerId& owner) {
  wire::ObjectRemove request;
  request.set_bucket("b");
  request.set_key(key);
  request.set_owner(std::string(owner.view()));
  auto reply = f.call<wire::Empty>(Method::kObjectRemove, request);
  if (!reply) return fail(reply.error());
  return {};
}

Result<OwnerId> begin_instead_of(Fixture& f, const std::string& key, const OwnerId& version) {
  wire::ObjectBegin request;
  request.set_bucket("b");
  request.set_key(key);
  request.set_if_owner(std::string(version.view()));
  auto reply = f.call<wire::ObjectBeginReply>(Method::kObjectBegin, request);
  if (!reply) return fail(reply.error());
  return OwnerId::from_bytes(reply->owner());
}

Result<wire::ObjectInfo> seal_instead_of(Fixture& f, const std::string& key, const OwnerId& owner,
                                         const OwnerId& version) {
  wire::ObjectSeal request;
  request.set_bucket("b");
  request.set_key(key);
  request.set_owner(std::string(owner.view()));
  request.set_if_owner(std::string(version.view()));
  return f.call<wire::ObjectInfo>(Method::kObjectSeal, request);
}

OwnerId version_of(Fixture& f, const std::string& key) {
  return *OwnerId::from_bytes(stat(f, key)->owner());
}

/// Keys and common prefixes, in the order of pages; `prefix/` ends in the delimiter.
std::vector<std::string> list_folders(Fixture& f, const std::string& prefix, std::uint32_t page,
                                      const std::string& after = "") {
  std::vector<std::string> out;
  wire::ObjectList request;
  request.set_bucket("b");
  request.set_prefix(prefix);
  request.set_delimiter("/");
  request.set_limit(page);
  request.set_after(after);
  for (;;) {
    auto reply = f.call<wire::ObjectListReply>(Method::kObjectList, request);
    REQUIRE(reply);
    REQUIRE(static_cast<std::uint32_t>(reply->objects_size() + reply->prefixes_size()) <= page);
    std::vector<std::string> got(reply->prefixes().begin(), reply->prefixes().end());
    for (const auto& object : reply->objects()) got.push_back(object.key());
    std::sort(got.begin(), got.end());
    out.insert(out.end(), got.begin(), got.end());
    if (!reply->more()) return out;
    REQUIRE(!reply->next().empty());
    request.set_token(reply->next());
  }
}

}  // namespace

TEST_CASE("objects: a removal that names a version removes no other", "[server]") {
  ObjectFixture f;
  REQUIRE(f.put_object("b", "k", "one"));
  const auto first = version_of(f, "k");
  REQUIRE(f.put_object("b", "k", "two"));
  // A copy of the request that arrives late, after the key was put again.
  CHECK(remove_version(f, "k", first).error().code == Errc::kNotFound);
  REQUIRE(stat(f, "k"));
  REQUIRE(remove_version(f, "k", version_of(f, "k")));
  CHECK(stat(f, "k").error().code == Errc::kNotFound);
  CHECK(remove_version(f, "k", first).error().code == Errc::kNotFound);
}

TEST_CASE("objects: a put that names the version it replaces replaces no other", "[server]") {
  ObjectFixture f;
  REQUIRE(f.put_object("b", "k", "one"));
  const auto first = version_of(f, "k");
  const auto a = *begin_instead_of(f, "k", first);
  const auto b = *begin_instead_of(f, "k", first);
  REQUIRE(seal_instead_of(f, "k", a, first));
  // Of two, one wins; repeated, it has won still.
  CHECK(seal_instead_of(f, "k", b, first).error().code == Errc::kConflict);
  REQUIRE(seal_instead_of(f, "k", a, first));
  CHECK(version_of(f, "k") == a);
  CHECK(begin_instead_of(f, "k", first).error().code == Errc::kConflict);
  REQUIRE(remove(f, "k"));
  CHECK(begin_instead_of(f, "k", a).error().code == Errc::kConflict);
}

TEST_CASE("objects: an upload that is given up leaves nothing, and can be sealed no more", "[server]") {
  ObjectFixture f;
  const auto owner = *f.begin_object("b", "k");
  REQUIRE(f.put({.owner = owner, .writer = 5, .index = 0}, "v"));
  wire::ObjectAbort abort;
  abort.set_bucket("b");
  abort.set_key("other");
  abort.set_owner(std::string(owner.view()));
  CHECK(f.call<wire::Empty>(Method::kObjectAbort, abort).error().code == Errc::kInvalid);
  abort.set_key("k");
  REQUIRE(f.call<wire::Empty>(Method::kObjectAbort, abort));
  CHECK(f.put({.owner = owner, .writer = 5, .index = 1}, "v").error().code == Errc::kFenced);
  CHECK(f.seal_object("b", "k", owner, 5, "v").error().code == Errc::kConflict);
  CHECK(f.eventually([&] { return f.target->chunks().stats().chunks == 0; }, 1h));

  const auto sealed = *f.begin_object("b", "k");
  REQUIRE(f.seal_object("b", "k", sealed, 5, ""));
  abort.set_owner(std::string(sealed.view()));
  CHECK(f.call<wire::Empty>(Method::kObjectAbort, abort).error().code == Errc::kConflict);
  REQUIRE(stat(f, "k"));
}

TEST_CASE("objects: a delimiter folds what lies below into one prefix", "[server]") {
  ObjectFixture f;
  for (const auto* key : {"a", "d/1", "d/2", "d/e/3", "dd", "e/x", "\xc3\xa4/y", "z"})
    REQUIRE(f.put_object("b", key, ""));
  for (int i = 0; i < 60; ++i) REQUIRE(f.put_object("b", "many/" + std::to_string(i), ""));
  for (std::uint32_t page : {1u, 2u, 3u, 1000u}) {
    CHECK(list_folders(f, "", page) == std::vector<std::string>{"a", "d/", "dd", "e/", "many/", "z", "\xc3\xa4/"});
    CHECK(list_folders(f, "d/", page) == std::vector<std::string>{"d/1", "d/2", "d/e/"});
    CHECK(list_folders(f, "", page, "d/1") == std::vector<std::string>{"d/", "dd", "e/", "many/", "z", "\xc3\xa4/"});
  }
}

TEST_CASE("objects: a listing sees every key that is there throughout, once and in order", "[server]") {
  // Goal: the contract while others put and remove. Method: keys that stay are among keys that come and go between
  // the pages.
  ObjectFixture f;
  sim::Prng draw(7);
  std::vector<std::string> stay;
  for (int i = 0; i < 200; ++i) {
    stay.push_back("k" + std::to_string(draw.below(100'000)) + "s");
    REQUIRE(f.put_object("b", stay.back(), ""));
  }
  std::sort(stay.begin(), stay.end());
  stay.erase(std::unique(stay.begin(), stay.end()), stay.end());
  wire::ObjectList request;
  request.set_bucket("b");
  request.set_limit(9);
  std::vector<std::string> seen;
  std::vector<std::string> others;
  for (bool more = true; more;) {
    for (int i = 0; i < 3; ++i) {
      others.push_back("k" + std::to_string(draw.below(100'000)) + "t");
      REQUIRE(f.put_object("b", others.back(), ""));
      REQUIRE(f.begin_object("b", "k" + std::to_string(draw.below(100'000)) + "u"));
    }
    if (others.size() > 6) {
      (void)remove(f, others.front());
      others.erase(others.begin());
    }
    auto reply = f.call<wire::ObjectListReply>(Method::kObjectList, request);
    REQUIRE(reply);
    for (const auto& object : reply->objects()) seen.push_back(object.key());
    more = reply->more();
    request.set_token(reply->next());
  }
  CHECK(std::is_sorted(seen.begin(), seen.end()));
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
  CHECK(std::includes(seen.begin(), seen.end(), stay.begin(), stay.end()));
  CHECK(std::none_of(seen.begin(), seen.end(), [](const auto& key) { return key.ends_with('u'); }));
}
