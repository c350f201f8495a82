// Ranks that die by SIGKILL as soon as stage() has returned, against a real daemon.

#include <arpa/inet.h>
#include <cairn/client.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "tests/integration/test_daemon.h"

using namespace cairn;
using cairn::test::TestDaemon;

namespace {

constexpr std::uint32_t kRanks = 4;

std::vector<std::byte> pattern(std::size_t size, std::uint64_t seed) {
  std::vector<std::byte> out(size);
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + 1;
  for (std::size_t i = 0; i < size; i += sizeof x) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    std::memcpy(out.data() + i, &x, std::min(sizeof x, size - i));
  }
  return out;
}

/// Rows of a tensor, and a blob.
struct Part {
  std::vector<std::byte> rows, blob;
};
constexpr std::uint64_t kRowBytes = 100'000;
std::uint64_t rows_of(std::uint64_t round) {
  // From less than a chunk holds to more than the arena does.
  return round % 4 == 3 ? 200 : 1 + round * 37 % 100;
}
Part part_of(std::uint64_t round, std::uint32_t rank) {
  const auto seed = round * kRanks + rank;
  return {pattern(rows_of(round) * kRowBytes, seed), pattern(1000 + round, ~seed)};
}

ClientOptions options(const TestDaemon& daemon) {
  return {.servers = {daemon.address()}, .arena_bytes = 12u << 20, .chunk_bytes = 1u << 20};
}

/// Processes without threads of their own fork; the rest happens in their children.
pid_t child(const std::function<int()>& body) {
  const auto pid = fork();
  REQUIRE(pid >= 0);
  if (pid > 0) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  _exit(body());
}
int status_of(pid_t pid) {
  int status = 0;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  return status;
}
int told(const Error& error) {
  std::fprintf(stderr, "%s\n", error.message.c_str());
  return 1;
}

/// Ends by SIGKILL when it has staged; by exit code otherwise.
int save_and_die(const TestDaemon& daemon, std::uint64_t round, std::uint32_t rank) {
  auto client = Client::connect(options(daemon));
  if (!client) return told(client.error());
  auto run = client->open_run({.name = "b/run", .launch = {.job = "job", .restart = round}});
  if (!run) return told(run.error());
  auto save = run->begin_save({.step = round, .rank = rank, .world_size = kRanks});
  if (!save) return told(save.error());
  const auto part = part_of(round, rank);
  const auto rows = rows_of(round);
  if (auto ok = save->add_tensor({.name = "w",
                                  .dtype = DType::u8,
                                  .global_shape = {kRanks * rows, kRowBytes},
                                  .box = Box{{rank * rows, 0}, {rows, kRowBytes}}},
                                 part.rows);
      !ok)
    return told(ok.error());
  if (auto ok = save->add_blob("state", part.blob); !ok) return told(ok.error());
  auto ticket = save->stage();
  if (!ticket) return told(ticket.error());
  if (!ticket->survives()) return told({Errc::kFailed, "the daemon has not taken it over"});
  raise(SIGKILL);
  return 1;
}

/// The step is committed, and holds what was staged.
int check_step(const TestDaemon& daemon, std::uint64_t round) {
  auto client = Client::connect(options(daemon));
  if (!client) return told(client.error());
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  auto step = client->open_step("b/run", round);
  while (!step && step.error().code == Errc::kNotFound && std::chrono::steady_clock::now() < give_up) {
    usleep(5'000);
    step = client->open_step("b/run", round);
  }
  if (!step) return told(step.error());
  std::vector<std::byte> expected;
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    const auto part = part_of(round, rank);
    expected.insert(expected.end(), part.rows.begin(), part.rows.end());
    auto blob = step->blob("state", rank);
    if (!blob) return told(blob.error());
    if (*blob != part.blob) return told({Errc::kDataLoss, "other bytes in the blob of a rank"});
  }
  std::vector<std::byte> out(expected.size());
  auto restore = step->restore();
  restore.want({.name = "w"}, out);
  if (auto ok = restore.run(); !ok) return told(ok.error());
  return out == expected ? 0 : told({Errc::kDataLoss, "other bytes in the tensor"});
}

std::uint64_t metric(const TestDaemon& daemon, const std::string& name) {
  const auto& address = daemon.http();
  const auto colon = address.rfind(':');
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<std::uint16_t>(std::stoi(address.substr(colon + 1))));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  REQUIRE(connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0);
  const std::string request = "GET /metrics HTTP/1.0\r\n\r\n";
  REQUIRE(write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size()));
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  close(fd);
  const auto at = text.find("\n" + name + " ");
  REQUIRE(at != std::string::npos);
  return std::stoull(text.substr(at + name.size() + 2));
}

}  // namespace

TEST_CASE("handover: all ranks are killed as soon as they have staged, and the step commits, every byte right",
          "[integration]") {
  // CAIRN_HANDOVER_ROUNDS=200 is the full run.
  const char* asked = std::getenv("CAIRN_HANDOVER_ROUNDS");
  const std::uint64_t rounds = asked ? std::strtoull(asked, nullptr, 10) : 10;
  TestDaemon daemon;
  REQUIRE(status_of(child([&] {
            auto client = Client::connect(options(daemon));
            if (!client) return told(client.error());
            auto made = client->create_bucket({.name = "b"});
            return made ? 0 : told(made.error());
          })) == 0);
  for (std::uint64_t round = 1; round <= rounds; ++round) {
    INFO("round " << round);
    std::vector<pid_t> ranks;
    for (std::uint32_t rank = 0; rank < kRanks; ++rank)
      ranks.push_back(child([&] { return save_and_die(daemon, round, rank); }));
    for (const auto pid : ranks) {
      const auto status = status_of(pid);
      REQUIRE(WIFSIGNALED(status));
      REQUIRE(WTERMSIG(status) == SIGKILL);
    }
    REQUIRE(status_of(child([&] { return check_step(daemon, round); })) == 0);
  }
  CHECK(metric(daemon, "cairn_handovers_taken_total") == kRanks * rounds);
  CHECK(metric(daemon, "cairn_handovers_finished_total") > 0);
  CHECK(metric(daemon, "cairn_handovers_failed_total") == 0);
  CHECK(metric(daemon, "cairn_handovers_memory_bytes") == 0);
}
