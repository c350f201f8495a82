#include <catch2/catch.hpp>
#include <vector>

#include "proto/rt/sync.h"
#include "proto/rt/unit_pool.h"
#include "proto/runtime/runtime.h"

using namespace cairn;
using namespace cairn::rt;
using namespace std::chrono_literals;

namespace {

struct Fixture {
  std::unique_ptr<RealRuntime> runtime = *RealRuntime::create({.offload_threads = 1});
  RealLoop& loop = runtime->loop();

  template <class T>
  Result<T> run(Task<T> task) {
    return rt::run(loop, std::move(task));
  }
  /// Lets everything that is ready now run, and what that makes ready.
  Task<void> settle() {
    for (int i = 0; i < 8; ++i) {
      OneShot<bool> turn(loop);
      loop.post([setter = turn.setter()] { setter.set(true); });
      co_await turn;
    }
    co_return {};
  }
};

struct Flag {
  bool* where;
  explicit Flag(bool& w) : where(&w) {}
  Flag(const Flag&) = delete;
  ~Flag() { *where = true; }
};

Task<int> answer() {
  co_return 42;
}
Task<int> refuse() {
  co_return fail(Errc::kBusy, "no");
}
Task<int> throws() {
  throw std::runtime_error("inside");
  co_return 0;
}
Task<void> wait_for(Signal& signal, bool& destroyed) {
  Flag flag(destroyed);
  co_await signal.wait();
  co_return {};
}

}  // namespace

TEST_CASE("task: values, errors and exceptions all come back as a Result", "[rt]") {
  Fixture f;
  CHECK(f.run(answer()).value() == 42);
  CHECK(f.run(refuse()).error().code == Errc::kBusy);
  const auto thrown = f.run(throws());
  REQUIRE_FALSE(thrown);
  CHECK(thrown.error().message == "exception: inside");
}

TEST_CASE("task: dropping a task that was never awaited runs none of it", "[rt]") {
  Fixture f;
  bool destroyed = false;
  Signal signal(f.loop);
  {
    auto task = wait_for(signal, destroyed);
  }
  CHECK_FALSE(destroyed);
}

TEST_CASE("task: a million awaits in a row that complete at once do not grow the stack", "[rt]") {
  Fixture f;
  auto many = []() -> Task<int> {
    int sum = 0;
    for (int i = 0; i < 1'000'000; ++i) {
      CO_TRY(const int one, co_await answer());
      sum += one == 42;
    }
    co_return sum;
  };
  CHECK(f.run(many()).value() == 1'000'000);
}

TEST_CASE("one_shot: the first value wins, set before or after the wait begins", "[rt]") {
  Fixture f;
  auto before = [](RealLoop& loop) -> Task<int> {
    OneShot<int> shot(loop);
    shot.setter().set(1);
    shot.setter().set(2);
    co_return co_await shot;
  };
  CHECK(f.run(before(f.loop)).value() == 1);
  auto after = [](RealLoop& loop) -> Task<int> {
    OneShot<int> shot(loop);
    loop.post([setter = shot.setter()] {
      setter.set(3);
      setter.set(4);
    });
    co_return co_await shot;
  };
  CHECK(f.run(after(f.loop)).value() == 3);
}

