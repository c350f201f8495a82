#include "server/cairnd/faults.h"

#include <cstdlib>
#include <map>
#include <string>
#include <string_view>

namespace cairn::server {

Result<PlantedFaults> planted_faults() {
  PlantedFaults faults;
#ifdef CAIRN_TEST_FAULTS
  const std::map<std::string_view, bool*> names = {
      {"no_flush", &faults.storage.no_flush},
      {"no_index_sync", &faults.storage.no_index_sync},
      {"join_flush", &faults.storage.join_flush},
      {"punch_before_sync", &faults.storage.punch_before_sync},
      {"no_read_check", &faults.storage.no_read_check},
      {"append_foreign_segment", &faults.storage.append_foreign_segment},
      {"begin_unfenced", &faults.saves.begin_unfenced},
      {"commit_unfenced", &faults.saves.commit_unfenced},
      {"coverage_off", &faults.saves.coverage_off},
      {"commit_early", &faults.saves.commit_early},
      {"existing_unseen", &faults.saves.existing_unseen},
      {"absence_is_death", &faults.saves.absence_is_death},
      {"ask_once", &faults.saves.ask_once},
      {"readers_unasked", &faults.saves.readers_unasked},
      {"takeover_unwaited", &faults.saves.takeover_unwaited},
      {"retention_unpinned", &faults.saves.retention_unpinned},
      {"retention_one_fewer", &faults.saves.retention_one_fewer},
      {"retention_blind", &faults.saves.retention_blind},
  };
  const char* wanted = std::getenv("CAIRN_TEST_FAULTS");
  for (std::string_view rest = wanted == nullptr ? "" : wanted; !rest.empty();) {
    const auto comma = rest.find(',');
    const auto name = rest.substr(0, comma);
    rest = comma == rest.npos ? "" : rest.substr(comma + 1);
    const auto bug = names.find(name);
    if (bug == names.end()) return fail(Errc::kInvalid, "CAIRN_TEST_FAULTS: '" + std::string(name) + "' is unknown");
    *bug->second = true;
  }
#endif
  return faults;
}

}  // namespace cairn::server
