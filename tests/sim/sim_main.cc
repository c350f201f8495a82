// cairn-sim: runs seeds of the checkpoint workload in the deterministic simulator.

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tests/sim/workload.h"

namespace {

using namespace cairn::sim;

constexpr const char* kHelp = R"(usage: cairn-sim [--workload NAME] [--seeds A-B] [--jobs N] [--bug NAME] [--fail-fast]
       cairn-sim [--workload NAME] --seed N [--trace] [--bug NAME]
       cairn-sim --list-bugs

Runs a workload under seeds A to B (default 1-1000) with faults drawn from the seed. Every failing seed is printed with the command that replays it. One seed in a hundred runs twice, in
separate processes, and both must have the same trace.

  --workload    checkpoint (default): one daemon, launches of several ranks that save, die, resume and restore
                handover: ranks that die as soon as they have handed over their part of a save
                retention: policies, removals, pins and garbage while readers hold steps open
                scrub: objects whose copies rot, and scrubs that find and repair them
                storage: one storage target, its chunks and records
                directories: the checkpoint workload on several data directories, with copies across them
                space: a disk and quotas that fill, again and again
                targets: records on several data directories that fail, are missing, lost or stale
  --bug NAME    plant a bug, in the workload meant for it unless told; the exit code is 0 when a seed catches it
  --fail-fast   stop at the first failing seed (implied by --bug)
  --trace       print every event

example: cairn-sim --seeds 1-5000 --jobs 2
exit codes: 0 as expected, 1 a promise was broken (with --bug: none was), 2 wrong usage
)";

struct Arguments {
  std::uint64_t first = 1, last = 1000;
  bool single = false, trace = false, fail_fast = false, worker = false;
  unsigned jobs = 1;
  std::string bug;
  std::string workload;  // empty: the bug's, or checkpoint
};

WorkloadResult run_workload(const Arguments& args, std::uint64_t seed, std::function<void(const std::string&)> trace) {
  WorkloadOptions options{.seed = seed, .bug = args.bug, .directories = false, .trace = std::move(trace)};
  if (args.workload == "retention") return run_retention_workload(std::move(options));
  if (args.workload == "handover") return run_handover_workload(std::move(options));
  if (args.workload == "scrub") return run_scrub_workload(std::move(options));
  if (args.workload == "space") return run_space_workload(std::move(options));
  if (args.workload == "storage") return run_storage_workload(std::move(options));
  if (args.workload == "targets") return run_targets_workload(std::move(options));
  options.directories = args.workload == "directories";
  return run_checkpoint_workload(std::move(options));
}

std::optional<std::uint64_t> number(const char* text) {
  char* end = nullptr;
  const auto value = std::strtoull(text, &end, 10);
  if (end == text || *end != '\0') return std::nullopt;
  return value;
}

bool parse(int argc, char** argv, Arguments& out) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    auto value = [&]() -> const char* { return i + 1 < argc ? argv[++i] : ""; };
    if (arg == "--help" || arg == "-h") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    } else if (arg == "--list-bugs") {
      for (const auto& bug : planted_bugs()) std::printf("%-24s %s\n", bug.name.c_str(), bug.what.c_str());
      std::exit(0);
    } else if (arg == "--seeds") {
      const std::string range = value();
      const auto dash = range.find('-');
      if (dash == std::string::npos) return false;
      const auto a = number(range.substr(0, dash).c_str()), b = number(range.substr(dash + 1).c_str());
      if (!a || !b || *a > *b) return false;
      out.first = *a;
      out.last = *b;
    } else if (arg == "--seed") {
      const auto seed = number(value());
      if (!seed) return false;
      out.first = out.last = *seed;
      out.single = true;
    } else if (arg == "--jobs") {
      const auto jobs = number(value());
      if (!jobs || *jobs < 1 || *jobs > 256) return false;
      out.jobs = static_cast<unsigned>(*jobs);
    } else if (arg == "--bug") {
      out.bug = value();
      const auto bugs = planted_bugs();
      if (std::none_of(bugs.begin(), bugs.end(), [&](const auto& b) { return b.name == out.bug; })) {
        std::fprintf(stderr, "cairn-sim: no bug named '%s'; --list-bugs names them\n", out.bug.c_str());
        return false;
      }
    } else if (arg == "--workload") {
      out.workload = value();
      if (out.workload != "storage" && out.workload != "targets" && out.workload != "directories" &&
          out.workload != "checkpoint" && out.workload != "retention" && out.workload != "space" &&
          out.workload != "scrub" && out.workload != "handover")
        return false;
    } else if (arg == "--trace") {
      out.trace = true;
    } else if (arg == "--fail-fast") {
      out.fail_fast = true;
    } else if (arg == "--worker") {
      out.worker = true;
    } else {
      std::fprintf(stderr, "cairn-sim: unknown argument '%s'\n", arg.c_str());
      return false;
    }
  }
  if (out.workload.empty()) {
    out.workload = "checkpoint";
    for (const auto& bug : planted_bugs())
      if (bug.name == out.bug) out.workload = bug.workload;
  }
  return true;
}

