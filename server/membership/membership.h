#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/coordinator/changes.h"
#include "server/coordinator/coordinator.h"
#include "server/coordinator/membership_bugs.h"

namespace cairn::server {

/// Who holds what: the map in force, as this daemon's targets, and the changes of it that this daemon makes.
///
/// A writer sends what it writes to all members of a group, waits for all of them, and then asks may_acknowledge().
/// A reader takes any serving member. Whoever brings a syncing member up to date says promote().
///
/// Threads:  the loop. Changes of the map come one after the other.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 1; ARCHITECTURE.md, "Several data directories"
class Membership {
 public:
  Membership(rt::Runtime runtime, TargetSet& targets, Coordinator& coordinator, MembershipBugs bugs)
      : runtime_(runtime),
        targets_(targets),
        coordinator_(coordinator),
        bugs_(bugs),
        turn_(runtime.loop, 1),
        changed_(runtime.loop),
        background_(runtime.loop) {}

  struct Options {
    std::string node;                    // name
    std::vector<std::string> addresses;  // where clients reach it
    std::set<Uuid> lost;                 // targets that the operator asserts to be lost
    bool forced = false;                 // as the coordinator says
  };
  /// Puts the map of this start in force. errors: as after_start()
  Task<void> start(Options options);
  /// Looks for targets that fail, and takes them from their groups. Runs for ever.
  Task<void> watch();

  const ClusterMap& map() const { return *coordinator_.map(); }
  TargetSet& targets() { return targets_; }
  /// Notified after every change that is in force.
  rt::Signal& changed() { return changed_; }
  /// Called at every change that is in force, before anybody goes on.
  std::function<void()> on_change;

  struct Group {
    GroupEpoch epoch;
    std::uint32_t loss = 0;
    std::vector<storage::Target*> serving;  // primary first; none that has failed
    std::vector<storage::Target*> syncing;  // must get every write, too
    std::vector<Uuid> missing;              // members that are not here, or have failed
  };
  /// The members of a group now. errors: kStale  there is no such group
  Result<Group> group(bool home, std::uint32_t number) const;

  /// Whether what all of `have` have durably may be acknowledged: when every member of the group is among them. A
  /// member that has failed is taken from its groups first, and that is in force before this returns ok.
  /// errors: kFailed       the group cannot do without a member that has failed
  ///         kUnavailable  a member that has not failed lacks it: write again
  Task<void> may_acknowledge(bool home, std::uint32_t group, std::set<Uuid> have);

  /// A syncing member that joined at `joined` has everything, durably: it serves. Does nothing when it is not that
  /// member any more.
  Task<void> promote(bool home, std::uint32_t group, Uuid target, std::uint64_t joined);
  /// A serving member was found to lack something: it is syncing again, unless it is the last that serves.
  Task<void> demote(bool home, std::uint32_t group, Uuid target);

  /// Why it can serve no more: too many targets have failed.
  std::optional<Error> failure() const;

 private:
  Task<void> change(std::function<ClusterMap(const ClusterMap&)> step, std::string why);

  rt::Runtime runtime_;
  TargetSet& targets_;
  Coordinator& coordinator_;
  MembershipBugs bugs_;
  rt::Semaphore turn_;
  rt::Signal changed_;
  rt::Scope background_;
};

}  // namespace cairn::server
