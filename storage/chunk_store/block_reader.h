#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "storage/chunk_store/location_cache.h"
#include "storage/chunk_store/segments.h"

namespace cairn::storage {

/// Reads blocks of chunks from the disk and compares them with their CRCs. What is wrong it tells the caller, and the
/// operator by the log.
class BlockReader {
 public:
  BlockReader(rt::Runtime runtime, Segments& segments, PlantedBugs bugs)
      : runtime_(runtime), segments_(segments), bugs_(bugs) {}

  /// [begin, end) of a chunk, not verified: `begin` at a block, `end` at one or at the chunk's end. `entry`, and a pin
  /// of its extent, outlive the task. sizes:   `memory` has room for them, rounded up to 4096 returns `memory`, cut to
  /// that errors:  kDataLoss  the disk cannot read it: chunk, segment, offset
  Task<rt::MutableBuffer> read(ChunkId id, const ChunkEntry& entry, std::uint64_t begin, std::uint64_t end,
                               rt::MutableBuffer memory);
  /// Do these bytes, which begin with a block at `begin` and end with one, match the CRCs of the chunk's blocks?
  /// errors:  kDataLoss  the first that does not: chunk, block, segment, offset
  Result<void> verify(const ChunkId& id, const ChunkEntry& entry, std::uint64_t begin,
                      std::span<const std::byte> bytes);

  /// Since start; of reads that the disk refused, and of blocks that did not match.
  std::uint64_t blocks_bad() const { return blocks_bad_; }
  std::uint64_t bytes_read() const { return bytes_read_; }

 private:
  Failure bad(Error why);

  rt::Runtime runtime_;
  Segments& segments_;
  PlantedBugs bugs_;
  std::uint64_t bytes_read_ = 0, blocks_bad_ = 0;
};

}  // namespace cairn::storage
