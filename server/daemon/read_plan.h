#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "proto/common/ids.h"

namespace cairn::wire {
class ReadRanges;
}

namespace cairn::server {

/// One read of the store, within one aligned piece of a chunk, and what of it goes into the reply, in order.
struct PieceRead {
  ChunkId id;
  std::uint32_t begin = 0, end = 0;  // in the chunk
  struct Part {
    std::uint32_t offset = 0;  // in the chunk
    std::uint32_t size = 0;
  };
  std::vector<Part> parts;

  /// Bytes of the blocks that the read touches.
  std::uint64_t block_bytes() const;
};

/// Splits a request into reads, lazily. Ranges that follow each other in the request and touch the same or neighbouring
/// blocks share a read, so that with rising offsets each block is read once.
///
/// Lifetime: `request` outlives it.
class ReadPlan {
 public:
  struct Limits {
    std::uint32_t ranges_max = 65'536;
    std::uint64_t bytes_max = 256ULL << 20;
  };
  /// errors: kInvalid  malformed ids, empty ranges, ranges outside any chunk, over a limit
  static Result<ReadPlan> make(const wire::ReadRanges& request, std::uint32_t piece_bytes, Limits limits);

  std::uint64_t bytes() const { return bytes_; }
  /// Nothing at the end.
  std::optional<PieceRead> next();

 private:
  ReadPlan(const wire::ReadRanges& request, std::uint32_t piece_bytes)
      : request_(&request), piece_bytes_(piece_bytes) {}
  /// The next part of a range that lies within one piece; nothing at the end of the chunk's ranges.
  std::optional<PieceRead::Part> peek() const;
  void take(const PieceRead::Part& part);

  const wire::ReadRanges* request_;
  std::uint32_t piece_bytes_;
  std::uint64_t bytes_ = 0;
  std::vector<ChunkId> ids_;
  int chunk_ = 0, range_ = 0;
  std::uint32_t in_range_ = 0;  // bytes of the range already planned
};

}  // namespace cairn::server
