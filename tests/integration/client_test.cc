// The public client against a real daemon.

#include <cairn/client.h>

#include <cairn/asio.h>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/use_awaitable.hpp>

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <thread>

#include "tests/integration/test_daemon.h"

using namespace cairn;
using namespace std::chrono_literals;
using cairn::test::TestDaemon;

namespace {

std::vector<std::byte> pattern(std::size_t size, unsigned seed) {
  std::vector<std::byte> out(size);
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + 1;
  for (auto& b : out) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    b = static_cast<std::byte>(x);
  }
  return out;
}

/// A daemon, a bucket, and as many clients as there are ranks.
struct Job {
  explicit Job(std::vector<std::string> flags = {}) : daemon(std::move(flags)) {
    client = *Client::connect(options());
    REQUIRE(client->create_bucket({.name = "b"}));
  }
  ClientOptions options() const {
    return {.servers = {daemon.address()}, .arena_bytes = 16u << 20, .chunk_bytes = 1u << 20};
  }
  Run open(std::string job = "job", std::uint64_t restart = 0) {
    auto run = client->open_run({.name = "b/run", .launch = {.job = std::move(job), .restart = restart}});
    REQUIRE(run);
    return *run;
  }
  TestDaemon daemon;
  std::optional<Client> client;
};

}  // namespace

