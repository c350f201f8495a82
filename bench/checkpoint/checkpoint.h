#pragma once

#include <cairn/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/checkpoint/workload.h"

namespace cairn::bench {

struct CheckpointOptions {
  std::string model = "8b";
  double scale = 0;         // of every element count; 0: from bytes
  std::uint64_t bytes = 0;  // total size, another way to say scale
  std::uint32_t ranks = 4;
  std::uint32_t processes = 0;  // that they share; 0: one each
  std::optional<Parallelism> layout;
  std::uint32_t rounds = 5;         // measured, after one that is reported apart
  std::string mode = "restore";     // save | restore | reshard | async
  std::uint32_t restore_ranks = 0;  // reshard; 0: as many
  Content content = Content::kWeights;
  bool steady = false;  // a step is freed before the next is saved, and a daemon that recycles nothing beside
  std::vector<std::string> peers;  // files, odirect
  std::string data, server, server_http, transport = "auto";
  std::string daemon_program;
  std::vector<std::string> daemon_flags;
  // As a client has them that says nothing.
  std::uint64_t arena_bytes = ClientOptions{}.arena_bytes;
  std::uint32_t chunk_bytes = ClientOptions{}.chunk_bytes, chunks_in_flight = ClientOptions{}.chunks_in_flight,
                connections = ClientOptions{}.connections;
  std::uint64_t seed = 1;
  bool json = false;
};

/// Runs the benchmark and prints it. Returns the exit code.
int run_checkpoint(const CheckpointOptions& options);

}  // namespace cairn::bench
