#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cairn::bench {

struct TinyOptions {
  std::uint32_t tensors = 10'000;    // of 1 to 64 KiB, in turn over the ranks
  std::uint64_t bytes = 1ull << 30;  // of large ones beside, together
  std::uint32_t ranks = 4, rounds = 10;
  std::string data, transport = "auto";
  std::string daemon_program;
  std::vector<std::string> daemon_flags;
  bool json = false;
};

/// Saves and restores large tensors with many tiny ones beside, and in turn the same bytes in large ones only: what the
/// tiny ones cost above their bytes, in time, on the disk and on the wire. Prints the figures; returns the exit code.
int run_tiny(const TinyOptions& options);

}  // namespace cairn::bench
