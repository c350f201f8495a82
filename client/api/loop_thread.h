#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "cairn/client.h"
#include "client/core/arena.h"
#include "client/core/session.h"
#include "proto/runtime/runtime.h"

namespace cairn {

/// The thread behind a Client: runs the loop on which all of client/core lives, and carries calls to it.
///
/// Lifetime: every public handle shares it; what a handle holds of client/core goes home through release().
struct ClientImpl : std::enable_shared_from_this<ClientImpl> {
  static Result<std::shared_ptr<ClientImpl>> start(ClientOptions options);
  ~ClientImpl();

  /// Runs `make`'s Task on the loop. A Future that is cancelled drops it where it waits, unless !cancellable (it reads
  /// the caller's memory).
  template <class T>
  Future<T> async(std::function<Task<T>()> make, bool cancellable = true) {
    auto state = std::make_shared<typename Future<T>::State>();
    auto op = std::make_shared<Operation>();
    op->cancelled = [state] { state->set(fail(Errc::kCancelled, "cancelled: by the caller, or its client is gone")); };
    if (cancellable)
      state->on_cancel([weak = weak_from_this(), weak_op = std::weak_ptr(op)] {
        auto self = weak.lock();
        auto running = weak_op.lock();
        if (self && running) self->loop().post([impl = self.get(), running] { impl->end(running, true); });
      });
    loop().post([this, state, op, make = std::move(make)]() mutable {
      op->scope = std::make_unique<rt::Scope>(loop());
      operations_.insert(op);
      op->scope->spawn(carry<T>(make(), state), [this, op](Result<void>) {
        // Not from inside its own task: the scope goes in the next turn of the loop.
        loop().post([this, op] { end(op, false); });
      });
    });
    return Future<T>(std::move(state));
  }

  /// Blocking form of async(). errors: kInvalid  called on the client's own thread, which would wait for itself
  template <class T>
  Result<T> call(std::function<Task<T>()> make, bool cancellable = true) {
    if (on_loop_thread())
      return fail(Errc::kInvalid,
                  "a blocking call inside a callback of the client would wait for itself: use the _async form");
    return async<T>(std::move(make), cancellable).get();
  }

  /// Destroys `held` on the loop.
  template <class T>
  void release(std::shared_ptr<T> held) {
    if (held) loop().post([held = std::move(held)]() mutable { held.reset(); });
  }

  rt::RealLoop& loop() { return runtime_->loop(); }
  bool on_loop_thread() const { return std::this_thread::get_id() == thread_.get_id(); }
  rt::Duration timeout() const { return options_.timeout; }
  rt::TimePoint deadline() { return loop().now() + options_.timeout; }

  ClientOptions options_;
  std::shared_ptr<client::Session> session_;
  std::unique_ptr<client::Arena> arena_;

 private:
  std::atomic<bool> stopping_ = false;  // ends work on other threads early

  struct Operation {
    std::unique_ptr<rt::Scope> scope;
    std::function<void()> cancelled;
  };
  /// On the loop. Drops the operation's task if it still waits.
  void end(const std::shared_ptr<Operation>& op, bool cancelled) {
    op->scope.reset();
    if (cancelled) op->cancelled();
    operations_.erase(op);
  }
  void stop();  // on the loop: the last that runs there
  template <class T>
  static Task<void> carry(Task<T> task, std::shared_ptr<typename Future<T>::State> state) {
    state->set(co_await std::move(task));
    co_return {};
  }

  std::unique_ptr<rt::RealRuntime> runtime_;
  std::set<std::shared_ptr<Operation>> operations_;
  std::unique_ptr<rt::Scope> farewell_;
  std::thread thread_;
};

}  // namespace cairn
