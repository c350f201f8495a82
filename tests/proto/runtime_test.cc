#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "proto/common/buffer.h"
#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/rt/mapped_pages.h"
#include "proto/rt/offload.h"
#include "proto/runtime/runtime.h"
#include "proto/runtime/shared_memory.h"

using namespace cairn;
using namespace cairn::rt;
using namespace std::chrono_literals;

namespace {

struct TempDir {
  std::string path;
  TempDir() {
    char name[] = "/tmp/cairn-runtime-XXXXXX";
    path = mkdtemp(name);
  }
  ~TempDir() { rmdir(path.c_str()); }
};

struct Fixture {
  std::unique_ptr<RealRuntime> runtime = *RealRuntime::create();
  RealLoop& loop = runtime->loop();
  Net& net = runtime->seams().net;
  TempDir dir;

  template <class T>
  Result<T> run(Task<T> task) {
    return rt::run(loop, std::move(task));
  }
  std::string address(std::string_view kind) {
    return kind == "unix" ? "unix:" + dir.path + "/s" : kind == "ipv6" ? "[::1]:0" : "127.0.0.1:0";
  }
};

Task<void> read_exactly(Stream& stream, std::span<std::byte> into) {
  while (!into.empty()) {
    CO_TRY(const auto got, co_await stream.read_some(into));
    if (got == 0) co_return fail(Errc::kUnavailable, "closed early");
    into = into.subspan(got);
  }
  co_return {};
}

Task<void> write_text(Stream& stream, std::string text) {
  std::vector<std::span<const std::byte>> pieces{bytes_of(text)};
  co_return co_await stream.write_all(std::move(pieces));
}

/// Sends back what arrives on one connection until the peer closes.
Task<void> echo_once(Listener& listener) {
  CO_TRY(auto stream, co_await listener.accept());
  std::vector<std::byte> memory(kMiB);
  for (;;) {
    CO_TRY(const auto got, co_await stream->read_some(memory));
    if (got == 0) co_return {};
    std::vector<std::span<const std::byte>> pieces{std::span(memory).first(got)};
    CO_CHECK_OK(co_await stream->write_all(std::move(pieces)));
  }
}

struct Pair {
  std::unique_ptr<Listener> listener;
  std::unique_ptr<Stream> client, server;
};
Task<Pair> connect(Fixture& f, std::string address) {
  Pair pair;
  CO_TRY(pair.listener, f.net.listen(std::move(address)));
  CO_TRY(pair.client, co_await f.net.dial(pair.listener->address()));
  CO_TRY(pair.server, co_await pair.listener->accept());
  co_return pair;
}

}  // namespace

TEST_CASE("net: what is sent comes back, over TCP, IPv6 and unix sockets", "[runtime]") {
  const std::string kind = GENERATE("tcp", "ipv6", "unix");
  Fixture f;
  auto listening = f.net.listen(f.address(kind));
  if (!listening && kind == "ipv6") return;  // a machine without IPv6
  REQUIRE(listening);
  Listener& listener = **listening;
  CHECK(is_loopback(listener.address()));
  auto body = [](Fixture& fx, Listener& l) -> Task<std::string> {
    Scope scope(fx.loop);
    scope.spawn(echo_once(l), [](Result<void> r) { CHECK(r); });
    CO_TRY(auto stream, co_await fx.net.dial(l.address()));
    CHECK(stream->peer() == l.address());
    CO_CHECK_OK(co_await write_text(*stream, "hello"));
    std::string got(5, ' ');
    CO_CHECK_OK(co_await read_exactly(*stream, std::as_writable_bytes(std::span(got))));
    stream->close();
    CO_CHECK_OK(co_await scope.join());
    co_return got;
  };
  CHECK(f.run(body(f, listener)).value() == "hello");
}

