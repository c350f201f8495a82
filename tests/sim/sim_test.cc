#include <bit>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <set>

#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/net.h"
#include "tests/sim/world.h"

using namespace cairn;
using namespace cairn::sim;
using namespace std::chrono_literals;
using storage::Batch;
using storage::Table;

namespace {

Buffer sectors(char fill, std::size_t count = 1) {
  auto memory = std::shared_ptr<char>(static_cast<char*>(std::aligned_alloc(kSectorBytes, count * kSectorBytes)),
                                      [](char* p) { std::free(p); });
  std::memset(memory.get(), fill, count * kSectorBytes);
  auto bytes = std::as_bytes(std::span(memory.get(), count * kSectorBytes));
  return {std::move(memory), bytes};
}

struct Counted {
  explicit Counted(std::vector<int>& o, int i) : order(o), id(i) {}
  ~Counted() { order.push_back(id); }
  std::vector<int>& order;
  int id;
};

/// One node with one disk and one index, and the words to drive them.
struct Machine {
  explicit Machine(std::uint64_t seed, DiskOptions options = {})
      : world(seed),
        node(world.make_node("node")),
        image(world.make_disk("d0", options)),
        index(world.make_index("i0")) {
    attach();
  }
  void attach() {
    disk = image.attach(node);
    db = index.attach(node);
  }
  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  void crash(Death death) {
    disk.reset();
    db.reset();
    node.kill(death);
    node.restart();
    attach();
  }
  std::shared_ptr<storage::File> file(const std::string& name, std::uint64_t size) {
    auto made = run(disk->create(name, size));
    REQUIRE(made);
    return *made;
  }
  char first_byte(const std::string& name, std::size_t sector = 0) {
    auto bytes = image.contents(name);
    REQUIRE(bytes);
    return sector * kSectorBytes < bytes->size() ? (*bytes)[sector * kSectorBytes] : '?';
  }

  World world;
  Node& node;
  DiskImage& image;
  IndexImage& index;
  std::unique_ptr<storage::Disk> disk;
  std::unique_ptr<storage::Index> db;
};

Task<void> echo(std::unique_ptr<rt::Stream> stream) {
  std::vector<std::byte> buffer(1000);
  for (;;) {
    CO_TRY(auto n, co_await stream->read_some(buffer));
    if (n == 0) co_return {};
    std::vector<std::span<const std::byte>> pieces{std::span(buffer).first(n)};
    CO_CHECK_OK(co_await stream->write_all(std::move(pieces)));
  }
}
Task<void> serve(Node* node, std::string address) {
  auto listener = node->runtime().net.listen(std::move(address));
  if (!listener) co_return fail(listener.error());
  for (;;) {
    CO_TRY(auto stream, co_await (*listener)->accept());
    node->spawn(echo(std::move(stream)));
  }
}
Task<std::string> ask(rt::Net* net, std::string address, std::string text) {
  CO_TRY(auto stream, co_await net->dial(std::move(address)));
  const auto bytes = bytes_of(text);
  std::vector<std::span<const std::byte>> pieces{bytes.first(bytes.size() / 3), {}, bytes.subspan(bytes.size() / 3)};
  CO_CHECK_OK(co_await stream->write_all(std::move(pieces)));
  std::string got;
  std::vector<std::byte> buffer(4096);
  while (got.size() < text.size()) {
    CO_TRY(auto n, co_await stream->read_some(buffer));
    if (n == 0) co_return fail(Errc::kUnavailable, "ended early");
    got += text_of(std::span(buffer).first(n));
  }
  co_return got;
}
/// Reads to the end of one accepted stream into `got`; the reason of the end is the result.
Task<void> collect(Node* node, std::string address, std::string* got) {
  auto listener = node->runtime().net.listen(std::move(address));
  if (!listener) co_return fail(listener.error());
  CO_TRY(auto stream, co_await (*listener)->accept());
  std::vector<std::byte> buffer(512);
  for (;;) {
    CO_TRY(auto n, co_await stream->read_some(buffer));
    if (n == 0) co_return {};
    *got += text_of(std::span(buffer).first(n));
  }
}

/// A small world with everything in it; returns its trace hash.
std::uint64_t mixed_run(std::uint64_t seed) {
  Machine m(seed);
  auto& client = m.world.make_node("client");
  m.world.net().faults = {.cut = 0.02, .ghost = 0.5, .clog = 0.02, .slow = 0.1, .split_read = 0.5};
  m.node.spawn(serve(&m.node, "127.0.0.1:7000"));
  for (int i = 0; i < 5; ++i) {
    (void)m.world.run(client, ask(&client.runtime().net, m.node.host() + ":7000", std::string(5000, 'x')), 10s);
    auto f = m.run(m.disk->create("f" + std::to_string(i), 4 * kSectorBytes));
    (void)m.run((*f)->write(0, sectors('a', 2)));
    if (i == 2) {
      m.crash(Death::kPowerLoss);
      m.node.spawn(serve(&m.node, "127.0.0.1:7000"));
    }
  }
  return m.world.trace_hash();
}

}  // namespace

