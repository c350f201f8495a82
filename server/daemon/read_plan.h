#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "proto/common/ids.h"
#include "storage/format/strided.h"

namespace cairn::wire {
class ReadRanges;
}

namespace cairn::server {

/// One read of the store, within one aligned piece of a chunk, and what of it goes into the reply, in order.
struct PieceRead {
  ChunkId id;
  std::uint32_t piece = 0;           // which one of the chunk
  std::uint32_t begin = 0, end = 0;  // in the chunk
  struct Part {
    std::uint32_t offset = 0;  // in the chunk
    std::uint32_t size = 0;
  };
  std::vector<Part> parts;
  /// Instead of parts: the next `bytes` of these runs. Not one by one: they may be a million.
  std::shared_ptr<const format::Strided> runs;
  std::optional<format::RunCursor> from;
  std::uint32_t bytes = 0;   // of all parts
  std::uint64_t blocks = 0;  // bit i: something in block i of the piece

  /// Bytes of the blocks between begin and end.
  std::uint64_t block_bytes() const;
  /// All between begin and end is wanted, in order.
  bool one_run() const { return !runs && parts.size() == 1; }
  /// Much of what its blocks hold is wanted by somebody else, if by anybody.
  bool sparse() const;
};

/// Goes through the parts of a piece, in order.
///
/// Lifetime: `piece` outlives it.
class PartWalk {
 public:
  explicit PartWalk(const PieceRead& piece) : piece_(&piece), runs_(piece.from), bytes_left_(piece.bytes) { enter(); }
  bool done() const { return bytes_left_ == 0; }
  std::uint32_t at() const { return part_.offset; }  // in the chunk
  std::uint32_t left() const { return part_.size; }  // of this part
  /// sizes: at most left()
  void take(std::uint32_t size) {
    part_.offset += size;
    part_.size -= size;
    bytes_left_ -= size;
    if (runs_) runs_->take(size);
    if (part_.size == 0 && bytes_left_ > 0) enter();
  }

 private:
  void enter() {
    if (runs_)
      part_ = {.offset = static_cast<std::uint32_t>(runs_->at()),
               .size = static_cast<std::uint32_t>(std::min<std::uint64_t>(bytes_left_, runs_->left()))};
    else
      part_ = piece_->parts[next_++];
  }

  const PieceRead* piece_;
  std::size_t next_ = 0;
  std::optional<format::RunCursor> runs_;
  std::uint32_t bytes_left_;
  PieceRead::Part part_;
};

/// Splits a request into reads, lazily. Ranges that follow each other in the request and touch the same or neighbouring
/// blocks share a read, so that with rising offsets each block is read once.
///
/// Lifetime: `request` outlives it.
class ReadPlan {
 public:
  struct Limits {
    std::uint32_t ranges_max = 65'536;  // strided runs count as one
    std::uint32_t runs_max = 1 << 20;   // of all strided runs
    std::uint64_t bytes_max = 256ULL << 20;
  };
  /// A piece of a chunk.
  using Key = std::pair<ChunkId, std::uint32_t>;

  /// errors: kInvalid  malformed ids, empty ranges, ranges outside any chunk, over a limit
  static Result<ReadPlan> make(const wire::ReadRanges& request, std::uint32_t piece_bytes, Limits limits);

  std::uint64_t bytes() const { return bytes_; }
  /// Nothing at the end.
  std::optional<PieceRead> next();
  /// Pieces of which the request wants parts, in the order of next(), at most so many; some more than it will read.
  std::vector<Key> partly_wanted(std::size_t keys_max) const;

 private:
  ReadPlan(const wire::ReadRanges& request, std::uint32_t piece_bytes)
      : request_(&request), piece_bytes_(piece_bytes) {}
  /// The next part of a range that lies within one piece; nothing at the end of the chunk's ranges.
  std::optional<PieceRead::Part> peek() const;
  void take(const PieceRead::Part& part);
  void add(PieceRead& read, const PieceRead::Part& part) const;
  PieceRead next_of_ranges(PieceRead::Part first);
  PieceRead next_of_runs();

  const wire::ReadRanges* request_;
  std::uint32_t piece_bytes_;
  std::uint64_t bytes_ = 0;
  std::vector<ChunkId> ids_;
  int chunk_ = 0, range_ = 0, strided_ = 0;
  std::uint32_t in_range_ = 0;                   // bytes of the range already planned
  std::shared_ptr<const format::Strided> runs_;  // under way
  std::optional<format::RunCursor> at_;          // in them
};

}  // namespace cairn::server