std::string replay(std::uint64_t seed, const Arguments& args) {
  return "cairn-sim --workload " + args.workload + " --seed " + std::to_string(seed) + " --trace" +
         (args.bug.empty() ? "" : " --bug " + args.bug);
}

int run_single(const Arguments& args) {
  std::function<void(const std::string&)> trace;
  if (args.trace) trace = [](const std::string& line) { std::printf("%s\n", line.c_str()); };
  const auto result = run_workload(args, args.first, std::move(trace));
  std::printf("seed %" PRIu64 ": %s\n", result.seed, result.configuration.c_str());
  std::printf("  trace %016" PRIx64 ", %" PRIu64 " events, %.1f virtual seconds, %" PRIu64 " commits, %" PRIu64
              " restores; faults: %s\n",
              result.trace_hash, result.events, result.virtual_seconds, result.commits, result.restores,
              result.faults.text().c_str());
  for (const auto& violation : result.violations) std::printf("  BROKEN %s\n", violation.c_str());
  const bool broken = !result.violations.empty();
  return broken == !args.bug.empty() ? 0 : 1;
}

// ---- Workers: processes of their own, each under its own address layout, so that a run that depends on addresses
// shows in the traces, and a seed that crashes is known.
//
// A worker reads seeds from its standard input, one a line, and answers each with one line:
//   start SEED
//   done SEED HASH EVENTS COMMITS RESTORES VIOLATIONS IDLE COUNT,...       (a count per fault, with + when it was
//   enabled)
// and before "done" a line "broken SEED TEXT" per violation.

int run_worker(const Arguments& args) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  char line[64];
  while (std::fgets(line, sizeof line, stdin) != nullptr) {
    const auto seed = std::strtoull(line, nullptr, 10);
    std::printf("start %llu\n", seed);
    const auto r = run_workload(args, seed, {});
    for (const auto& violation : r.violations) {
      auto text = violation;
      std::replace(text.begin(), text.end(), '\n', '|');
      std::printf("broken %llu %s\n", seed, text.c_str());
    }
    std::string faults;
    for (std::size_t i = 0; i < kFaultCount; ++i)
      faults += (r.faults.enabled(static_cast<Fault>(i)) ? "+" : "-") +
                std::to_string(r.faults.count(static_cast<Fault>(i))) + ",";
    std::printf("done %llu %016" PRIx64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %zu %d %s\n", seed, r.trace_hash,
                r.events, r.commits, r.restores, r.violations.size(), r.faults.idle() ? 1 : 0, faults.c_str());
  }
  return 0;
}

struct Worker {
  pid_t pid = -1;
  int in = -1, out = -1;  // its standard input and output
  std::string buffer;
  std::optional<std::uint64_t> seed;  // being run
};

