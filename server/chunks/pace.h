#pragma once

#include <algorithm>
#include <cstdint>

#include "proto/rt/loop.h"
#include "proto/rt/task.h"

namespace cairn::server {

/// So many bytes a second, on average, of whoever takes them from it; what was not taken is not saved up.
///
/// Threads: the loop.
class Pace {
 public:
  /// 0: as fast as it goes.
  Pace(rt::Loop& loop, std::uint64_t bytes_per_second) : loop_(loop), rate_(bytes_per_second) {}

  /// From the next take() on.
  void set(std::uint64_t bytes_per_second) {
    rate_ = bytes_per_second;
    free_at_ = std::min(free_at_, loop_.now());
  }
  Task<void> take(std::uint64_t bytes) {
    if (rate_ == 0) co_return {};
    const auto turn = std::max(loop_.now(), free_at_);
    const auto nanos = static_cast<double>(bytes) * 1e9 / static_cast<double>(rate_);
    free_at_ = turn + rt::Duration(static_cast<std::int64_t>(std::min(nanos, 3.6e12)));
    if (turn > loop_.now()) co_await loop_.sleep_until(turn);
    co_return {};
  }

 private:
  rt::Loop& loop_;
  std::uint64_t rate_;
  rt::TimePoint free_at_{};
};

}  // namespace cairn::server
