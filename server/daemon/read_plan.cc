#include "server/daemon/read_plan.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {
namespace {

format::Strided runs_of(const wire::ReadRanges::Strided& strided) {
  format::Strided out{.offset = strided.offset(), .length = strided.length()};
  for (int i = 0; i < strided.counts_size(); ++i)
    out.steps.push_back({.count = strided.counts(i), .stride = strided.strides(i)});
  return out;
}

}  // namespace

std::uint64_t PieceRead::block_bytes() const {
  return round_up(end, kBlockBytes) - round_down(begin, kBlockBytes);
}

bool PieceRead::sparse() const {
  return bytes < static_cast<std::uint64_t>(std::popcount(blocks)) * kBlockBytes / 8 * 7;
}

Result<ReadPlan> ReadPlan::make(const wire::ReadRanges& request, std::uint32_t piece_bytes, Limits limits) {
  ReadPlan plan(request, piece_bytes);
  std::uint64_t ranges = 0, runs = 0;
  for (const auto& chunk : request.chunks()) {
    TRY(const auto id, wire::from_wire(chunk.id()));
    plan.ids_.push_back(id);
    if (chunk.offsets_size() != chunk.lengths_size())
      return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::to_string(chunk.offsets_size()) + " offsets and " +
                                      std::to_string(chunk.lengths_size()) + " lengths");
    ranges += static_cast<std::uint64_t>(chunk.offsets_size()) + static_cast<std::uint64_t>(chunk.strided_size());
    for (int i = 0; i < chunk.offsets_size(); ++i) {
      const auto offset = chunk.offsets(i), length = chunk.lengths(i);
      if (length == 0 || length > kChunkBytesMax || offset > kChunkBytesMax - length)
        return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::to_string(length) + " bytes at " +
                                        std::to_string(offset) + " lie outside any chunk");
      plan.bytes_ += length;
    }
    for (const auto& strided : chunk.strided()) {
      if (strided.counts_size() == 0 || strided.counts_size() != strided.strides_size())
        return fail(Errc::kInvalid, "chunk " + id.text() + ": strided runs with " +
                                        std::to_string(strided.counts_size()) + " counts and " +
                                        std::to_string(strided.strides_size()) + " strides");
      const auto one = runs_of(strided);
      if (auto checked = format::check_strided(one, kChunkBytesMax, limits.runs_max); !checked)
        return fail(std::move(checked).error().with("chunk " + id.text()));
      runs += one.runs();
      plan.bytes_ += one.bytes();
    }
    if (ranges > limits.ranges_max || runs > limits.runs_max || plan.bytes_ > limits.bytes_max)
      return fail(Errc::kInvalid, "more than " + std::to_string(limits.ranges_max) + " ranges, " +
                                      std::to_string(limits.runs_max) + " strided runs or " +
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

void ReadPlan::add(PieceRead& read, const PieceRead::Part& part) const {
  read.begin = std::min(read.begin, part.offset);
  read.end = std::max(read.end, part.offset + part.size);
  read.bytes += part.size;
  const auto first = part.offset % piece_bytes_ / kBlockBytes;
  const auto last = (part.offset % piece_bytes_ + part.size - 1) / kBlockBytes;
  read.blocks |= (~std::uint64_t{0} >> (63 - (last - first))) << first;
}

PieceRead ReadPlan::next_of_ranges(PieceRead::Part first) {
  PieceRead read{.id = ids_[static_cast<std::size_t>(chunk_)],
                 .piece = first.offset / piece_bytes_,
                 .begin = first.offset,
                 .end = first.offset + first.size,
                 .parts = {},
                 .runs = {},
                 .from = {}};
  for (std::optional<PieceRead::Part> part = first;;) {
    add(read, *part);
    read.parts.push_back(*part);
    take(*part);
    part = peek();
    if (!part || part->offset / piece_bytes_ != read.piece) return read;
    // Blocks between them that nobody wants are not worth a second read when there is at most one.
    const auto from = part->offset / kBlockBytes, to = (part->offset + part->size - 1) / kBlockBytes;
    if (from > (read.end - 1) / kBlockBytes + 1 || to + 1 < read.begin / kBlockBytes) return read;
  }
}

PieceRead ReadPlan::next_of_runs() {
  const auto begin = static_cast<std::uint32_t>(at_->at());
  PieceRead read{.id = ids_[static_cast<std::size_t>(chunk_)],
                 .piece = begin / piece_bytes_,
                 .begin = begin,
                 .end = begin,
                 .parts = {},
                 .runs = runs_,
                 .from = at_};
  const auto piece_end = std::uint64_t{read.piece + 1} * piece_bytes_;
  while (!at_->done() && at_->at() < piece_end) {
    const auto offset = static_cast<std::uint32_t>(at_->at());
    const auto size = static_cast<std::uint32_t>(std::min(at_->left(), piece_end - offset));
    add(read, {.offset = offset, .size = size});
    at_->take(size);
  }
  if (at_->done()) {
    at_.reset();
    ++strided_;
  }
  return read;
}

std::optional<PieceRead> ReadPlan::next() {
  for (; chunk_ < request_->chunks_size(); ++chunk_, range_ = 0, strided_ = 0) {
    if (const auto part = peek()) return next_of_ranges(*part);
    const auto& chunk = request_->chunks(chunk_);
    if (strided_ == chunk.strided_size()) continue;
    if (!at_) {
      runs_ = std::make_shared<const format::Strided>(runs_of(chunk.strided(strided_)));
      at_.emplace(*runs_);
    }
    return next_of_runs();
  }
  return std::nullopt;
}

std::vector<ReadPlan::Key> ReadPlan::partly_wanted(std::size_t keys_max) const {
  std::vector<Key> out;
  const auto add = [&](const ChunkId& id, std::uint64_t piece) {
    const Key key{id, static_cast<std::uint32_t>(piece)};
    if (out.size() < keys_max && (out.empty() || out.back() != key)) out.push_back(key);
  };
  for (int c = 0; c < request_->chunks_size() && out.size() < keys_max; ++c) {
    const auto& chunk = request_->chunks(c);
    const auto& id = ids_[static_cast<std::size_t>(c)];
    for (int i = 0; i < chunk.offsets_size() && out.size() < keys_max; ++i) {
      // Of a range that fills pieces only the first and the last are partly wanted.
      const std::uint64_t begin = chunk.offsets(i), end = begin + chunk.lengths(i);
      if (begin % piece_bytes_ != 0) add(id, begin / piece_bytes_);
      if (end % piece_bytes_ != 0) add(id, (end - 1) / piece_bytes_);
    }
    for (const auto& strided : chunk.strided()) {
      const auto end = runs_of(strided).end();
      for (std::uint64_t piece = strided.offset() / piece_bytes_; piece * piece_bytes_ < end && out.size() < keys_max;
           ++piece)
        add(id, piece);
    }
  }
  return out;
}

}  // namespace cairn::server
