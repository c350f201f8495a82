#include "server/checkpoints/merge.h"

#include <utility>
#include <variant>

namespace cairn::server {
namespace {

std::vector<std::uint64_t> sizes_of(const std::vector<MergePart>& parts) {
  std::vector<std::uint64_t> out;
  for (const auto& part : parts) out.push_back(part.bytes);
  return out;
}

/// Flaws that the ranks made together are a conflict among them, whoever is to blame.
Error as_conflict(Error error) {
  if (error.code == Errc::kInvalid) error.code = Errc::kConflict;
  return error;
}

}  // namespace

Merge::Merge(std::vector<MergePart> parts, OwnerId owner, std::set<DataGroup> groups, bool prove)
    : owner_(owner),
      groups_(std::move(groups)),
      prove_(prove),
      merge_(sizes_of(parts), [this](std::size_t part, format::Entry& entry) { return check(part, entry); }),
      writer_([this](std::string_view bytes) -> Result<void> {
        out_ += bytes;
        return {};
      }),
      coverage_([this](const format::Entry& entry) { return writer_.add_checked(entry); }) {
  for (auto& part : parts) {
    auto& kept = parts_.emplace_back();
    kept.said = std::move(part);
    if (kept.said.speaker) kept.digest.emplace();
  }
}

std::string Merge::name_of(std::size_t part) const {
  const auto& speaker = parts_[part].said.speaker;
  return speaker ? "manifest of rank " + std::to_string(speaker->rank) : "merged part " + std::to_string(part);
}

void Merge::supply(std::size_t part, std::string bytes) {
  parts_[part].supplied.push_back(std::move(bytes));
}

std::uint64_t Merge::buffered(std::size_t part) const {
  auto bytes = merge_.stream(part).buffered();
  for (const auto& supplied : parts_[part].supplied) bytes += supplied.size();
  return bytes;
}

Result<void> Merge::take_over() {
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    auto& part = parts_[i];
    for (const auto& bytes : part.supplied) {
      part.received += bytes.size();
      if (part.digest) part.digest->add(bytes);
      merge_.supply(i, bytes);
    }
    part.supplied.clear();
    if (!part.digest || part.received != part.said.bytes) continue;
    const auto digest = part.digest->finish();
    part.digest.reset();
    if (digest != part.said.speaker->digest)
      return fail(Errc::kDataLoss, name_of(i) + ": its bytes do not have the digest that was sealed");
  }
  return {};
}

Result<Merge::Piece> Merge::run(std::size_t bytes) {
  CHECK_OK(take_over());
  while (out_.size() < bytes) {
    auto next = merge_.next();
    if (!next) return fail(std::move(next).error().with(name_of(merge_.failed().value_or(0))));
    if (*next == nullptr) {
      if (!merge_.ended()) break;
      if (prove_) {
        if (auto proved = coverage_.finish(); !proved) return fail(as_conflict(std::move(proved).error()));
      }
      TRY(written_, writer_.finish());
      return Piece{.bytes = std::exchange(out_, {}), .done = true};
    }
    auto added = prove_ ? coverage_.add_checked(**next) : writer_.add_checked(**next);
    if (!added) return fail(as_conflict(std::move(added).error()));
  }
  return Piece{.bytes = std::exchange(out_, {}), .done = false};
}

Result<void> Merge::check(std::size_t part, format::Entry& entry) const {
  const auto& speaker = parts_[part].said.speaker;
  if (!speaker) return {};
  const auto check_rank = [&](std::uint32_t said, const std::string& what) -> Result<void> {
    if (said == speaker->rank) return {};
    return fail(Errc::kConflict, what + " is said to be of rank " + std::to_string(said));
  };
  if (const auto* shard = std::get_if<format::ShardEntry>(&entry)) {
    if (shard->rank != speaker->rank) return check_rank(shard->rank, "tensor '" + shard->tensor + "'");
    return check_extents(*speaker, shard->tensor, shard->extents);
  }
  if (const auto* blob = std::get_if<format::BlobEntry>(&entry)) {
    CHECK_OK(check_rank(blob->rank, "blob '" + blob->name + "'"));
    return check_extents(*speaker, blob->name, blob->extents);
  }
  // Who names a token or metadata says so by naming it.
  if (auto* token = std::get_if<format::TokenEntry>(&entry)) token->rank = speaker->rank;
  if (auto* meta = std::get_if<format::MetaEntry>(&entry)) meta->rank = speaker->rank;
  return {};
}

Result<void> Merge::check_extents(const Speaker& speaker, const std::string& name,
                                  const std::vector<format::Extent>& extents) const {
  for (const auto& extent : extents) {
    const auto bad = [&](const char* why) {
      return fail(Errc::kConflict, "'" + name + "': chunk " + extent.chunk.text() + " " + why);
    };
    if (extent.chunk.owner != owner_) return bad("belongs to another save");
    if (extent.chunk.writer != speaker.writer) return bad("was not written by this rank");
    if (speaker.abandoned.contains(extent.chunk.index)) return bad("was abandoned");
    if (!groups_.contains(extent.group)) return bad("lies in a data group that does not exist");
  }
  return {};
}

}  // namespace cairn::server
