#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proto/common/result.h"
#include "proto/common/units.h"
#include "storage/format/manifest.h"
#include "storage/format/strided.h"

namespace cairn::format {

/// A box that a caller wants, row-major, in a buffer of its own.
struct Want {
  std::string tensor;
  Box box;
  std::optional<DType> dtype;               // must equal the saved one when given
  std::optional<std::uint64_t> size_bytes;  // of the buffer; must be the box's bytes when given
};

struct PlanLimits {
  std::uint64_t request_bytes_max = 32 * kMiB;
  std::uint32_t request_ranges_max = 16 * 1024;  // a set of strided runs counts as one
  std::uint32_t request_runs_max = 512 * 1024;
};

/// Ranges of a chunk, then strided runs.
struct ReadChunk {
  ChunkId id;
  /// Neighbours are one range. Ranges, and the first bytes of strided runs, rise, unless bytes are wanted twice.
  std::vector<std::uint32_t> offsets;
  std::vector<std::uint32_t> lengths;  // as many, each >= 1
  std::vector<Strided> strided = {};   // each of several runs
};

/// The next bytes of a reply, as many as the runs have, go to them in the buffer of wants[want].
struct Scatter {
  std::uint32_t want = 0;
  Strided to;
};

/// One vectored read of chunks of one group. The reply is the chunks' bytes in order.
struct ReadRequest {
  DataGroup group = 0;
  std::vector<ReadChunk> chunks;  // sorted by id; one may come several times
  std::vector<Scatter> scatter;   // together exactly the reply
  std::uint64_t bytes = 0;
};

struct RestorePlan {
  std::vector<ReadRequest> requests;  // sorted by (group, chunk, offset); one chunk may be split over several
  std::uint64_t bytes = 0;
};

/// Which bytes to read, and where to put them, so that every wanted element is filled exactly once.
///
/// `shards` are entries of a committed index in any order, at least all that touch a wanted box; holders are used
/// part by part; a box saved twice with equal size and CRC is read once.
/// errors: kNotFound  a tensor that was not saved, or the first box of a want that no shard holds
///         kInvalid   wrong dtype, shape or buffer size; sub-byte elements that do not begin at a whole byte
///         kDataLoss  shards contradict each other: overlap, different shapes, extents that do not fit
Result<RestorePlan> plan(std::span<const Want> wants, std::span<const ShardEntry> shards,
                         const PlanLimits& limits = {});

}  // namespace cairn::format
