#include "server/readers/readers.h"

#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

Daemon::Options readers_options(SaveBugs bugs = {}) {
  Daemon::Options options;
  options.readers.ttl = 60s;
  options.garbage.grace = 1s;
  options.garbage.interval = 1s;
  options.bugs = bugs;
  return options;
}

/// A run with step 1, and somebody who reads it.
struct ReadersFixture : RunFixture {
  explicit ReadersFixture(Daemon::Options options = readers_options()) : RunFixture(std::move(options)) {
    launched = *open("a");
    owner = *save(launched, 1);
    chunk = {.owner = owner, .writer = writer_of(0), .index = 0};
    wait(this->options.readers.ttl + 5s);  // what a start waits for is over
  }
  Result<wire::StepInfo> open_for(std::uint64_t reader, std::uint64_t step = 1) {
    wire::StepOpen request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    request.mutable_step()->set_step(step);
    request.set_reader(reader);
    return call<wire::StepInfo>(Method::kStepOpen, request);
  }
  Result<std::uint32_t> remove_step(std::uint64_t step = 1) {
    wire::StepRemove request;
    request.set_bucket(bucket);
    request.set_run(run_name);
    request.mutable_step()->set_step(step);
    auto reply = call<wire::StepRemoveReply>(Method::kStepRemove, request);
    if (!reply) return fail(reply.error());
    return reply->removed();
  }
  wire::ReaderRenewReply send(std::vector<std::uint64_t> renewed, std::vector<std::uint64_t> closed = {}) {
    wire::ReaderRenew request;
    request.set_home_group(owner.home_group());
    const auto name = [&](wire::Reader& reader, std::uint64_t id) {
      reader.set_id(id);
      reader.set_owner(std::string(owner.view()));
    };
    for (const auto id : renewed) name(*request.add_readers(), id);
    for (const auto id : closed) name(*request.add_closed(), id);
    auto reply = call<wire::ReaderRenewReply>(Method::kReaderRenew, request);
    REQUIRE(reply);
    return *reply;
  }
  void renew_for(rt::Duration duration) {
    for (const auto until = world.now() + duration; world.now() < until; wait(15s)) CHECK(send({7}).gone().empty());
  }
  bool kept() { return has(chunk) && records("d/") == 1; }
  bool freed() { return !has(chunk) && records("d/") == 0; }

  Launched launched;
  OwnerId owner;
  ChunkId chunk;
};

}  // namespace