TEST_CASE("net: memory attached to a unix socket is the same memory on the other side, TCP carries none", "[runtime]") {
  const std::string kind = GENERATE("unix", "tcp");
  Fixture f;
  auto body = [](Fixture& fx, std::string address, bool local) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, std::move(address)));
    CO_TRY(auto memory, make_shared_memory(4 * kSectorBytes));
    CHECK(pair.client->attach(memory) == local);
    std::vector<std::byte> got(3);
    CO_CHECK_OK(co_await write_text(*pair.client, "one"));
    CO_CHECK_OK(co_await write_text(*pair.client, "two"));
    CO_CHECK_OK(co_await read_exactly(*pair.server, got));
    auto arrived = pair.server->take_attached();
    REQUIRE(arrived);
    CHECK((*arrived != nullptr) == local);
    CHECK(pair.server->take_attached().value() == nullptr);  // once
    CO_CHECK_OK(co_await read_exactly(*pair.server, got));
    CHECK(text_of(got) == "two");
    if (!local) co_return {};
    const auto theirs = (*arrived)->bytes();
    REQUIRE(theirs.size() == 4 * kSectorBytes);
    memory->bytes()[5000] = std::byte{42};
    CHECK(theirs[5000] == std::byte{42});
    theirs[7] = std::byte{43};
    CHECK(memory->bytes()[7] == std::byte{43});
    // It stays when its maker lets go.
    memory.reset();
    CHECK(theirs[5000] == std::byte{42});
    co_return {};
  };
  CHECK(f.run(body(f, f.address(kind), kind == "unix")));
}

TEST_CASE("shared memory: pages that are let go leave the process's size, not the memory", "[runtime]") {
  constexpr std::size_t kBytes = 8 * kMiB + kSectorBytes;  // not whole huge pages
  const auto resident = [] {
    std::ifstream statm("/proc/self/statm");
    std::uint64_t size = 0, all = 0, shared = 0;
    statm >> size >> all >> shared;
    return shared * kSectorBytes;
  };
  auto made = make_shared_memory(kBytes);
  REQUIRE(made);
  const auto bytes = (*made)->bytes();
  bytes[12345] = std::byte{1};
  const std::atomic<bool> stopped = true, goes_on = false;
  fault_in(bytes, stopped);
  const auto before = resident();
  fault_in(bytes, goes_on);
  CHECK(resident() - before > kBytes - kMiB);
  CHECK(bytes[12345] == std::byte{1});
  std::ranges::fill(bytes, std::byte{7});

  auto theirs = map_shared_memory(dup(descriptor_of(**made)));
  REQUIRE(theirs);
  const auto touched = resident();
  CHECK(std::ranges::count((*theirs)->bytes(), std::byte{7}) == kBytes);
  CHECK(resident() - touched > kBytes - kMiB);
  dynamic_cast<MappedPages&>(**theirs).unmap_pages();
  CHECK(resident() < touched + kMiB);
  CHECK(std::ranges::count((*theirs)->bytes(), std::byte{7}) == kBytes);
}

