#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "proto/common/result.h"
#include "storage/format/manifest.h"
#include "storage/format/strided.h"
#include "storage/format/tensor.h"

namespace cairn::format {

/// The elements that two boxes of equal rank share; nothing when they share none.
std::optional<Box> intersect(const Box& a, const Box& b);
bool empty(const Box& box);  // without elements; a 0-d box has one
bool inside(const Box& inner, const Box& outer);

/// Equal runs from `saved` (in the saved bytes of a shard) to `wanted` (in the destination): run (i, j, ..) of them
/// lies i * steps[0].saved + .. further in the one and i * steps[0].wanted + .. in the other. Both rise; saved runs do
/// not overlap.
struct CopyRuns {
  struct Step {
    std::uint64_t count = 0, saved = 0, wanted = 0;
    bool operator==(const Step&) const = default;
  };
  std::uint64_t saved = 0, wanted = 0, length = 0;
  std::vector<Step> steps = {};  // the outermost first; none: one run

  /// Each side for itself, neighbours joined.
  Strided from() const;
  Strided to() const;
  std::uint64_t bytes() const;
  bool operator==(const CopyRuns&) const = default;
};

/// Appends what of `all` lies in [begin, end) of the saved bytes, in rising order: at most two runs sets a step and
/// one.
void cut(const CopyRuns& all, std::uint64_t begin, std::uint64_t end, std::vector<CopyRuns>& out);

/// Appends the runs that carry what `saved` and `wanted` share, in rising order of both offsets, in as few sets as
/// possible: a whole-box match is one run, a box of columns one set.
///
/// shapes: the saved bytes are elements `part` of `saved`, row-major; the destination is `wanted`, row-major
/// errors: kInvalid  names the tensor: a run of a sub-byte dtype does not begin and end at whole bytes; ranks differ;
///                   overflow
Result<void> copy_runs(std::string_view tensor, DType dtype, const Box& saved, LinearRange part, const Box& wanted,
                       std::vector<CopyRuns>& out);

/// The elements of its box, row-major, that a shard saves: all of them, or its holder's part. errors: kInvalid
Result<LinearRange> saved_range(const ShardEntry& shard);

/// A place where boxes do not tile a whole.
struct Flaw {
  std::uint64_t covered = 0;  // how many boxes cover `box`: 0 a gap, 2 and more an overlap
  Box box;                    // begins at the lexicographically first element that is not covered exactly once
};

/// Do `boxes`, all inside `whole`, cover each of its elements exactly once? Nothing when they do. Empty boxes do not
/// count. Takes about n log n for layouts made by cutting.
std::optional<Flaw> find_flaw(std::vector<const Box*> boxes, const Box& whole);

}  // namespace cairn::format
