#include "bench/plan/plan.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <system_error>

#include "bench/common/processes.h"
#include "client/core/arena.h"
#include "client/core/buckets.h"
#include "client/core/save.h"
#include "client/core/step_reader.h"
#include "proto/runtime/runtime.h"

namespace cairn::bench {
namespace {

constexpr char kBucket[] = "bench";
constexpr std::uint64_t kStep = 1;
constexpr std::uint32_t kRanksAtOnce = 64;          // that have begun and not sealed
constexpr std::uint32_t kRanksPerConnection = 128;  // each waits for the commit by a call, and a daemon runs 256
constexpr std::size_t kPageBytes = 16 * kKiB;
constexpr rt::Duration kTimeout = std::chrono::minutes(10);

enum Process : std::uint32_t { kSaver, kReader, kProcesses };
enum Phase : std::uint32_t { kSave, kOpen };
enum Figure : std::size_t {
  kSaveSeconds,    // of all ranks, up to the last seal
  kCommitSeconds,  // from the last seal until every rank knew of the commit
  kOpenSeconds,
  kPlanSeconds,
  kReadSeconds,
  kIndexBytes,
  kIndexBytesRead,
  kRequests,
  kRss,
};

/// The element of a tensor that a rank holds.
std::uint32_t element(std::uint32_t tensor, std::uint32_t rank) {
  std::uint64_t x = (std::uint64_t{tensor} << 32 | rank) + 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return static_cast<std::uint32_t>(x >> 16);
}

std::string tensor_name(std::uint32_t tensor) {
  return fmt::format("model.layers.{}.part.{}.weight", tensor / 10, tensor % 10);
}

class Player {
 public:
  Player(const PlanOptions& options, std::string address, std::uint64_t launch)
      : options_(options), address_(std::move(address)), launch_(launch) {}

  /// Empty: done.
  std::string run(std::uint32_t phase, std::uint64_t argument, Report& report) {
    if (!runtime_) {
      auto made = rt::RealRuntime::create({.offload_threads = 2, .log_min = rt::Level::kWarning, .log = nullptr});
      if (!made) return made.error().message;
      runtime_ = *std::move(made);
    }
    auto done = rt::run(runtime_->loop(), phase == kSave ? save(report) : open(argument, report));
    report.figures[kRss] = static_cast<double>(use_of(getpid()).rss_bytes_max);
    return done ? "" : done.error().message;
  }

 private:
  rt::TimePoint deadline() { return runtime_->loop().now() + kTimeout; }
  std::string run_name() const { return fmt::format("plan-{}", launch_); }

  Task<std::shared_ptr<client::Session>> connect() {
    client::SessionOptions session;
    session.servers = {address_};
    session.name = "cairn-bench plan";
    session.host = rt::boot_id();
    co_return co_await client::Session::connect(runtime_->seams(), session, deadline());
  }

  // ---- All ranks ----

  struct Saving {
    Saving(rt::Loop& loop, std::unique_ptr<client::Arena> memory)
        : arena(std::move(memory)), at_once(loop, kRanksAtOnce), scope(loop) {}
    std::vector<std::shared_ptr<client::Session>> sessions;
    std::unique_ptr<client::Arena> arena;
    client::OpenedRun run;
    std::vector<std::shared_ptr<client::SaveAttempt>> attempts;
    std::uint32_t sealed = 0;
    std::optional<Error> failed;
    rt::Semaphore at_once;
    rt::Scope scope;
  };