TEST_CASE("one_shot: a value set for a destroyed waiter wakes nobody", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    std::optional<OneShot<int>::Setter> setter;
    auto waits = [](RealLoop& loop, std::optional<OneShot<int>::Setter>& out) -> Task<void> {
      OneShot<int> shot(loop);
      out = shot.setter();
      co_await shot;
      FAIL("resumed after its scope was cancelled");
      co_return {};
    };
    Scope scope(fx.loop);
    scope.spawn(waits(fx.loop, setter));
    setter->set(7);  // the wake-up is posted, and finds nobody
    scope.cancel();
    co_return co_await fx.settle();
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("signal: wakes those who wait, once, and forgets the dead", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<int> {
    Signal signal(fx.loop);
    int woken = 0;
    auto waits = [](Signal& s, int& count) -> Task<void> {
      co_await s.wait();
      ++count;
      co_return {};
    };
    Scope scope(fx.loop), dead(fx.loop);
    for (int i = 0; i < 3; ++i) scope.spawn(waits(signal, woken));
    for (int i = 0; i < 100; ++i) dead.spawn(waits(signal, woken));
    dead.cancel();
    CHECK(woken == 0);
    signal.notify_all();
    CHECK(woken == 0);  // never inline
    CO_CHECK_OK(co_await scope.join());
    signal.notify_all();
    CO_CHECK_OK(co_await fx.settle());
    co_return woken;
  };
  CHECK(f.run(body(f)).value() == 3);
}

TEST_CASE("semaphore: first come, first served, also when a later one would fit", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<std::vector<int>> {
    Semaphore budget(fx.loop, 10);
    std::vector<int> order;
    auto takes = [](Fixture& x, Semaphore& s, std::uint64_t count, int id, std::vector<int>& out) -> Task<void> {
      CO_TRY(auto lease, co_await s.acquire(count));
      out.push_back(id);
      co_return co_await x.settle();
    };
    CO_TRY(auto first, co_await budget.acquire(8));
    Scope scope(fx.loop);
    scope.spawn(takes(fx, budget, 5, 1, order));
    scope.spawn(takes(fx, budget, 1, 2, order));  // would fit now; waits its turn
    CO_CHECK_OK(co_await fx.settle());
    CHECK(order.empty());
    CHECK_FALSE(budget.try_acquire(1));
    first.release();
    CO_CHECK_OK(co_await scope.join());
    CHECK(budget.available() == 10);
    CHECK_FALSE((co_await budget.acquire(11)).has_value());
    co_return order;
  };
  CHECK(f.run(body(f)).value() == std::vector<int>{1, 2});
}

TEST_CASE("semaphore: a cancelled waiter loses its turn and nothing else", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    Semaphore budget(fx.loop, 4);
    bool got = false;
    auto takes = [](Semaphore& s, std::uint64_t count, bool& out) -> Task<void> {
      CO_TRY(auto lease, co_await s.acquire(count));
      out = true;
      co_return {};
    };
    bool never = false;
    CO_TRY(auto held, co_await budget.acquire(2));
    Scope first(fx.loop), second(fx.loop);
    first.spawn(takes(budget, 4, never));
    second.spawn(takes(budget, 2, got));
    first.cancel();  // the head of the queue goes: the next one fits
    CO_CHECK_OK(co_await second.join());
    CHECK(got);
    CHECK_FALSE(never);
    held.release();
    CHECK(budget.available() == 4);
    // Granted, and cancelled before it could run: the lease comes back.
    CO_TRY(auto all_of_it, co_await budget.acquire(4));
    Scope third(fx.loop);
    third.spawn(takes(budget, 3, never));
    all_of_it.release();
    third.cancel();
    CO_CHECK_OK(co_await fx.settle());
    CHECK_FALSE(never);
    CHECK(budget.available() == 4);
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("scope: cancel destroys what waits, join waits for what runs", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    Signal never(fx.loop);
    bool destroyed = false;
    {
      Scope scope(fx.loop);
      scope.spawn(wait_for(never, destroyed));
      CHECK(scope.running() == 1);
      CHECK_FALSE(destroyed);
    }
    CHECK(destroyed);
    Scope scope(fx.loop);
    std::optional<Result<void>> ended;
    scope.spawn(
        [](Loop& loop) -> Task<void> {
          co_await loop.sleep(1ms);
          co_return fail(Errc::kFailed, "late");
        }(fx.loop),
        [&ended](Result<void> r) { ended = std::move(r); });
    CO_CHECK_OK(co_await scope.join());
    CHECK(ended->error().message == "late");
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("with_deadline: the task's value in time, else kDeadline and the task is gone", "[rt]") {
  Fixture f;
  CHECK(f.run(with_deadline(f.loop, f.loop.now() + 1h, answer(), "ask")).value() == 42);
  CHECK(f.run(with_deadline(f.loop, kNever, answer(), "ask")).value() == 42);
  Signal never(f.loop);
  bool destroyed = false;
  const auto late = f.run(with_deadline(f.loop, f.loop.now() + 1ms, wait_for(never, destroyed), "read chunk 7"));
  REQUIRE_FALSE(late);
  CHECK(late.error().code == Errc::kDeadline);
  CHECK(late.error().message == "read chunk 7: deadline exceeded");
  CHECK(destroyed);
}

TEST_CASE("all: waits for every task, or gives the first error and destroys the rest", "[rt]") {
  Fixture f;
  int ended = 0;
  auto naps = [](Loop& loop, Duration d, int& count) -> Task<void> {
    co_await loop.sleep(d);
    ++count;
    co_return {};
  };
  std::vector<Task<void>> good;
  for (int i = 3; i > 0; --i) good.push_back(naps(f.loop, i * 1ms, ended));
  CHECK(f.run(all(f.loop, std::move(good))));
  CHECK(ended == 3);
  CHECK(f.run(all(f.loop, {})));

  Signal never(f.loop);
  bool destroyed = false;
  std::vector<Task<void>> bad;
  bad.push_back(wait_for(never, destroyed));
  bad.push_back([]() -> Task<void> { co_return fail(Errc::kNoSpace, "full"); }());
  const auto failed = f.run(all(f.loop, std::move(bad)));
  REQUIRE_FALSE(failed);
  CHECK(failed.error().code == Errc::kNoSpace);
  CHECK(destroyed);
}

TEST_CASE("sleep: a destroyed sleeper's timer is cancelled", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    Scope scope(fx.loop);
    scope.spawn([](Loop& loop) -> Task<void> {
      co_await loop.sleep(1ms);
      FAIL("slept on after cancel");
      co_return {};
    }(fx.loop));
    scope.cancel();
    co_await fx.loop.sleep(3ms);
    co_return {};
  };
  CHECK(f.run(body(f)));
}

TEST_CASE("unit_pool: units are aligned, bounded, and return when their last owner goes", "[rt]") {
  Fixture f;
  auto body = [](Fixture& fx) -> Task<void> {
    CO_TRY(auto pool, UnitPool::create(fx.loop, 2, 8192));
    CO_TRY(auto a, co_await pool->acquire());
    CHECK(reinterpret_cast<std::uintptr_t>(a.bytes.data()) % 4096 == 0);
    auto b = pool->try_acquire();
    REQUIRE(b);
    CHECK_FALSE(pool->try_acquire());
    Buffer shared = std::move(a).freeze(100);
    Buffer part = shared.slice(50, 10);
    shared = {};
    CHECK(pool->available() == 0);
    part = {};
    CHECK(pool->available() == 1);
    pool.reset();
    std::memset(b->bytes.data(), 1, b->bytes.size());  // the slab outlives the pool while a unit does
    co_return {};
  };
  CHECK(f.run(body(f)));
}
