#include "tests/sim/bugs.h"

namespace cairn::sim {

namespace {

struct StorageBug {
  const char* name;
  const char* what;
  bool storage::PlantedBugs::* flag;
};
constexpr StorageBug kStorageBugs[] = {
    {"no_flush", "chunks are acknowledged without flushing their bytes", &storage::PlantedBugs::no_flush},
    {"no_index_sync", "index batches are not synced", &storage::PlantedBugs::no_index_sync},
    {"join_flush", "a commit joins a flush that is already in flight", &storage::PlantedBugs::join_flush},
    {"punch_before_sync", "extents are punched before the delete batch is synced",
     &storage::PlantedBugs::punch_before_sync},
    {"no_read_check", "the CRC is not checked on read", &storage::PlantedBugs::no_read_check},
    {"append_foreign_segment", "a process appends to a segment of another one",
     &storage::PlantedBugs::append_foreign_segment},
};

}  // namespace

storage::PlantedBugs storage_bugs(const std::string& bug) {
  storage::PlantedBugs bugs;
  for (const auto& known : kStorageBugs)
    if (bug == known.name) bugs.*known.flag = true;
  return bugs;
}

std::vector<BugName> planted_bugs() {
  std::vector<BugName> out;
  for (const auto& known : kStorageBugs) out.push_back({known.name, known.what, "storage"});
  return out;
}

}  // namespace cairn::sim
