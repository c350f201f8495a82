#include "server/checkpoints/merge.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "proto/common/checksum.h"
#include "storage/format/index_pages.h"

using namespace cairn;
using namespace cairn::server;

namespace {

const OwnerId kOwner = OwnerId::make(3, 0, 1, 2);
const std::set<DataGroup> kGroups = {1};

format::ShardEntry shard(std::uint32_t rank, std::uint64_t row, std::uint64_t rows, std::string tensor = "w") {
  format::ShardEntry out;
  out.tensor = std::move(tensor);
  out.dtype = format::DType::kF32;
  out.global_shape = {4, 10};
  out.box = {.offset = {row, 0}, .shape = {rows, 10}};
  out.rank = rank;
  out.crc = 7;
  out.extents = {{.group = 1,
                  .chunk = {.owner = kOwner, .writer = 100 + rank, .index = 0},
                  .offset = static_cast<std::uint32_t>(row * 40),
                  .length = static_cast<std::uint32_t>(rows * 40)}};
  return out;
}

struct Manifest {
  MergePart part;
  std::string bytes;
};

Manifest manifest(std::uint32_t rank, format::Contents contents) {
  auto bytes = format::encode(std::move(contents));
  REQUIRE(bytes);
  return {.part = {.bytes = bytes->size(),
                   .speaker = Speaker{.rank = rank, .digest = sha256(*bytes), .writer = 100 + rank, .abandoned = {}}},
          .bytes = *bytes};
}

format::Contents of(std::vector<format::ShardEntry> shards) {
  format::Contents out;
  out.shards = std::move(shards);
  return out;
}

struct Merged {
  std::string bytes;
  format::IndexWriter::Written written;
  std::uint64_t buffered_max = 0;  // of all parts together
};

/// Supplies each part `piece` bytes at a time, when it is hungry.
Result<Merged> merge(const std::vector<Manifest>& parts, bool prove = true, std::uint64_t piece = 1 << 20) {
  std::vector<MergePart> said;
  for (const auto& part : parts) said.push_back(part.part);
  Merge merge(said, kOwner, kGroups, prove);
  std::vector<std::uint64_t> given(parts.size(), 0);
  Merged out;
  for (;;) {
    TRY(auto came, merge.run(1000));
    out.bytes += came.bytes;
    if (came.done) break;
    if (!came.bytes.empty()) continue;
    std::uint64_t buffered = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (merge.buffered(i) < merge.wanted(i) && given[i] < parts[i].bytes.size()) {
        auto bytes = parts[i].bytes.substr(given[i], std::max(piece, merge.wanted(i) - merge.buffered(i)));
        given[i] += bytes.size();
        merge.supply(i, std::move(bytes));
      }
      buffered += merge.buffered(i);
    }
    out.buffered_max = std::max(out.buffered_max, buffered);
  }
  out.written = merge.written();
  return out;
}

/// The error of merging these, or nothing.
std::optional<Error> flaw(const std::vector<Manifest>& ranks) {
  auto merged = merge(ranks);
  if (merged) return std::nullopt;
  return merged.error();
}

bool says(const std::optional<Error>& error, Errc code, std::string_view text) {
  if (!error) return false;
  INFO(error->message);
  CHECK(error->message.find(text) != std::string::npos);
  return error->code == code && error->message.find(text) != std::string::npos;
}

}  // namespace

TEST_CASE("merge: the manifests of all ranks become one index", "[server]") {
  auto first = of({shard(0, 0, 1), shard(0, 2, 1)});
  auto second = of({shard(1, 1, 1), shard(1, 3, 1)});
  first.tokens.push_back({.stream = "data", .bytes = "at 7", .rank = 0});
  second.tokens.push_back({.stream = "data", .bytes = "at 7", .rank = 0});  // who names it says so by naming it
  second.blobs.push_back({.name = "rng", .rank = 1, .size = 0, .crc = 0, .extents = {}});
  const auto merged = merge({manifest(0, first), manifest(1, second)});
  INFO((merged ? "" : merged.error().message));
  REQUIRE(merged);
  CHECK(merged->written.totals.tensors == 1);
  CHECK(merged->written.totals.shards == 4);
  CHECK(merged->written.totals.blobs == 1);
  CHECK(merged->written.totals.tokens == 1);
  CHECK(merged->written.totals.bytes == 160);
  CHECK(merged->written.index_bytes == merged->bytes.size());
  const auto index = format::decode(merged->bytes);
  REQUIRE(index);
  REQUIRE(index->shards.size() == 4);
  for (std::uint64_t row = 0; row < 4; ++row) CHECK(index->shards[row].box.offset[0] == row);
  const auto root = format::root_of(merged->bytes);
  REQUIRE(root);
  CHECK(sha256(*root) == merged->written.root_digest);
}

