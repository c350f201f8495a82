#pragma once

#include <chrono>
#include <coroutine>
#include <cstdint>
#include <functional>
#include <utility>

#include "proto/rt/task.h"

namespace cairn::rt {

using Duration = std::chrono::nanoseconds;
/// Steady time since an arbitrary start. No wall clock decides anything.
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;
inline constexpr TimePoint kNever = TimePoint::max();
using Job = std::move_only_function<void()>;
using TimerId = std::uint64_t;  // 0 = none

/// One thread of execution: a real one, or a simulated node on virtual time. Executor and clock seams in one.
///
/// Threads:  post() from any thread; everything else from the loop's own.
class Loop {
 public:
  virtual ~Loop() = default;
  /// Runs `job` on the loop, after what was posted before.
  virtual void post(Job job) = 0;
  /// Runs `job` at `when` or soon after. Returns an id for cancel(); a cancelled job is destroyed, not run.
  virtual TimerId at(TimePoint when, Job job) = 0;
  virtual void cancel(TimerId timer) = 0;
  virtual TimePoint now() const = 0;
  /// For log stamps and display only: nanoseconds since the Unix epoch.
  virtual std::int64_t wall_nanos() const = 0;

  /// Awaiter of sleep().
  struct Sleep {
    Loop& loop;
    TimePoint when;
    TimerId timer = 0;
    Sleep(Loop& l, TimePoint w) : loop(l), when(w) {}
    Sleep(const Sleep&) = delete;
    ~Sleep() {
      if (timer != 0) loop.cancel(timer);
    }
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
      timer = loop.at(when, [this, waiter] {
        timer = 0;
        waiter.resume();
      });
    }
    void await_resume() const noexcept {}
  };

  /// co_await loop.sleep(d): resumes after `d`; cancelled by destroying the waiting frame.
  Sleep sleep(Duration d) { return sleep_until(now() + d); }
  Sleep sleep_until(TimePoint when) { return Sleep{*this, when}; }
};

/// Calls `job` at a time unless destroyed before.
class Timer {
 public:
  Timer(Loop& loop, TimePoint when, Job job) : loop_(loop) {
    id_ = loop.at(when, [this, job = std::move(job)]() mutable {
      id_ = 0;
      auto run = std::move(job);  // the job may destroy this timer
      run();
    });
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    if (id_ != 0) loop_.cancel(id_);
  }

 private:
  Loop& loop_;
  TimerId id_ = 0;
};

}  // namespace cairn::rt
