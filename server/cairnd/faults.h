#pragma once

#include "proto/common/result.h"
#include "server/checkpoints/save_bugs.h"
#include "storage/committer/committer.h"

namespace cairn::server {

struct PlantedFaults {
  storage::PlantedBugs storage;
  SaveBugs saves;
};

/// What CAIRN_TEST_FAULTS names ("no_flush,no_index_sync"), in cairnd_faulty, a program of the tests; nothing in
/// cairnd. errors: kInvalid  an unknown name
Result<PlantedFaults> planted_faults();

}  // namespace cairn::server
