#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "proto/rt/sync.h"
#include "storage/target/target.h"

namespace cairn::server {

/// A copy that a target should have, and has not, or not whole.
struct Damage {
  storage::ChunkInfo chunk;
  std::vector<std::uint32_t> offsets;  // in the chunk, of its bad blocks; empty: all of it
  std::string reason;                  // of the first
  std::int64_t found_unix_nanos = 0;
  std::int64_t repaired_unix_nanos = 0;  // 0: it is not
  std::string unrepaired;                // why it could not be

  bool left() const { return repaired_unix_nanos == 0; }
};

/// The damaged copies of one target, in its index: what is left to repair, and what was repaired since the last scrub
/// began. Table meta, key "damage." and the chunk's key; value: records.Damage.
///
/// Threads:  the loop; calls may overlap.
/// Lifetime: the target outlives it.
class DamageList {
 public:
  /// Of those repaired at most so many are kept.
  static constexpr std::uint64_t kRepairedMax = 1000;

  DamageList(rt::Loop& loop, storage::Target& target) : target_(target), turn_(loop, 1) {}

  /// Before the first call of the others.
  Task<void> load();
  Task<std::optional<Damage>> find(ChunkId id);
  /// Durable when it returns ok; in place of what was known of the chunk.
  Task<void> put(Damage damage);
  Task<void> forget(ChunkId id);
  Task<void> forget_repaired();
  /// By rising chunk, those after `after`.
  Task<std::vector<Damage>> page(std::optional<ChunkId> after, std::size_t limit);
  std::uint64_t left() const { return left_; }

 private:
  Task<void> change(ChunkId id, std::optional<Damage> damage);

  storage::Target& target_;
  rt::Semaphore turn_;  // one change at a time, so that the counts are exact
  std::uint64_t left_ = 0, repaired_ = 0;
};

}  // namespace cairn::server
