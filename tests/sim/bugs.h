#pragma once

#include <string>

#include "server/checkpoints/save_bugs.h"
#include "server/coordinator/membership_bugs.h"
#include "storage/committer/committer.h"
#include "tests/sim/workload.h"

namespace cairn::sim {

/// The client's.
inline constexpr char kSharedUnchecked[] = "shared_unchecked";

/// The switch of the storage engine that `bug` names; none for other names.
storage::PlantedBugs storage_bugs(const std::string& bug);
/// The same of the server.
server::SaveBugs save_bugs(const std::string& bug);
server::MembershipBugs membership_bugs(const std::string& bug);

}  // namespace cairn::sim
