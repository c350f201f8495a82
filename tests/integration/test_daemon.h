#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace cairn::test {

/// A real cairnd on a free port in a temporary directory; killed and removed with this object.
class TestDaemon {
 public:
  /// `flags` are added to every start. The program is bin/cairnd beside the tests (environment CAIRND overrides).
  explicit TestDaemon(std::vector<std::string> flags = {});
  ~TestDaemon();
  TestDaemon(const TestDaemon&) = delete;
  TestDaemon& operator=(const TestDaemon&) = delete;

  /// Starts again on the same data and the same port.
  void start();
  void kill9();
  pid_t pid() const { return pid_; }
  /// SIGTERM; its exit status.
  int stop();
  const std::string& http() const { return http_; }  // HOST:PORT of /metrics
  const std::string& address() const { return address_; }
  const std::string& folder() const { return folder_; }
  std::string data() const { return folder_ + "/data"; }

 private:
  std::vector<std::string> flags_;
  std::string folder_, listen_ = "127.0.0.1:0", address_, http_;
  pid_t pid_ = -1;
};

}  // namespace cairn::test
