#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace cairn::server {

/// Which steps of a run are kept: those that one of the rules names. Without any rule, all.
struct KeepPolicy {
  std::uint32_t last = 0;   // the highest so many
  std::uint64_t every = 0;  // those divisible by it
  std::uint32_t days = 0;   // those committed in the last so many days
  bool any() const { return last > 0 || every > 0 || days > 0; }
};

struct CommittedStep {
  std::uint64_t step = 0;
  std::int64_t committed_unix_nanos = 0;
  bool pinned = false;
};

/// What the policy lets go, by rising step. Whatever it says, these are kept: the newest step, pinned ones, and `held`,
/// from which the launch that has the run was told to resume.
///
/// `now` is a wall clock, and decides only about `days`: when it stands wrong, steps that no other rule keeps go too
/// early or too late. A step of the future counts as young.
///
/// sizes:  `steps` by rising step, each once; times in nanoseconds since the Unix epoch
/// source: protocol.md 9
std::vector<std::uint64_t> steps_to_remove(const KeepPolicy& policy, const std::vector<CommittedStep>& steps,
                                           std::optional<std::uint64_t> held, std::int64_t now_unix_nanos);

}  // namespace cairn::server
