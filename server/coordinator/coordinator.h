#pragma once

#include <memory>

#include "proto/rt/task.h"
#include "server/coordinator/map.h"
#include "storage/target/target.h"

namespace cairn::server {

/// Where the map is kept. One value, changed by compare on its version.
///
/// Threads: the loop.
class Coordinator {
 public:
  virtual ~Coordinator() = default;
  /// The newest map that was read or written here; nothing before the first.
  virtual const std::optional<ClusterMap>& map() const = 0;
  /// Replaces the map when its version is still `expected` (0: none yet). Durable when it returns ok.
  /// errors: kConflict  another version;  others: the outcome is unknown, and a proposal is nothing until read back
  virtual Task<void> propose(ClusterMap next, std::uint64_t expected) = 0;
};

/// Embedded mode: the map lies in the target's index, key "map" of table kMeta, as wire.Map.
///
/// Lifetime: `target` outlives it.
/// errors:   kDataLoss  what is stored is no map
Task<std::unique_ptr<Coordinator>> open_local_coordinator(storage::Target& target);

}  // namespace cairn::server
