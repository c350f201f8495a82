#include "bench/common/processes.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace cairn::bench {

double now_seconds() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double own_cpu_seconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

ProcessUse use_of(pid_t pid) {
  ProcessUse use;
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(stat, line)) return use;
  std::istringstream fields(line.substr(line.rfind(')') + 2));
  std::string skipped;
  for (int i = 0; i < 11; ++i) fields >> skipped;
  std::uint64_t user = 0, system = 0;
  fields >> user >> system;
  use.cpu_seconds = static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  while (std::getline(status, line))
    if (line.starts_with("VmHWM:")) use.rss_bytes_max = std::strtoull(line.c_str() + 6, nullptr, 10) * 1024;
  return use;
}

std::optional<double> metric_at(const std::string& http, const std::string& name) {
  const auto colon = http.rfind(':');
  if (colon == std::string::npos) return std::nullopt;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(std::strtoul(http.c_str() + colon + 1, nullptr, 10)));
  if (inet_pton(AF_INET, http.substr(0, colon).c_str(), &address.sin_addr) != 1) return std::nullopt;
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return std::nullopt;
  std::string text;
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: " + http + "\r\nConnection: close\r\n\r\n";
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 &&
      write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
    char buffer[4096];
    for (ssize_t n = 0; (n = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  }
  close(fd);
  const auto at = text.find("\n" + name + " ");
  if (at == std::string::npos) return std::nullopt;
  return std::strtod(text.c_str() + at + name.size() + 2, nullptr);
}

ProcessUse use_from_metrics(const std::string& http) {
  return {.cpu_seconds = metric_at(http, "cairn_process_cpu_seconds_total").value_or(0),
          .rss_bytes_max = static_cast<std::uint64_t>(metric_at(http, "cairn_process_resident_max_bytes").value_or(0))};
}

void Report::add(const Report& other) {
  end = std::max(end, other.end);
  stall = std::max(stall, other.stall);
  wanted += other.wanted;
  moved += other.moved;
  from_disk += other.from_disk;
  wrong_bytes += other.wrong_bytes;
  if (other.failed && !failed) std::memcpy(error, other.error, sizeof error);
  failed |= other.failed;
}

struct Ranks::Shared {
  pthread_barrier_t begin, end;
  std::atomic<std::uint32_t> phase;
  std::atomic<std::uint64_t> argument;
  std::atomic<bool> quit;
  Report reports[1];  // one per rank
};

namespace {

const std::vector<pid_t>* watched = nullptr;

// A barrier that one rank never reaches would hold everybody for ever.
void child_ended(int) {
  if (watched == nullptr) return;
  for (auto pid : *watched)
    if (waitpid(pid, nullptr, WNOHANG) == pid) {
      constexpr char kText[] = "cairn-bench: a rank process died\n";
      (void)!write(STDERR_FILENO, kText, sizeof kText - 1);
      _exit(1);
    }
}

}  // namespace

Ranks::Ranks(std::uint32_t ranks, std::function<Work(std::uint32_t)> make_work) : ranks_(ranks) {
  void* memory =
      mmap(nullptr, sizeof(Shared) + ranks * sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  shared_ = new (memory) Shared{};
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&shared_->begin, &attributes, ranks + 1);
  pthread_barrier_init(&shared_->end, &attributes, ranks + 1);
  for (std::uint32_t r = 0; r < ranks; ++r) {
    const pid_t pid = fork();
    if (pid == 0) child(r, make_work);
    pids_.push_back(pid);
  }
  watched = &pids_;
  signal(SIGCHLD, child_ended);
}

void Ranks::child(std::uint32_t rank, const std::function<Work(std::uint32_t)>& make_work) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGCHLD, SIG_DFL);
  auto work = make_work(rank);
  for (;;) {
    pthread_barrier_wait(&shared_->begin);
    if (shared_->quit) _exit(0);
    auto& report = shared_->reports[rank];
    report = Report{};
    const double cpu = own_cpu_seconds();
    report.begin = now_seconds();
    work(rank, shared_->phase, shared_->argument, report);
    if (report.end == 0) report.end = now_seconds();
    report.cpu_seconds = own_cpu_seconds() - cpu;
    pthread_barrier_wait(&shared_->end);
  }
}

std::vector<Report> Ranks::run(std::uint32_t phase, std::uint64_t argument) {
  shared_->phase = phase;
  shared_->argument = argument;
  pthread_barrier_wait(&shared_->begin);
  pthread_barrier_wait(&shared_->end);
  return {shared_->reports, shared_->reports + ranks_};
}

Ranks::~Ranks() {
  watched = nullptr;
  shared_->quit = true;
  pthread_barrier_wait(&shared_->begin);
  for (auto pid : pids_) waitpid(pid, nullptr, 0);
}

std::string OwnDaemon::start() {
  int out[2];
  if (pipe(out) != 0) return "pipe failed";
  std::vector<std::string> args{program_, "--data", data_, "--listen", listen_, "--http", "127.0.0.1:0"};
  args.insert(args.end(), extra_.begin(), extra_.end());
  const double begun = now_seconds();
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    dup2(out[1], STDOUT_FILENO);
    close(out[0]);
    close(out[1]);
    std::vector<char*> argv;
    for (auto& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    execv(program_.c_str(), argv.data());
    std::fprintf(stderr, "cannot run %s: %s\n", program_.c_str(), std::strerror(errno));
    _exit(127);
  }
  close(out[1]);
  std::string line;
  char c = 0;
  while (read(out[0], &c, 1) == 1 && c != '\n') line += c;
  close(out[0]);
  ready_seconds_ = now_seconds() - begun;
  const auto at = line.find("listen=");
  if (!line.starts_with("cairnd ready") || at == std::string::npos) {
    stop();
    return "the daemon did not start" + (line.empty() ? "" : ": " + line);
  }
  address_ = line.substr(at + 7, line.find(' ', at) - at - 7);
  listen_ = address_;  // the ranks know this one
  if (const auto http = line.find("http="); http != std::string::npos)
    http_ = line.substr(http + 5, line.find(' ', http) - http - 5);
  return {};
}

std::optional<double> OwnDaemon::metric(const std::string& name) const {
  return metric_at(http_, name);
}

void OwnDaemon::stop() {
  end(SIGTERM);
}

void OwnDaemon::kill() {
  end(SIGKILL);
}

void OwnDaemon::end(int signal) {
  if (pid_ <= 0) return;
  ::kill(pid_, signal);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

std::string drop_caches(const std::vector<std::string>& files) {
  sync();
  if (std::ofstream drop("/proc/sys/vm/drop_caches"); drop << "3\n" << std::flush) return "drop_caches";
  for (const auto& name : files) {
    const int fd = open(name.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
  }
  return "fadvise";
}

}  // namespace cairn::bench
