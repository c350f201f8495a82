#pragma once

#include <cassert>
#include <cstdint>
#include <vector>

#include "proto/common/result.h"

namespace cairn::format {

/// Equal runs of bytes at regular distances, such as the columns of a matrix that lies there row by row. Run (i, j, ..)
/// begins at offset + i * steps[0].stride + j * steps[1].stride + .. and the last step moves fastest; runs rise and do
/// not overlap.
struct Strided {
  struct Step {
    std::uint64_t count = 0, stride = 0;
    bool operator==(const Step&) const = default;
  };
  std::uint64_t offset = 0, length = 0;  // of the first run; of every run
  std::vector<Step> steps = {};          // the outermost first; none: one run

  std::uint64_t runs() const;
  std::uint64_t bytes() const { return runs() * length; }
  /// After its last byte.
  std::uint64_t end() const;
  bool operator==(const Strided&) const = default;
};

/// From a peer: rising runs of at least one byte, before `end_max`, at most `runs_max` of them. errors: kInvalid
Result<void> check_strided(const Strided& runs, std::uint64_t end_max, std::uint64_t runs_max);

/// Joins what lies side by side: runs that touch become one, steps that continue each other one step.
void join_neighbours(Strided& runs);

/// A place in the bytes of strided runs, which moves forward.
///
/// Lifetime: the runs outlive it.
class RunCursor {
 public:
  explicit RunCursor(const Strided& runs) : runs_(&runs) { enter(0); }
  bool done() const { return left_ == 0; }
  std::uint64_t at() const { return at_; }      // the next byte
  std::uint64_t left() const { return left_; }  // of its run; 0 at the end
  /// sizes: at most left()
  void take(std::uint64_t bytes) {
    assert(bytes <= left_);
    at_ += bytes;
    left_ -= bytes;
    if (left_ > 0) return;
    ++run_;
    if (inner_left_ == 0) return enter(run_);
    --inner_left_;
    at_ += runs_->steps.back().stride - runs_->length;
    left_ = runs_->length;
  }
  /// Any distance within the runs.
  void skip(std::uint64_t bytes);

 private:
  void enter(std::uint64_t run);

  const Strided* runs_;
  std::uint64_t run_ = 0;
  std::uint64_t at_ = 0, left_ = 0;
  std::uint64_t inner_left_ = 0;  // further runs of the innermost step
};

}  // namespace cairn::format
