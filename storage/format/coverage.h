#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "proto/common/result.h"
#include "storage/format/manifest.h"

namespace cairn::format {

struct Totals {
  std::uint64_t tensors = 0, shards = 0, blobs = 0, tokens = 0, meta = 0;
  std::uint64_t bytes = 0;  // saved bytes of shards and blobs
  bool operator==(const Totals&) const = default;
};

/// Proves that the entries of all ranks make one whole checkpoint, entry by entry in the order of order(); holds the
/// entries of one tensor at a time.
///
/// - Every tensor: one dtype and global shape; boxes inside it; each element covered exactly once.
/// - Holders: the same n from every holder of a box, parts 0 .. n-1 once.
/// - The same box twice without holder: kept once (the lowest rank's) when size and CRC agree.
/// - Tokens of a stream and metadata of a (scope, key) are equal on all ranks that name them, and kept once.
/// - Blobs: one per (name, rank).
/// errors: kInvalid   an entry that is wrong in itself, or not in order
///         kConflict  entries that contradict each other: gaps, overlaps, different dtypes or shapes, wrong holders,
///         the
///                    same box with other bytes, the same blob twice in a rank, unequal tokens or metadata
///         The message names tensor, box and ranks.
/// source: protocol.md 4
class Coverage {
 public:
  using Sink = std::function<Result<void>(Entry)>;
  /// `kept` gets every entry that belongs into the merged index, in order; its errors come back from add and finish.
  explicit Coverage(Sink kept) : kept_(std::move(kept)) {}

  Result<void> add(Entry entry);
  Result<Totals> finish();

 private:
  Result<void> end_tensor();

  Sink kept_;
  std::vector<ShardEntry> tensor_;  // entries of the tensor being read
  std::optional<Entry> last_;       // last entry that is not a shard
  Totals totals_;
};

/// The merged index of small checkpoints: sorts, proves, drops duplicates. `by_rank` in any order.
Result<Contents> merge(std::vector<Contents> by_rank);

}  // namespace cairn::format
