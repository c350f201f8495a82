#pragma once

#include <cassert>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"

namespace cairn::client {

/// Where staged bytes wait until they are durable. Memory is handed out a whole chunk at a time, to one taker after the
/// other: nobody waits for memory while holding a part of a chunk, so savers that share an arena cannot block each
/// other.
class Arena {
 public:
  /// sizes: bytes at least twice chunk_bytes
  static Result<std::unique_ptr<Arena>> create(rt::Loop& loop, std::uint64_t bytes, std::uint32_t chunk_bytes,
                                               std::uint32_t unit_bytes = kUnitBytes) {
    if (chunk_bytes == 0 || bytes / 2 < chunk_bytes)
      return fail(Errc::kInvalid, "arena of " + std::to_string(bytes) + " bytes: must hold two chunks of " +
                                      std::to_string(chunk_bytes) + " bytes");
    TRY(auto pool, rt::UnitPool::create(loop, bytes / unit_bytes, unit_bytes));
    return std::unique_ptr<Arena>(new Arena(loop, std::move(pool), chunk_bytes));
  }
  /// Over memory that the daemon sees too: `memory` from `begin` on.
  static std::unique_ptr<Arena> over(rt::Loop& loop, std::shared_ptr<rt::SharedMemory> memory, std::uint64_t begin,
                                     std::uint32_t chunk_bytes, std::uint32_t unit_bytes = kUnitBytes) {
    const auto slab = memory->bytes().subspan(begin);
    assert(slab.size() / 2 >= chunk_bytes);
    return std::unique_ptr<Arena>(
        new Arena(loop, rt::UnitPool::over(loop, std::move(memory), slab, unit_bytes), chunk_bytes));
  }

  /// Units for `bytes` (at most chunk_bytes()). Waits, first come first served.
  Task<std::vector<rt::MutableBuffer>> take(std::uint64_t bytes) {
    CO_TRY(auto turn, co_await turn_.acquire(1));
    std::vector<rt::MutableBuffer> units;
    for (std::uint64_t have = 0; have < bytes; have += pool_->unit_bytes()) {
      CO_TRY(auto unit, co_await pool_->acquire());
      units.push_back(std::move(unit));
    }
    co_return units;
  }
  /// The same when they are free and nobody waits.
  std::optional<std::vector<rt::MutableBuffer>> try_take(std::uint64_t bytes) {
    const auto turn = turn_.try_acquire(1);
    if (!turn || free_bytes() < bytes) return std::nullopt;
    std::vector<rt::MutableBuffer> units;
    for (std::uint64_t have = 0; have < bytes; have += pool_->unit_bytes()) {
      auto unit = pool_->try_acquire();
      if (!unit) return std::nullopt;
      units.push_back(*std::move(unit));
    }
    return units;
  }
  std::uint32_t chunk_bytes() const { return chunk_bytes_; }
  std::uint64_t free_bytes() const { return pool_->available() * pool_->unit_bytes(); }
  std::uint64_t total_bytes() const { return pool_->units() * pool_->unit_bytes(); }
  std::span<std::byte> slab() const { return pool_->slab(); }
  std::uint32_t unit_bytes() const { return static_cast<std::uint32_t>(pool_->unit_bytes()); }

 private:
  Arena(rt::Loop& loop, std::unique_ptr<rt::UnitPool> pool, std::uint32_t chunk_bytes)
      : pool_(std::move(pool)), turn_(loop, 1), chunk_bytes_(chunk_bytes) {}
  std::unique_ptr<rt::UnitPool> pool_;
  rt::Semaphore turn_;
  std::uint32_t chunk_bytes_;
};

}  // namespace cairn::client
