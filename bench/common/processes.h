#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace cairn::bench {

double now_seconds();      // CLOCK_MONOTONIC, the same in all processes
double own_cpu_seconds();  // user + system of this process
/// user + system seconds and peak resident bytes of another process; zeros when it is gone.
struct ProcessUse {
  double cpu_seconds = 0;
  std::uint64_t rss_bytes_max = 0;
};
ProcessUse use_of(pid_t pid);
/// One value of the /metrics at HOST:PORT, an IPv4 address; nothing when it does not answer.
std::optional<double> metric_at(const std::string& http, const std::string& name);
/// The same of a daemon elsewhere, from its /metrics; zeros when it does not answer there.
ProcessUse use_from_metrics(const std::string& http);

/// What a rank reports of one phase.
struct Report {
  double begin = 0, end = 0;  // now_seconds()
  double stall = 0;           // save: until stage() returned
  double cpu_seconds = 0;
  std::uint64_t wanted = 0, moved = 0, from_disk = 0, wrong_bytes = 0;
  double figures[16] = {};  // what else a phase has to tell, by its own numbers
  bool failed = false;
  char error[512] = {};
  /// Another rank of the same process. CPU time is the process's own.
  void add(const Report& other);
};

/// Rank processes, forked before this process has threads. Each runs `work(rank, phase, argument)` for every phase that
/// the parent starts, all from one barrier.
class Ranks {
 public:
  using Work = std::function<void(std::uint32_t rank, std::uint32_t phase, std::uint64_t argument, Report& report)>;
  /// `ranks` forked children; `work` and what it holds live in each child.
  Ranks(std::uint32_t ranks, std::function<Work(std::uint32_t rank)> make_work);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  /// Runs one phase on all ranks. A rank that dies ends this process too, with a message.
  std::vector<Report> run(std::uint32_t phase, std::uint64_t argument);

 private:
  struct Shared;
  void child(std::uint32_t rank, const std::function<Work(std::uint32_t)>& make_work);
  Shared* shared_;
  std::vector<pid_t> pids_;
  std::uint32_t ranks_;
};

/// A cairnd of our own on `data`, port 0.
class OwnDaemon {
 public:
  OwnDaemon(std::string program, std::string data, std::vector<std::string> extra)
      : program_(program), data_(data), extra_(extra) {}
  ~OwnDaemon() { stop(); }
  OwnDaemon(const OwnDaemon&) = delete;
  OwnDaemon& operator=(const OwnDaemon&) = delete;
  /// Empty: ready. Else what it said.
  std::string start();
  void stop();  // SIGTERM
  void kill();  // SIGKILL
  const std::string& address() const { return address_; }
  /// One value of its /metrics; nothing when it does not answer.
  std::optional<double> metric(const std::string& name) const;
  pid_t pid() const { return pid_; }
  double ready_seconds() const { return ready_seconds_; }

 private:
  std::string program_, data_;
  std::vector<std::string> extra_;
  std::string listen_ = "127.0.0.1:0", address_, http_;
  pid_t pid_ = -1;
  double ready_seconds_ = 0;

  void end(int signal);
};

/// Empties the guest's page cache where allowed, else gives up the pages of `files`. Returns what it did.
std::string drop_caches(const std::vector<std::string>& files);

}  // namespace cairn::bench
