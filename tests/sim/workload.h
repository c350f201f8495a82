#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "proto/rt/loop.h"
#include "tests/sim/faults.h"

namespace cairn::sim {

class World;

/// The checkpoint workload: one daemon, several launches of one or two training jobs with several ranks each, that
/// save, die, resume, restore, overwrite and remove steps under the faults of draw_swarm(seed). Then the world heals:
/// saves must succeed again, everything acknowledged must be there, to the byte, and garbage must go to zero.
struct WorkloadOptions {
  std::uint64_t seed = 1;
  std::string bug;           // name of a planted bug, or empty
  bool directories = false;  // the checkpoint workload on two or three data directories, with copies across them
  std::function<void(const std::string&)> trace;
};

struct WorkloadResult {
  std::uint64_t seed = 0;
  std::uint64_t trace_hash = 0;
  std::uint64_t events = 0;
  double virtual_seconds = 0;
  std::vector<std::string> violations;  // empty: all promises kept
  FaultCounts faults;
  std::uint64_t commits = 0, restores = 0, fenced = 0, refused_bad = 0;
  std::string configuration;
};

/// What every workload tells at its end of the world that it ran in since `began`.
void conclude(WorkloadResult& result, const World& world, rt::TimePoint began, std::vector<std::string> violations);

WorkloadResult run_checkpoint_workload(WorkloadOptions options);

/// The storage workload: one target, no network; several writers put, abandon, repeat, read and remove chunks and
/// change records, while processes die and power fails. Every acknowledged chunk and record is there, to the byte,
/// after each restart, what was removed stays away, and no space is lost.
WorkloadResult run_storage_workload(WorkloadOptions options);

/// The targets workload: one daemon with up to three data directories that fail, are missing at a start, are lost for
/// good or come back stale; writers change records meanwhile. Every acknowledged record is there after each start that
/// the daemon takes, and in the end every directory has them all again.
WorkloadResult run_targets_workload(WorkloadOptions options);

/// The retention workload: steps come and go by policies, by hand and by replacement, are pinned and unpinned, while
/// readers hold them open, some for longer than the daemon hears of them. A protected reader gets all bytes, an
/// unprotected one right bytes or kDeleted; what must stay stays, and all else is freed in the end.
WorkloadResult run_retention_workload(WorkloadOptions options);

/// The space workload: a disk, and sometimes a quota, that saves and uploads of known and unknown size fill again and
/// again. What does not fit fails alone, for all its ranks as NO_SPACE; a step saved before is read all the time; what
/// failed or was removed leaves no chunk, no reservation and no byte.
WorkloadResult run_space_workload(WorkloadOptions options);

/// The scrub workload: objects on up to three directories, in one or several copies, whose bits rot; scrubs while
/// others write, and while the daemon dies. What has a good copy of each block is whole everywhere afterwards; all that
/// is not is told, with the right offsets, and nothing else is.
WorkloadResult run_scrub_workload(WorkloadOptions options);

/// The handover workload: launches of ranks that save by shared memory and die as soon as they have handed over what is
/// left, or a moment later, while a newer launch opens the run, the daemon dies, or somebody scribbles over the memory
/// of the dead. What all ranks have handed over commits, unless one of these came between; what commits is right to the
/// byte, no newer launch is overtaken, and nothing of the dead is kept.
WorkloadResult run_handover_workload(WorkloadOptions options);

struct BugName {
  std::string name;
  std::string what;
  std::string workload;  // that catches it
};
/// The planted bugs of protocol.md section 10, disk and save lines.
std::vector<BugName> planted_bugs();

}  // namespace cairn::sim
