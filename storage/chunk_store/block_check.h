#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/rt/unit_pool.h"
#include "storage/chunk_store/chunk_store.h"
#include "storage/disk/disk.h"

namespace cairn::storage {

/// Where some blocks of a chunk lie, and what they must be.
struct BlocksAt {
  ChunkId id;
  std::uint32_t offset = 0;  // in the chunk, a multiple of 64 KiB
  std::uint32_t size = 0;
  std::uint64_t at = 0;  // in the file
  std::string in;        // name of the file, for messages
  std::vector<std::uint32_t> crcs;
};

/// Reads them and tells each one that is bad. Where a read fails, its blocks are read one by one: an unreadable sector
/// says nothing about those beside it.
/// sizes:  memory has room for them, rounded up to sectors
/// errors: kUnavailable  no answer from the disk: nothing is known
Task<std::vector<ChunkStore::BadBlock>> check_blocks(std::shared_ptr<File> file, BlocksAt blocks,
                                                     rt::MutableBuffer memory);

}  // namespace cairn::storage
