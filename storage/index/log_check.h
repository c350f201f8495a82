#pragma once

#include <cstdint>
#include <string>

#include "proto/common/result.h"

// What RocksDB's own checks let pass. Its logs, and its MANIFEST, are read until a record reaches beyond the end of the
// file or is of a kind that recycled logs use: that is taken for the torn end of what a crash interrupted, and
// everything behind it is dropped without a word. One flipped bit of a length or a kind looks the same.
//
// source: RocksDB's log format (blocks of 32 KiB; record: masked CRC32C 4, length 2, kind 1, payload)

namespace cairn::storage {

/// Checks the logs in `folder` with numbers from `first` on, except the newest that is not empty: that one may be torn,
/// and the committer's mark notices what it lacks. All others must be whole.
/// errors: kDataLoss  names file and offset;  kFailed  a file cannot be read
Result<void> check_finished_logs(const std::string& folder, std::uint64_t first);

/// Checks the MANIFEST that CURRENT names, if there is one. It may be torn: where it ends, nothing that is or was a
/// record may follow.
/// errors: as check_finished_logs()
Result<void> check_manifest(const std::string& folder);

}  // namespace cairn::storage
