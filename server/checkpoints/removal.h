#pragma once

#include <cstdint>
#include <string>

#include "proto/common/ids.h"
#include "server/readers/readers.h"
#include "server/records/keys.h"
#include "server/records/records.h"

// Only for the sources of this folder: how a committed step goes, whoever removes it.

namespace cairn::server {

struct StepToRemove {
  std::uint64_t step = 0;
  OwnerId owner;
  Version version;  // of its record
};

/// Hides the step; its owner goes when nobody reads it any more. After the transaction: Readers::hidden().
inline void remove_step(const std::string& bucket, const std::string& run, const StepToRemove& step, Edit& edit) {
  const auto key = step_key(bucket, run, step.step);
  edit.unchanged(key, step.version).erase(key);
  Readers::hide(step.owner, bucket, run, edit);
}

}  // namespace cairn::server
