#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "storage/format/index_pages.h"

namespace cairn::server {

/// The manifest of one rank, as it lies in its chunks.
struct RankManifest {
  std::uint32_t rank = 0;
  std::string bytes;
  std::string digest;                 // SHA-256 that the rank sealed
  std::uint64_t writer = 0;           // of the rank's chunks
  std::set<std::uint32_t> abandoned;  // chunk indices of this writer that were given up
};

struct MergedIndex {
  std::string bytes;
  format::IndexWriter::Written written;
};

/// Proves that the manifests of all ranks make one whole checkpoint and writes the merged index. A pure function;
/// memory is the manifests and the index, plus a page of each rank.
///
/// sizes:  `ranks` sorted by rank, each once
/// errors: kDataLoss  a manifest is not what its rank sealed, or damaged
///         kConflict  gaps, overlaps, unequal tokens: names tensor and where; an entry of another rank, a chunk that
///         the
///                    rank has not written or has abandoned
/// source: protocol.md 4
Result<MergedIndex> merge_manifests(const std::vector<RankManifest>& ranks, const OwnerId& owner,
                                    const std::set<DataGroup>& groups, bool prove_coverage = true);

}  // namespace cairn::server