  Task<void> save(Report& report) {
    CO_TRY(auto arena, client::Arena::create(runtime_->loop(), kRanksAtOnce * 2 * kMiB, 16 * kMiB));
    auto saving = std::make_unique<Saving>(runtime_->loop(), std::move(arena));
    CO_TRY(auto first, co_await connect());
    saving->sessions.push_back(first);
    if (auto made = co_await client::create_bucket(first, {.name = kBucket}, deadline());
        !made && made.error().code != Errc::kExists)
      co_return fail(std::move(made).error());
    client::OpenRunRequest ask{
        .bucket = kBucket, .run = run_name(), .launch = {"cairn-bench", launch_}, .resume = {}, .discard_after = false};
    CO_TRY(saving->run, co_await client::open_run(first, std::move(ask), deadline()));

    std::vector<std::uint32_t> order(options_.ranks);
    for (std::uint32_t rank = 0; rank < options_.ranks; ++rank) order[rank] = rank;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(options_.seed));
    const double begun = now_seconds();
    double told = begun;
    for (std::uint32_t i = 0; i < order.size(); ++i) {
      if (i / kRanksPerConnection == saving->sessions.size()) {
        CO_TRY(auto next, co_await connect());
        saving->sessions.push_back(std::move(next));
      }
      CO_TRY(auto turn, co_await saving->at_once.acquire(1));
      if (saving->failed) co_return fail(*saving->failed);
      saving->scope.spawn(one(*saving, saving->sessions.back(), order[i], std::move(turn)),
                          [saving = saving.get()](Result<void> done) {
                            if (!done && !saving->failed) saving->failed = std::move(done).error();
                          });
      if (now_seconds() - told > 1 && isatty(STDERR_FILENO) != 0) {
        told = now_seconds();
        fmt::print(stderr, "\rsaving: {} of {} ranks ", saving->sealed, options_.ranks);
      }
    }
    CO_CHECK_OK(co_await saving->scope.join());
    if (saving->failed) co_return fail(*saving->failed);
    const double sealed = now_seconds();
    for (const auto& attempt : saving->attempts) CO_CHECK_OK(co_await attempt->outcome(deadline()));
    report.figures[kSaveSeconds] = sealed - begun;
    report.figures[kCommitSeconds] = now_seconds() - sealed;
    saving->attempts.clear();
    for (auto& session : saving->sessions) session->close();
    co_return {};
  }

  Task<void> one(Saving& saving, std::shared_ptr<client::Session> session, std::uint32_t rank,
                 rt::Semaphore::Lease turn) {
    (void)turn;  // given back when this ends
    CO_TRY(auto attempt, co_await client::SaveAttempt::begin(
                             std::move(session), *saving.arena, saving.run,
                             {.step = kStep, .rank = rank, .world_size = options_.ranks}, {.timeout = kTimeout}));
    std::vector<std::uint32_t> elements(options_.tensors);
    for (std::uint32_t tensor = 0; tensor < options_.tensors; ++tensor) {
      elements[tensor] = element(tensor, rank);
      format::ShardEntry entry;
      entry.tensor = tensor_name(tensor);
      entry.dtype = format::DType::kU32;
      entry.global_shape = {options_.ranks};
      entry.box = {.offset = {rank}, .shape = {1}};
      CO_CHECK_OK(attempt->add_tensor(std::move(entry), std::as_bytes(std::span(elements).subspan(tensor, 1))));
    }
    CO_CHECK_OK(co_await attempt->stage(true));
    CO_CHECK_OK(co_await attempt->sealed(deadline()));
    ++saving.sealed;
    saving.attempts.push_back(std::move(attempt));
    co_return {};
  }

  // ---- One rank, later ----

