#pragma once

#include <memory>
#include <set>

#include "proto/rt/task.h"
#include "server/coordinator/map.h"
#include "server/coordinator/membership_bugs.h"
#include "server/targets/target_set.h"

namespace cairn::server {

/// Where the map is kept. One value, changed by compare on its version.
///
/// Threads: the loop.
class Coordinator {
 public:
  virtual ~Coordinator() = default;
  /// The newest map that is in force, as far as it is known here; nothing before the first.
  virtual const std::optional<ClusterMap>& map() const = 0;
  /// Replaces the map when its version is still `expected` (0: none yet); `next` gets a version above it. In force when
  /// it returns ok.
  /// errors: kConflict  another version;  others: the outcome is unknown, and a proposal is nothing until read back
  virtual Task<void> propose(ClusterMap next, std::uint64_t expected) = 0;
};

/// What lies on the targets of a daemon that keeps its map itself.
struct LocalMap {
  std::unique_ptr<Coordinator> coordinator;
  bool forced = false;  // as may_start() says
};

/// Embedded mode: the map lies in the index of every target that it names as not out, key "map" of table kMeta, as
/// wire.Map. A change is in force when it is durable on all of them. Where targets differ, the newest counts, by
/// (generation, term, version); whether the targets that are here may know it is decided by may_start().
///
/// Before it changes anything, a start makes a `term` that is above all that it finds durable on every target here, key
/// "map.term": majorities meet, so what two starts with different targets write is never taken for one another.
///
/// Lifetime: `targets` outlives it.
/// errors:   kDataLoss     what is stored is no map
///           kInvalid      targets of two clusters; one that was declared lost; and as may_start()
///           kUnavailable  as may_start()
Task<LocalMap> open_local_coordinator(TargetSet& targets, std::set<Uuid> lost = {}, MembershipBugs bugs = {});

/// As may_start() of changes.h, with the targets that are here and have not failed. Where it is refused because some
/// have failed since they were opened, it says why, with the code of that failure.
Result<bool> may_start_here(const ClusterMap& map, const TargetSet& targets, const std::set<Uuid>& lost);

/// The newest map that lies on these targets; nothing when they never belonged to a cluster. Targets on which it cannot
/// be read are passed over. errors: kDataLoss  it can be read on none of them
Task<std::optional<ClusterMap>> newest_map(const TargetSet& targets);

}  // namespace cairn::server