TEST_CASE("net: memory that its owner could take away is refused, and descriptors do not pile up", "[runtime]") {
  const auto open_descriptors = [] {
    int n = 0;
    for (int fd = 0; fd < 256; ++fd) n += fcntl(fd, F_GETFD) >= 0;
    return n;
  };
  const auto before = open_descriptors();
  const auto refused = [](int fd) {
    auto mapped = map_shared_memory(fd);
    REQUIRE_FALSE(mapped);
    CHECK(mapped.error().code == Errc::kInvalid);
    return mapped.error().message;
  };
  CHECK(refused(memfd_create("t", MFD_CLOEXEC | MFD_ALLOW_SEALING)).find("not sealed against shrinking") !=
        std::string::npos);
  CHECK(refused(eventfd(0, EFD_CLOEXEC)).find("not a memfd") != std::string::npos);
  int pipes[2];
  REQUIRE(pipe2(pipes, O_CLOEXEC) == 0);
  refused(pipes[0]);
  close(pipes[1]);
  const int empty = memfd_create("t", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  REQUIRE(fcntl(empty, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  CHECK(refused(empty).find("0 bytes") != std::string::npos);
  const int fixed = memfd_create("t", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  REQUIRE(ftruncate(fixed, kSectorBytes) == 0);
  REQUIRE(fcntl(fixed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_WRITE) == 0);
  CHECK(refused(fixed).find("against writing") != std::string::npos);
  CHECK(open_descriptors() == before);

  // A peer that attaches to every write: one is kept, and goes with the connection.
  {
    Fixture f;
    auto body = [](Fixture& fx, std::string address, int& most) -> Task<void> {
      CO_TRY(auto pair, co_await connect(fx, std::move(address)));
      CO_TRY(auto memory, make_shared_memory(kSectorBytes));
      std::vector<std::byte> got(1);
      int n = 0;
      for (int fd = 0; fd < 256; ++fd) n += fcntl(fd, F_GETFD) >= 0;
      for (int i = 0; i < 20; ++i) {
        CHECK(pair.client->attach(memory));
        CO_CHECK_OK(co_await write_text(*pair.client, "x"));
        CO_CHECK_OK(co_await read_exactly(*pair.server, got));
      }
      most = -n;
      for (int fd = 0; fd < 256; ++fd) most += fcntl(fd, F_GETFD) >= 0;
      co_return {};
    };
    int most = 0;
    CHECK(f.run(body(f, f.address("unix"), most)));
    CHECK(most == 1);
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("net: gathered writes of many uneven pieces arrive whole and in order", "[runtime]") {
  const std::string kind = GENERATE("tcp", "unix");
  Fixture f;
  auto body = [](Fixture& fx, std::string address) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, std::move(address)));
    std::vector<std::byte> sent(24 * kMiB + 12345);
    for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<std::byte>(i * 2654435761u >> 13);
    std::vector<std::span<const std::byte>> pieces;
    std::span<const std::byte> left(sent);
    for (std::size_t size = 0; !left.empty(); size = (size * 7 + 3) % 300'000) {  // begins with an empty piece
      const auto n = std::min(size, left.size());
      pieces.push_back(left.first(n));
      left = left.subspan(n);
    }
    Scope scope(fx.loop);
    scope.spawn(pair.client->write_all(std::move(pieces)), [](Result<void> r) { CHECK(r); });
    std::vector<std::byte> got(sent.size());
    CO_CHECK_OK(co_await read_exactly(*pair.server, got));
    CO_CHECK_OK(co_await scope.join());
    CHECK(got == sent);
    co_return {};
  };
  CHECK(f.run(body(f, f.address(kind))));
}

TEST_CASE("net: both directions at once", "[runtime]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, "127.0.0.1:0"));
    auto sends = [](Stream& s) -> Task<void> {
      std::vector<std::byte> bytes(8 * kMiB, std::byte{7});
      std::vector<std::span<const std::byte>> pieces{std::span<const std::byte>(bytes)};
      co_return co_await s.write_all(std::move(pieces));
    };
    auto receives = [](Stream& s) -> Task<void> {
      std::vector<std::byte> bytes(8 * kMiB);
      co_return co_await read_exactly(s, bytes);
    };
    std::vector<Task<void>> tasks;
    for (Stream* s : {pair.client.get(), pair.server.get()}) {
      tasks.push_back(sends(*s));
      tasks.push_back(receives(*s));
    }
    co_return co_await all(fx.loop, std::move(tasks));
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("net: close() ends a waiting read, write and accept with kUnavailable", "[runtime]") {
  const std::string kind = GENERATE("tcp", "unix");
  Fixture f;
  auto body = [](Fixture& fx, std::string address) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, std::move(address)));
    std::vector<Errc> codes;
    const auto note = [&codes](Result<void> r) { codes.push_back(r ? Errc::kInvalid : r.error().code); };
    auto reads = [](Stream& s) -> Task<void> {
      std::array<std::byte, 16> memory;
      CO_TRY(const auto got, co_await s.read_some(memory));
      CHECK(got == 0);
      co_return {};
    };
    auto writes = [](Stream& s) -> Task<void> {
      std::vector<std::byte> bytes(64 * kMiB);  // more than any socket holds, and nobody reads
      std::vector<std::span<const std::byte>> pieces{std::span<const std::byte>(bytes)};
      co_return co_await s.write_all(std::move(pieces));
    };
    auto accepts = [](Listener& l) -> Task<void> {
      CO_TRY(auto s, co_await l.accept());
      co_return {};
    };
    Scope scope(fx.loop);
    scope.spawn(reads(*pair.client), note);
    scope.spawn(writes(*pair.client), note);
    scope.spawn(accepts(*pair.listener), note);
    co_await fx.loop.sleep(1ms);
    CHECK(scope.running() == 3);
    pair.client->close();
    pair.listener->close();
    CHECK(codes.empty());  // woken through the loop, never inline
    CO_CHECK_OK(co_await scope.join());
    CHECK(codes == std::vector{Errc::kUnavailable, Errc::kUnavailable, Errc::kUnavailable});
    CHECK((co_await write_text(*pair.client, "x")).error().code == Errc::kUnavailable);
    co_return {};
  };
  CHECK(f.run(body(f, f.address(kind))));
}

TEST_CASE("net: a dropped read, write, accept or dial touches nothing afterwards", "[runtime]") {
  // Goal: memory given to a read may be freed once its Task is gone. The sanitizers watch; the later read must
  // also find every byte.
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, "127.0.0.1:0"));
    auto reads = [](Stream& s) -> Task<void> {
      std::vector<std::byte> memory(4096);
      CO_TRY(const auto got, co_await s.read_some(memory));
      FAIL("read " << got);
      co_return {};
    };
    for (int i = 0; i < 3; ++i) {
      Scope scope(fx.loop);
      scope.spawn(reads(*pair.server));
      scope.cancel();
      scope.spawn(reads(*pair.server));
      co_await fx.loop.sleep(1ms);
      scope.cancel();
    }
    CO_CHECK_OK(co_await write_text(*pair.client, "still here"));
    std::string got(10, ' ');
    CO_CHECK_OK(co_await read_exactly(*pair.server, std::as_writable_bytes(std::span(got))));
    CHECK(got == "still here");

    Scope scope(fx.loop);
    auto accepts = [](Listener& l) -> Task<void> {
      CO_TRY(auto s, co_await l.accept());
      co_return {};
    };
    scope.spawn(accepts(*pair.listener));
    scope.spawn([](Net& net, std::string to) -> Task<void> {
      CO_TRY(auto s, co_await net.dial(std::move(to)));
      co_return {};
    }(fx.net, pair.listener->address()));
    scope.spawn(reads(*pair.client));
    pair.client.reset();  // the stream goes while its read waits
    scope.cancel();
    co_await fx.loop.sleep(1ms);
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("net: the peer's close is a read of 0, its reset kUnavailable", "[runtime]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    CO_TRY(auto pair, co_await connect(fx, "127.0.0.1:0"));
    std::array<std::byte, 16> memory;
    CO_CHECK_OK(co_await write_text(*pair.server, "unread"));
    pair.server->close();
    CO_CHECK_OK(co_await read_exactly(*pair.client, std::span(memory).first(6)));
    CO_TRY(const auto got, co_await pair.client->read_some(memory));
    CHECK(got == 0);
    // Writing to a closed peer brings a reset; SIGPIPE must not kill us.
    Result<void> wrote;
    for (int i = 0; i < 1000 && wrote; ++i) {
      wrote = co_await write_text(*pair.client, "x");
      co_await fx.loop.sleep(100us);
    }
    REQUIRE_FALSE(wrote);
    CHECK(wrote.error().code == Errc::kUnavailable);
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("net: a port or path in use is kBusy and the message names it", "[runtime]") {
  const std::string kind = GENERATE("tcp", "unix");
  Fixture f;
  auto first = f.net.listen(f.address(kind));
  REQUIRE(first);
  const auto address = (*first)->address();
  auto second = f.net.listen(address);
  REQUIRE_FALSE(second);
  CHECK(second.error().code == Errc::kBusy);
  CHECK(second.error().message == "listen at " + address + ": Address already in use");
  first->reset();
  CHECK(f.net.listen(address));  // free again at once
}

TEST_CASE("net: a dead process's unix socket is replaced, another kind of file is not", "[runtime]") {
  Fixture f;
  const std::string path = f.dir.path + "/s";
  {  // as left behind by kill -9: bound, closed, never unlinked
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un un{};
    un.sun_family = AF_UNIX;
    std::strcpy(un.sun_path, path.c_str());
    REQUIRE(bind(fd, reinterpret_cast<sockaddr*>(&un), sizeof un) == 0);
    close(fd);
  }
  {
    auto listener = f.net.listen("unix:" + path);
    REQUIRE(listener);
    CHECK(access(path.c_str(), F_OK) == 0);
  }
  CHECK(access(path.c_str(), F_OK) != 0);  // removed with the listener
  FILE* file = fopen(path.c_str(), "w");
  fclose(file);
  const auto refused = f.net.listen("unix:" + path);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kBusy);
  CHECK(access(path.c_str(), F_OK) == 0);
  unlink(path.c_str());
}

