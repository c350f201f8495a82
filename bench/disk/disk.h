#pragma once

#include <cstdint>
#include <string>

namespace cairn::bench {

struct DiskOptions {
  std::string data;
  std::uint64_t bytes = 1ull << 30;
  std::uint32_t chunk_bytes = 16u << 20;
  std::uint32_t streams = 4;
  std::uint32_t rounds = 5;  // measured, after one that is reported apart
  bool json = false;
};

/// The storage engine alone, without network and client: `streams` writers put chunks until they are durable, the
/// engine is opened again, and as many readers read them back, verified; in every round also O_DIRECT files of the same
/// bytes by as many threads. Returns the exit code.
int run_disk(const DiskOptions& options);

}  // namespace cairn::bench
