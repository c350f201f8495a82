#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "proto/common/buffer.h"
#include "proto/common/units.h"
#include "proto/rt/sync.h"

namespace cairn::rt {

/// Memory being filled, with one owner; becomes an immutable Buffer by freeze().
struct MutableBuffer {
  std::shared_ptr<void> owner;
  std::span<std::byte> bytes;

  /// The first `size_bytes` as a Buffer. The caller writes no more.
  Buffer freeze(std::size_t size_bytes) && {
    return Buffer(std::move(owner), std::span<const std::byte>(bytes.first(size_bytes)));
  }
};

/// A fixed slab of equal, 4096-byte aligned units: the memory budget of bulk data. A unit returns to the pool when its
/// last owner goes. The slab lives until the pool and all its units are gone.
///
/// Threads: acquire on the loop; units may be released on the loop only.
class UnitPool {
 public:
  /// sizes: unit_bytes a multiple of 4096; units >= 1
  /// errors: kFailed  the memory cannot be had
  static Result<std::unique_ptr<UnitPool>> create(Loop& loop, std::size_t units, std::size_t unit_bytes = kUnitBytes);

  /// Over memory of somebody else's, which `owner` keeps.
  /// sizes: slab a multiple of unit_bytes, aligned to 4096
  static std::unique_ptr<UnitPool> over(Loop& loop, std::shared_ptr<void> owner, std::span<std::byte> slab,
                                        std::size_t unit_bytes = kUnitBytes);

  /// Waits, first come first served.
  Task<MutableBuffer> acquire();
  /// `give_back` is called when somebody asks for a unit and none is free: whoever holds units that he can do without
  /// releases one, or more. One at most; empty: none.
  void on_shortage(std::function<void()> give_back);
  std::optional<MutableBuffer> try_acquire();
  std::size_t unit_bytes() const;
  std::size_t units() const;
  std::size_t available() const;
  /// The whole slab, for registering with a ring.
  std::span<std::byte> slab() const;

 private:
  struct State;
  explicit UnitPool(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace cairn::rt
