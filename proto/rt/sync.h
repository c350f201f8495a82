#pragma once

#include <cassert>
#include <coroutine>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/rt/loop.h"
#include "proto/rt/task.h"

// Waiting, on one loop thread. Rule: nothing resumes a coroutine inline; every wake-up goes through Loop::post, so a
// function never finds its state changed by a call that only wakes others. A waiter whose frame is destroyed is
// forgotten.

namespace cairn::rt {

/// A value that arrives once. The setter may outlive the waiter and the other way round.
///
///   OneShot<int> answer(loop);
///   start(answer.setter());           // callback side: setter.set(42), on the loop thread
///   int value = co_await answer;
template <class T>
class OneShot {
  struct State {
    Loop* loop;
    std::coroutine_handle<> waiter;
    std::optional<T> value;
  };

 public:
  class Setter {
   public:
    /// The first call wins; later ones are dropped.
    void set(T value) const {
      if (state_->value) return;
      state_->value.emplace(std::move(value));
      if (state_->waiter) resume_later();
    }
    bool is_set() const { return state_->value.has_value(); }

   private:
    friend class OneShot;
    explicit Setter(std::shared_ptr<State> state) : state_(std::move(state)) {}
    void resume_later() const {
      state_->loop->post([state = state_] {
        if (auto waiter = std::exchange(state->waiter, {})) waiter.resume();
      });
    }
    std::shared_ptr<State> state_;
  };

  explicit OneShot(Loop& loop) : state_(std::make_shared<State>(State{&loop, {}, {}})) {}
  OneShot(const OneShot&) = delete;
  OneShot& operator=(const OneShot&) = delete;
  ~OneShot() { state_->waiter = {}; }

  Setter setter() const { return Setter(state_); }
  auto operator co_await() noexcept {
    struct Awaiter {
      std::shared_ptr<State> state;
      ~Awaiter() {
        if (state) state->waiter = {};
      }
      bool await_ready() const noexcept { return state->value.has_value(); }
      void await_suspend(std::coroutine_handle<> waiter) noexcept { state->waiter = waiter; }
      T await_resume() { return *std::move(state->value); }
    };
    return Awaiter{state_};
  }

 private:
  std::shared_ptr<State> state_;
};

/// Wakes all who wait now. Use as a condition variable: while (!condition) co_await signal.wait();
class Signal {
 public:
  explicit Signal(Loop& loop) : loop_(&loop) {}

  void notify_all() {
    auto woken = std::exchange(waiters_, {});
    for (auto& waiter : woken)
      if (auto alive = waiter.lock()) {
        alive->notified = true;
        if (alive->handle)
          loop_->post([alive] {
            if (auto handle = std::exchange(alive->handle, {})) handle.resume();
          });
      }
  }

  auto wait() {
    struct Awaiter {
      std::shared_ptr<Waiter> waiter;
      ~Awaiter() {
        if (waiter) waiter->handle = {};
      }
      bool await_ready() const noexcept { return waiter->notified; }
      void await_suspend(std::coroutine_handle<> handle) noexcept { waiter->handle = handle; }
      void await_resume() const noexcept {}
    };
    if (waiters_.size() >= sweep_at_) {  // forget the dead, so that a signal that never fires stays small
      std::erase_if(waiters_, [](const auto& w) { return w.expired(); });
      sweep_at_ = 2 * waiters_.size() + 16;
    }
    auto waiter = std::make_shared<Waiter>();
    waiters_.push_back(waiter);
    return Awaiter{std::move(waiter)};
  }

 private:
  struct Waiter {
    std::coroutine_handle<> handle;
    bool notified = false;
  };
  Loop* loop_;
  std::vector<std::weak_ptr<Waiter>> waiters_;
  std::size_t sweep_at_ = 16;
};

/// A counted budget, first come first served. acquire() waits; the Lease gives back when destroyed.
class Semaphore {
  struct State;

 public:
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept : state_(std::move(other.state_)), count_(std::exchange(other.count_, 0)) {}
    Lease& operator=(Lease&& other) noexcept {
      if (this != &other) {
        release();
        state_ = std::move(other.state_);
        count_ = std::exchange(other.count_, 0);
      }
      return *this;
    }
    ~Lease() { release(); }
    void release() {
      if (state_ && count_ > 0) state_->give_back(std::exchange(count_, 0));
      state_.reset();
    }
    std::uint64_t count() const { return count_; }

   private:
    friend class Semaphore;
    friend struct State;
    Lease(std::shared_ptr<State> state, std::uint64_t count) : state_(std::move(state)), count_(count) {}
    std::shared_ptr<State> state_;
    std::uint64_t count_ = 0;
  };

  Semaphore(Loop& loop, std::uint64_t capacity)
      : state_(std::make_shared<State>(State{&loop, capacity, capacity, {}})) {}