TEST_CASE("world: the same seed gives the same trace, another seed another one", "[sim]") {
  std::set<std::uint64_t> hashes;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const auto hash = mixed_run(seed);
    CHECK(hash == mixed_run(seed));
    hashes.insert(hash);
  }
  CHECK(hashes.size() == 20);
}

TEST_CASE("world: the generator is xoshiro256** seeded by splitmix64", "[sim]") {
  std::uint64_t state = 1234567;  // reference values of splitmix64
  CHECK(Prng::split_mix(state) == 6457827717110365317u);
  CHECK(Prng::split_mix(state) == 3203168211198807973u);
  Prng a(7, "x"), b(7, "y"), c(7, "x");
  const auto first = a.next();
  CHECK(first == c.next());
  CHECK(first != b.next());
}

TEST_CASE("world: posts run in order, timers by time, a cancelled job is destroyed and not run", "[sim]") {
  World world(1);
  auto& node = world.make_node("n");
  std::vector<int> order;
  node.at(node.now() + 2s, [&] { order.push_back(4); });
  node.at(node.now() + 1s, [&] { order.push_back(3); });
  node.post([&] {
    order.push_back(1);
    node.post([&] { order.push_back(2); });
  });
  auto token = std::make_shared<int>(0);
  const auto timer = node.at(node.now() + 1s, [&, token] { order.push_back(9); });
  CHECK(token.use_count() == 2);
  node.cancel(timer);
  CHECK(token.use_count() == 1);
  world.run_for(3s);
  CHECK(order == std::vector{1, 2, 3, 4});
}

