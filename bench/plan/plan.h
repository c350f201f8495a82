#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cairn::bench {

struct PlanOptions {
  std::uint32_t ranks = 16384, tensors = 1000;
  std::uint32_t rounds = 5;
  std::string data, server;
  std::string daemon_program;
  std::vector<std::string> daemon_flags;
  std::uint64_t memory_bytes = 512ull << 20;
  std::uint64_t seed = 1;
  bool json = false;
};

/// One process plays all ranks of a save, in shuffled order: each holds one element of each tensor. Another opens the
/// step as single ranks do, plans and reads their elements, and checks them. Prints the figures; returns the exit code.
///
/// Beside them, from the same run: how long it takes to write and flush a plain file of the index's length, and to read
/// as many pages of it, cold, as the plan fetched.
int run_plan(const PlanOptions& options);

}  // namespace cairn::bench
