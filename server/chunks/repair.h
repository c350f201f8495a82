#pragma once

#include <cstdint>
#include <memory>

#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"
#include "server/chunks/chunks.h"
#include "server/membership/membership.h"

namespace cairn::server {

/// Brings syncing members of data groups up to date: every chunk that a serving member has is copied, from any that has
/// good bytes; new ones come by themselves. Then the member serves. One chunk at a time, so that saves come first;
/// never deletes. A chunk without a good copy anywhere is reported and left out: it is damage, which no repair can
/// heal.
///
/// Threads:  the loop.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 5
class Repair {
 public:
  Repair(rt::Runtime runtime, Membership& members, Chunks& chunks, rt::UnitPool& units)
      : runtime_(runtime), members_(members), chunks_(chunks), units_(units) {}

  /// For ever.
  Task<void> run();

  struct Stats {
    std::uint64_t groups = 0;  // with syncing members, now
    std::uint64_t chunks = 0, bytes = 0;
    std::uint64_t damaged = 0;  // chunks without a good copy
  };
  Stats stats() const;

 private:
  Task<void> bring_up(DataGroup group, Member newcomer);
  Task<void> copy(DataGroup group, storage::ChunkInfo chunk, storage::Target& to);

  rt::Runtime runtime_;
  Membership& members_;
  Chunks& chunks_;
  rt::UnitPool& units_;
  Stats stats_;
};

}  // namespace cairn::server