TEST_CASE("world: a node's clock may run fast or slow, and its timers never fire early", "[sim]") {
  World world(1);
  for (std::int64_t ppm : {-50'000, 0, 50'000}) {
    auto& node = world.make_node("n" + std::to_string(ppm), {.clock_ppm = ppm, .clock_offset = 7s});
    const auto start = node.now();
    const auto world_start = world.now();
    bool fired = false;
    node.at(start + 100s, [&] {
      fired = true;
      CHECK(node.now() >= start + 100s);
      CHECK(node.now() < start + 101s);
    });
    world.run_for(120s);
    CHECK(fired);
    const auto ran = (node.now() - start).count() - (world.now() - world_start).count();
    CHECK(std::abs(ran - ppm * 120'000) < 1000 * std::max<std::int64_t>(1, std::abs(ppm)));
  }
}

TEST_CASE("node: kill drops jobs, then frames, then held objects, last first, and nothing of it runs again", "[sim]") {
  World world(1);
  auto& node = world.make_node("n");
  std::vector<int> order;
  node.hold(std::make_unique<Counted>(order, 4));
  node.hold(std::make_unique<Counted>(order, 3));
  struct Waits {
    static Task<void> run(rt::Loop* loop, std::vector<int>* order) {
      Counted in_frame(*order, 2);
      co_await loop->sleep(1h);
      co_return {};
    }
  };
  node.spawn(Waits::run(&node, &order));
  node.post([job = std::make_unique<Counted>(order, 1)] { FAIL("ran after death"); });
  node.kill(Death::kProcess);
  CHECK(order == std::vector{1, 2, 3, 4});
  node.post([] { FAIL("a dead node runs nothing"); });
  world.run_for(2h);
  node.restart();
  bool ran = false;
  node.post([&] { ran = true; });
  world.run_for(1s);
  CHECK(ran);
}

TEST_CASE("node: offloaded work of a killed process runs or not, its completion never", "[sim]") {
  World world(1);
  auto& node = world.make_node("n");
  node.runtime().offload.submit([] {}, [] { FAIL("told a dead node"); });
  node.kill(Death::kProcess);
  node.restart();
  bool worked = false, done = false;
  node.runtime().offload.submit([&] { worked = true; }, [&] { done = worked; });
  CHECK_FALSE(worked);
  world.run_for(1s);
  CHECK(done);
}

TEST_CASE("disk: a power loss keeps, drops or tears an unsynced sector, each in some seed", "[sim]") {
  int kept = 0, dropped = 0, tore = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Machine m(seed);
    auto f = m.file("f", 4 * kSectorBytes);
    REQUIRE(m.run(f->write(0, sectors('a', 4))));
    REQUIRE(m.run(f->flush()));
    REQUIRE(m.run(m.disk->sync_directory()));
    REQUIRE(m.image.all_durable());
    REQUIRE(m.run(f->write(kSectorBytes, sectors('b', 1))));
    f.reset();
    m.crash(Death::kPowerLoss);
    const auto bytes = *m.image.contents("f");
    CHECK(bytes.substr(0, kSectorBytes) == std::string(kSectorBytes, 'a'));
    CHECK(bytes.substr(2 * kSectorBytes) == std::string(2 * kSectorBytes, 'a'));
    const auto b = std::count(bytes.begin(), bytes.end(), 'b');
    CHECK(b % 512 == 0);
    ++(b == 0 ? dropped : b == static_cast<std::ptrdiff_t>(kSectorBytes) ? kept : tore);
  }
  CHECK(kept > 20);
  CHECK(dropped > 20);
  CHECK(tore > 20);
}

TEST_CASE("disk: a flush covers what had completed when it was submitted, and nothing later", "[sim]") {
  int lost = 0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Machine m(seed);
    auto f = m.file("f", 2 * kSectorBytes);
    REQUIRE(m.run(m.disk->sync_directory()));
    REQUIRE(m.run(f->write(0, sectors('a'))));
    m.image.faults.slow = 1;  // the flush takes long: a second write completes inside it
    m.image.faults.slow_by = 1s;
    bool flushed = false;
    m.node.spawn(f->flush(), [&](Result<void> r) { flushed = r.has_value(); });
    m.image.faults.slow = 0;
    REQUIRE(m.run(f->write(kSectorBytes, sectors('b'))));
    CHECK_FALSE(flushed);
    m.world.run_until([&] { return flushed; }, m.world.now() + 5s);
    REQUIRE(flushed);
    f.reset();
    m.crash(Death::kPowerLoss);
    CHECK(m.first_byte("f", 0) == 'a');
    lost += m.first_byte("f", 1) != 'b';
  }
  CHECK(lost > 5);
}

TEST_CASE("disk: names are durable after sync_directory only, a rename is whole or not at all", "[sim]") {
  std::set<std::string> outcomes;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Machine m(seed);
    auto put = [&](const char* name, char fill) {
      auto f = m.file(name, 0);
      REQUIRE(m.run(f->write(0, sectors(fill))));
      REQUIRE(m.run(f->flush()));
    };
    put("mark", 'o');
    put("other", 'x');
    REQUIRE(m.run(m.disk->sync_directory()));
    put("mark.tmp", 'n');
    REQUIRE(m.run(m.disk->rename("mark.tmp", "mark")));
    REQUIRE(m.run(m.disk->unlink("other")));
    m.crash(Death::kPowerLoss);
    std::string outcome;
    for (const auto& name : m.image.names()) outcome += name + "=" + m.first_byte(name) + " ";
    CHECK(outcome.find("mark=") != std::string::npos);
    outcomes.insert(outcome);
  }
  CHECK(outcomes.contains("mark=o other=x "));
  CHECK(outcomes.contains("mark=n "));
  CHECK(outcomes.contains("mark=o mark.tmp=n other=x "));
}

