// Many steps are removed while some of them are being restored, and their space comes back.

#include <arpa/inet.h>
#include <cairn/client.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <thread>

#include "tests/integration/test_daemon.h"

using namespace cairn;
using namespace std::chrono_literals;
using cairn::test::TestDaemon;

namespace {

constexpr std::uint64_t kKept = 5, kRemoved = 1000;
constexpr std::size_t kBytes = 100'000;  // of a step

/// A function of the step and the address: bytes of another step are wrong bytes.
std::vector<std::byte> content(std::uint64_t step) {
  std::vector<std::byte> out(kBytes);
  std::uint64_t x = step * 0x9e3779b97f4a7c15 + 1;
  for (auto& b : out) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    b = static_cast<std::byte>(x);
  }
  return out;
}

/// Bytes of segment files that the file system has allocated.
std::uint64_t allocated(const std::string& data) {
  std::uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(data)) {
    struct stat info{};
    if (entry.path().filename().string().starts_with("segment-") && stat(entry.path().c_str(), &info) == 0)
      bytes += static_cast<std::uint64_t>(info.st_blocks) * 512;
  }
  return bytes;
}

/// A value of /metrics; -1: not there.
double metric(const TestDaemon& daemon, const std::string& name) {
  const auto colon = daemon.http().rfind(':');
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<std::uint16_t>(std::stoi(daemon.http().substr(colon + 1))));
  inet_pton(AF_INET, daemon.http().substr(0, colon).c_str(), &to.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  REQUIRE(connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0);
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  REQUIRE(write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size()));
  std::string text;
  char piece[4096];
  for (ssize_t n = 0; (n = read(fd, piece, sizeof piece)) > 0;) text.append(piece, static_cast<std::size_t>(n));
  close(fd);
  const auto at = text.find("\n" + name + " ");
  return at == text.npos ? -1 : std::strtod(text.c_str() + at + name.size() + 2, nullptr);
}

bool eventually(const std::function<bool()>& done, std::chrono::seconds limit = 60s) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!done()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(100ms);
  }
  return true;
}

/// Opens random steps, holds them a moment and reads them. A step is there, or it is not; when it opened, its bytes are
/// right, or the client is told that it was removed.
struct Restorer {
  Restorer(const TestDaemon& daemon, unsigned seed) : client(*Client::connect({.servers = {daemon.address()}})) {
    thread = std::thread([this, seed] { run(seed); });
  }
  ~Restorer() {
    stop = true;
    thread.join();
  }
  void run(unsigned seed) {
    std::uint64_t draw = seed;
    while (!stop) {
      draw = draw * 6364136223846793005 + 1442695040888963407;
      const auto number = 1 + (draw >> 33) % (kKept + kRemoved);
      auto step = client.open_step("b/run", number);
      if (!step) {
        ++(step.error().code == Errc::kNotFound ? absent : wrong);
        continue;
      }
      if (draw >> 60 < 4) std::this_thread::sleep_for(300ms);
      const auto bytes = step->blob("state");
      if (bytes)
        ++(*bytes == content(number) ? right : wrong);
      else
        ++(bytes.error().code == Errc::kDeleted ? deleted : wrong);
    }
  }
  Client client;
  std::atomic<bool> stop = false;
  std::atomic<std::uint64_t> right = 0, absent = 0, deleted = 0, wrong = 0;
  std::thread thread;
};

}  // namespace

