#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "storage/format/restore_plan.h"

namespace cairn::client {

/// Where the bytes of a request's reply go, one after the other. Copies go on from the same place.
///
/// Lifetime: request and destinations outlive it.
class ScatterCursor {
 public:
  ScatterCursor(const format::ReadRequest& request, const std::vector<std::span<std::byte>>& destinations)
      : request_(&request), destinations_(&destinations) {
    if (!request.scatter.empty()) run_.emplace(request.scatter.front().to);
  }

  /// Memory for the next bytes, 1 .. `bytes_max` of them, and moves behind them.
  /// sizes: at most what the request still has
  std::span<std::byte> take(std::uint64_t bytes_max) {
    assert(bytes_max > 0 && next_ < request_->scatter.size() && run_);
    const auto size = std::min(bytes_max, run_->left());
    const auto out = (*destinations_)[request_->scatter[next_].want].subspan(run_->at(), size);
    run_->take(size);
    if (run_->done() && ++next_ < request_->scatter.size()) run_.emplace(request_->scatter[next_].to);
    return out;
  }
  void skip(std::uint64_t bytes) {
    while (bytes > 0) bytes -= take(bytes).size();
  }

 private:
  const format::ReadRequest* request_;
  const std::vector<std::span<std::byte>>* destinations_;
  std::size_t next_ = 0;  // in the scatter list
  std::optional<format::RunCursor> run_;
};

}  // namespace cairn::client
