#pragma once

namespace cairn::server {

/// Faults that tests plant to prove that the checkers see them. All off in a daemon.
struct MembershipBugs {
  bool acknowledge_early = false;       // a transaction is acknowledged when its first member has it
  bool acknowledge_before_map = false;  // what a failed member lacks is acknowledged before the map says so
  bool start_alone = false;             // any target may go on alone after a restart
  bool repair_unchecked = false;        // a repair takes what its first source has, good or bad
};

}  // namespace cairn::server
