#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "server/coordinator/map.h"

// How the map changes: pure functions. They leave `version` and `term` to the coordinator, and change a group's epoch
// whenever they change the group.

namespace cairn::server {

struct StartedTarget {
  Uuid uuid;
  std::uint64_t incarnation = 0;
  std::string directory;
};

/// A daemon has started with these targets.
struct Start {
  std::vector<StartedTarget> targets;  // in the order of the command line
  std::set<Uuid> lost;                 // the operator asserts that they are lost for good
  bool forced = false;                 // as may_start() says
  std::string node;
  std::vector<std::string> addresses;
  Uuid fresh_cluster;  // id of the cluster if this start makes it
};

/// Whether a daemon may go on from `map`, the newest that it found, with the targets `present`. A map in force lies on
/// every target that it names as not out, and a change takes away a minority of those, or one of two. So a majority (of
/// two: both) knows of every change. With fewer, the operator has to assert that the others are lost.
/// returns whether only that assertion allows it: the map may then be stale
/// errors: kUnavailable  names the targets that are missing
///         kInvalid      a target in `lost` that is present. One that the map does not know is no error: it was said
///                       before, and the flag may stay
/// source: ARCHITECTURE.md, "Several data directories"
Result<bool> may_start(const ClusterMap& map, const std::set<Uuid>& present, const std::set<Uuid>& lost);

/// The map after a start.
/// - No map yet: a cluster of these targets.
/// - A new incarnation of a member keeps its place (nothing could be acknowledged without it), and every group that
///   lists it gets a new epoch: requests of clients that knew the old incarnation are answered STALE.
/// - A known target that is not here is out, and member only where it is the last serving one.
/// - A target that comes back, or is new, enters the groups where it is placed as syncing.
/// - One that is lost for good is forgotten, its places go to others. A data group whose last serving member it was
///   has lost its chunks: its `loss` rises, and new members serve at once. `forced`: every group's `loss` rises.
/// errors: kUnavailable  no serving member of the home groups is here
///         kDataLoss     an older incarnation than the map knows: the superblock went back in time
/// source: protocol.md 1
Result<ClusterMap> after_start(const std::optional<ClusterMap>& map, const Start& start);

/// The map without targets that have failed.
/// errors: kUnavailable  they cannot be done without: too few are left, or none that serves the home groups
Result<ClusterMap> after_failures(ClusterMap map, const std::set<Uuid>& failed);

/// The map when a syncing member has everything: it serves. The same map when it is no member any more, or entered
/// again since.
ClusterMap after_sync(ClusterMap map, bool home, std::uint32_t group, const Uuid& target, std::uint64_t joined);

/// The map when a serving member was found to lack something: it enters again as syncing. The same map when nobody else
/// serves.
ClusterMap after_lack(ClusterMap map, bool home, std::uint32_t group, const Uuid& target);

/// Adds the data groups that are missing: for each number of copies R from 1 to min(kCopiesMax, targets), and each
/// target i in order, the group (i, i + 1, .., i + R - 1 modulo the number of targets). Numbers go on from the highest.
/// Members that are not out serve at once: there is nothing to bring them.
void add_data_groups(ClusterMap& map);

}  // namespace cairn::server
