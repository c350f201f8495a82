#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/common/checksum.h"
#include "proto/common/ids.h"
#include "storage/format/coverage.h"
#include "storage/format/index_merge.h"
#include "storage/format/index_pages.h"

namespace cairn::server {

/// Who made a manifest, and what it may say: its own entries, in chunks that it has written and kept.
struct Speaker {
  std::uint32_t rank = 0;
  std::string digest;                 // SHA-256 of the manifest that the rank sealed
  std::uint64_t writer = 0;           // of the rank's chunks
  std::set<std::uint32_t> abandoned;  // chunk indices of this writer that were given up
};

/// A manifest, or an index that was merged from some before.
struct MergePart {
  std::uint64_t bytes = 0;
  std::optional<Speaker> speaker;  // of a manifest
};

/// Merges manifests and indexes of some ranks into one index, whose bytes come out in order; with `prove` those of all
/// ranks, proved to make one whole checkpoint. A pure function whose input and output come in pieces: it holds a page
/// of each part, and what was supplied and not read yet.
///
/// Threads: one at a time; run() is the only call that computes.
/// source:  protocol.md 4
class Merge {
 public:
  Merge(std::vector<MergePart> parts, OwnerId owner, std::set<DataGroup> groups, bool prove);
  Merge(const Merge&) = delete;
  Merge& operator=(const Merge&) = delete;

  /// The next bytes of a part.
  void supply(std::size_t part, std::string bytes);
  std::uint64_t buffered(std::size_t part) const;
  /// How many bytes must be buffered for a hungry part.
  std::uint64_t wanted(std::size_t part) const { return merge_.stream(part).wanted(); }

  struct Piece {
    std::string bytes;  // of the index
    bool done = false;
  };
  /// Goes on until about `bytes` have come out, a part is hungry, or all is done.
  /// errors: kDataLoss  a manifest is not what its rank sealed, or damaged: names the rank
  ///         kConflict  gaps, overlaps, unequal tokens: names tensor and where; an entry of another rank, a chunk that
  ///                    the rank has not written or has abandoned
  Result<Piece> run(std::size_t bytes);
  /// After the last piece.
  const format::IndexWriter::Written& written() const { return written_; }

 private:
  struct Part {
    MergePart said;
    std::vector<std::string> supplied;  // not taken over yet
    std::uint64_t received = 0;
    std::optional<Sha256> digest;
  };
  Result<void> take_over();
  Result<void> check(std::size_t part, format::Entry& entry) const;
  Result<void> check_extents(const Speaker& speaker, const std::string& name,
                             const std::vector<format::Extent>& extents) const;
  std::string name_of(std::size_t part) const;

  OwnerId owner_;
  std::set<DataGroup> groups_;
  bool prove_;
  std::vector<Part> parts_;
  format::IndexMerge merge_;
  std::string out_;
  format::IndexWriter writer_;
  format::Coverage coverage_;
  format::IndexWriter::Written written_;
};

}  // namespace cairn::server