TEST_CASE("merge: many entries over many pages keep their order", "[server]") {
  std::vector<Manifest> ranks;
  for (std::uint32_t rank = 0; rank < 4; ++rank) {
    format::Contents contents;
    for (int t = 0; t < 3000; ++t) {
      auto entry = shard(rank, rank, 1, "layer." + std::to_string(t) + ".weight");
      contents.shards.push_back(std::move(entry));
    }
    ranks.push_back(manifest(rank, std::move(contents)));
  }
  const auto merged = merge(ranks);
  INFO((merged ? "" : merged.error().message));
  REQUIRE(merged);
  CHECK(merged->written.totals.tensors == 3000);
  CHECK(merged->written.totals.shards == 12'000);
}

TEST_CASE("merge: gaps, overlaps and disagreement are refused by name", "[server]") {
  CHECK(says(flaw({manifest(0, of({shard(0, 0, 2)})), manifest(1, of({shard(1, 3, 1)}))}), Errc::kConflict, "'w'"));
  CHECK(says(flaw({manifest(0, of({shard(0, 0, 3)})), manifest(1, of({shard(1, 2, 2)}))}), Errc::kConflict, "'w'"));
  auto first = of({shard(0, 0, 4)}), second = of({});
  first.tokens.push_back({.stream = "data", .bytes = "at 7", .rank = 0});
  second.tokens.push_back({.stream = "data", .bytes = "at 8", .rank = 0});
  CHECK(says(flaw({manifest(0, first), manifest(1, second)}), Errc::kConflict, "data"));
  // Without the proof (a planted bug) the gap goes through: the test above sees it.
  CHECK(merge({manifest(0, of({shard(0, 0, 2)}))}, false));
}

TEST_CASE("merge: a rank speaks for itself, about chunks that it wrote and kept", "[server]") {
  const auto with = [](auto change) {
    auto entry = shard(0, 0, 4);
    change(entry);
    return entry;
  };
  CHECK(says(flaw({manifest(0, of({with([](auto& s) { s.rank = 1; })}))}), Errc::kConflict, "rank 1"));
  CHECK(says(flaw({manifest(0, of({with([](auto& s) { s.extents[0].chunk.writer = 101; })}))}), Errc::kConflict,
             "not written by this rank"));
  CHECK(says(flaw({manifest(0, of({with([](auto& s) { s.extents[0].chunk.owner.bytes[15] ^= 1; })}))}), Errc::kConflict,
             "another save"));
  CHECK(says(flaw({manifest(0, of({with([](auto& s) { s.extents[0].group = 2; })}))}), Errc::kConflict, "data group"));
  auto rank = manifest(0, of({shard(0, 0, 4)}));
  rank.part.speaker->abandoned = {0};
  CHECK(says(flaw({rank}), Errc::kConflict, "abandoned"));
}

TEST_CASE("merge: a manifest that is not what was sealed, at any byte, is data loss", "[server]") {
  const auto good = manifest(0, of({shard(0, 0, 4)}));
  CHECK_FALSE(flaw({good}));
  for (std::size_t at = 0; at < good.bytes.size(); ++at) {
    auto bad = good;
    bad.bytes[at] = static_cast<char>(bad.bytes[at] ^ 0x10);
    const auto error = flaw({bad});
    REQUIRE(error);
    CHECK(error->code == Errc::kDataLoss);
    CHECK(error->message.find("rank 0") != std::string::npos);
  }
  // Also one that was sealed as it is and makes no sense.
  Manifest nonsense{
      .part = {.bytes = 8, .speaker = Speaker{.rank = 0, .digest = sha256("nonsense"), .writer = 100, .abandoned = {}}},
      .bytes = "nonsense"};
  CHECK(says(flaw({nonsense}), Errc::kDataLoss, "rank 0"));
}

TEST_CASE("merge: in levels and in pieces of any size the index is the same, byte for byte", "[server]") {
  // Goal: what is merged while ranks save comes to what one merge of all manifests makes. Method: 24 ranks, merged at
  // once, and by groups in an order drawn from a seed, a level above another, until one part is left.
  std::vector<Manifest> ranks;
  for (std::uint32_t rank = 0; rank < 24; ++rank) {
    format::Contents contents;
    for (int t = 0; t < 40; ++t) {
      auto entry = shard(rank, rank, 1, "layer." + std::to_string(t));
      entry.global_shape = {24, 10};
      contents.shards.push_back(std::move(entry));
    }
    contents.tokens.push_back({.stream = "data", .bytes = "at 7", .rank = rank});
    contents.blobs.push_back({.name = "rng", .rank = rank, .size = 0, .crc = 0, .extents = {}});
    ranks.push_back(manifest(rank, std::move(contents)));
  }
  const auto at_once = merge(ranks);
  INFO((at_once ? "" : at_once.error().message));
  REQUIRE(at_once);
  CHECK(at_once->written.totals.shards == 24 * 40);
  CHECK(at_once->written.totals.tokens == 1);
  CHECK(at_once->written.totals.blobs == 24);
  for (std::uint64_t draw = 1; draw <= 20; ++draw) {
    const std::uint64_t piece = draw % 4 == 0 ? 1 << 20 : 37 * draw;
    auto parts = ranks;
    std::uint64_t random = draw * 0x9e3779b97f4a7c15ull;
    while (parts.size() > 4) {
      std::vector<Manifest> some;
      for (int i = 0; i < 4; ++i) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        const auto at = parts.begin() + static_cast<std::ptrdiff_t>((random >> 33) % parts.size());
        some.push_back(std::move(*at));
        parts.erase(at);
      }
      auto run = merge(some, false, piece);
      REQUIRE(run);
      parts.push_back({.part = {.bytes = run->bytes.size(), .speaker = {}}, .bytes = std::move(run->bytes)});
    }
    const auto last = merge(parts, true, piece);
    INFO((last ? "" : last.error().message));
    REQUIRE(last);
    REQUIRE(last->bytes == at_once->bytes);
    CHECK(last->written.root_digest == at_once->written.root_digest);
  }
}

