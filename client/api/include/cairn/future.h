#pragma once

#include <chrono>
#include <condition_variable>
#include <coroutine>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "cairn/result.h"

namespace cairn {

/// The outcome of an operation that runs on the client's own thread: wait for it, be called back, or co_await it.
///
/// Threads:  get() from any thread but the client's own; then() and co_await continue on the client's thread, so they
///           must be quick and must not block.
/// Lifetime: dropping a Future does not stop the operation; cancel() does, and the outcome is then kCancelled unless it
///           was already there.
template <class T = void>
class Future {
 public:
  /// The library's side.
  class State {
   public:
    void set(Result<T> result) {
      std::unique_lock lock(mutex_);
      if (done_) return;
      done_ = true;
      ready_.notify_all();
      auto call = std::exchange(then_, {});
      if (!call) {
        result_.emplace(std::move(result));
        return;
      }
      lock.unlock();
      call(std::move(result));
    }
    void on_cancel(std::function<void()> cancel) {
      std::lock_guard lock(mutex_);
      cancel_ = std::move(cancel);
    }

   private:
    friend class Future;
    std::mutex mutex_;
    std::condition_variable ready_;
    bool done_ = false;
    std::optional<Result<T>> result_;
    std::function<void(Result<T>)> then_;
    std::function<void()> cancel_;
  };

  explicit Future(std::shared_ptr<State> state) : state_(std::move(state)) {}

  bool ready() const {
    std::lock_guard lock(state_->mutex_);
    return state_->done_;
  }
  /// Waits and takes the outcome; call once.
  Result<T> get() {
    std::unique_lock lock(state_->mutex_);
    state_->ready_.wait(lock, [&] { return state_->done_; });
    return take();
  }
  /// Like get(), or kDeadline after `timeout`; the operation goes on and may be asked again.
  Result<T> get_for(std::chrono::milliseconds timeout) {
    std::unique_lock lock(state_->mutex_);
    if (!state_->ready_.wait_for(lock, timeout, [&] { return state_->done_; }))
      return fail(Errc::kDeadline, "not done within " + std::to_string(timeout.count()) + " ms");
    return take();
  }
  /// Calls `callback` once with the outcome: at once if it is there, else on the client's thread.
  void then(std::function<void(Result<T>)> callback) {
    std::unique_lock lock(state_->mutex_);
    if (!state_->done_) {
      state_->then_ = std::move(callback);
      return;
    }
    auto result = take();
    lock.unlock();
    callback(std::move(result));
  }
  void cancel() {
    std::function<void()> call;
    {
      std::lock_guard lock(state_->mutex_);
      if (!state_->done_) call = state_->cancel_;
    }
    if (call) call();
  }

  auto operator co_await() {
    struct Awaiter {
      Future future;
      std::optional<Result<T>> result;
      bool await_ready() { return false; }
      void await_suspend(std::coroutine_handle<> waiter) {
        // The callback may run before this returns: nothing of the awaiter is touched after then().
        future.then([this, waiter](Result<T> r) {
          result.emplace(std::move(r));
          waiter.resume();
        });
      }
      Result<T> await_resume() { return std::move(*result); }
    };
    return Awaiter{*this, {}};
  }

 private:
  Result<T> take() {
    if (!state_->result_) return fail(Errc::kInvalid, "the outcome of this future has been taken already");
    Result<T> result = std::move(*state_->result_);
    state_->result_.reset();
    return result;
  }
  std::shared_ptr<State> state_;
};

}  // namespace cairn