  /// sizes: count at most capacity()
  /// errors: kInvalid  more than capacity()
  Task<Lease> acquire(std::uint64_t count) {
    auto state = state_;
    if (count > state->capacity)
      co_return fail(Errc::kInvalid,
                     "wants " + std::to_string(count) + " of a budget of " + std::to_string(state->capacity));
    if (state->waiters.empty() && state->available >= count) {
      state->available -= count;
      co_return Lease(std::move(state), count);
    }
    OneShot<Lease> granted(*state->loop);
    auto alive = std::make_shared<bool>(true);
    state->waiters.push_back({count, granted.setter(), alive});
    // If this frame is destroyed while queued, its turn passes to the next.
    struct Leave {
      std::shared_ptr<State> state;
      std::shared_ptr<bool> alive;
      ~Leave() {
        *alive = false;
        state->grant();
      }
    } leave{state, alive};
    co_return co_await granted;
  }
  std::optional<Lease> try_acquire(std::uint64_t count) {
    if (!state_->waiters.empty() || state_->available < count) return std::nullopt;
    state_->available -= count;
    return Lease(state_, count);
  }
  std::uint64_t available() const { return state_->available; }
  std::uint64_t capacity() const { return state_->capacity; }

 private:
  struct Waiting {
    std::uint64_t count;
    OneShot<Lease>::Setter setter;
    std::shared_ptr<bool> alive;
  };
  struct State : std::enable_shared_from_this<State> {
    State(Loop* l, std::uint64_t a, std::uint64_t c, std::list<Waiting> w)
        : loop(l), available(a), capacity(c), waiters(std::move(w)) {}
    Loop* loop;
    std::uint64_t available, capacity;
    std::list<Waiting> waiters;
    void give_back(std::uint64_t count) {
      available += count;
      assert(available <= capacity);
      grant();
    }
    void grant() {
      while (!waiters.empty() && (!*waiters.front().alive || waiters.front().count <= available)) {
        auto first = std::move(waiters.front());
        waiters.pop_front();
        if (!*first.alive) continue;
        *first.alive = false;  // granted: no longer queued
        available -= first.count;
        first.setter.set(Lease(shared_from_this(), first.count));
      }
    }
  };
  std::shared_ptr<State> state_;
};

/// Owns running coroutines. Destroying or cancel()ing it destroys their frames where they wait.
/// Never destroy a Scope from inside a task that it owns.
class Scope {
 public:
  using Done = std::move_only_function<void(Result<void>)>;

  explicit Scope(Loop& loop) : idle_(loop) {}
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  ~Scope() { cancel(); }

  /// Runs `task` up to its first wait at once. `done` gets its result; an error nobody takes is dropped, so pass one.
  void spawn(Task<void> task, Done done = {}) { run(*this, std::move(task), std::move(done)); }
  std::size_t running() const { return roots_.size(); }
  /// Destroys all running tasks now.
  void cancel() {
    while (!roots_.empty()) roots_.back().destroy();
  }
  /// Waits until none is running.
  Task<void> join() {
    while (!roots_.empty()) co_await idle_.wait();
    co_return {};
  }

 private:
  struct Root {
    struct promise_type {
      Scope* scope;
      std::list<std::coroutine_handle<>>::iterator self;
      promise_type(Scope& s, Task<void>&, Done&) : scope(&s) {
        self = scope->roots_.insert(scope->roots_.end(), std::coroutine_handle<promise_type>::from_promise(*this));
      }
      ~promise_type() {
        scope->roots_.erase(self);
        if (scope->roots_.empty()) scope->idle_.notify_all();
      }
      Root get_return_object() { return {}; }
      std::suspend_never initial_suspend() noexcept { return {}; }
      std::suspend_never final_suspend() noexcept { return {}; }
      void return_void() {}
      void unhandled_exception() { std::terminate(); }  // only `done` could throw, and it must not
    };
  };
  static Root run(Scope&, Task<void> task, Done done) {
    auto result = co_await std::move(task);
    if (done) done(std::move(result));
  }

  std::list<std::coroutine_handle<>> roots_;
  Signal idle_;
};

namespace detail {
template <class T>
Task<void> run_into(Task<T> task, typename OneShot<Result<T>>::Setter setter) {
  setter.set(co_await std::move(task));
  co_return {};
}
}  // namespace detail

/// `task`, or kDeadline with `what` at `when`; then `task` is destroyed where it waits.
template <class T>
Task<T> with_deadline(Loop& loop, TimePoint when, Task<T> task, std::string what) {
  if (when == kNever) co_return co_await std::move(task);
  OneShot<Result<T>> done(loop);
  Scope scope(loop);
  scope.spawn(detail::run_into<T>(std::move(task), done.setter()));
  Timer timer(loop, when, [setter = done.setter(), what = std::move(what)]() mutable {
    setter.set(fail(Errc::kDeadline, what + ": deadline exceeded"));
  });
  co_return co_await done;
}

/// All tasks at once; the first error, after which the others are destroyed where they wait.
inline Task<void> all(Loop& loop, std::vector<Task<void>> tasks) {
  if (tasks.empty()) co_return {};
  OneShot<Result<void>> done(loop);
  auto left = std::make_shared<std::size_t>(tasks.size());
  Scope scope(loop);
  for (auto& task : tasks)
    scope.spawn(std::move(task), [left, setter = done.setter()](Result<void> result) {
      if (!result || --*left == 0) setter.set(std::move(result));
    });
  co_return co_await done;
}

}  // namespace cairn::rt