TEST_CASE("net: nobody there is kUnavailable, nonsense is kInvalid, and the message names the address", "[runtime]") {
  Fixture f;
  std::string free_port;
  {
    auto listener = f.net.listen("127.0.0.1:0");
    free_port = (*listener)->address();
  }
  for (const auto& nobody : {free_port, "unix:" + f.dir.path + "/none"}) {
    const auto refused = f.run(f.net.dial(nobody));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == Errc::kUnavailable);
    CHECK(refused.error().message.starts_with("dial " + nobody + ": "));
  }
  for (const char* bad : {"", "7420", "host", "host:", ":7420", "host:70000", "host:-1", "host:1x", "::1:7420",
                          "unix:", "127.0.0.1:+5"}) {
    INFO(bad);
    CHECK(f.run(f.net.dial(bad)).error().code == Errc::kInvalid);
    CHECK(f.net.listen(bad).error().code == Errc::kInvalid);
  }
  CHECK(f.net.listen("unix:/" + std::string(200, 'x')).error().code == Errc::kInvalid);
}

TEST_CASE("net: names are looked up", "[runtime]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    CO_TRY(auto listener, fx.net.listen("127.0.0.1:0"));
    const auto address = listener->address();
    CO_TRY(auto stream, co_await fx.net.dial("localhost" + address.substr(address.rfind(':'))));
    CHECK(stream->peer() == address);
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("net: only addresses that cannot be reached from outside count as loopback", "[runtime]") {
  for (const char* yes : {"127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/x", "[::ffff:127.0.0.1]:1"})
    CHECK(is_loopback(yes));
  for (const char* no : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "128.0.0.1:1", "nonsense", "",
                         "127.0.0.1.example.org:1", "[::ffff:10.0.0.1]:1"})
    CHECK_FALSE(is_loopback(no));
}

