#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "proto/rt/unit_pool.h"
#include "server/chunks/chunks.h"

namespace cairn::server {

/// Bytes that lie in chunks of following indices, all equally long but the last.
struct StoredRun {
  DataGroup group = 0;
  std::uint64_t writer = 0;
  std::uint32_t first_index = 0, count = 0;
  std::uint32_t chunk_bytes = 0, last_bytes = 0;
  std::uint64_t bytes() const { return count == 0 ? 0 : std::uint64_t{count - 1} * chunk_bytes + last_bytes; }
};

/// Appends bytes [offset, offset + size) of what `runs` hold one after the other to `out`, which must outlive the call.
/// Whole blocks are read: offsets and sizes of whole blocks cost least.
/// errors: kDataLoss  also when the runs are shorter
Task<void> read_stored(Chunks& chunks, OwnerId owner, std::vector<StoredRun> runs, std::uint64_t offset,
                       std::uint64_t size, std::string& out);

/// Writes bytes that the daemon itself made as chunks of one writer, which nobody else uses.
///
/// Threads:  the loop; one flush() at a time, and no append() meanwhile.
/// Lifetime: what it is given outlives it.
class ChunkStream {
 public:
  /// sizes: chunk_bytes a multiple of the unit size, at most kChunkBytesMax
  ChunkStream(Chunks& chunks, rt::UnitPool& units, OwnerId owner, DataGroup group, std::uint64_t writer,
              std::uint32_t chunk_bytes)
      : chunks_(chunks), units_(units), owner_(owner) {
    stored_.group = group;
    stored_.writer = writer;
    stored_.chunk_bytes = chunk_bytes;
  }

  void append(std::string_view bytes) { waiting_ += bytes; }
  /// Bytes appended that are not stored yet.
  std::uint64_t waiting() const { return waiting_.size(); }
  /// Stores the chunks that are full; with `all` also the rest, after which nothing is appended. Durable then.
  Task<void> flush(bool all);
  /// After flush(true).
  const StoredRun& stored() const { return stored_; }

 private:
  Chunks& chunks_;
  rt::UnitPool& units_;
  OwnerId owner_;
  StoredRun stored_;
  std::string waiting_;
};

}  // namespace cairn::server
