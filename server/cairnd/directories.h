#pragma once

#include <cstdint>

#include "proto/runtime/runtime.h"
#include "server/cairnd/options.h"
#include "server/targets/target_set.h"

namespace cairn::server {

/// Opens the data directories that the options name, and adds their targets to `out`.
/// - A directory that cannot be read or is damaged is left out, loudly, when there are others: the map tells whether
/// the
///   rest may go on without it.
/// - An empty directory is formatted, and joins as a new target; but not while a target that the map knows is missing
/// and
///   not declared lost, because it may be the mount point of that one's disk.
///
/// `index_bytes`: memory of all indexes together.
/// errors: what is not the disk's fault (in use, not ours, a newer version), always; the only directory's;  and on the
///         first start any
Task<void> open_directories(rt::RealRuntime& real, const CairndOptions& options, std::uint64_t index_bytes,
                            storage::PlantedBugs bugs, rt::UnitPool& units, TargetSet& out);

}  // namespace cairn::server