TEST_CASE("loop: jobs run in the order posted, timers in the order of their times", "[runtime]") {
  Fixture f;
  std::vector<int> order;
  const auto now = f.loop.now();
  f.loop.at(now + 3ms, [&] { order.push_back(6); });
  f.loop.at(now + 2ms, [&] { order.push_back(4); });
  const auto cancelled = f.loop.at(now + 1ms, [&] { order.push_back(-1); });
  f.loop.at(now + 2ms, [&] { order.push_back(5); });
  f.loop.at(now - 1h, [&] { order.push_back(3); });  // overdue: at once, but never inline
  CHECK(order.empty());
  f.loop.cancel(cancelled);
  f.loop.cancel(cancelled);  // and again, at no harm
  f.loop.at(kNever, [&] { order.push_back(-2); });
  f.loop.post([&] { order.push_back(1); });
  f.loop.post([&] { order.push_back(2); });
  f.loop.at(now + 4ms, [&] { f.loop.stop(); });
  f.loop.run();
  CHECK(order == std::vector{1, 2, 3, 4, 5, 6});
}

TEST_CASE("loop: a cancelled job is destroyed at once, pending ones with the loop", "[runtime]") {
  auto runtime = *RealRuntime::create();
  auto token = std::make_shared<int>(1);
  const auto timer = runtime->loop().at(runtime->loop().now() + 1h, [token] {});
  CHECK(token.use_count() == 2);
  runtime->loop().cancel(timer);
  CHECK(token.use_count() == 1);
  runtime->loop().at(runtime->loop().now() + 1h, [token] {});
  runtime->loop().post([token] {});
  CHECK(token.use_count() == 3);
  runtime.reset();
  CHECK(token.use_count() == 1);
}

