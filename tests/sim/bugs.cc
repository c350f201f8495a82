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
    {"repair_blind", "a repair replaces an entry that has changed since it was seen",
     &storage::PlantedBugs::repair_blind},
    {"repair_early", "a repair is acknowledged before it is durable", &storage::PlantedBugs::repair_early},
    {"recycle_while_read", "a segment is written again while an extent of it is being read",
     &storage::PlantedBugs::recycle_while_read},
};

struct SaveBug {
  const char* name;
  const char* what;
  bool server::SaveBugs::* flag;
  const char* workload = "checkpoint";
};
constexpr SaveBug kSaveBugs[] = {
    {"begin_unfenced", "begin compares neither run_epoch nor launch", &server::SaveBugs::begin_unfenced},
    {"commit_unfenced", "commit does not compare the run_epoch", &server::SaveBugs::commit_unfenced},
    {"coverage_off", "boxes, holders and tokens are not proved", &server::SaveBugs::coverage_off},
    {"commit_early", "a step commits when one rank has not sealed yet", &server::SaveBugs::commit_early},
    {"existing_unseen", "an existing chunk id is accepted without comparing its bytes",
     &server::SaveBugs::existing_unseen},
    {"handover_unfenced", "what a rank has handed over is committed without comparing the run_epoch",
     &server::SaveBugs::handover_unfenced, "handover"},
    {"handover_unwritten", "what a rank has handed over is sealed before it is written",
     &server::SaveBugs::handover_unwritten, "handover"},
    {"absence_is_death", "garbage: no answer, or one after a loss, counts as dead",
     &server::SaveBugs::absence_is_death},
    {"reservation_kept", "a failed attempt keeps the space that it has reserved", &server::SaveBugs::reservation_kept,
     "space"},
    {"ask_once", "garbage: the question is not asked again after the grace time", &server::SaveBugs::ask_once},
    {"readers_unasked", "what was removed is let go though readers are registered", &server::SaveBugs::readers_unasked,
     "retention"},
    {"takeover_unwaited", "what was removed is let go before readers of the process before could register again",
     &server::SaveBugs::takeover_unwaited, "retention"},
    {"retention_unpinned", "retention removes pinned steps", &server::SaveBugs::retention_unpinned, "retention"},
    {"retention_one_fewer", "retention keeps one less of the newest steps than it is to",
     &server::SaveBugs::retention_one_fewer, "retention"},
    {"retention_blind", "retention does not compare the run's record", &server::SaveBugs::retention_blind, "retention"},
};

struct MembershipBug {
  const char* name;
  const char* what;
  bool server::MembershipBugs::* flag;
  const char* workload = "targets";
};
constexpr MembershipBug kMembershipBugs[] = {
    {"acknowledge_early", "a transaction is acknowledged when its first member has it",
     &server::MembershipBugs::acknowledge_early},
    {"acknowledge_before_map", "what a failed member lacks is acknowledged before the map says so",
     &server::MembershipBugs::acknowledge_before_map},
    {"start_alone", "any target may go on alone after a restart", &server::MembershipBugs::start_alone},
    {"repair_unchecked", "a damaged copy is taken as the source of a repair", &server::MembershipBugs::repair_unchecked,
     "scrub"},
};

}  // namespace

storage::PlantedBugs storage_bugs(const std::string& bug) {
  storage::PlantedBugs bugs;
  for (const auto& known : kStorageBugs)
    if (bug == known.name) bugs.*known.flag = true;
  bugs.repair_unchecked = bug == "repair_unchecked";  // both who reads and who writes must look away
  return bugs;
}

server::SaveBugs save_bugs(const std::string& bug) {
  server::SaveBugs bugs;
  for (const auto& known : kSaveBugs)
    if (bug == known.name) bugs.*known.flag = true;
  return bugs;
}

server::MembershipBugs membership_bugs(const std::string& bug) {
  server::MembershipBugs bugs;
  for (const auto& known : kMembershipBugs)
    if (bug == known.name) bugs.*known.flag = true;
  return bugs;
}

std::vector<BugName> planted_bugs() {
  std::vector<BugName> out;
  for (const auto& known : kStorageBugs) out.push_back({known.name, known.what, "storage"});
  for (const auto& known : kSaveBugs) out.push_back({known.name, known.what, known.workload});
  for (const auto& known : kMembershipBugs) out.push_back({known.name, known.what, known.workload});
  out.push_back({kSharedUnchecked, "the client does not verify what is read into its memory", "checkpoint"});
  return out;
}

}  // namespace cairn::sim
