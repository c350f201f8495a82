#include "server/daemon/read_plan.h"

#include <algorithm>
#include <utility>

#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {

std::uint64_t PieceRead::block_bytes() const {
  return round_up(end, kBlockBytes) - round_down(begin, kBlockBytes);
}

Result<ReadPlan> ReadPlan::make(const wire::ReadRanges& request, std::uint32_t piece_bytes, Limits limits) {
  ReadPlan plan(request, piece_bytes);
  std::uint64_t ranges = 0;
  for (const auto& chunk : request.chunks()) {
    TRY(const auto id, wire::from_wire(chunk.id()));
    plan.ids_.push_back(id);
    if (chunk.offsets_size() != chunk.lengths_size())
      return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::to_string(chunk.offsets_size()) + " offsets and " +
                                      std::to_string(chunk.lengths_size()) + " lengths");
    ranges += static_cast<std::uint64_t>(chunk.offsets_size());
    for (int i = 0; i < chunk.offsets_size(); ++i) {
      const auto offset = chunk.offsets(i), length = chunk.lengths(i);
      if (length == 0 || length > kChunkBytesMax || offset > kChunkBytesMax - length)
        return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::to_string(length) + " bytes at " +
                                        std::to_string(offset) + " lie outside any chunk");
      plan.bytes_ += length;
    }
    if (ranges > limits.ranges_max || plan.bytes_ > limits.bytes_max)
      return fail(Errc::kInvalid, "more than " + std::to_string(limits.ranges_max) + " ranges or " +
                                      std::to_string(limits.bytes_max) + " bytes in one request");
  }
  return plan;
}

std::optional<PieceRead::Part> ReadPlan::peek() const {
  const auto& chunk = request_->chunks(chunk_);
  if (range_ == chunk.offsets_size()) return std::nullopt;
  const auto offset = chunk.offsets(range_) + in_range_;
  const auto left = chunk.lengths(range_) - in_range_;
  return PieceRead::Part{.offset = offset, .size = std::min(left, piece_bytes_ - offset % piece_bytes_)};
}

void ReadPlan::take(const PieceRead::Part& part) {
  in_range_ += part.size;
  if (in_range_ < request_->chunks(chunk_).lengths(range_)) return;
  in_range_ = 0;
  ++range_;
}

std::optional<PieceRead> ReadPlan::next() {
  while (chunk_ < request_->chunks_size()) {
    auto part = peek();
    if (!part) {
      ++chunk_;
      range_ = 0;
      continue;
    }
    PieceRead read{.id = ids_[static_cast<std::size_t>(chunk_)],
                   .begin = part->offset,
                   .end = part->offset + part->size,
                   .parts = {}};
    const auto piece = part->offset / piece_bytes_;
    for (;;) {
      read.begin = std::min(read.begin, part->offset);
      read.end = std::max(read.end, part->offset + part->size);
      read.parts.push_back(*part);
      take(*part);
      part = peek();
      if (!part || part->offset / piece_bytes_ != piece) return read;
      // Blocks between them that nobody wants are not worth a second read when there is at most one.
      const auto first = part->offset / kBlockBytes, last = (part->offset + part->size - 1) / kBlockBytes;
      if (first > (read.end - 1) / kBlockBytes + 1 || last + 1 < read.begin / kBlockBytes) return read;
    }
  }
  return std::nullopt;
}

}  // namespace cairn::server