  Task<void> open(std::uint64_t rank, Report& report) {
    CO_TRY(auto session, co_await connect());
    const double begun = now_seconds();
    CO_TRY(auto reader, co_await client::StepReader::open(session, kBucket, run_name(), kStep, kTimeout));
    const double opened = now_seconds();
    std::vector<client::StepReader::Wanted> wanted;
    for (std::uint32_t tensor = 0; tensor < options_.tensors; ++tensor)
      wanted.push_back({tensor_name(tensor), format::Box{.offset = {rank}, .shape = {1}}});
    std::vector<std::uint64_t> sizes(options_.tensors, sizeof(std::uint32_t));
    CO_TRY(auto plan, co_await reader->plan(std::move(wanted), std::move(sizes)));
    const double planned = now_seconds();
    report.figures[kRequests] = static_cast<double>(plan.requests.size());
    std::vector<std::uint32_t> elements(options_.tensors);
    std::vector<std::span<std::byte>> destinations;
    for (auto& one : elements) destinations.push_back(std::as_writable_bytes(std::span(&one, 1)));
    CO_CHECK_OK(co_await reader->read(std::move(plan), std::move(destinations)));
    report.figures[kOpenSeconds] = opened - begun;
    report.figures[kPlanSeconds] = planned - opened;
    report.figures[kReadSeconds] = now_seconds() - planned;
    report.figures[kIndexBytes] = static_cast<double>(reader->summary().index_bytes);
    report.figures[kIndexBytesRead] = static_cast<double>(reader->index_bytes_read());
    for (std::uint32_t tensor = 0; tensor < options_.tensors; ++tensor)
      report.wrong_bytes += elements[tensor] == element(tensor, static_cast<std::uint32_t>(rank)) ? 0 : 4;
    reader.reset();
    session->close();
    co_return {};
  }

  const PlanOptions& options_;
  std::string address_;
  std::uint64_t launch_;
  std::unique_ptr<rt::RealRuntime> runtime_;
};

/// Plain files of the same lengths on the same disk.
class Limit {
 public:
  explicit Limit(std::string path) : path_(std::move(path)) {}
  ~Limit() { unlink(path_.c_str()); }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;

  double write(std::uint64_t bytes) {
    std::string piece(8 * kMiB, '\0');
    std::mt19937_64 random(1);
    for (std::size_t at = 0; at < piece.size(); at += 8) {
      const auto word = random();
      std::memcpy(piece.data() + at, &word, 8);
    }
    const double begun = now_seconds();
    const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    for (std::uint64_t at = 0; fd >= 0 && at < bytes;) {
      const auto n = ::write(fd, piece.data(), std::min<std::uint64_t>(piece.size(), bytes - at));
      if (n <= 0) break;
      at += static_cast<std::uint64_t>(n);
    }
    if (fd >= 0) {
      fdatasync(fd);
      close(fd);
    }
    bytes_ = bytes;
    return now_seconds() - begun;
  }
  /// `bytes` in pages spread evenly over the file, one after the other, cold.
  double read(std::uint64_t bytes) {
    (void)drop_caches({path_});
    const double begun = now_seconds();
    const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    const auto pages = std::max<std::uint64_t>(bytes / kPageBytes, 1);
    char page[kPageBytes];
    for (std::uint64_t i = 0; fd >= 0 && i < pages; ++i)
      if (pread(fd, page, sizeof page, static_cast<off_t>(round_down(bytes_ / pages * i, kPageBytes))) < 0) break;
    if (fd >= 0) close(fd);
    return now_seconds() - begun;
  }

 private:
  std::string path_;
  std::uint64_t bytes_ = 0;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values.empty() ? 0 : values[values.size() / 2];
}

/// A folder that goes with it.
struct Temporary {
  std::string path;
  ~Temporary() {
    std::error_code ignored;
    if (!path.empty()) std::filesystem::remove_all(path, ignored);
  }
};

}  // namespace

