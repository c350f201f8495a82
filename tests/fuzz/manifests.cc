#include <algorithm>
#include <map>

#include "proto/common/checksum.h"
#include "server/checkpoints/merge.h"
#include "storage/format/coverage.h"
#include "storage/format/restore_plan.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/sample.h"

// Manifests of ranks that say anything: what the daemon merges covers every tensor, and can be restored.

namespace cairn::fuzz {
namespace {

using namespace format;

void one(std::string_view input) {
  Input in(input);
  const auto owner = *OwnerId::from_bytes(kSampleOwner);
  std::vector<server::MergePart> parts;
  std::vector<std::string> manifests;
  std::vector<Contents> by_rank;
  for (std::uint32_t rank = 0; rank < 4 && !in.empty(); ++rank) {
    const auto count = in.byte();
    auto contents = contents_of(in.piece(), count);
    if (!contents) return;
    const auto manifest = encode(*contents);
    must(manifest, "what was decoded can be encoded");
    parts.push_back({.bytes = manifest->size(),
                     .speaker = server::Speaker{
                         .rank = rank, .digest = sha256(*manifest), .writer = 1000 + rank, .abandoned = {}}});
    manifests.push_back(*manifest);
    // Who names a token or metadata says so by naming it.
    for (auto& token : contents->tokens) token.rank = rank;
    for (auto& meta : contents->meta) meta.rank = rank;
    by_rank.push_back(*std::move(contents));
  }
  server::Merge work(std::move(parts), owner, {1}, true);
  for (std::size_t i = 0; i < manifests.size(); ++i) work.supply(i, std::move(manifests[i]));
  std::string bytes_merged;
  for (bool done = false; !done;) {
    auto piece = work.run(1000);
    if (!piece) return;
    must(piece->done || !piece->bytes.empty(), "with all bytes there it goes on");
    bytes_merged += piece->bytes;
    done = piece->done;
  }
  const auto& written = work.written();
  must(written.index_bytes == bytes_merged.size(), "the index has the length that it is said to have");
  must(sha256(std::string_view(bytes_merged).substr(bytes_merged.size() - written.root_bytes)) == written.root_digest,
       "and the root's digest");
  const auto index = decode(bytes_merged);
  must(index, "a merged index can be decoded");
  const auto in_memory = merge(by_rank);
  must(in_memory && *in_memory == *index, "it is what merging in memory gives");
  // Proved to be whole: so every tensor can be read, each byte once.
  std::map<std::string, Want> tensors;
  std::uint64_t bytes = 0;
  for (const auto& shard : index->shards) {
    const auto count = elements(shard.global_shape);
    must(count, "its elements can be counted");
    const auto size = bytes_of(shard.dtype, *count);
    if (!size || *size > 1 << 20) return;
    if (!tensors
             .emplace(shard.tensor,
                      Want{.tensor = shard.tensor, .box = whole(shard.global_shape), .dtype = {}, .size_bytes = {}})
             .second)
      continue;
    bytes += *size;
  }
  std::vector<Want> wants;
  for (auto& [name, want] : tensors) wants.push_back(std::move(want));
  const auto read = plan(wants, index->shards);
  must(read, "what covers every tensor can be restored");
  must(read->bytes == bytes, "a restore reads each byte once");
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  for (std::uint32_t ranks = 1; ranks <= 4; ++ranks) {
    std::string seed;
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      const auto contents = sample_contents(rank, ranks);
      seed += static_cast<char>(entries_of(contents).size());
      seed += piece_of(entries_body(contents));
    }
    out.push_back(std::move(seed));
  }
  return out;
}

const Register registered({.name = "manifests", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
