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

/// Proves that the entries of all ranks make one whole checkpoint, entry by entry in the order of order(). Boxes of a
/// tensor that adjoin are joined as they come, so a tensor cut into millions of parts takes the memory of a few; no
/// entry is kept.
///
/// - Every tensor: one dtype and global shape; boxes inside it; each element covered exactly once.
/// - Holders: the same n from every holder of a box, parts 0 .. n-1 once.
/// - The same box twice without holder: kept once (the lowest rank's) when size and CRC agree.
/// - Tokens of a stream and metadata of a (scope, key) are equal on all ranks that name them, and kept once.
/// - Blobs: one per (name, rank).
/// sizes:  at most kBoxesMax boxes of one tensor that do not join
/// errors: kInvalid   an entry that is wrong in itself, or not in order;  too many boxes
///         kConflict  entries that contradict each other: gaps, overlaps, different dtypes or shapes, wrong holders,
///         the
///                    same box with other bytes, the same blob twice in a rank, unequal tokens or metadata
///         The message names tensor, box and ranks (of an overlap: unless the tensor has very many parts).
/// source: protocol.md 4
class Coverage {
 public:
  static constexpr std::size_t kBoxesMax = 1 << 18;

  using Sink = std::function<Result<void>(const Entry&)>;
  /// `kept` gets every entry that belongs into the merged index, in order; its errors come back from add and finish.
  /// Its tensor may prove to be flawed afterwards.
  explicit Coverage(Sink kept) : kept_(std::move(kept)) {}

  Result<void> add(const Entry& entry);
  /// Of an entry that check_entry() has passed.
  Result<void> add_checked(const Entry& entry);
  Result<Totals> finish();

 private:
  /// Parts of one box: copies without holder, or holders' parts.
  struct SameBox {
    ShardEntry first;  // without extents
    std::size_t copies = 0, parts = 0;
    std::vector<std::uint32_t> ranks;
    std::optional<Holder> last_holder;
    std::uint32_t last_rank = 0;
  };
  struct Seen {
    std::uint32_t rank;
    std::size_t box;  // where its numbers stand: offsets, then sizes
  };

  Result<void> add_shard(const Entry& entry, const ShardEntry& shard);
  Result<void> begin_box(const ShardEntry& shard);
  /// Whether the merged index keeps it.
  Result<bool> add_to_box(const ShardEntry& shard);
  Result<void> end_box();
  Result<void> join(const Box& box);
  Result<void> end_tensor();
  Error flawed(const struct Flaw& flaw) const;

  Sink kept_;
  bool in_tensor_ = false;
  std::uint32_t first_rank_ = 0;  // of the tensor being read; the rest of what names it stands in box_
  SameBox box_;
  std::vector<Box> joined_;
  // For messages about overlaps; given up when a tensor has too many parts.
  std::vector<Seen> seen_;
  std::vector<std::uint64_t> seen_boxes_;
  std::optional<Entry> last_;  // last entry that is not a shard
  Totals totals_;
};

/// The merged index of small checkpoints: sorts, proves, drops duplicates. `by_rank` in any order.
Result<Contents> merge(std::vector<Contents> by_rank);

}  // namespace cairn::format