TEST_CASE("removal: of 1,000 steps while they are restored, readers finish, and the space comes back",
          "[integration]") {
  // Without recycled segments: what the file system says is what is kept.
  TestDaemon daemon(
      {"--reader-ttl", "5s", "--garbage-grace", "500ms", "--garbage-interval", "200ms", "--space-recycle", "0"});
  auto client = *Client::connect({.servers = {daemon.address()}});
  REQUIRE(client.create_bucket({.name = "b"}));
  auto run = *client.open_run({.name = "b/run", .launch = {.job = "job"}});
  struct Saving {
    std::vector<std::byte> bytes;
    Save::Ticket ticket;
  };
  std::deque<Saving> saving;
  for (std::uint64_t number = 1; number <= kKept + kRemoved; ++number) {
    if (saving.size() == 16) {
      REQUIRE(saving.front().ticket.wait());
      saving.pop_front();
    }
    auto save = run.begin_save({.step = number});
    REQUIRE(save);
    auto bytes = content(number);
    REQUIRE(save->add_blob("state", bytes));
    auto ticket = save->stage();
    REQUIRE(ticket);
    saving.push_back({std::move(bytes), std::move(*ticket)});
  }
  for (auto& last : saving) REQUIRE(last.ticket.wait());
  const auto live_full = metric(daemon, "cairn_chunk_store_live_bytes");
  const auto allocated_full = allocated(daemon.data());
  CHECK(live_full > static_cast<double>(kRemoved * kBytes));

  std::vector<Step> held;  // open all the time
  for (std::uint64_t number = 10; number <= kRemoved; number += 100) held.push_back(*client.open_step("b/run", number));
  std::deque<Restorer> restorers;
  for (unsigned seed = 1; seed <= 3; ++seed) restorers.emplace_back(daemon, seed);
  REQUIRE(eventually([&] { return restorers[0].right > 20 && restorers[1].right > 20; }));

  std::uint64_t told = 0, pages = 0;
  const auto removed = client.remove_steps_after("b/run", kKept, [&](std::uint64_t done, std::uint64_t all) {
    CHECK(all == kRemoved);
    CHECK(done > told);
    told = done;
    ++pages;
  });
  REQUIRE(removed);
  CHECK(*removed == kRemoved);
  CHECK(told == kRemoved);
  CHECK(pages > 1);
  CHECK(client.steps("b/run")->items.size() == kKept);

  // Long enough for everything that nobody reads to go; what is held stays.
  REQUIRE(eventually([&] { return metric(daemon, "cairn_readers_held") == static_cast<double>(held.size()); }));
  REQUIRE(eventually([&] { return metric(daemon, "cairn_garbage_freed_chunks_total") > kRemoved; }));
  REQUIRE(eventually([&] { return restorers[0].absent > 50; }));
  for (auto& step : held) {
    const auto bytes = step.blob("state");
    INFO("step " << step.info().step << (bytes ? "" : ": " + bytes.error().message));
    REQUIRE(bytes);
    CHECK(*bytes == content(step.info().step));
  }
  std::uint64_t right = 0;
  for (auto& restorer : restorers) {
    right += restorer.right;
    CHECK(restorer.wrong == 0);
    CHECK(restorer.deleted == 0);  // all of them were heard of all the time
  }
  CHECK(right > 60);

  held.clear();
  restorers.clear();
  REQUIRE(eventually([&] {
    return metric(daemon, "cairn_readers_held") == 0 && metric(daemon, "cairn_chunk_store_orphaned_bytes") == 0 &&
           metric(daemon, "cairn_chunk_store_live_bytes") < live_full * (kKept + 1) / (kKept + kRemoved);
  }));
  // Each hole is punched in its turn.
  REQUIRE(eventually([&] { return allocated(daemon.data()) < allocated_full - kRemoved * kBytes * 95 / 100; }));

  // The next start closes the segment that was being filled: what is left is what is live.
  REQUIRE(daemon.stop() == 0);
  daemon.start();
  client = *Client::connect({.servers = {daemon.address()}});
  const auto live = metric(daemon, "cairn_chunk_store_live_bytes");
  REQUIRE(eventually([&] { return static_cast<double>(allocated(daemon.data())) <= live + 256 * 1024; }));
  for (std::uint64_t number = 1; number <= kKept; ++number)
    CHECK(*client.open_step("b/run", number)->blob("state") == content(number));
}