TEST_CASE("merge: a run that is left out is refused, one that is merged twice adds nothing", "[server]") {
  const auto first = manifest(0, of({shard(0, 0, 2)})), second = manifest(1, of({shard(1, 2, 2)}));
  const auto run = merge({first}, false);
  REQUIRE(run);
  const Manifest again{.part = {.bytes = run->bytes.size(), .speaker = {}}, .bytes = run->bytes};
  const auto once = merge({again, second});
  REQUIRE(once);
  CHECK(says(flaw({second}), Errc::kConflict, "'w'"));
  const auto twice = merge({again, first, second});
  REQUIRE(twice);
  CHECK(twice->bytes == once->bytes);
  // Between levels nothing is proved, and nothing dropped either.
  const auto level = merge({again, first}, false);
  REQUIRE_FALSE(level);
  CHECK(level.error().code == Errc::kConflict);
}

TEST_CASE("merge: it holds a page of each part, however long the parts are", "[server]") {
  std::vector<Manifest> ranks;
  for (std::uint32_t rank = 0; rank < 4; ++rank) {
    format::Contents contents;
    for (int t = 0; t < 20'000; ++t)
      contents.shards.push_back(shard(rank, rank, 1, "layer." + std::to_string(t) + ".weight"));
    ranks.push_back(manifest(rank, std::move(contents)));
    REQUIRE(ranks.back().bytes.size() > 400'000);
  }
  const auto merged = merge(ranks, true, 16 * 1024);
  REQUIRE(merged);
  CHECK(merged->written.totals.shards == 80'000);
  CHECK(merged->buffered_max <= 4 * 2 * 16 * 1024);
}
