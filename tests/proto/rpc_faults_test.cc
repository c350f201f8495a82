#include <catch2/catch.hpp>
#include <functional>

#include "tests/proto/rpc_fixture.h"

// What breaks between the two ends, at every moment: all in the simulator.

using namespace cairn;
using namespace cairn::rpc_test;

namespace {

rpc::Server::Options small_server() {
  auto options = server_options();
  options.credit_units = 3;
  return options;
}

/// One call of a kind that is started, watched event by event, and ended from outside.
struct Victim {
  enum Kind { kCall, kUpload, kEarlyError, kSlowUpload, kDownload, kStrided };
  static constexpr Kind kAll[] = {kCall, kUpload, kEarlyError, kSlowUpload, kDownload, kStrided};
  static constexpr std::string_view kNames[] = {"call",        "upload",   "upload with early error",
                                                "slow upload", "download", "strided download"};

  Victim(OverSim& fixture, Kind k)
      : f(fixture), kind(k), sink(k == kStrided ? MemorySink(40'000, 100, 20) : MemorySink(40'000)) {
    f.scope->spawn(run(), [this](Result<void> end) { ended = std::move(end); });
  }
  Task<void> run() {
    const auto deadline = f.in(60s);
    const auto up = pattern(40'000, 4);
    Result<std::string> reply;
    switch (kind) {
      case kCall:
        reply = co_await f.channel->call(Method::kMap, up, deadline);
        break;
      case kUpload:
      case kSlowUpload:
      case kEarlyError: {
        const auto method = kind == kEarlyError ? Method::kObjectBegin
                            : kind == kUpload   ? Method::kPutChunk
                                                : Method::kObjectSeal;
        auto request = kind == kEarlyError ? std::string("2") : std::to_string(up.size());
        reply = co_await f.channel->upload(method, std::move(request), pieces_of(up, kSmallUnitBytes), deadline);
        break;
      }
      case kDownload:
      case kStrided:
        reply = co_await f.channel->download(Method::kReadRanges, "10 4000 4", sink, deadline);
        break;
    }
    CO_CHECK_OK(std::move(reply));
    co_return {};
  }
  /// The result a call without trouble has.
  bool right() const {
    if (kind == kEarlyError) return !*ended && ended->error().code == Errc::kNoSpace;
    if (kind == kDownload || kind == kStrided) return *ended && sink.bytes() == pattern(40'000, 4);
    return ended->has_value();
  }

  OverSim& f;
  Kind kind;
  MemorySink sink;
  std::optional<Result<void>> ended;
};

/// Nothing of earlier calls is left, and the connection works in every way.
void check_whole(OverSim& f) {
  f.service.open_gate();
  f.settle();
  CHECK(f.service.running == 0);
  CHECK(f.server->stats().calls_running == 0);
  CHECK(f.pool->available() == f.pool->units());
  CHECK(f.call(Method::kMap, "x").value_or("none") == "echo x");
  const auto bytes = pattern(10 * kSmallUnitBytes, 9);  // more than all credit
  CHECK(f.upload(bytes, kSmallUnitBytes).value_or("none") == std::to_string(crc32c(bytes)));
  MemorySink sink(30'000);
  CHECK(f.run(f.channel->download(Method::kReadRanges, "3 10000 2", sink, f.in(60s))));
  CHECK(sink.bytes() == pattern(30'000, 2));
  CHECK(f.server->stats().protocol_errors == 0);
}

/// Runs `disturb` after the n-th event of a call of every kind, for all n; `check` then sees what became of it.
void at_every_event(std::function<void(OverSim&, Victim&)> disturb, std::function<void(OverSim&, Victim&)> check,
                    double split = 0) {
  for (const auto kind : Victim::kAll) {
    int events = 0;
    for (int n = 0;; ++n) {
      OverSim f(small_server(), 4, kSmallUnitBytes, 1000 + n);
      f.world.net().faults.split_read = split;
      f.world.net().options.segment_bytes = 1500;
      f.world.net().options.window_bytes = 6000;
      f.connect();
      Victim victim(f, kind);
      if (kind == Victim::kSlowUpload) f.world.after(1ms, [&] { f.service.open_gate(); });
      int left = n;
      while (left > 0 && !victim.ended && f.world.step()) --left;
      if (left > 0) break;  // it ended by itself before
      ++events;
      INFO(Victim::kNames[kind] << ", event " << n << ", seed " << f.world.seed());
      disturb(f, victim);
      check(f, victim);
      if (n > 5000) FAIL("does not end");
    }
    INFO(Victim::kNames[kind]);
    CHECK(events > 10);
  }
}

}  // namespace

TEST_CASE("rpc: a call dropped at any moment leaves nothing behind and touches no memory", "[rpc][sim]") {
  for (const double split : {0.0, 0.5}) {
    std::vector<std::byte> before;
    at_every_event(
        [&](OverSim& f, Victim& v) {
          f.scope->cancel();
          before = v.sink.memory;
        },
        [&](OverSim& f, Victim& v) {
          check_whole(f);
          CHECK(v.sink.memory == before);
        },
        split);
  }
}

TEST_CASE("rpc: a connection cut at any moment ends the call, naming the peer", "[rpc][sim]") {
  for (const bool ghost : {false, true})
    at_every_event([&](OverSim& f, Victim&) { f.world.net().cut("", "", ghost); },
                   [&](OverSim& f, Victim& v) {
                     f.service.open_gate();
                     f.settle();
                     REQUIRE(v.ended);
                     if (!v.right()) {
                       REQUIRE(!*v.ended);
                       CHECK(v.ended->error().code == Errc::kUnavailable);
                       CHECK_THAT(v.ended->error().message, Catch::Contains("daemon:7420"));
                     }
                     CHECK_FALSE(f.channel->alive());
                     CHECK(f.call(Method::kMap, "x").error().code == Errc::kUnavailable);
                     CHECK(f.server->stats().connections == 0);
                     CHECK(f.pool->available() == f.pool->units());
                     f.connect();
                     check_whole(f);
                   });
}

TEST_CASE("rpc: a deadline at any moment leaves the connection whole", "[rpc][sim]") {
  at_every_event(
      [&](OverSim& f, Victim& v) {
        // The victim's own deadline is far; a second call's passes now, in the middle of the first.
        const auto late = f.run(f.channel->call(Method::kHeartbeat, "", f.client.now()));
        CHECK(late.error().code == Errc::kDeadline);
        f.service.open_gate();
        f.settle();
        REQUIRE(v.ended);
        CHECK(v.right());
      },
      [&](OverSim& f, Victim&) { check_whole(f); });
}

TEST_CASE("rpc: a client killed at any moment leaves the daemon whole", "[rpc][sim]") {
  at_every_event(
      [&](OverSim& f, Victim&) {
        f.scope.reset();
        f.channel.reset();
        f.client.kill(sim::Death::kProcess);
      },
      [&](OverSim& f, Victim&) {
        f.settle();
        CHECK(f.service.running == 0);
        CHECK(f.server->stats().connections == 0);
        CHECK(f.pool->available() == f.pool->units());
        f.client.restart();
        f.connect();
        check_whole(f);
      });
}

TEST_CASE("rpc: a daemon that falls silent is given up", "[rpc][sim]") {
  OverSim f;
  f.connect();
  std::optional<Result<void>> end;
  struct Call {
    static Task<void> run(OverSim& fixture) {
      CO_CHECK_OK(co_await fixture.channel->call(Method::kHeartbeat, "", rt::kNever));
      co_return {};
    }
  };
  f.scope->spawn(Call::run(f), [&](Result<void> r) { end = std::move(r); });
  f.world.run_for(10min);  // pings and pongs keep both ends content
  REQUIRE(!end);
  REQUIRE(f.channel->alive());
  REQUIRE(f.server->stats().connections == 1);
  f.world.net().clog(f.daemon.host(), f.client.host(), f.world.now() + 1h);
  f.world.run_for(30s);
  REQUIRE(end);
  CHECK(end->error().code == Errc::kUnavailable);
  CHECK_THAT(end->error().message, Catch::Contains("daemon:7420") && Catch::Contains("silent for"));
  CHECK_FALSE(f.channel->alive());
}

TEST_CASE("rpc: a client that falls silent loses its connection", "[rpc][sim]") {
  OverSim f;
  f.connect();
  std::optional<Result<std::string>> out;
  struct Call {
    static Task<void> run(OverSim& fixture) {
      CO_CHECK_OK(co_await fixture.channel->call(Method::kHeartbeat, "", rt::kNever));
      co_return {};
    }
  };
  f.scope->spawn(Call::run(f));
  f.settle();
  REQUIRE(f.service.running == 1);
  f.world.net().clog(f.client.host(), f.daemon.host(), f.world.now() + 1h);
  f.world.run_for(2min);
  CHECK(f.service.running == 0);
  CHECK(f.server->stats().connections == 0);
}

TEST_CASE("rpc: a daemon that waits for its own memory is not taken for dead", "[rpc][sim]") {
  OverSim f(small_server(), 3, kSmallUnitBytes);
  f.connect();
  std::vector<rt::MutableBuffer> all;
  while (auto unit = f.pool->try_acquire()) all.push_back(*std::move(unit));
  Victim victim(f, Victim::kUpload);
  f.world.run_for(55s);  // much longer than silence_max; the daemon does not read
  CHECK(f.channel->alive());
  CHECK(!victim.ended);
  all.clear();
  f.settle();
  REQUIRE(victim.ended);
  CHECK(victim.right());
}

TEST_CASE("rpc: a small call is not stuck behind a large upload, and uploads advance together", "[rpc][sim]") {
  OverSim f;
  f.world.net().options.bytes_per_second = 100 * kMiB;
  f.connect();
  const auto bytes = pattern(30 * kMiB, 1);
  struct Upload {
    static Task<void> run(OverSim& fixture, std::string data) {
      CO_CHECK_OK(co_await fixture.channel->upload(Method::kPutChunk, std::to_string(data.size()),
                                                   pieces_of(data, kMiB), rt::kNever));
      co_return {};
    }
  };
  int done = 0;
  f.scope->spawn(Upload::run(f, bytes), [&](Result<void> r) { done += r.has_value(); });
  f.scope->spawn(Upload::run(f, bytes.substr(0, 29 * kMiB)), [&](Result<void> r) { done += r.has_value(); });
  f.world.run_for(50ms);
  const auto sent = f.channel->bytes_sent();
  CHECK(f.call(Method::kMap, "x").value() == "echo x");
  // What was being written, one more data frame, and what the reply's way takes.
  CHECK(f.channel->bytes_sent() - sent <= 4 * kMiB);
  CHECK(done == 0);
  REQUIRE(f.run(f.scope->join()));
  CHECK(done == 2);
  // Neither is ever more than a few pieces ahead of the other while both run.
  int ahead = 0;
  std::size_t seen = 0;
  for (const auto& arrival : f.service.arrivals) {
    ahead += arrival.starts_with(std::to_string(bytes.size())) ? 1 : -1;
    if (++seen < 50) CHECK(std::abs(ahead) <= 4);
  }
}

TEST_CASE("rpc: one seed gives one run", "[rpc][sim]") {
  const auto run = [](std::uint64_t seed) {
    OverSim f(small_server(), 4, kSmallUnitBytes, seed);
    f.world.net().faults.split_read = 0.3;
    f.world.net().faults.slow = 0.1;
    f.connect();
    f.service.open_gate();
    Victim a(f, Victim::kUpload), b(f, Victim::kDownload), c(f, Victim::kCall);
    (void)f.run(f.scope->join());
    return f.world.trace_hash();
  };
  CHECK(run(5) == run(5));
  CHECK(run(5) != run(6));
}

TEST_CASE("rpc: many calls under faults end right or with a reason, and leave the daemon whole", "[rpc][sim]") {
  // Method: per seed, calls of all kinds come at random times, some are dropped, connections are cut, stand still and
  // split; whenever the channel is lost, a new one is made.
  int right = 0, lost = 0, dropped = 0;
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    INFO("seed " << seed);
    OverSim f(small_server(), 4, kSmallUnitBytes, seed);
    sim::Prng random(seed, "calls");
    f.service.open_gate();
    f.world.net().options.segment_bytes = 50 + random.below(4000);
    f.world.net().options.window_bytes = 200 + random.below(10'000);
    f.connect();
    f.world.net().faults.split_read = 0.2;
    f.world.net().faults.slow = 0.01;
    f.world.net().faults.clog = 0.0005;
    f.world.net().faults.cut = seed % 3 == 0 ? 0.0005 : 0;
    f.world.net().faults.ghost = 0.5;
    for (int round = 0; round < 10; ++round) {
      if (!f.channel->alive()) {
        auto again = f.run(Channel::connect(f.runtime(), f.address(), channel_options(), f.in(10s)));
        if (!again) continue;  // cut again
        f.channel = *std::move(again);
      }
      std::vector<std::unique_ptr<Victim>> victims;
      for (auto n = 1 + random.below(6); n > 0; --n)
        victims.push_back(std::make_unique<Victim>(f, Victim::kAll[random.below(std::size(Victim::kAll))]));
      if (random.chance(0.3)) {
        for (auto n = random.below(400); n > 0; --n) f.world.step();
        f.scope->cancel();
      } else {
        REQUIRE(f.world.run_until([&] { return f.scope->running() == 0; }, f.world.now() + 5min));
      }
      for (const auto& victim : victims) {
        if (!victim->ended) {
          ++dropped;
        } else if (victim->right()) {
          ++right;
        } else {
          REQUIRE(!*victim->ended);
          CHECK(victim->ended->error().code == Errc::kUnavailable);
          INFO(victim->ended->error().message);
          CHECK(seed % 3 == 0);  // nothing else loses a connection
          ++lost;
        }
      }
    }
    f.world.net().faults = {};
    f.world.net().unclog();
    f.settle();
    if (!f.channel->alive()) f.connect();
    check_whole(f);
  }
  CHECK(right > 2000);
  CHECK(lost > 20);
  CHECK(dropped > 200);
}