TEST_CASE("client: two ranks save rows, three restore columns, replicas, 0-d, empty shards, blobs and tokens come back",
          "[integration]") {
  Job job;
  auto run = job.open();
  CHECK_FALSE(run.resume_step());
  // w: 7 x 1000 f32 by uneven rows; replicated: two holders; scalar: 0-d; tiny: 1 row, so one rank's shard is empty.
  const auto w = pattern(7 * 1000 * 4, 1);
  const auto replicated = pattern(300'000, 2);
  const auto scalar = pattern(8, 3);
  const auto tiny = pattern(10, 4);
  const auto blob0 = pattern(100, 5), blob1 = pattern(200'000, 6);
  const auto position = pattern(64, 7);
  std::vector<Save> saves;
  for (std::uint32_t rank = 0; rank < 2; ++rank) {
    auto save = run.begin_save({.step = 10, .rank = rank, .world_size = 2});
    REQUIRE(save);
    const std::uint64_t first = rank * 3ull, rows = rank == 0 ? 3 : 4;
    REQUIRE(save->add_tensor({.name = "w", .global_shape = {7, 1000}, .box = Box{{first, 0}, {rows, 1000}}},
                             std::span(w).subspan(first * 4000, rows * 4000)));
    REQUIRE(save->add_tensor(
        {.name = "replicated", .dtype = DType::u8, .global_shape = {300'000}, .holder = Holder{rank, 2}}, replicated));
    if (rank == 0) REQUIRE(save->add_tensor({.name = "scalar", .dtype = DType::f64, .global_shape = {}}, scalar));
    REQUIRE(save->add_tensor(
        {.name = "tiny", .dtype = DType::i8, .global_shape = {1, 10}, .box = Box{{rank, 0}, {1 - rank, 10}}},
        std::span(tiny).first(rank == 0 ? 10 : 0)));
    REQUIRE(save->add_blob("rng", rank == 0 ? blob0 : blob1));
    REQUIRE(save->add_token("train", position));
    saves.push_back(*save);
  }
  auto first = saves[0].stage();
  REQUIRE(first);
  CHECK_FALSE(first->wait_for(50ms));  // the other rank has not sealed: nothing is visible
  CHECK(job.client->open_step("b/run").error().code == Errc::kNotFound);
  auto second = saves[1].stage();
  REQUIRE(second);
  REQUIRE(first->wait());
  REQUIRE(second->wait());
  CHECK(first->ready());

  auto step = job.client->open_step("b/run");
  REQUIRE(step);
  CHECK(step->info().step == 10);
  CHECK(step->info().world_size == 2);
  auto tensors = step->tensors();
  REQUIRE(tensors);
  CHECK(tensors->size() == 4);
  for (std::uint64_t part = 0; part < 3; ++part) {  // columns, uneven
    const std::uint64_t from = 1000 * part / 3, to = 1000 * (part + 1) / 3;
    std::vector<std::byte> out(7 * (to - from) * 4);
    auto restore = step->restore();
    restore.want({.name = "w", .box = Box{{0, from}, {7, to - from}}}, out);
    auto done = restore.run();
    REQUIRE(done);
    CHECK(done->bytes_moved > out.size());
    CHECK(done->bytes_moved < out.size() * 105 / 100);  // only the bytes wanted travel
    for (std::uint64_t row = 0; row < 7; ++row)
      CHECK(std::memcmp(&out[row * (to - from) * 4], &w[(row * 1000 + from) * 4], (to - from) * 4) == 0);
  }
  std::vector<std::byte> r(300'000), s(8), t(10);
  auto restore = step->restore();
  restore.want({.name = "replicated"}, r);
  restore.want({.name = "scalar"}, s);
  restore.want({.name = "tiny"}, t);
  REQUIRE(restore.run());
  CHECK(r == replicated);
  CHECK(s == scalar);
  CHECK(t == tiny);
  CHECK(step->blob("rng", 0).value() == blob0);
  CHECK(step->blob("rng", 1).value() == blob1);
  CHECK(step->blob("rng", 2).error().code == Errc::kNotFound);
  CHECK(step->token("train").value() == position);
  REQUIRE(step->verify());
  CHECK(job.open("job", 1).resume_step() == 10);
}

TEST_CASE("client: every element type survives", "[integration]") {
  Job job;
  auto run = job.open();
  auto save = run.begin_save({.step = 1});
  REQUIRE(save);
  std::vector<std::vector<std::byte>> kept;
  const auto bits = [](int d) {
    return d == 2 ? 4u : d == 3 || d == 4 ? 6u : d <= 11 ? 8u : d <= 15 ? 16u : d <= 18 ? 32u : 64u;
  };
  for (int d = 1; d <= 22; ++d) {
    kept.push_back(pattern(24 * bits(d) / 8, static_cast<unsigned>(d)));
    INFO("dtype " << d);
    REQUIRE(save->add_tensor({.name = "t" + std::to_string(d), .dtype = static_cast<DType>(d), .global_shape = {4, 6}},
                             kept.back()));
  }
  auto ticket = save->stage();
  REQUIRE(ticket);
  REQUIRE(ticket->wait());
  auto restore = run.restore(1);
  REQUIRE(restore);
  std::vector<std::vector<std::byte>> out;
  for (int d = 1; d <= 22; ++d) out.emplace_back(kept[static_cast<std::size_t>(d - 1)].size());
  for (int d = 1; d <= 22; ++d) restore->want({.name = "t" + std::to_string(d)}, out[static_cast<std::size_t>(d - 1)]);
  REQUIRE(restore->run());
  CHECK(out == kept);
}

TEST_CASE("client: of an index of many pages, tensors here and there, and all of them, come back right",
          "[integration]") {
  // Goal: find() reads pages apart and side by side, more than are under way at once. Method: long names that share no
  // beginning, about thirty to a page, so that 2,000 tensors take more than sixty pages.
  constexpr std::size_t kTensors = 2000, kBytes = 8;
  const auto name = [](std::size_t i) {
    const auto number = std::to_string(10'000 + i);
    return number + "." + std::string(500, static_cast<char>('a' + i % 26));
  };
  Job job;
  auto run = job.open();
  const auto bytes = pattern(kTensors * kBytes, 9);
  auto save = run.begin_save({.step = 1, .rank = 0, .world_size = 1});
  REQUIRE(save);
  for (std::size_t i = 0; i < kTensors; ++i)
    REQUIRE(save->add_tensor({.name = name(i), .global_shape = {2}, .box = Box{{0}, {2}}},
                             std::span(bytes).subspan(i * kBytes, kBytes)));
  auto ticket = save->stage();
  REQUIRE(ticket);
  REQUIRE(ticket->wait());
  auto step = job.client->open_step("b/run", 1);
  REQUIRE(step);
  for (const std::size_t every : {1, 59, 1999}) {
    std::vector<std::byte> out(bytes.size());
    auto restore = step->restore();
    for (std::size_t i = 0; i < kTensors; i += every)
      restore.want({.name = name(i), .box = Box{{0}, {2}}}, std::span(out).subspan(i * kBytes, kBytes));
    REQUIRE(restore.run());
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < kTensors; i += every)
      wrong += std::memcmp(out.data() + i * kBytes, bytes.data() + i * kBytes, kBytes) != 0;
    CHECK(wrong == 0);
  }
}

TEST_CASE("client: gaps and overlaps fail the attempt for all ranks, naming tensor and place", "[integration]") {
  Job job;
  auto run = job.open();
  const auto bytes = pattern(40, 1);
  const auto attempt = [&](std::uint64_t step, Box a, Box b) {
    Result<SaveResult> results[2];
    std::vector<Save::Ticket> tickets;
    for (std::uint32_t rank = 0; rank < 2; ++rank) {
      auto save = run.begin_save({.step = step, .rank = rank, .world_size = 2});
      REQUIRE(save);
      auto box = rank == 0 ? a : b;
      REQUIRE(save->add_tensor({.name = "layer.0/w", .dtype = DType::u8, .global_shape = {10}, .box = box},
                               std::span(bytes).first(box.shape[0])));
      auto ticket = save->stage();
      REQUIRE(ticket);
      tickets.push_back(*ticket);
    }
    for (int rank = 0; rank < 2; ++rank) results[rank] = tickets[static_cast<std::size_t>(rank)].wait();
    CHECK_FALSE(results[0]);
    REQUIRE_FALSE(results[1]);
    CHECK(results[1].error().code == Errc::kConflict);
    return results[1].error().message;
  };
  const auto gap = attempt(1, Box{{0}, {4}}, Box{{5}, {5}});
  CHECK(gap.find("layer.0/w") != std::string::npos);
  CHECK(gap.find("[4:") != std::string::npos);
  const auto overlap = attempt(2, Box{{0}, {6}}, Box{{5}, {5}});
  CHECK(overlap.find("layer.0/w") != std::string::npos);
  CHECK(overlap.find("[5:") != std::string::npos);
  CHECK(job.client->steps("b/run")->items.empty());
}

TEST_CASE("client: bad input is refused with its reason, and nothing changes", "[integration]") {
  Job job;
  CHECK(job.client->open_run({.name = "nobucket/run", .launch = {.job = "j"}}).error().code == Errc::kNotFound);
  CHECK(job.client->open_run({.name = "b/../x", .launch = {.job = "j"}}).error().code == Errc::kInvalid);
  auto run = job.open();
  auto save = run.begin_save({.step = 5, .rank = 0, .world_size = 2});
  REQUIRE(save);
  auto other = run.begin_save({.step = 5, .rank = 1, .world_size = 3});
  CHECK(other.error().code == Errc::kInvalid);
  CHECK(other.error().message.find("3") != std::string::npos);
  const auto bytes = pattern(16, 1);
  const auto refused = [&](TensorShard shard, std::size_t size) {
    auto added = save->add_tensor(std::move(shard), std::span(bytes).first(size));
    REQUIRE_FALSE(added);
    CHECK(added.error().code == Errc::kInvalid);
    return added.error().message;
  };
  CHECK(refused({.name = "t", .global_shape = {2, 2}}, 12).find("16") != std::string::npos);        // size
  refused({.name = "t", .global_shape = {2}, .box = Box{{1}, {2}}}, 8);                             // outside
  refused({.name = "t", .global_shape = {2}, .box = Box{{0, 0}, {2, 1}}}, 8);                       // dimensions
  refused({.name = "t", .global_shape = {1ull << 40, 1ull << 40}, .box = Box{{0, 0}, {1, 1}}}, 4);  // overflow
  refused({.name = "t", .global_shape = {4}, .box = Box{{~0ull}, {4}}}, 16);  // offset + size overflows
  refused({.name = std::string("a\0b", 3), .global_shape = {4}}, 16);
  refused({.name = "t", .dtype = DType::f4, .global_shape = {3}}, 2);  // not whole bytes
  REQUIRE(save->add_tensor({.name = "t", .global_shape = {4}}, bytes));
  refused({.name = "t", .global_shape = {4}}, 16);  // twice
  REQUIRE(save->abort("test"));
  CHECK(job.client->status("b/run", save->attempt())->state == AttemptState::failed);

  auto again = run.begin_save({.step = 5});
  REQUIRE(again);
  REQUIRE(again->add_tensor({.name = "t", .global_shape = {4}}, bytes));
  REQUIRE(again->stage()->wait());
  CHECK(run.begin_save({.step = 5}).error().code == Errc::kExists);
  std::vector<std::byte> out(16), wrong(15);
  const auto read = [&](TensorSlice slice, std::span<std::byte> to) {
    auto restore = run.restore();
    restore->want(std::move(slice), to);
    return restore->run();
  };
  CHECK(read({.name = "none"}, out).error().code == Errc::kNotFound);
  CHECK(read({.name = "t", .box = Box{{2}, {4}}}, out).error().code == Errc::kInvalid);
  CHECK(read({.name = "t"}, wrong).error().code == Errc::kInvalid);
  REQUIRE(read({.name = "t"}, out));
  CHECK(out == bytes);
  auto huge = run.begin_save({.step = 6, .declared_bytes = 1ull << 60});
  CHECK(huge.error().code == Errc::kNoSpace);
}

TEST_CASE("client: a newer launch fences the older one's begins, seals and commits", "[integration]") {
  Job job;
  auto old_run = job.open("job", 0);
  const auto bytes = pattern(1000, 1);
  auto save = old_run.begin_save({.step = 1});
  REQUIRE(save);
  REQUIRE(save->add_blob("x", bytes));
  auto new_run = job.open("job", 1);
  auto ticket = save->stage();
  if (ticket) {
    auto outcome = ticket->wait();
    REQUIRE_FALSE(outcome);
    CHECK(outcome.error().code == Errc::kFenced);
  } else {
    CHECK(ticket.error().code == Errc::kFenced);
  }
  CHECK(old_run.begin_save({.step = 2}).error().code == Errc::kFenced);
  CHECK(job.client->open_run({.name = "b/run", .launch = {.job = "job", .restart = 0}}).error().code == Errc::kFenced);
  CHECK(job.client->steps("b/run")->items.empty());
  auto fresh = new_run.begin_save({.step = 1});
  REQUIRE(fresh);
  REQUIRE(fresh->add_blob("x", bytes));
  REQUIRE(fresh->stage()->wait());
}

TEST_CASE("client: a started save copies before the daemon has answered, and commits like any other", "[integration]") {
  Job job;
  auto run = job.open();
  const auto big = pattern((3u << 20) + 12'345, 1), small = pattern(100, 2), late = pattern(5u << 20, 3);
  REQUIRE(kill(job.daemon.pid(), SIGSTOP) == 0);
  auto save = run.start_save({.step = 1});
  REQUIRE(save);
  REQUIRE(save->add_tensor({.name = "big", .dtype = DType::u8, .global_shape = {big.size()}}, big));
  REQUIRE(save->add_blob("small", small));
  const auto part = save->stage_part();  // nobody answers yet
  REQUIRE(kill(job.daemon.pid(), SIGCONT) == 0);
  REQUIRE(part);
  // In the middle of a chunk that was opened before the owner was known.
  REQUIRE(save->add_tensor({.name = "late", .dtype = DType::u8, .global_shape = {late.size()}}, late));
  auto ticket = save->stage();
  REQUIRE(ticket);
  REQUIRE(ticket->wait());
  CHECK(job.client->status("b/run", save->attempt())->state == AttemptState::committed);
  auto step = job.client->open_step("b/run");
  REQUIRE(step);
  std::vector<std::byte> out(big.size()), out_late(late.size());
  auto restore = step->restore();
  restore.want({.name = "big"}, out);
  restore.want({.name = "late"}, out_late);
  REQUIRE(restore.run());
  CHECK(out == big);
  CHECK(out_late == late);
  CHECK(step->blob("small").value() == small);
}

TEST_CASE("client: a started save larger than the arena, what the begin refuses comes from stage, nothing is left",
          "[integration]") {
  Job job;
  auto run = job.open();
  const auto bytes = pattern(40u << 20, 9);
  const auto start = [&](Run& from, std::uint64_t step) {
    auto save = from.start_save({.step = step});
    REQUIRE(save);
    REQUIRE(save->add_tensor({.name = "w", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
    return *save;
  };
  auto first = start(run, 1);
  REQUIRE(first.stage()->wait());

  auto again = start(run, 1);
  auto staged = again.stage();
  REQUIRE_FALSE(staged);
  CHECK(staged.error().code == Errc::kExists);
  CHECK(again.stage().error().code == Errc::kExists);
  CHECK(again.stage_part().error().code == Errc::kExists);
  CHECK(again.abort("no").error().code == Errc::kExists);
  CHECK(again.attempt().empty());

  auto given_up = start(run, 2);
  REQUIRE(given_up.abort("changed my mind"));
  {
    auto dropped = start(run, 2);
  }

  auto newer = job.open("job", 1);
  CHECK(start(run, 3).stage().error().code == Errc::kFenced);
  // All of the arena is there again.
  auto last = start(newer, 4);
  REQUIRE(last.stage()->wait());
  CHECK(newer.open_step()->info().step == 4);
  REQUIRE(newer.open_step()->verify());
}

TEST_CASE("client: saves that are staged first share an arena too small for both, nobody waits for ever",
          "[integration]") {
  Job job;
  auto run = job.open();
  // Each fits when it begins to copy; together they do not. Begun or started, alone or not.
  const auto bytes = pattern(11u << 20, 5);
  for (std::uint64_t step = 1; step <= 6; ++step) {
    const std::uint32_t ranks = step <= 2 ? 1 : 3;
    std::vector<std::thread> threads;
    std::atomic<int> committed = 0;
    for (std::uint32_t rank = 0; rank < ranks; ++rank)
      threads.emplace_back([&, rank] {
        const SaveOptions options{.step = step, .rank = rank, .world_size = ranks, .stage_first = true};
        auto save = step % 2 == 0 ? run.begin_save(options) : run.start_save(options);
        if (!save) return;
        auto added = save->add_tensor({.name = "w",
                                       .dtype = DType::u8,
                                       .global_shape = {ranks, bytes.size()},
                                       .box = Box{{rank, 0}, {1, bytes.size()}}},
                                      bytes);
        auto ticket = save->stage();
        if (added && ticket && ticket->wait()) ++committed;
      });
    for (auto& thread : threads) thread.join();
    REQUIRE(committed == static_cast<int>(ranks));
    auto opened = run.open_step(step);
    REQUIRE(opened);
    std::vector<std::byte> out(ranks * bytes.size());
    auto restore = opened->restore();
    restore.want({.name = "w"}, out);
    REQUIRE(restore.run());
    for (std::uint32_t rank = 0; rank < ranks; ++rank)
      CHECK(std::ranges::equal(std::span(out).subspan(rank * bytes.size(), bytes.size()), bytes));
  }
}

TEST_CASE("client: a silent rank fails the attempt for all, by name", "[integration]") {
  Job job({"--rank-silence", "1s"});
  auto run = job.open();
  const auto bytes = pattern(1000, 1);
  auto alive = run.begin_save({.step = 1, .rank = 0, .world_size = 2});
  REQUIRE(alive);
  REQUIRE(alive->add_blob("x", bytes));
  {
    auto dead = Client::connect(job.options());
    REQUIRE(dead);
    auto its_run = dead->open_run({.name = "b/run", .launch = {.job = "job"}});
    REQUIRE(its_run);
    REQUIRE(its_run->begin_save({.step = 1, .rank = 1, .world_size = 2}));
  }  // gone with its client: no heartbeat any more
  auto outcome = alive->stage()->wait();
  REQUIRE_FALSE(outcome);
  CHECK(outcome.error().code == Errc::kAttemptFailed);
  CHECK(outcome.error().message.find("rank 1") != std::string::npos);
}

TEST_CASE("client: a save larger than the arena streams through it, without waiting it is kBusy and loses nothing",
          "[integration]") {
  Job job;
  auto run = job.open();
  const auto bytes = pattern(40u << 20, 9);
  auto save = run.begin_save({.step = 1});
  REQUIRE(save->add_tensor({.name = "big", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
  REQUIRE(save->stage()->wait());
  std::vector<std::byte> out(bytes.size());
  auto restore = run.restore();
  restore->want({.name = "big"}, out);
  REQUIRE(restore->run());
  CHECK(out == bytes);

  auto options = job.options();
  options.arena_wait = false;
  auto impatient = Client::connect(options);
  REQUIRE(impatient);
  auto its_run = impatient->open_run({.name = "b/run", .launch = {.job = "job"}});
  auto small = its_run->begin_save({.step = 2});
  REQUIRE(small->add_tensor({.name = "big", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
  auto staged = small->stage();
  REQUIRE_FALSE(staged);
  CHECK(staged.error().code == Errc::kBusy);
}

TEST_CASE(
    "client: on the daemon's host the arena is shared, else the unix socket is used, else TCP, bytes are the same",
    "[integration]") {
  Job job;
  const auto bytes = pattern(40u << 20, 11);
  struct Way {
    bool unix_socket, shared_memory;
  };
  std::uint64_t step = 0;
  for (const auto saving : {Way{true, true}, Way{true, false}, Way{false, true}}) {
    auto options = job.options();
    options.unix_socket = saving.unix_socket;
    options.shared_memory = saving.shared_memory;
    auto client = Client::connect(options);
    REQUIRE(client);
    const auto how = client->description();
    CHECK(how.starts_with("unix:") == saving.unix_socket);
    CHECK(how.ends_with("shared memory") == (saving.unix_socket && saving.shared_memory));
    auto run = client->open_run({.name = "b/run", .launch = {.job = "job", .restart = step}});
    REQUIRE(run);
    auto save = run->begin_save({.step = ++step});
    REQUIRE(save);
    // Odd sizes, and many small ones beside a large one.
    REQUIRE(save->add_tensor({.name = "t", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
    for (std::size_t i = 0; i < 50; ++i)
      REQUIRE(save->add_tensor({.name = "s" + std::to_string(i), .dtype = DType::u8, .global_shape = {1000 + i * 777}},
                               std::span(bytes).subspan(i * 31, 1000 + i * 777)));
    REQUIRE(save->stage()->wait());
    // Read back by all of them.
    for (const auto reading : {Way{true, true}, Way{true, false}, Way{false, true}}) {
      auto other = job.options();
      other.unix_socket = reading.unix_socket;
      other.shared_memory = reading.shared_memory;
      auto reader = Client::connect(other);
      REQUIRE(reader);
      auto saved = reader->open_step("b/run", step);
      REQUIRE(saved);
      auto opened = saved->restore();
      std::vector<std::byte> whole(bytes.size()), part(3'000'001), small(1000 + 49 * 777);
      opened.want({.name = "t"}, whole);
      opened.want({.name = "t", .box = Box{.offset = {12'345'678}, .shape = {part.size()}}}, part);
      opened.want({.name = "s49"}, small);
      REQUIRE(opened.run());
      CHECK(whole == bytes);
      CHECK(std::ranges::equal(part, std::span(bytes).subspan(12'345'678, part.size())));
      CHECK(std::ranges::equal(small, std::span(bytes).subspan(49 * 31, small.size())));
    }
  }
}

TEST_CASE("client: damage is told, not returned, also where the daemon reads into shared memory", "[integration]") {
  Job job;
  const auto bytes = pattern(8u << 20, 5);
  {
    auto run = job.open();
    auto save = run.begin_save({.step = 1});
    REQUIRE(save->add_tensor({.name = "t", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
    REQUIRE(save->stage()->wait());
  }
  CHECK(job.daemon.stop() == 0);
  int flipped = 0;
  for (const auto& entry : std::filesystem::directory_iterator(job.daemon.data())) {
    if (!entry.path().filename().string().starts_with("segment")) continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    const auto at = static_cast<std::streamoff>(5u << 20);
    file.seekg(at);
    const auto old = static_cast<char>(file.get());
    file.seekp(at);
    file.put(static_cast<char>(old ^ 4));
    ++flipped;
  }
  REQUIRE(flipped == 1);
  job.daemon.start();
  auto client = Client::connect(job.options());
  REQUIRE(client);
  REQUIRE(client->description().ends_with("shared memory"));
  auto step = client->open_step("b/run", 1);
  REQUIRE(step);
  std::vector<std::byte> out(bytes.size());
  auto restore = step->restore();
  restore.want({.name = "t"}, out);
  auto read = restore.run();
  REQUIRE_FALSE(read);
  CHECK(read.error().code == Errc::kDataLoss);
  CHECK(read.error().message.find("block") != std::string::npos);
  // What lies around it is readable.
  auto again = step->restore();
  std::vector<std::byte> front(4u << 20);
  again.want({.name = "t", .box = Box{.offset = {0}, .shape = {front.size()}}}, front);
  REQUIRE(again.run());
  CHECK(std::ranges::equal(front, std::span(bytes).first(front.size())));
}

TEST_CASE("client: a save outlives the daemon: killed in its middle, restarted, the same step commits",
          "[integration]") {
  Job job;
  auto run = job.open();
  const auto bytes = pattern(30u << 20, 3);
  auto save = run.begin_save({.step = 1});
  REQUIRE(save->add_tensor({.name = "t", .dtype = DType::u8, .global_shape = {bytes.size()}}, bytes));
  // The arena holds 16 MiB: this cannot be over before the daemon has taken the other half.
  auto staging = save->stage_async();
  job.daemon.kill9();
  job.daemon.start();
  auto ticket = staging.get();
  INFO((ticket ? "" : ticket.error().message));
  REQUIRE(ticket);
  REQUIRE(ticket->wait());
  std::vector<std::byte> out(bytes.size());
  auto restore = run.restore(1);
  REQUIRE(restore);
  restore->want({.name = "t"}, out);
  REQUIRE(restore->run());
  CHECK(out == bytes);
  CHECK(job.daemon.stop() == 0);
}

TEST_CASE("client: overwrite replaces a step whole, discard_after drops later ones, removed steps are gone",
          "[integration]") {
  Job job;
  auto run = job.open();
  const auto save = [&](Run& to, std::uint64_t step, unsigned seed, bool overwrite) {
    const auto bytes = pattern(5000, seed);
    auto begun = to.begin_save({.step = step, .overwrite = overwrite});
    REQUIRE(begun);
    REQUIRE(begun->add_blob("x", bytes));
    REQUIRE(begun->stage()->wait());
  };
  for (std::uint64_t step : {1, 2, 3}) save(run, step, static_cast<unsigned>(step), false);
  save(run, 2, 22, true);
  CHECK(run.open_step(2)->blob("x").value() == pattern(5000, 22));
  auto back = job.client->open_run(
      {.name = "b/run", .launch = {.job = "job", .restart = 1}, .resume = 2, .discard_after = true});
  REQUIRE(back);
  CHECK(back->resume_step() == 2);
  CHECK(job.client->steps("b/run")->items.size() == 2);
  CHECK(job.client->open_step("b/run")->info().step == 2);
  REQUIRE(job.client->remove_step("b/run", 1));
  CHECK(job.client->remove_step("b/run", 1).error().code == Errc::kNotFound);
  CHECK(job.client->remove_bucket("b").error().code == Errc::kConflict);
  CHECK(job.client->runs("b")->items == std::vector<std::string>{"run"});
}

TEST_CASE("client: objects in whole, by ranges, streamed, listed in order", "[integration]") {
  Job job;
  const auto bytes = pattern(9u << 20, 4);
  REQUIRE(job.client->put("b", "dir/a", bytes));
  CHECK(job.client->get("b", "dir/a").value() == bytes);
  CHECK(job.client->put("b", "dir/a", bytes, {.if_absent = true}).error().code == Errc::kExists);
  std::size_t sent = 0;
  auto streamed = job.client->put_stream("b", "dir/b",
                                         [&](std::span<std::byte> to) -> Result<std::size_t> {
                                           const auto n =
                                               std::min<std::size_t>({to.size(), bytes.size() - sent, 77'777});
                                           std::memcpy(to.data(), bytes.data() + sent, n);
                                           sent += n;
                                           return n;
                                         },
                                         {});
  REQUIRE(streamed);
  CHECK(streamed->crc32c == job.client->stat("b", "dir/a")->crc32c);
  std::vector<std::byte> part;
  REQUIRE(
      job.client->get_stream("b", "dir/b", 1'000'001, 8'000'003, [&](std::span<const std::byte> piece) -> Result<void> {
        part.insert(part.end(), piece.begin(), piece.end());
        return {};
      }));
  CHECK(std::equal(part.begin(), part.end(), bytes.begin() + 1'000'001, bytes.begin() + 8'000'003));
  REQUIRE(job.client->put("b", "empty", {}));
  CHECK(job.client->get("b", "empty")->empty());
  std::string after;
  std::vector<std::string> keys;
  for (bool more = true; more;) {
    auto page = job.client->list("b", "", after, 1);
    REQUIRE(page);
    for (const auto& o : page->items) keys.push_back(after = o.key);
    more = page->more;
  }
  CHECK(keys == std::vector<std::string>{"dir/a", "dir/b", "empty"});
  REQUIRE(job.client->remove("b", "dir/a"));
  CHECK(job.client->get("b", "dir/a").error().code == Errc::kNotFound);
}

TEST_CASE("client: an object is written piece by piece and read at any offset, in three ways of waiting",
          "[integration]") {
  Job job;
  const auto bytes = pattern(5'000'000, 5);
  const auto part = [&](std::size_t first, std::size_t size) { return std::span(bytes).subspan(first, size); };
  auto writer = job.client->create_object("b", "k", {});
  REQUIRE(writer);
  REQUIRE(writer->write(part(0, 1)));
  auto second = writer->write_async(part(1, 2'999'999));
  auto third = writer->write_async(part(3'000'000, 2'000'000));  // in order, though the one before is under way
  CHECK(second.get());
  CHECK(third.get());
  CHECK(job.client->stat("b", "k").error().code == Errc::kNotFound);
  auto info = writer->finish();
  REQUIRE(info);
  CHECK(info->size_bytes == bytes.size());
  CHECK(writer->finish()->version == info->version);  // again: done

  auto reader = job.client->open_object("b", "k");
  REQUIRE(reader);
  CHECK(reader->info().version == info->version);
  std::vector<std::byte> out(1000);
  CHECK(reader->read(1'234'567, out).value() == 1000);
  CHECK(std::ranges::equal(out, part(1'234'567, 1000)));
  CHECK(reader->read(bytes.size() - 10, out).value() == 10);
  CHECK(std::ranges::equal(std::span(out).first(10), part(bytes.size() - 10, 10)));
  CHECK(reader->read(bytes.size(), out).value() == 0);
  CHECK(reader->read(bytes.size() + 1, out).error().code == Errc::kInvalid);
  std::atomic<std::size_t> called = 0;
  reader->read_async(0, out).then([&](Result<std::size_t> got) {
    called = got.value_or(1);
    called.notify_one();
  });
  called.wait(0);
  CHECK(called == 1000);

  // Replaced and removed: the reader goes on with what it has opened.
  REQUIRE(job.client->put("b", "k", part(0, 10)));
  REQUIRE(job.client->remove("b", "k"));
  std::vector<std::byte> all;
  REQUIRE(reader->stream(0, ObjectReader::npos, [&](std::span<const std::byte> piece) -> Result<void> {
    all.insert(all.end(), piece.begin(), piece.end());
    return {};
  }));
  CHECK(all == bytes);
  CHECK(reader->stream(1, 0, {}).error().code == Errc::kInvalid);
  // The caller's error ends a stream at once.
  const auto stopped =
      reader->stream(0, ObjectReader::npos, [](auto) -> Result<void> { return fail(Errc::kBusy, "enough"); });
  CHECK(stopped.error().code == Errc::kBusy);
}

TEST_CASE("client: an object that is not finished is never there, and its space comes back", "[integration]") {
  Job job({"--garbage-grace", "10ms", "--garbage-interval", "10ms"});
  const auto bytes = pattern(3'000'000, 6);
  {
    auto dropped = job.client->create_object("b", "dropped", {});
    REQUIRE(dropped);
    REQUIRE(dropped->write(bytes));
    CHECK(job.client->bucket("b")->reserved_bytes > 0);
  }
  auto aborted = job.client->create_object("b", "aborted", {});
  REQUIRE(aborted);
  REQUIRE(aborted->write(bytes));
  REQUIRE(aborted->abort());
  CHECK_FALSE(aborted->finish());
  const auto broken = job.client->put_stream("b", "broken",
                                             [n = 0](std::span<std::byte> into) mutable -> Result<std::size_t> {
                                               if (++n > 2) return fail(Errc::kFailed, "the source is gone");
                                               return into.size();
                                             },
                                             {});
  CHECK(broken.error().message == "the source is gone");
  const auto deadline = std::chrono::steady_clock::now() + 60s;
  while (job.client->bucket("b")->reserved_bytes > 0 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  CHECK(job.client->bucket("b")->reserved_bytes == 0);
  CHECK(job.client->list("b")->items.empty());
}

TEST_CASE("client: puts and removals of a named version, and quotas", "[integration]") {
  Job job;
  auto& client = *job.client;
  const auto bytes = pattern(1000, 7);
  const auto first = client.put("b", "k", bytes);
  REQUIRE(first);
  const auto second = client.put("b", "k", bytes, {.if_version = first->version});
  REQUIRE(second);
  CHECK(second->version != first->version);
  CHECK(client.put("b", "k", bytes, {.if_version = first->version}).error().code == Errc::kConflict);
  CHECK(client.put("b", "none", bytes, {.if_version = first->version}).error().code == Errc::kConflict);
  CHECK(client.put("b", "k", bytes, {.if_version = "rubbish"}).error().code == Errc::kInvalid);
  CHECK(client.put("b", "k", bytes, {.if_absent = true, .if_version = first->version}).error().code == Errc::kInvalid);
  CHECK(client.remove("b", "k", {.if_version = first->version}).error().code == Errc::kConflict);
  REQUIRE(client.remove("b", "k", {.if_version = second->version}));
  CHECK(client.remove("b", "k", {.if_version = second->version}).error().code == Errc::kNotFound);

  REQUIRE(client.set_bucket("b", {.quota_bytes = 2500}));
  REQUIRE(client.put("b", "k", bytes));
  REQUIRE(client.put("b", "l", bytes));
  const auto refused = client.put("b", "m", bytes);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  CHECK(refused.error().message.find("limit 2500 bytes, used 2000") != std::string::npos);
  REQUIRE(client.put("b", "l", pattern(1500, 8)));
  const auto info = client.bucket("b");
  CHECK(info->used_bytes == 2500);
  CHECK(info->objects == 2);
  CHECK(info->quota_bytes == 2500);
  REQUIRE(client.set_bucket("b", {.quota_bytes = 0}));
  REQUIRE(client.put("b", "m", bytes));
}

TEST_CASE("client: listings fold keys below a delimiter and go on from their token", "[integration]") {
  Job job;
  for (const auto* key : {"a", "d/1", "d/2", "e", "f/g/h", "f/i"}) REQUIRE(job.client->put("b", key, {}));
  std::vector<std::string> got;
  ListOptions options{.delimiter = "/", .limit = 2};
  for (bool more = true; more;) {
    const auto page = job.client->list("b", options);
    REQUIRE(page);
    for (const auto& item : page->items) got.push_back(item.key);
    got.insert(got.end(), page->prefixes.begin(), page->prefixes.end());
    options.token = page->next;
    more = page->more;
  }
  CHECK(got == std::vector<std::string>{"a", "d/", "e", "f/"});
  const auto after = job.client->list("b", {.prefix = "d/", .after = "d/1"});
  REQUIRE(after->items.size() == 1);
  CHECK(after->items[0].key == "d/2");
}

TEST_CASE("client: callbacks, co_await, Asio tokens and cancellation share one implementation", "[integration]") {
  Job job;
  const auto bytes = pattern(100'000, 1);
  REQUIRE(job.client->put("b", "k", bytes));
  std::atomic<bool> called = false;
  job.client->get_async("b", "k").then([&](Result<std::vector<std::byte>> got) {
    // A blocking call here would wait for itself: it is refused.
    called = got && *got == bytes && job.client->stat("b", "k").error().code == Errc::kInvalid;
    called.notify_all();
  });
  called.wait(false);
  CHECK(called);

  asio::io_context context;
  bool awaited = false;
  asio::co_spawn(
      context,
      [&]() -> asio::awaitable<void> {
        auto future = job.client->get_async("b", "k");
        auto got = co_await cairn::async(std::move(future), asio::use_awaitable);
        awaited = got && *got == bytes;
      },
      asio::detached);
  context.run();
  CHECK(awaited);

  auto run = job.open();
  auto save = run.begin_save({.step = 1, .rank = 0, .world_size = 2});
  REQUIRE(save->add_blob("x", bytes));
  auto waiting = save->stage()->wait_async();  // the other rank never comes
  waiting.cancel();
  CHECK(waiting.get().error().code == Errc::kCancelled);
  // A client may go while something of its own still waits.
  auto orphan = save->commit_async();
  job.client.reset();
}

TEST_CASE("client: one that scribbles over memory that the daemon writes from hurts only its own attempt",
          "[integration]") {
  const auto shared_now = [] {  // what this process shares with daemons: begin and end
    std::map<void*, void*> out;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      void *begin = nullptr, *end = nullptr;
      if (line.find("/memfd:cairn") != std::string::npos && std::sscanf(line.c_str(), "%p-%p", &begin, &end) == 2)
        out.emplace(begin, end);
    }
    return out;
  };
  Job job;
  const auto honest = shared_now();
  auto scribbler = Client::connect(job.options());
  REQUIRE(scribbler);
  auto mine = shared_now();
  for (const auto& [begin, end] : honest) mine.erase(begin);
  REQUIRE(mine.size() == 1);
  const std::span memory(static_cast<std::byte*>(mine.begin()->first), static_cast<std::byte*>(mine.begin()->second));

  const auto bytes = pattern(40'000'000, 1);
  const auto save = [&](Client& client, const std::string& name, std::uint64_t step) -> std::optional<Errc> {
    auto run = client.open_run({.name = "b/" + name, .launch = {.job = name, .restart = step}});
    REQUIRE(run);
    auto begun = run->begin_save({.step = step});
    REQUIRE(begun);
    REQUIRE(begun->add_blob("x", bytes));
    auto ticket = begun->stage();
    if (!ticket) return ticket.error().code;
    auto committed = ticket->wait();
    return committed ? std::optional<Errc>() : committed.error().code;
  };
  const auto restored = [&](Client& client, const std::string& name, std::uint64_t step) -> std::optional<Errc> {
    auto opened = client.open_step("b/" + name, step);
    REQUIRE(opened);
    auto blob = opened->blob("x");
    if (blob) CHECK((*blob == bytes));  // whatever happened: never other bytes
    return blob ? std::optional<Errc>() : blob.error().code;
  };

  const auto scribbling = fork();
  REQUIRE(scribbling >= 0);
  if (scribbling == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (std::uint64_t i = 1;; i += 0x9e3779b97f4a7c15ull) memory[i % memory.size()] ^= std::byte{1};
  }
  int failed = 0;
  for (std::uint64_t step = 1; step <= 4; ++step) {
    const auto outcome = save(*scribbler, "scribbled", step);
    if (outcome) {
      CHECK((outcome == Errc::kDataLoss || outcome == Errc::kAttemptFailed));
      ++failed;
    } else if (const auto read = restored(*job.client, "scribbled", step)) {
      CHECK(read == Errc::kDataLoss);  // scribbled between the daemon's check and its disk
    }
    // Beside it, and on the same daemon, nobody notices.
    CHECK_FALSE(save(*job.client, "honest", step));
    CHECK_FALSE(restored(*job.client, "honest", step));
  }
  kill(scribbling, SIGKILL);
  waitpid(scribbling, nullptr, 0);
  CHECK(failed > 0);
  // Nor is it held against the one who stops.
  CHECK_FALSE(save(*scribbler, "scribbled", 9));
  CHECK_FALSE(restored(*scribbler, "scribbled", 9));
}
