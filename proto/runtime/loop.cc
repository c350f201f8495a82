#include <asio/executor_work_guard.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/post.hpp>
#include <asio/signal_set.hpp>
#include <system_error>

#include "proto/runtime/asio_loop.h"

namespace cairn::rt {
namespace {

struct ReadableState : std::enable_shared_from_this<ReadableState> {
  ReadableState(asio::io_context& io, int fd, std::function<void()> r) : descriptor(io, fd), ready(std::move(r)) {}
  void arm() {
    descriptor.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](asio::error_code ec) {
      if (ec || self->ended) return;
      self->ready();
      if (!self->ended) self->arm();
    });
  }
  asio::posix::stream_descriptor descriptor;
  std::function<void()> ready;
  bool ended = false;
};

class ReadableWatch final : public Watch {
 public:
  explicit ReadableWatch(std::shared_ptr<ReadableState> state) : state_(std::move(state)) {}
  ~ReadableWatch() override {
    state_->ended = true;
    state_->descriptor.release();  // the caller closes it
  }

 private:
  std::shared_ptr<ReadableState> state_;
};

struct SignalState : std::enable_shared_from_this<SignalState> {
  SignalState(asio::io_context& io, std::function<void(int)> a) : set(io), arrived(std::move(a)) {}
  void arm() {
    set.async_wait([self = shared_from_this()](asio::error_code ec, int signal) {
      if (ec || self->ended) return;
      self->arrived(signal);
      if (!self->ended) self->arm();
    });
  }
  asio::signal_set set;
  std::function<void(int)> arrived;
  bool ended = false;
};

class SignalWatch final : public Watch {
 public:
  explicit SignalWatch(std::shared_ptr<SignalState> state) : state_(std::move(state)) {}
  ~SignalWatch() override {
    state_->ended = true;
    asio::error_code ignored;  // nothing left to undo if it fails
    state_->set.clear(ignored);
    state_->set.cancel(ignored);
  }

 private:
  std::shared_ptr<SignalState> state_;
};

}  // namespace

Result<std::unique_ptr<RealLoop>> RealLoop::create() {
  try {
    return std::make_unique<AsioLoop>();
  } catch (const std::system_error& e) {  // no descriptors left
    return fail(Errc::kFailed, std::string("start the event loop: ") + e.what());
  }
}

AsioLoop::AsioLoop() = default;

AsioLoop::~AsioLoop() {
  closing_ = true;
  // One at a time: what a job holds may call cancel() when it goes.
  while (!timers_.empty()) {
    auto job = timers_.extract(timers_.begin());
    when_.erase(job.key().second);
  }
}

void AsioLoop::post(Job job) {
  if (closing_) return;
  asio::post(io_, std::move(job));
}

TimerId AsioLoop::at(TimePoint when, Job job) {
  if (closing_) return 0;
  const TimerId id = ++last_timer_;
  timers_.emplace(std::pair(when, id), std::move(job));
  when_.emplace(id, when);
  arm();
  return id;
}

void AsioLoop::cancel(TimerId timer) {
  const auto found = when_.find(timer);
  if (found == when_.end()) return;
  const auto job = timers_.extract({found->second, timer});
  when_.erase(found);
  // The system's timer stays armed; when it fires early, run_due() finds nothing and arms it anew.
}

void AsioLoop::arm() {
  if (timers_.empty()) return;
  const TimePoint first = timers_.begin()->first.first;
  if (first >= armed_) return;
  armed_ = first;
  timer_.expires_at(first);
  timer_.async_wait([this](asio::error_code ec) {
    if (ec) return;  // moved to an earlier time
    armed_ = kNever;
    run_due();
    arm();
  });
}

void AsioLoop::run_due() {
  const std::pair until{now(), last_timer_};  // timers made meanwhile wait for the next turn
  while (!timers_.empty() && timers_.begin()->first <= until) {
    auto due = timers_.extract(timers_.begin());
    when_.erase(due.key().second);
    due.mapped()();
  }
}

TimePoint AsioLoop::now() const {
  return std::chrono::steady_clock::now();
}
std::int64_t AsioLoop::wall_nanos() const {
  return std::chrono::duration_cast<Duration>(std::chrono::system_clock::now().time_since_epoch()).count();
}

void AsioLoop::run() {
  const auto stay = asio::make_work_guard(io_);
  io_.restart();
  io_.run();
}
void AsioLoop::stop() {
  io_.stop();
}

std::unique_ptr<Watch> AsioLoop::watch_readable(int fd, std::function<void()> ready) {
  auto state = std::make_shared<ReadableState>(io_, fd, std::move(ready));
  state->arm();
  return std::make_unique<ReadableWatch>(std::move(state));
}

std::unique_ptr<Watch> AsioLoop::watch_signals(std::vector<int> signals, std::function<void(int)> arrived) {
  auto state = std::make_shared<SignalState>(io_, std::move(arrived));
  for (int signal : signals) state->set.add(signal);
  state->arm();
  return std::make_unique<SignalWatch>(std::move(state));
}

}  // namespace cairn::rt