TEST_CASE("loop: post() from other threads loses nothing", "[runtime]") {
  Fixture f;
  int ran = 0;
  constexpr int kThreads = 4, kJobs = 5000;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < kJobs; ++i)
        f.loop.post([&] {
          if (++ran == kThreads * kJobs) f.loop.stop();
        });
    });
  f.loop.run();
  for (auto& thread : threads) thread.join();
  CHECK(ran == kThreads * kJobs);
}

TEST_CASE("loop: run() gives kCancelled when somebody else stops the loop", "[runtime]") {
  Fixture f;
  f.loop.post([&] { f.loop.stop(); });
  auto forever = [](Loop& loop) -> Task<int> {
    co_await loop.sleep(1h);
    co_return 1;
  };
  CHECK(f.run(forever(f.loop)).error().code == Errc::kCancelled);
}

TEST_CASE("loop: a watched descriptor calls for as long as it is readable", "[runtime]") {
  Fixture f;
  const int fd = eventfd(3, EFD_NONBLOCK | EFD_SEMAPHORE | EFD_CLOEXEC);
  int calls = 0;
  std::unique_ptr<Watch> watch = f.loop.watch_readable(fd, [&] {
    std::uint64_t one = 0;
    REQUIRE(read(fd, &one, sizeof one) == sizeof one);
    if (++calls == 3) {
      watch.reset();  // from within
      f.loop.stop();
    }
  });
  f.loop.run();
  CHECK(calls == 3);
  close(fd);
}

TEST_CASE("loop: a watched signal is delivered on the loop", "[runtime]") {
  Fixture f;
  int got = 0;
  auto watch = f.loop.watch_signals({SIGUSR1, SIGUSR2}, [&](int signal) {
    got = signal;
    f.loop.stop();
  });
  raise(SIGUSR2);
  f.loop.run();
  CHECK(got == SIGUSR2);
}

TEST_CASE("offload: work runs elsewhere, its end and its destruction on the loop", "[runtime]") {
  Fixture f;
  struct Probe {
    std::thread::id* destroyed_on;
    explicit Probe(std::thread::id* d) : destroyed_on(d) {}
    ~Probe() { *destroyed_on = std::this_thread::get_id(); }
  };
  std::thread::id worked_on, done_on, destroyed_on;
  f.runtime->seams().offload.submit(
      [&worked_on, probe = std::make_unique<Probe>(&destroyed_on)] { worked_on = std::this_thread::get_id(); },
      [&] {
        done_on = std::this_thread::get_id();
        f.loop.post([&] { f.loop.stop(); });
      });
  f.loop.run();
  CHECK(worked_on != std::this_thread::get_id());
  CHECK(done_on == std::this_thread::get_id());
  CHECK(destroyed_on == std::this_thread::get_id());
  CHECK(f.run(away(f.loop, f.runtime->seams().offload, [] { return Result<int>(5); })).value() == 5);
}

TEST_CASE("offload: queued work is dropped with it, and a dropped Task leaves nothing behind", "[runtime]") {
  auto runtime = *RealRuntime::create({.offload_threads = 1});
  auto token = std::make_shared<int>(1);
  {
    Scope scope(runtime->loop());
    for (int i = 0; i < 100; ++i)
      scope.spawn([](RealRuntime& r, std::shared_ptr<int> t) -> Task<void> {
        CO_TRY(int n, co_await away(r.loop(), r.seams().offload, [t] { return Result<int>(*t); }));
        FAIL("resumed with " << n);
        co_return {};
      }(*runtime, token));
  }
  runtime.reset();
  CHECK(token.use_count() == 1);
}

TEST_CASE("random: numbers do not repeat", "[runtime]") {
  auto random = make_os_random();
  std::set<std::uint64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(random->next());
  CHECK(seen.size() == 1000);
}

