#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "proto/common/units.h"
#include "proto/rt/seams.h"
#include "storage/index/index.h"

namespace cairn::storage {

struct RocksDbOptions {
  std::uint64_t memory_bytes = 64 * kMiB;  // at least 8 MiB: half for changes not yet in tables, half for cached blocks
  int reader_threads = 2;                  // 1 .. 16; for reads that are not in memory
  int open_files_max = 256;                // at least 32
};

/// The index of one target in a RocksDB database at `path`, made when missing (mode 0700).
///
/// Commits run on a thread of their own, in order; reads that memory can answer run on the loop, others on reader
/// threads. Nothing is repaired and nothing is retried: a damaged database does not open, and after a failed commit
/// every later one fails. What RocksDB cannot notice, a log cut off at its end, is what the committer's mark is for.
///
/// Lifetime: destroying it waits for the commit and reads that run. No Task of its may be waited for any longer.
/// errors: kDataLoss  the database is damaged, or files of it are missing
///         kBusy      another process has it open
///         kInvalid   options out of range, or tables that only a newer version knows
///         kNoSpace, kDenied, kFailed
Task<std::unique_ptr<Index>> open_rocksdb_index(rt::Runtime runtime, std::string path, RocksDbOptions options = {});

}  // namespace cairn::storage
