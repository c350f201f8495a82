#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cairn::bench {

struct OpenOptions {
  std::uint64_t chunks = 1'000'000;
  std::uint32_t rounds = 5;
  std::string data;
  std::string daemon_program;
  std::vector<std::string> daemon_flags;
  bool json = false;
};

/// A store of that many chunks of 4 KiB, a thousand to an object, written by a client. Then how long it takes from the
/// start of the daemon to the first byte that a client reads, cold; by turns after a kill and after an orderly end. The
/// store stays in `data` and is used again when it is there. Prints the figures; returns the exit code.
int run_open(const OpenOptions& options);

}  // namespace cairn::bench