TEST_CASE("disk: a killed process loses nothing that completed, and its writes in flight land later", "[sim]") {
  Machine m(3);
  auto f = m.file("f", 2 * kSectorBytes);
  REQUIRE(m.run(f->write(0, sectors('a'))));
  m.image.faults.slow = 1;
  m.image.faults.slow_by = 1s;
  m.node.spawn(f->write(kSectorBytes, sectors('b')));
  m.image.faults.slow = 0;
  m.crash(Death::kProcess);
  CHECK(m.first_byte("f", 0) == 'a');
  CHECK(m.first_byte("f", 1) == '\0');
  CHECK_FALSE(m.run(f->flush()));  // the old process's handle
  m.world.run_for(2s);
  CHECK(m.first_byte("f", 1) == 'b');
}

TEST_CASE("disk: a dropped Task does not take back its write, nor its memory", "[sim]") {
  Machine m(4);
  auto f = m.file("f", kSectorBytes);
  {
    rt::Scope scope(m.node);
    scope.spawn(f->write(0, sectors('w')));
  }
  m.world.run_for(1s);
  CHECK(m.first_byte("f") == 'w');
  {
    rt::Scope scope(m.node);
    auto pool = rt::UnitPool::create(m.node, 1, kSectorBytes);
    scope.spawn([](std::shared_ptr<storage::File> file, rt::MutableBuffer into) -> Task<void> {
      CO_TRY([[maybe_unused]] auto back, co_await file->read(0, std::move(into)));
      co_return {};
    }(f, *(*pool)->try_acquire()));
  }
  m.world.run_for(1s);
}

TEST_CASE("disk: errors, lost and misdirected writes, rot, and a full disk, each counted", "[sim]") {
  Machine m(5, {.capacity_bytes = 16 * kSectorBytes});
  auto f = m.file("f", 4 * kSectorBytes);
  m.image.fail_write_in = 2;
  CHECK(m.run(f->write(0, sectors('a'))));
  CHECK(m.run(f->write(0, sectors('a'))).error().code == Errc::kFailed);
  CHECK(m.run(f->write(0, sectors('a', 4))));
  CHECK(m.run(f->flush()));

  m.image.faults.lost_write = 1;
  CHECK(m.run(f->write(0, sectors('b'))));
  m.image.faults = {};
  CHECK(m.first_byte("f") == 'a');

  m.image.faults.misdirected_write = 1;
  for (int i = 0; i < 8; ++i) CHECK(m.run(f->write(0, sectors('c'))));
  m.image.faults = {};
  const auto bytes = *m.image.contents("f");
  CHECK(std::count(bytes.begin() + kSectorBytes, bytes.end(), 'c') > 0);

  CHECK(m.run(f->flush()));
  const auto before = *m.image.contents("f");
  CHECK(m.image.rot());
  const auto after = *m.image.contents("f");
  int differing_bits = 0;
  for (std::size_t i = 0; i < before.size(); ++i)
    differing_bits += std::popcount(static_cast<unsigned char>(before[i] ^ after[i]));
  CHECK(differing_bits == 1);

  CHECK(m.run(m.disk->create("g", 20 * kSectorBytes)).error().code == Errc::kNoSpace);
  auto g = m.file("g", 12 * kSectorBytes);
  CHECK(m.image.free_bytes() == 0);
  CHECK(m.run(g->write(12 * kSectorBytes, sectors('d'))).error().code == Errc::kNoSpace);
  CHECK(m.run(g->punch(0, 2 * kSectorBytes)));
  CHECK(m.image.free_bytes() == 2 * kSectorBytes);
  CHECK(m.run(g->write(12 * kSectorBytes, sectors('d'))));
  g.reset();
  CHECK(m.run(m.disk->unlink("g")));
  CHECK(m.run(m.disk->sync_directory()));
  CHECK(m.image.free_bytes() == 12 * kSectorBytes);

  m.image.fail_read_in = 1;
  auto pool = rt::UnitPool::create(m.node, 1, kSectorBytes);
  CHECK(m.run(f->read(0, *(*pool)->try_acquire())).error().code == Errc::kFailed);
  CHECK(m.run(f->read(8 * kSectorBytes, *(*pool)->try_acquire())).error().code == Errc::kDataLoss);
  auto bytes_back = m.run(f->read(0, *(*pool)->try_acquire()));
  REQUIRE(bytes_back);
  CHECK(text_of(bytes_back->bytes) == std::string_view(*m.image.contents("f")).substr(0, kSectorBytes));
  for (auto fault : {Fault::kWriteError, Fault::kLostWrite, Fault::kMisdirected, Fault::kBitRot, Fault::kDiskFull,
                     Fault::kReadError})
    CHECK(m.world.faults.count(fault) > 0);
}

