#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <map>
#include <unordered_map>

#include "proto/runtime/runtime.h"

// Only for the sources of this folder: the one header with Asio in it.

namespace cairn::rt {

class AsioLoop final : public RealLoop {
 public:
  AsioLoop();
  ~AsioLoop() override;

  void post(Job job) override;
  TimerId at(TimePoint when, Job job) override;
  void cancel(TimerId timer) override;
  TimePoint now() const override;
  std::int64_t wall_nanos() const override;
  void run() override;
  void stop() override;
  std::unique_ptr<Watch> watch_readable(int fd, std::function<void()> ready) override;
  std::unique_ptr<Watch> watch_signals(std::vector<int> signals, std::function<void(int)> arrived) override;

  asio::io_context& io() { return io_; }

 private:
  void arm();
  void run_due();

  // One timer of the system serves all of ours: deadlines are set and cancelled far more often than they fire.
  std::map<std::pair<TimePoint, TimerId>, Job> timers_;
  std::unordered_map<TimerId, TimePoint> when_;  // looked up only, never walked
  TimerId last_timer_ = 0;
  TimePoint armed_ = kNever;
  bool closing_ = false;

  // Last, so that jobs destroyed with it may still call post() and cancel().
  asio::io_context io_{1};  // one thread runs it; posting from others is safe
  asio::steady_timer timer_{io_};
};

}  // namespace cairn::rt
