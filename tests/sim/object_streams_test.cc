#include <catch2/catch.hpp>
#include <numeric>

#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "client/core/session.h"
#include "tests/sim/daemon.h"
#include "tests/sim/net.h"
#include "tests/sim/world.h"

// Objects of many extents, by the unchanged client and daemon in one simulated world.

using namespace cairn;
using namespace cairn::sim;
using namespace std::chrono_literals;

namespace {

constexpr rt::Duration kTimeout = 20s;

struct Stage {
  explicit Stage(std::uint64_t seed)
      : world(seed), daemon(world, {}), node(world.make_node("client")), draw(seed, "test") {
    daemon.start();
    REQUIRE(world.run_until([&] { return daemon.ready(); }, world.now() + 1min));
    connect();
    client::BucketSummary bucket;
    bucket.name = "b";
    REQUIRE(run(client::create_bucket(session, bucket, soon())));
  }
  ~Stage() {
    session->close();
    node.kill(Death::kProcess);
    daemon.node().kill(Death::kProcess);
  }
  void connect() {
    client::SessionOptions options;
    options.servers = {daemon.address()};
    session = *run(client::Session::connect(node.runtime(), options, soon()));
    arena = *client::Arena::create(node, 1 * kMiB, 64 * kKiB, session->unit_bytes());
  }
  void restart_daemon() {
    daemon.kill(Death::kPowerLoss, false, 100ms);
    REQUIRE(world.run_until([&] { return daemon.ready(); }, world.now() + 1min));
  }
  rt::TimePoint soon() const { return node.now() + kTimeout; }
  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  std::size_t chunks() { return daemon.index().keys(storage::Table::kChunks).size(); }

  std::string random_bytes(std::size_t size) {
    std::string out(size, '\0');
    for (auto& c : out) c = static_cast<char>(draw.next());
    return out;
  }
  std::shared_ptr<client::ObjectWriter> begin(const std::string& key, client::PutTerms terms = {}) {
    client::ChunkWriter::Options options;
    options.timeout = kTimeout;
    auto writer = run(
        client::ObjectWriter::begin(session, *arena, "b", key, terms, options, {.inline_runs = 4, .page_runs = 50}));
    REQUIRE(writer);
    return *writer;
  }
  /// `pieces` small chunks, each of another size, so that none joins a run with another.
  std::string put(const std::string& key, std::size_t pieces) {
    auto writer = begin(key);
    std::string all;
    for (std::size_t i = 0; i < pieces; ++i) {
      const auto piece = random_bytes(draw.between(1, 700) + (i % 2) * 700);
      REQUIRE(run(writer->write(bytes_of(piece))));
      REQUIRE(run(writer->flush()));
      all += piece;
    }
    const auto sealed = run(writer->seal());
    REQUIRE(sealed);
    CHECK(sealed->size == all.size());
    return all;
  }
  std::shared_ptr<const client::OpenedObject> open(const std::string& key) {
    auto opened = run(client::open_object(session, "b", key, soon()));
    REQUIRE(opened);
    return std::make_shared<const client::OpenedObject>(*std::move(opened));
  }
  Result<std::string> read(std::shared_ptr<const client::OpenedObject> object, std::uint64_t first,
                           std::uint64_t size) {
    std::string out(size, '\0');
    auto done = run(
        client::read_object(session, "b", std::move(object), first, std::as_writable_bytes(std::span(out)), kTimeout));
    if (!done) return fail(done.error());
    return out;
  }

  World world;
  SimDaemon daemon;
  Node& node;
  Prng draw;
  std::shared_ptr<client::Session> session;
  std::unique_ptr<client::Arena> arena;
};

}  // namespace

