#include "proto/rt/unit_pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace cairn::rt {

struct UnitPool::State {
  State(Loop& loop, std::size_t units, std::size_t size) : unit_bytes(size), free_count(loop, units) {}
  std::size_t unit_bytes;
  std::shared_ptr<void> owner;  // of the slab
  std::span<std::byte> slab;
  Semaphore free_count;  // who may take from free_units
  std::vector<std::size_t> free_units;
  std::function<void()> give_back;

  void look_for_units() const {
    if (free_count.available() == 0 && give_back) give_back();
  }
};

namespace {

template <class State>
MutableBuffer take(std::shared_ptr<State> state, Semaphore::Lease lease) {
  // The lease goes back after the unit does, so that whoever is granted it finds the unit.
  struct Held {
    std::shared_ptr<State> state;
    std::size_t unit;
    Semaphore::Lease lease;
    Held(std::shared_ptr<State> s, std::size_t u, Semaphore::Lease l)
        : state(std::move(s)), unit(u), lease(std::move(l)) {}
    ~Held() { state->free_units.push_back(unit); }
  };
  const auto unit = state->free_units.back();
  state->free_units.pop_back();
  auto bytes = state->slab.subspan(unit * state->unit_bytes, state->unit_bytes);
  return {std::make_shared<Held>(std::move(state), unit, std::move(lease)), bytes};
}

}  // namespace

Result<std::unique_ptr<UnitPool>> UnitPool::create(Loop& loop, std::size_t units, std::size_t unit_bytes) {
  const std::size_t size = units * unit_bytes;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    return fail(Errc::kFailed, "mmap of " + std::to_string(size) + " bytes for buffers: " + std::strerror(errno));
  madvise(memory, size, MADV_HUGEPAGE);  // a wish: fewer page faults where the kernel allows it
  std::shared_ptr<void> owner(memory, [size](void* at) { munmap(at, size); });
  return over(loop, std::move(owner), {static_cast<std::byte*>(memory), size}, unit_bytes);
}

std::unique_ptr<UnitPool> UnitPool::over(Loop& loop, std::shared_ptr<void> owner, std::span<std::byte> slab,
                                         std::size_t unit_bytes) {
  const auto units = slab.size() / unit_bytes;
  auto state = std::make_shared<State>(loop, units, unit_bytes);
  state->owner = std::move(owner);
  state->slab = slab;
  for (std::size_t i = units; i-- > 0;) state->free_units.push_back(i);
  return std::unique_ptr<UnitPool>(new UnitPool(std::move(state)));
}

Task<MutableBuffer> UnitPool::acquire() {
  auto state = state_;
  state->look_for_units();
  CO_TRY(auto lease, co_await state->free_count.acquire(1));
  co_return take(std::move(state), std::move(lease));
}

std::optional<MutableBuffer> UnitPool::try_acquire() {
  state_->look_for_units();
  auto lease = state_->free_count.try_acquire(1);
  if (!lease) return std::nullopt;
  return take(state_, std::move(*lease));
}

void UnitPool::on_shortage(std::function<void()> give_back) {
  state_->give_back = std::move(give_back);
}

std::size_t UnitPool::unit_bytes() const {
  return state_->unit_bytes;
}
std::size_t UnitPool::units() const {
  return state_->free_count.capacity();
}
std::size_t UnitPool::available() const {
  return state_->free_count.available();
}
std::span<std::byte> UnitPool::slab() const {
  return state_->slab;
}

}  // namespace cairn::rt
