#pragma once

#include <cstdint>
#include <vector>

#include "server/checkpoints/merge.h"
#include "server/chunks/chunk_stream.h"

// Only for the sources of this folder: what is merged, and where it lies.

namespace cairn::wire {
class ExtentRun;
}
namespace cairn::records {
class SealRecord;
}

namespace cairn::server {

struct StoredPart {
  MergePart part;
  std::vector<StoredRun> runs;
};

/// Of a run that check_run() has passed.
StoredRun stored_run(const wire::ExtentRun& run);
StoredPart stored_part(std::uint32_t rank, const records::SealRecord& seal);

/// The merged index of some ranks.
struct MergedRun {
  StoredPart stored;
  std::uint32_t ranks = 0;
  unsigned level = 0;  // 1: of manifests; else one above its parts
  bool taken = false;  // a merge of the level above is under way
};

}  // namespace cairn::server
