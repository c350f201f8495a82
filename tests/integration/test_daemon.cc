#include "tests/integration/test_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

namespace cairn::test {
namespace {

std::string program() {
  if (const char* named = std::getenv("CAIRND")) return named;
  return CAIRN_BIN_DIR "/cairnd";
}

}  // namespace

TestDaemon::TestDaemon(std::vector<std::string> flags) : flags_(std::move(flags)) {
  std::string pattern = std::filesystem::temp_directory_path() / "cairn-test-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  folder_ = pattern;
  start();
}

TestDaemon::~TestDaemon() {
  kill9();
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void TestDaemon::start() {
  int out[2];
  if (pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("pipe failed");
  std::vector<std::string> args{program(), "--data",      data(),        "--listen", listen_,
                                "--http",  "127.0.0.1:0", "--log-level", "warning"};
  args.insert(args.end(), flags_.begin(), flags_.end());
  std::vector<char*> argv;
  for (auto& a : args) argv.push_back(a.data());
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(out[1], STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(out[1]);
  std::string line;
  char c = 0;
  while (read(out[0], &c, 1) == 1 && c != '\n') line += c;
  close(out[0]);
  const auto at = line.find("listen=");
  if (!line.starts_with("cairnd ready") || at == std::string::npos)
    throw std::runtime_error("cairnd did not start: " + line);
  address_ = line.substr(at + 7, line.find(' ', at) - at - 7);
  listen_ = address_;
  const auto http = line.find("http=");
  if (http != std::string::npos) http_ = line.substr(http + 5, line.find(' ', http) - http - 5);
}

void TestDaemon::kill9() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

int TestDaemon::stop() {
  int status = -1;
  kill(pid_, SIGTERM);
  waitpid(pid_, &status, 0);
  pid_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace cairn::test