bool start(Worker& worker, const Arguments& args) {
  int to[2], from[2];
  if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) return false;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, to[0], 0);
  posix_spawn_file_actions_adddup2(&actions, from[1], 1);
  std::vector<std::string> words{"cairn-sim", "--worker", "--workload", args.workload};
  if (!args.bug.empty()) {
    words.push_back("--bug");
    words.push_back(args.bug);
  }
  std::vector<char*> argv;
  for (auto& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int rc = posix_spawn(&worker.pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(to[0]);
  ::close(from[1]);
  worker.in = to[1];
  worker.out = from[0];
  worker.buffer.clear();
  worker.seed.reset();
  return rc == 0;
}

void stop(Worker& worker, bool kill_it) {
  if (worker.pid < 0) return;
  ::close(worker.in);
  if (kill_it) ::kill(worker.pid, SIGKILL);
  ::close(worker.out);
  int status = 0;
  waitpid(worker.pid, &status, 0);
  worker.pid = -1;
}

struct Tally {
  std::uint64_t seeds = 0, events = 0, commits = 0, restores = 0, idle = 0, twice = 0;
  std::array<std::uint64_t, kFaultCount> faults{}, enabled{};
  std::set<std::uint64_t> failing;
  std::map<std::uint64_t, std::string> hashes;  // of seeds that run twice
};

void fail_seed(Tally& tally, std::uint64_t seed, const std::string& why, const Arguments& args) {
  if (tally.failing.insert(seed).second || why.size() > 0)
    std::printf("seed %" PRIu64 " BROKEN %s\n  replay: %s\n", seed, why.c_str(), replay(seed, args).c_str());
  std::fflush(stdout);
}

void take_line(Tally& tally, Worker& worker, const std::string& line, const Arguments& args) {
  char word[16] = {}, hash[32] = {}, faults[512] = {};
  std::uint64_t seed = 0, events = 0, commits = 0, restores = 0, violations = 0;
  int idle = 0;
  if (line.starts_with("broken ")) {
    const auto space = line.find(' ', 7);
    return fail_seed(tally, std::strtoull(line.c_str() + 7, nullptr, 10), line.substr(space + 1), args);
  }
  if (std::sscanf(line.c_str(), "%15s %" SCNu64 " %31s %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %d %511s", word,
                  &seed, hash, &events, &commits, &restores, &violations, &idle, faults) != 9)
    return;
  worker.seed.reset();
  ++tally.seeds;
  tally.events += events;
  tally.commits += commits;
  tally.restores += restores;
  tally.idle += static_cast<std::uint64_t>(idle);
  const char* at = faults;
  for (std::size_t i = 0; i < kFaultCount && *at != '\0'; ++i) {
    tally.enabled[i] += *at == '+';
    char* end = nullptr;
    tally.faults[i] += std::strtoull(at + 1, &end, 10);
    at = *end == ',' ? end + 1 : end;
  }
  auto [it, fresh] = tally.hashes.try_emplace(seed, hash);
  if (!fresh) {
    ++tally.twice;
    if (it->second != hash)
      fail_seed(tally, seed, "two processes saw different traces: " + it->second + " and " + hash, args);
  } else if (seed % 100 != 0) {
    tally.hashes.erase(it);
  }
}

int run_many(Arguments args) {
  if (!args.bug.empty()) args.fail_fast = true;
  std::vector<Worker> workers(args.jobs);
  // One seed in a hundred is asked for twice, the second time of another process.
  std::vector<std::uint64_t> again;
  if (args.bug.empty())
    for (auto seed = args.first; seed <= args.last; ++seed)
      if (seed % 100 == 0) again.push_back(seed);
  std::uint64_t next = args.first;
  auto has_next = [&] { return next <= args.last || !again.empty(); };

  Tally tally;
  const auto began = std::chrono::steady_clock::now();
  for (auto& worker : workers)
    if (!start(worker, args)) {
      std::fprintf(stderr, "cairn-sim: cannot start a worker: %s\n", std::strerror(errno));
      return 1;
    }
  bool restarted_for_again = args.jobs > 1;
  for (;;) {
    if (args.fail_fast && !tally.failing.empty()) break;
    bool busy = false;
    for (auto& worker : workers) {
      if (!worker.seed && has_next()) {
        if (next > args.last && !restarted_for_again) {  // the only process: the second runs need a fresh one
          stop(worker, false);
          start(worker, args);
          restarted_for_again = true;
        }
        std::uint64_t seed;
        if (next <= args.last) {
          seed = next++;
        } else {
          seed = again.back();
          again.pop_back();
        }
        worker.seed = seed;
        const auto line = std::to_string(seed) + "\n";
        if (::write(worker.in, line.data(), line.size()) < 0) continue;
      }
      busy |= worker.seed.has_value();
    }
    if (!busy) break;
    std::vector<pollfd> polls;
    for (auto& worker : workers) polls.push_back({worker.out, POLLIN, 0});
    if (poll(polls.data(), polls.size(), 300'000) == 0) {
      for (auto& worker : workers)
        if (worker.seed) fail_seed(tally, *worker.seed, "no end after five minutes", args);
      for (auto& worker : workers) stop(worker, true);
      return args.bug.empty() ? 1 : 0;
    }
    for (std::size_t i = 0; i < workers.size(); ++i) {
      if (polls[i].revents == 0) continue;
      auto& worker = workers[i];
      char chunk[4096];
      const auto n = ::read(worker.out, chunk, sizeof chunk);
      if (n <= 0) {
        const auto seed = worker.seed;
        ::close(worker.in);
        ::close(worker.out);
        int status = 0;
        waitpid(worker.pid, &status, 0);
        worker.pid = -1;
        if (seed)
          fail_seed(tally, *seed,
                    WIFSIGNALED(status) ? "the process ended with signal " + std::to_string(WTERMSIG(status))
                                        : "the process ended with code " + std::to_string(WEXITSTATUS(status)),
                    args);
        if (!start(worker, args)) return 1;
        continue;
      }
      worker.buffer.append(chunk, static_cast<std::size_t>(n));
      for (auto end = worker.buffer.find('\n'); end != std::string::npos; end = worker.buffer.find('\n')) {
        take_line(tally, worker, worker.buffer.substr(0, end), args);
        worker.buffer.erase(0, end + 1);
      }
    }
  }
  for (auto& worker : workers) stop(worker, worker.seed.has_value());

  const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  // By the time of the processor: the machine may be busy with other things.
  rusage used{};
  getrusage(RUSAGE_CHILDREN, &used);
  const auto cpu = static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
  std::printf("%" PRIu64 " seeds in %.1f s: %.0f seeds a minute and core; %" PRIu64 " events, %" PRIu64
              " commits, %" PRIu64 " restores; %" PRIu64 " seeds run twice\n",
              tally.seeds, seconds, static_cast<double>(tally.seeds) * 60 / std::max(cpu, 0.001), tally.events,
              tally.commits, tally.restores, tally.twice);
  std::printf("faults:");
  for (std::size_t i = 0; i < kFaultCount; ++i)
    std::printf(" %s=%" PRIu64, std::string(name_of(static_cast<Fault>(i))).c_str(), tally.faults[i]);
  std::printf("\n");

  if (!args.bug.empty()) {
    std::printf(
        "bug %s: %s\n", args.bug.c_str(),
        tally.failing.empty() ? "NOT CAUGHT" : ("caught after " + std::to_string(tally.seeds + 1) + " seeds").c_str());
    return tally.failing.empty() ? 1 : 0;
  }
  bool ok = tally.failing.empty();
  // Over many seeds every class of faults must have happened: else the swarm tests less than it says.
  if (tally.seeds >= 1000)
    for (std::size_t i = 0; i < kFaultCount; ++i)
      if (tally.enabled[i] > 0 && tally.faults[i] == 0) {
        std::printf("BROKEN: fault %s was enabled and never happened\n",
                    std::string(name_of(static_cast<Fault>(i))).c_str());
        ok = false;
      }
  if (tally.idle > 0) std::printf("%" PRIu64 " seeds injected none of the faults they enabled\n", tally.idle);
  if (!ok) {
    std::printf("%zu failing seeds:", tally.failing.size());
    for (auto seed : tally.failing) std::printf(" %" PRIu64, seed);
    std::printf("\n");
  }
  return ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  if (!parse(argc, argv, args)) {
    std::fputs(kHelp, stderr);
    return 2;
  }
  if (args.worker) return run_worker(args);
  if (args.single) return run_single(args);
  return run_many(args);
}