TEST_CASE("log: hostile values stay on one line and inside their quotes", "[runtime]") {
  CHECK(log_line(Level::kInfo, "ready", {{"listen", "127.0.0.1:1"}}) == "level=info event=ready listen=127.0.0.1:1");
  CHECK(log_line(Level::kError, "e", {{"a", ""}, {"b", "x y"}}) == "level=error event=e a=\"\" b=\"x y\"");
  CHECK(log_line(Level::kWarning, "e", {{"a", "q\"\\\n\x1b[2J level=error"}}) ==
        "level=warning event=e a=\"q\\\"\\\\\\n\\x1b[2J level=error\"");
  CHECK(log_line(Level::kInfo, "e", {{"a", std::string(5000, 'x')}}).size() < 1100);
}

TEST_CASE("log: a JSON line is JSON, whatever the values are", "[runtime]") {
  std::mt19937_64 random(7);
  std::vector<std::string> values = {"",
                                     "plain",
                                     "q\"\\/\b\f\n\r\t",
                                     std::string("\0\x01\x1f\x7f", 4),
                                     "\xff\xc3",
                                     "\xed\xa0\x80",
                                     "\xc3\xa9\xf0\x9f\x98\x80",
                                     "\xe2\x80\xa8",
                                     std::string(5000, '\xe2')};
  for (int i = 0; i < 2000; ++i) {
    std::string any(random() % 40, '\0');
    for (auto& c : any) c = static_cast<char>(random());
    values.push_back(std::move(any));
  }
  for (const auto& value : values) {
    const auto line = log_line(Level::kInfo, "e", {{"a", value}, {"b", "x"}}, LogFormat::kJson);
    const auto json = nlohmann::json::parse(line, nullptr, false);
    REQUIRE(json.is_object());
    CHECK(json.size() == 4);
    CHECK(json["level"] == "info");
    CHECK(json["b"] == "x");
    CHECK(std::ranges::none_of(line, [](unsigned char c) { return c < 0x20 || c == 0x7f; }));
    if (valid_utf8(value) && value.size() <= 1024) CHECK(json["a"] == value);
    // As text it is one line, and the quotes end where the value does.
    const auto text = log_line(Level::kInfo, "e", {{"a", value}, {"b", "x"}});
    CHECK(std::ranges::none_of(text, [](unsigned char c) { return c < 0x20 || c == 0x7f; }));
    CHECK(valid_utf8(text));
    CHECK(text.ends_with(" b=x"));
  }
}

TEST_CASE("log: a flood of one event is held back, counted and told, other events are not", "[runtime]") {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::tmpfile(), &std::fclose);
  REQUIRE(file);
  std::fflush(stderr);
  const int kept = ::dup(STDERR_FILENO);
  REQUIRE(::dup2(::fileno(file.get()), STDERR_FILENO) >= 0);
  const auto text = [&] {
    std::string out(static_cast<std::size_t>(::lseek(::fileno(file.get()), 0, SEEK_END)), '\0');
    (void)::pread(::fileno(file.get()), out.data(), out.size(), 0);
    return out;
  };
  const auto count = [&](std::string_view what) {
    const auto all = text();
    std::size_t n = 0;
    for (auto at = all.find(what); at != all.npos; at = all.find(what, at + 1)) ++n;
    return n;
  };
  {
    auto log = make_stderr_log({.min = Level::kInfo, .lines_per_second = 1'000'000});
    log->write(Level::kDebug, "quiet", {});
    log->set({.min = Level::kDebug, .format = LogFormat::kJson, .lines_per_second = 5});
    for (int i = 0; i < 100; ++i) log->write(Level::kWarning, "flood", {{"i", std::to_string(i)}});
    log->write(Level::kInfo, "other", {});
    // Told once a second has gone by, with whatever is written next.
    while (count("log_held_back") == 0) log->write(Level::kInfo, "tick", {});
  }
  ::dup2(kept, STDERR_FILENO);
  ::close(kept);
  CHECK(count("\"quiet\"") == 0);
  CHECK(count("\"event\":\"flood\"") == 5);
  CHECK(count("\"other\"") == 1);
  CHECK(count("\"of\":\"flood\",\"lines\":\"95\"") == 1);
}

TEST_CASE("runtime: a bad number of threads is refused", "[runtime]") {
  CHECK(RealRuntime::create({.offload_threads = 0}).error().code == Errc::kInvalid);
}
