#include "client/examples/char_lm/ranks.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace char_lm {
namespace {

std::string text_of_status(int status) {
  if (WIFSIGNALED(status)) {
    int number = WTERMSIG(status);
    return "was killed by signal " + std::to_string(number) + " (" + strsignal(number) + ")";
  }
  return "exited with " + std::to_string(WEXITSTATUS(status));
}

}  // namespace

std::expected<SharedMemory, std::string> SharedMemory::create(std::size_t bytes) {
  int fd = memfd_create("char_lm", MFD_CLOEXEC);
  if (fd < 0) return std::unexpected(std::string("memfd_create: ") + std::strerror(errno));
  void* data = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(bytes)) == 0)
    data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  int error = errno;
  close(fd);
  if (data == MAP_FAILED)
    return std::unexpected("shared memory of " + std::to_string(bytes) + " bytes: " + std::strerror(error));
  return SharedMemory(static_cast<std::byte*>(data), bytes);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

SharedMemory::~SharedMemory() {
  if (data_) munmap(data_, size_);
}

void Barrier::init(unsigned count) {
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&barrier_, &attributes, count);
  pthread_barrierattr_destroy(&attributes);
}

void Barrier::wait() {
  pthread_barrier_wait(&barrier_);
}

Rows rows_of(std::size_t rows, int rank, int ranks) {
  const std::size_t piece = (rows + ranks - 1) / ranks;
  return {std::min(rows, piece * rank), std::min(rows, piece * (rank + 1))};
}

std::expected<void, std::string> run_ranks(int ranks, const std::function<int(int rank)>& body,
                                           const std::function<void(std::span<const pid_t>)>& started) {
  std::fflush(nullptr);  // or every child would print what is still buffered
  const pid_t parent = getpid();
  std::vector<pid_t> pids;
  std::string failure;
  for (int rank = 0; rank < ranks; ++rank) {
    pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) std::_Exit(1);  // it died before the line above
      int code = body(rank);
      std::fflush(nullptr);
      std::_Exit(code);  // the parent's destructors and exit handlers are not ours to run
    }
    if (pid < 0) {
      failure = std::string("fork: ") + std::strerror(errno);
      break;
    }
    pids.push_back(pid);
  }

  auto kill_all = [&] {
    for (pid_t pid : pids)
      if (pid > 0) kill(pid, SIGKILL);
  };
  if (!failure.empty()) kill_all();
  if (failure.empty() && started) started(pids);
  for (std::size_t left = pids.size(); left > 0;) {
    int status = 0;
    pid_t pid = waitpid(-1, &status, 0);
    if (pid < 0 && errno == EINTR) continue;
    if (pid < 0) return std::unexpected(std::string("waitpid: ") + std::strerror(errno));
    auto found = std::ranges::find(pids, pid);
    if (found == pids.end()) continue;
    *found = 0;
    --left;
    if (status != 0 && failure.empty()) {
      failure = "rank " + std::to_string(found - pids.begin()) + " " + text_of_status(status);
      if (left > 0) failure += "; the other ranks were ended";
      kill_all();
    }
  }
  if (!failure.empty()) return std::unexpected(failure);
  return {};
}

}  // namespace char_lm
