#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "proto/rt/unit_pool.h"
#include "server/chunks/pace.h"
#include "server/targets/target_set.h"
#include "storage/chunk_store/chunk_store.h"

namespace cairn::server {

/// Copies single chunks to a target that lacks them or has them damaged, block by block, each from whichever copy has
/// it good: two copies that are damaged in different places make a whole one. Bytes count by their CRCs alone, and
/// those by the digest that the chunk is known by.
///
/// Threads:  the loop; calls overlap. One unit of memory each, two where a copy is damaged.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 5, 6
class Copier {
 public:
  /// `unchecked`: planted bug: what the first source has is taken for good.
  Copier(TargetSet& targets, rt::UnitPool& units, bool unchecked)
      : targets_(targets), units_(units), unchecked_(unchecked) {}

  /// Durable on `to` when it returns true; false: there is nothing to do any more, it is there, or gone everywhere.
  /// `place`: where `to` has it damaged; nothing: it lacks it.
  /// errors: kDataLoss  no copy of some block is good: which;  kNoSpace;  kFailed  `to` has failed
  Task<bool> copy(storage::ChunkInfo chunk, storage::Target& to, std::optional<std::string> place, Pace& pace);

 private:
  struct Sources {
    std::vector<storage::ChunkStore*> stores;  // that have it, the most trusted first
    std::vector<std::uint32_t> crcs;           // empty: damaged everywhere
    std::optional<Error> error;                // of an index that could not say whether it has it
  };
  Task<Sources> sources(const storage::ChunkInfo& chunk, storage::Target& to);
  Task<rt::MutableBuffer> gather(ChunkId id, std::uint32_t offset, std::uint32_t size, const Sources& from);

  TargetSet& targets_;
  rt::UnitPool& units_;
  bool unchecked_;
};

}  // namespace cairn::server