TEST_CASE("object streams: an object of thousands of extents is kept, read at any place, and freed whole", "[sim]") {
  Stage s(3);
  const auto all = s.put("many", 2500);
  CHECK(s.arena->free_bytes() == s.arena->total_bytes());
  CHECK(s.chunks() > 2500);
  const auto check = [&](const std::shared_ptr<const client::OpenedObject>& object) {
    CHECK(s.read(object, 0, all.size()).value() == all);
    for (int i = 0; i < 60; ++i) {
      const auto first = s.draw.below(all.size());
      const auto size = s.draw.chance(0.5) ? s.draw.below(std::min<std::uint64_t>(all.size() - first, 3000) + 1)
                                           : s.draw.below(all.size() - first + 1);
      CHECK(s.read(object, first, size).value() == all.substr(first, size));
    }
    CHECK(s.read(object, all.size(), 0).value().empty());
    CHECK(s.read(object, all.size() - 1, 2).error().code == Errc::kInvalid);
  };
  check(s.open("many"));
  // The pages are the object's own: no garbage, also after a restart.
  const auto before = s.chunks();
  s.restart_daemon();
  s.world.run_for(5min);
  CHECK(s.chunks() == before);
  auto object = s.open("many");
  check(object);

  // Replaced while somebody reads: what he opened, to the end, and never a mix.
  const auto other = s.put("many", 400);
  CHECK(s.read(object, 0, all.size()).value() == all);
  CHECK(s.read(s.open("many"), 0, other.size()).value() == other);
  object.reset();
  REQUIRE(s.run(client::remove_object(s.session, "b", "many", {}, s.soon())));
  CHECK(s.world.run_until([&] { return s.chunks() == 0; }, s.world.now() + 10min));
}

TEST_CASE("object streams: few extents stay in the record, many become pages, at every number in between", "[sim]") {
  Stage s(4);
  for (const std::size_t pieces : {0u, 1u, 3u, 4u, 5u, 49u, 50u, 51u, 52u, 100u, 101u, 151u}) {
    CAPTURE(pieces);
    const auto all = s.put("k", pieces);
    CHECK(s.read(s.open("k"), 0, all.size()).value() == all);
    if (all.size() > 2) CHECK(s.read(s.open("k"), 1, all.size() - 2).value() == all.substr(1, all.size() - 2));
  }
}

TEST_CASE("object streams: an upload whose client dies leaves nothing", "[sim]") {
  Stage s(5);
  auto writer = s.begin("k");
  for (int i = 0; i < 20; ++i) {
    REQUIRE(s.run(writer->write(bytes_of(std::string_view(s.random_bytes(40'000))))));
  }
  REQUIRE(s.run(writer->flush()));
  CHECK(s.chunks() > 0);
  writer.reset();
  s.session->close();
  s.node.kill(Death::kProcess);
  s.node.restart();
  s.connect();
  CHECK(s.run(client::stat_object(s.session, "b", "k", s.soon())).error().code == Errc::kNotFound);
  CHECK(s.world.run_until([&] { return s.chunks() == 0; }, s.world.now() + 10min));
}

TEST_CASE("object streams: another size than announced is refused", "[sim]") {
  Stage s(6);
  auto writer = s.begin("k", {.size_bytes = 100});
  REQUIRE(s.run(writer->write(bytes_of(std::string(60, 'x')))));
  CHECK(s.run(writer->write(bytes_of(std::string(41, 'x')))).error().code == Errc::kInvalid);
  CHECK(s.run(writer->seal()).error().code == Errc::kInvalid);
  REQUIRE(s.run(writer->write(bytes_of(std::string(40, 'x')))));
  REQUIRE(s.run(writer->seal()));
}

TEST_CASE("object streams: damage to a page of extents is said, never read through", "[sim]") {
  // Goal: wrong places are not read as if they were right. Method: a bit flips in every sector of the disk, one after
  // the other, while the object is read.
  Stage s(7);
  const auto all = s.put("k", 300);
  std::size_t refused = 0, right = 0;
  for (int i = 0; i < 150; ++i) {
    if (!s.daemon.disk().rot("segment")) break;
    const auto first = s.draw.below(all.size()), size = s.draw.below(all.size() - first + 1);
    const auto got = s.read(s.open("k"), first, size);
    if (got) {
      ++right;
      REQUIRE(*got == all.substr(first, size));
    } else {
      ++refused;
      REQUIRE(got.error().code == Errc::kDataLoss);
    }
  }
  CHECK(refused > 0);
  CHECK(right + refused == 150);
}
