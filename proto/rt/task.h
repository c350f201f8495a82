#pragma once

#include <cassert>
#include <coroutine>
#include <exception>
#include <optional>
#include <type_traits>
#include <utility>

#include "proto/common/result.h"

namespace cairn {

/// A coroutine that ends in a Result<T>. It starts when awaited and is owned by whoever holds the Task:
/// destroying a Task that waits destroys its frame and, through it, whatever it awaited. That is how calls are
/// cancelled, deadlines enforced and simulated machines killed, so destructors in frames must release, never do I/O.
///
/// Threads:  one loop thread; a Task never migrates.
/// Why not asio::awaitable: see ARCHITECTURE.md, "Decisions".
template <class T = void>
class [[nodiscard]] Task {
 public:
  struct promise_type {
    std::coroutine_handle<> continuation;
    std::optional<Result<T>> value;

    Task get_return_object() { return Task(Handle::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    auto final_suspend() noexcept {
      struct Final {
        bool await_ready() noexcept { return false; }
        std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> self) noexcept {
          auto next = self.promise().continuation;
          return next ? next : std::noop_coroutine();
        }
        void await_resume() noexcept {}
      };
      return Final{};
    }
    void return_value(Result<T> result) { value.emplace(std::move(result)); }
    /// Exceptions come only from libraries and from allocation; here they become errors.
    void unhandled_exception() {
      try {
        throw;
      } catch (const std::exception& e) {
        value.emplace(fail(Errc::kFailed, std::string("exception: ") + e.what()));
      } catch (...) {
        value.emplace(fail(Errc::kFailed, "exception of unknown type"));
      }
    }
  };
  using Handle = std::coroutine_handle<promise_type>;

  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, {})) {}
  Task& operator=(Task&& other) noexcept {
    if (this != &other) {
      if (handle_) handle_.destroy();
      handle_ = std::exchange(other.handle_, {});
    }
    return *this;
  }
  ~Task() {
    if (handle_) handle_.destroy();
  }

  auto operator co_await() && noexcept {
    struct Awaiter {
      Handle handle;
      bool await_ready() const noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<> caller) noexcept {
        handle.promise().continuation = caller;
        return handle;
      }
      Result<T> await_resume() { return *std::move(handle.promise().value); }
    };
    assert(handle_);
    return Awaiter{handle_};
  }

 private:
  explicit Task(Handle handle) : handle_(handle) {}
  Handle handle_;
};

}  // namespace cairn
