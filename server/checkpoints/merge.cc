#include "server/checkpoints/merge.h"

#include <optional>
#include <utility>
#include <variant>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "storage/format/coverage.h"

namespace cairn::server {
namespace {

std::string name_of(const RankManifest& rank) {
  return "manifest of rank " + std::to_string(rank.rank);
}

/// Entry pages of one manifest, in order, each decoded when it is wanted.
class Pages {
 public:
  static Result<Pages> open(const RankManifest& rank) {
    TRY(const auto page, format::root_of(rank.bytes));
    TRY(auto root, format::decode_root(page, rank.bytes.size()));
    Pages pages(rank);
    pages.push(std::move(root.fences));
    return pages;
  }

  /// Nothing at the end.
  Result<std::optional<format::Contents>> next() {
    while (!stack_.empty()) {
      auto fence = std::move(stack_.back());
      stack_.pop_back();
      std::uint64_t end = 0;
      if (!add_checked(fence.offset, fence.size, end) || end > rank_->bytes.size())
        return fail(Errc::kDataLoss, "page " + std::to_string(fence.offset) + " lies outside the manifest");
      const auto bytes = std::string_view(rank_->bytes).substr(fence.offset, fence.size);
      if (fence.level == 0) {
        TRY(auto contents, format::decode_entries(bytes, fence));
        return std::optional(std::move(contents));
      }
      TRY(auto fences, format::decode_fences(bytes, fence));
      push(std::move(fences));
    }
    return std::optional<format::Contents>();
  }

 private:
  explicit Pages(const RankManifest& rank) : rank_(&rank) {}
  void push(std::vector<format::Fence> fences) {
    for (auto fence = fences.rbegin(); fence != fences.rend(); ++fence) stack_.push_back(std::move(*fence));
  }
  const RankManifest* rank_;
  std::vector<format::Fence> stack_;  // the next one last; levels fall, so it stays small
};

/// What a rank may say: its own entries, in chunks that it has written and kept.
class Guard {
 public:
  Guard(const OwnerId& owner, const std::set<DataGroup>& groups) : owner_(owner), groups_(groups) {}

  Result<void> check(format::Contents& page, const RankManifest& rank) const {
    for (const auto& shard : page.shards) {
      const auto what = "tensor '" + shard.tensor + "'";
      CHECK_OK(check_rank(shard.rank, rank, what));
      CHECK_OK(check_extents(shard.extents, rank, what));
    }
    for (const auto& blob : page.blobs) {
      const auto what = "blob '" + blob.name + "'";
      CHECK_OK(check_rank(blob.rank, rank, what));
      CHECK_OK(check_extents(blob.extents, rank, what));
    }
    // Who names a token or metadata says so by naming it.
    for (auto& token : page.tokens) token.rank = rank.rank;
    for (auto& meta : page.meta) meta.rank = rank.rank;
    return {};
  }

 private:
  static Result<void> check_rank(std::uint32_t said, const RankManifest& rank, const std::string& what) {
    if (said == rank.rank) return {};
    return fail(Errc::kConflict, name_of(rank) + ": " + what + " is said to be of rank " + std::to_string(said));
  }
  Result<void> check_extents(const std::vector<format::Extent>& extents, const RankManifest& rank,
                             const std::string& what) const {
    for (const auto& extent : extents) {
      const auto bad = [&](const char* why) {
        return fail(Errc::kConflict, name_of(rank) + ": " + what + ": chunk " + extent.chunk.text() + " " + why);
      };
      if (extent.chunk.owner != owner_) return bad("belongs to another save");
      if (extent.chunk.writer != rank.writer) return bad("was not written by this rank");
      if (rank.abandoned.contains(extent.chunk.index)) return bad("was abandoned");
      if (!groups_.contains(extent.group)) return bad("lies in a data group that does not exist");
    }
    return {};
  }
  const OwnerId& owner_;
  const std::set<DataGroup>& groups_;
};

/// Flaws that the ranks made together are a conflict among them, whoever is to blame.
Error as_conflict(Error error) {
  if (error.code == Errc::kInvalid) error.code = Errc::kConflict;
  return error;
}

}  // namespace

Result<MergedIndex> merge_manifests(const std::vector<RankManifest>& ranks, const OwnerId& owner,
                                    const std::set<DataGroup>& groups, bool prove_coverage) {
  std::vector<Pages> sources;
  for (const auto& rank : ranks) {
    if (sha256(rank.bytes) != rank.digest)
      return fail(Errc::kDataLoss, name_of(rank) + ": its bytes do not have the digest that was sealed");
    auto pages = Pages::open(rank);
    if (!pages) return fail(std::move(pages).error().with(name_of(rank)));
    sources.push_back(*std::move(pages));
  }

  MergedIndex merged;
  format::IndexWriter writer([&](std::string_view bytes) -> Result<void> {
    merged.bytes += bytes;
    return {};
  });
  format::Coverage coverage([&](format::Entry entry) { return writer.add(entry); });
  const Guard guard(owner, groups);
  format::MergeIterator entries(sources.size());
  for (;;) {
    if (const auto hungry = entries.hungry()) {
      const auto& rank = ranks[*hungry];
      auto page = sources[*hungry].next();
      if (!page) return fail(std::move(page).error().with(name_of(rank)));
      if (!*page) {
        entries.end(*hungry);
        continue;
      }
      CHECK_OK(guard.check(**page, rank));
      entries.supply(*hungry, std::move(**page));
      continue;
    }
    auto entry = entries.next();
    if (!entry) break;
    if (auto added = prove_coverage ? coverage.add(*std::move(entry)) : writer.add(*entry); !added)
      return fail(as_conflict(std::move(added).error()));
  }
  if (prove_coverage) {
    if (auto proved = coverage.finish(); !proved) return fail(as_conflict(std::move(proved).error()));
  }
  TRY(merged.written, writer.finish());
  return merged;
}

}  // namespace cairn::server