TEST_CASE("readers: a removed step stays readable for whoever has it open, and goes when he closes it", "[server]") {
  ReadersFixture f;
  CHECK(f.open_for(7)->reader_ttl_millis() == 60'000);
  REQUIRE(f.remove_step());
  CHECK(f.open_step(1).error().code == Errc::kNotFound);
  f.renew_for(5min);
  CHECK(f.kept());
  CHECK(f.daemon->stats().readers.held == 1);
  f.send({}, {7});
  f.wait(10s);
  CHECK(f.freed());
  CHECK(f.daemon->stats().readers.held == 0);
  CHECK(f.daemon->stats().readers.let_go == 1);
  // He who comes back has lost it, and is told so.
  CHECK(f.send({7}).gone().size() == 1);
}

TEST_CASE("readers: a registration that is not renewed ends after its time, not before", "[server]") {
  ReadersFixture f;
  REQUIRE(f.open_for(7));
  REQUIRE(f.remove_step());
  f.wait(58s);
  CHECK(f.kept());
  f.wait(10s);
  CHECK(f.freed());
}

TEST_CASE("readers: without readers a removed step goes at once", "[server]") {
  ReadersFixture f;
  REQUIRE(f.open_step(1));  // to look at it registers nobody
  REQUIRE(f.remove_step());
  f.wait(10s);
  CHECK(f.freed());
}

TEST_CASE("readers: a step that is replaced, or dropped by a launch, is kept for its readers", "[server]") {
  const bool overwrite = GENERATE(true, false);
  ReadersFixture f;
  const auto first = *f.open_for(7);
  CHECK(first.owner() == f.owner.view());
  if (overwrite) {
    REQUIRE(f.save(f.launched, 1, {.world_size = 1, .overwrite = true}));
    CHECK(f.open_step(1)->owner() != f.owner.view());
  } else {
    REQUIRE(f.remove_step());  // with an earlier one to resume from
    f.owner = *f.save(f.launched, 3);
    f.chunk.owner = f.owner;
    REQUIRE(f.save(f.launched, 2));
    REQUIRE(f.open_for(7, 3));
    REQUIRE(f.open("a", 1, 2, true));
    CHECK(f.open_step(3).error().code == Errc::kNotFound);
  }
  f.renew_for(3min);
  CHECK(f.kept());
  f.send({}, {7});
  f.wait(10s);
  CHECK(f.freed());
}

TEST_CASE("readers: after a restart nothing goes until readers could register again", "[server]") {
  const auto death = GENERATE(sim::Death::kProcess, sim::Death::kPowerLoss);
  ReadersFixture f;
  REQUIRE(f.open_for(7));
  REQUIRE(f.remove_step());
  f.restart_after(death);
  f.wait(50s);  // the daemon that this reader registered with is gone, the next one must not forget him
  f.renew_for(3min);
  CHECK(f.kept());
  f.wait(70s);
  CHECK(f.freed());
}

TEST_CASE("readers: the planted bugs let go of what is read", "[server]") {
  SECTION("without asking") {
    ReadersFixture f(readers_options({.readers_unasked = true}));
    REQUIRE(f.open_for(7));
    REQUIRE(f.remove_step());
    f.wait(10s);
    CHECK(f.freed());
  }
  SECTION("before they could register again") {
    ReadersFixture f(readers_options({.takeover_unwaited = true}));
    REQUIRE(f.open_for(7));
    REQUIRE(f.remove_step());
    f.restart_after(sim::Death::kProcess);
    f.wait(10s);
    CHECK(f.freed());
  }
}

TEST_CASE("readers: too many are refused, by connection and in all, and room comes back", "[server]") {
  auto options = readers_options();
  options.readers.readers_max = 5;
  options.readers.connection_readers_max = 3;
  ReadersFixture f(options);
  for (const std::uint64_t reader : {1, 2, 3}) REQUIRE(f.open_for(reader));
  CHECK(f.open_for(4).error().code == Errc::kBusy);
  REQUIRE(f.open_for(3));   // known already
  REQUIRE(f.open_step(1));  // nobody is refused to look
  f.connection = 2;
  for (const std::uint64_t reader : {4, 5}) REQUIRE(f.open_for(reader));
  CHECK(f.open_for(6).error().code == Errc::kBusy);
  CHECK(f.daemon->stats().readers.refused == 2);
  f.send({}, {1});
  REQUIRE(f.open_for(6));
  // A reader belongs to the connection that it renewed itself by.
  f.connection = 1;
  CHECK(f.send({4, 5}).gone().empty());
  CHECK(f.open_for(7).error().code == Errc::kBusy);
  f.wait(61s);
  for (const std::uint64_t reader : {7, 8, 9}) REQUIRE(f.open_for(reader));
  CHECK(f.daemon->stats().readers.readers == 3);
}

TEST_CASE("readers: an object that is replaced or removed is kept for its readers", "[server]") {
  const bool replaced = GENERATE(true, false);
  ReadersFixture f;
  const auto put = *f.put_object(f.bucket, "k", "one");
  f.owner = *OwnerId::from_bytes(put.owner());
  f.chunk = {.owner = f.owner, .writer = 5, .index = 0};
  wire::ObjectStat stat;
  stat.set_bucket(f.bucket);
  stat.set_key("k");
  stat.set_reader(7);
  CHECK(f.call<wire::ObjectInfo>(Method::kObjectStat, stat)->reader_ttl_millis() == 60'000);
  if (replaced) {
    REQUIRE(f.put_object(f.bucket, "k", "two"));
  } else {
    wire::ObjectRemove remove;
    remove.set_bucket(f.bucket);
    remove.set_key("k");
    REQUIRE(f.call<wire::Empty>(Method::kObjectRemove, remove));
  }
  f.renew_for(3min);
  CHECK(f.kept());
  CHECK(f.read(f.chunk, 0, 3).value() == "one");
  f.send({}, {7});
  f.wait(10s);
  CHECK(f.freed());
  CHECK(f.read(f.chunk, 0, 3).error().code == Errc::kDeleted);
}