TEST_CASE("disk: after a failed flush its data is never durable, however often it is flushed again", "[sim]") {
  int lost = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Machine m(seed);
    auto f = m.file("f", kSectorBytes);
    REQUIRE(m.run(m.disk->sync_directory()));
    REQUIRE(m.run(f->write(0, sectors('a'))));
    m.image.fail_flush_in = 1;
    CHECK_FALSE(m.run(f->flush()));
    CHECK(m.run(f->flush()));
    f.reset();
    m.crash(Death::kPowerLoss);
    lost += m.first_byte("f") != 'a';
  }
  CHECK(lost > 5);
}

TEST_CASE("index: a power loss takes a suffix of the unsynced batches and none that a sync covers", "[sim]") {
  std::set<std::string> outcomes;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Machine m(seed);
    auto put = [&](const char* key, bool sync) {
      Batch batch;
      batch.put(Table::kMeta, key, "v");
      batch.put(Table::kMeta, "newest", key);
      CHECK(m.run(m.db->commit(std::move(batch), sync)));
    };
    put("a", false);
    put("b", true);
    put("c", false);
    put("d", false);
    CHECK(m.index.unsynced_batches() == 2);
    if (seed % 4 == 0) {
      m.crash(Death::kProcess);
      CHECK(m.index.size(Table::kMeta) == 5);
    }
    m.crash(Death::kPowerLoss);
    std::string keys;
    auto entries = m.run(m.db->scan(Table::kMeta, "", "", 10));
    REQUIRE(entries);
    for (const auto& e : *entries) keys += e.key == "newest" ? "=" + e.value : e.key;
    outcomes.insert(keys);
  }
  CHECK(outcomes == std::set<std::string>{"ab=b", "abc=c", "abcd=d"});
}

TEST_CASE("index: it can come back older, and a failed commit leaves an unknown outcome", "[sim]") {
  Machine m(1);
  for (int i = 0; i < 5; ++i) {
    Batch batch;
    batch.put(Table::kRecords, std::to_string(i), "v");
    if (i == 4) batch.erase(Table::kRecords, "0");
    CHECK(m.run(m.db->commit(std::move(batch))));
  }
  CHECK(m.index.size(Table::kRecords) == 4);
  CHECK(m.index.come_back_older(2));
  CHECK(m.index.size(Table::kRecords) == 3);
  CHECK(*m.run(m.db->get(Table::kRecords, "0")) == "v");
  CHECK_FALSE(m.run(m.db->get(Table::kRecords, "3"))->has_value());
  m.index.fail_commit_in = 1;
  CHECK_FALSE(m.run(m.db->commit({})));
}

TEST_CASE("net: streams carry bytes in order through splits, small windows and gathered writes", "[sim]") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    World world(seed);
    auto& server = world.make_node("server");
    auto& client = world.make_node("client");
    world.net().options.window_bytes = 1500;
    world.net().options.segment_bytes = 700;
    world.net().faults.split_read = 0.7;
    server.spawn(serve(&server, "127.0.0.1:7000"));
    std::string text;
    for (int i = 0; i < 1000; ++i) text += static_cast<char>('a' + i % 26);
    auto answer = world.run(client, ask(&client.runtime().net, server.host() + ":7000", text));
    REQUIRE(answer);
    CHECK(*answer == text);
    CHECK(world.faults.count(Fault::kSplitRead) > 0);
    CHECK(world.run(client, ask(&client.runtime().net, server.host() + ":7001", "x")).error().code ==
          Errc::kUnavailable);
    CHECK(world.run(client, ask(&client.runtime().net, "nonsense", "x")).error().code == Errc::kInvalid);
    // Loopback belongs to its host.
    CHECK_FALSE(world.run(client, ask(&client.runtime().net, "127.0.0.1:7000", "x")));
    CHECK(world.run(server, ask(&server.runtime().net, "127.0.0.1:7000", "x")));
  }
}