int run_plan(const PlanOptions& options) {
  const auto fail_with = [](const std::string& what) {
    fmt::print(stderr, "cairn-bench plan: {}\n", what);
    return 1;
  };
  const bool own = options.server.empty();
  Temporary temporary;
  auto folder = options.data;
  if (folder.empty()) {
    std::string name = (std::filesystem::temp_directory_path() / "cairn-bench-plan-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) return fail_with("cannot make " + name + ": " + std::strerror(errno));
    folder = temporary.path = name;
  }
  mkdir(folder.c_str(), 0700);
  // One process plays the ranks, some at a time: the last may begin long after the first.
  std::vector<std::string> flags{"--memory", std::to_string(options.memory_bytes), "--rank-join", "2h"};
  flags.insert(flags.end(), options.daemon_flags.begin(), options.daemon_flags.end());
  OwnDaemon daemon(options.daemon_program, folder + "/store", flags);
  auto address = options.server;
  if (own) {
    if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
    address = daemon.address();
  }
  const auto launch = static_cast<std::uint64_t>(now_seconds() * 1000);
  Ranks processes(kProcesses, [&](std::uint32_t process) -> Ranks::Work {
    auto player = std::make_shared<Player>(options, address, launch);
    return [player, process](std::uint32_t, std::uint32_t phase, std::uint64_t argument, Report& report) {
      if ((process == kSaver) != (phase == kSave)) return;
      const auto failed = player->run(phase, argument, report);
      report.failed = !failed.empty();
      std::strncpy(report.error, failed.c_str(), sizeof report.error - 1);
    };
  });

  const auto saved = processes.run(kSave, 0)[kSaver];
  if (saved.failed) return fail_with(std::string("save: ") + saved.error);
  ProcessUse server;
  if (own) server = use_of(daemon.pid());
  std::vector<double> open, plan, both, read;
  Report last;
  std::uint64_t server_open_rss = 0;
  for (std::uint32_t round = 0; round < options.rounds; ++round) {
    // Cold: nothing of the step is in anybody's memory.
    if (own) {
      daemon.stop();
      if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
    }
    last = processes.run(kOpen, std::uint64_t{round} * options.ranks / options.rounds)[kReader];
    if (last.failed) return fail_with(std::string("open: ") + last.error);
    if (last.wrong_bytes > 0) return fail_with(fmt::format("{} bytes that were read are wrong", last.wrong_bytes));
    open.push_back(last.figures[kOpenSeconds]);
    plan.push_back(last.figures[kPlanSeconds]);
    both.push_back(open.back() + plan.back());
    read.push_back(last.figures[kReadSeconds]);
    if (own) server_open_rss = std::max(server_open_rss, use_of(daemon.pid()).rss_bytes_max);
  }
  Limit limit(folder + "/limit");
  const auto index_bytes = static_cast<std::uint64_t>(last.figures[kIndexBytes]);
  const auto write_limit = limit.write(index_bytes);
  const auto read_limit = limit.read(static_cast<std::uint64_t>(last.figures[kIndexBytesRead]));

  nlohmann::ordered_json out;
  out["ranks"] = options.ranks;
  out["tensors"] = options.tensors;
  out["entries"] = std::uint64_t{options.ranks} * options.tensors;
  out["index_bytes"] = index_bytes;
  out["save_seconds"] = saved.figures[kSaveSeconds];
  out["commit_seconds"] = saved.figures[kCommitSeconds];
  out["limit_write_seconds"] = write_limit;
  out["open_seconds"] = median(open);
  out["plan_seconds"] = median(plan);
  out["open_and_plan_seconds"] = median(both);
  out["open_and_plan_seconds_max"] = *std::ranges::max_element(both);
  out["read_seconds"] = median(read);
  out["index_bytes_read"] = static_cast<std::uint64_t>(last.figures[kIndexBytesRead]);
  out["limit_read_seconds"] = read_limit;
  out["requests"] = static_cast<std::uint64_t>(last.figures[kRequests]);
  out["rss_bytes_max"] = static_cast<std::uint64_t>(last.figures[kRss]);
  out["rss_bytes_max_saver"] = static_cast<std::uint64_t>(saved.figures[kRss]);
  if (own) {
    out["rss_bytes_max_server"] = server.rss_bytes_max;
    out["rss_bytes_max_server_open"] = server_open_rss;
    out["cpu_seconds_server"] = server.cpu_seconds;
    out["memory_server"] = options.memory_bytes;
  }
  out["cpu_seconds_saver"] = saved.cpu_seconds;
  out["rounds"] = options.rounds;
  if (options.json) {
    fmt::print("{}\n", out.dump(1));
  } else {
    for (const auto& [name, value] : out.items()) fmt::print("{:<28}{:>16}\n", name, value.dump());
  }
  return 0;
}

}  // namespace cairn::bench