TEST_CASE("net: a cut resets both ends, a ghost's bytes arrive after its sender knows of the cut", "[sim]") {
  int ghosts = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    World world(seed);
    auto& server = world.make_node("server");
    auto& client = world.make_node("client");
    std::string got;
    Result<void> end;
    bool ended = false;
    server.spawn(collect(&server, "127.0.0.1:7000", &got), [&](Result<void> r) {
      end = std::move(r);
      ended = true;
    });
    auto stream = world.run(client, client.runtime().net.dial(server.host() + ":7000"));
    REQUIRE(stream);
    const std::string text(3000, 'g');
    std::vector<std::span<const std::byte>> pieces{bytes_of(text)};
    REQUIRE(world.run(client, (*stream)->write_all(pieces)));
    world.net().cut("", "", true);
    const bool client_knows = !world.run(client, (*stream)->write_all(pieces));
    CHECK(got.empty());
    world.run_for(10s);
    CHECK(ended);
    CHECK_FALSE(end);
    if (client_knows && got == text) ++ghosts;
  }
  CHECK(ghosts > 5);
}

TEST_CASE("net: a clog holds one direction back until it is lifted, a dead process ends its streams", "[sim]") {
  World world(1);
  auto& server = world.make_node("server");
  auto& client = world.make_node("client");
  std::string got;
  bool ended = false;
  server.spawn(collect(&server, "127.0.0.1:7000", &got), [&](Result<void> r) { ended = r.has_value(); });
  auto stream = world.run(client, client.runtime().net.dial(server.host() + ":7000"));
  REQUIRE(stream);
  world.net().clog(client.host(), server.host(), world.now() + 5s);
  std::vector<std::span<const std::byte>> pieces{bytes_of("hello")};
  REQUIRE(world.run(client, (*stream)->write_all(pieces)));
  world.run_for(4s);
  CHECK(got.empty());
  world.net().unclog();
  world.run_for(1s);
  CHECK(got == "hello");
  client.kill(Death::kProcess);
  world.run_for(1s);
  CHECK(ended);
}

TEST_CASE("net: nobody tells the peers of a machine that died silently until it is back", "[sim]") {
  World world(1);
  auto& server = world.make_node("server");
  auto& client = world.make_node("client");
  server.spawn(serve(&server, "127.0.0.1:7000"));
  auto stream = world.run(client, client.runtime().net.dial(server.host() + ":7000"));
  REQUIRE(stream);
  bool ended = false;
  client.spawn(
      [](rt::Stream* s) -> Task<void> {
        std::vector<std::byte> buffer(1);
        CO_TRY([[maybe_unused]] auto n, co_await s->read_some(buffer));
        co_return {};
      }(stream->get()),
      [&](Result<void> r) { ended = !r; });
  server.kill(Death::kPowerLoss, true);
  world.run_for(30s);
  CHECK_FALSE(ended);
  server.restart();
  world.run_for(1s);
  CHECK(ended);
}

TEST_CASE("faults: a run that injected none of what it enabled says so", "[sim]") {
  FaultCounts faults;
  CHECK_FALSE(faults.idle());
  faults.enable(Fault::kCut);
  faults.enable(Fault::kBitRot);
  CHECK(faults.idle());
  faults.add(Fault::kCut);
  CHECK_FALSE(faults.idle());
  CHECK(faults.enabled_but_never() == std::vector{Fault::kBitRot});
}

TEST_CASE("world: speed of trivial events (printed, not judged)", "[sim]") {
  World world(1);
  auto& node = world.make_node("n");
  std::uint64_t left = 1'000'000;
  std::function<void()> tick = [&] {
    if (--left > 0) node.post([&] { tick(); });
  };
  node.post([&] { tick(); });
  const auto start = std::chrono::steady_clock::now();
  world.run_for(1s);
  const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("sim: %.1f million events a second\n", static_cast<double>(world.events()) / seconds / 1e6);
  CHECK(left == 0);
}
