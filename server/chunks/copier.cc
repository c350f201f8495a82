#include "server/chunks/copier.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/common/units.h"

namespace cairn::server {
namespace {

std::string text_of(const ChunkId& id) {
  return "chunk " + id.text();
}

/// Blocks of a piece as one copy has them. Where the disk cannot read all, each is read alone; what cannot be read at
/// all stays what the memory held, and its CRC tells.
Task<void> read_blocks(storage::ChunkStore* store, ChunkId id, std::uint32_t offset, std::uint32_t size,
                       rt::MutableBuffer memory) {
  auto whole = co_await store->read_raw(id, offset, size, memory);
  if (whole) co_return {};
  if (whole.error().code == Errc::kUnavailable) co_return fail(std::move(whole).error());
  for (std::uint32_t at = 0; at < size && whole.error().code == Errc::kDataLoss; at += kBlockBytes) {
    const auto block = std::min<std::uint32_t>(kBlockBytes, size - at);
    const rt::MutableBuffer into{memory.owner, memory.bytes.subspan(at, round_up(block, kSectorBytes))};
    (void)co_await store->read_raw(id, offset + at, block, into);
  }
  co_return {};
}

}  // namespace

Task<Copier::Sources> Copier::sources(const storage::ChunkInfo& chunk, storage::Target& to) {
  // Others first, of them those that have not failed; last what `to` has itself.
  std::vector<storage::Target*> order;
  const auto rank = [&](storage::Target& target) { return &target == &to ? 2 : target.committer().failure() ? 1 : 0; };
  for (const int wanted : {0, 1, 2})
    for (const auto& entry : targets_.all())
      if (rank(*entry.target) == wanted) order.push_back(entry.target.get());
  const auto info = chunk;
  Sources out;
  for (auto* target : order) {
    auto entry = co_await target->chunks().entry(info.id);
    if (!entry && !out.error) out.error = entry.error();
    if (!entry || !*entry) continue;
    if ((*entry)->info.digest != info.digest || (*entry)->info.length != info.length) continue;
    out.stores.push_back(&target->chunks());
    if (out.crcs.empty()) out.crcs = std::move((*entry)->block_crcs);
  }
  co_return std::move(out);
}

Task<rt::MutableBuffer> Copier::gather(ChunkId id, std::uint32_t offset, std::uint32_t size, const Sources& from) {
  CO_TRY(auto out, co_await units_.acquire());
  rt::MutableBuffer other;
  const auto blocks = (size + kBlockBytes - 1) / kBlockBytes;
  std::vector<bool> good(blocks);
  for (auto* store : from.stores) {
    const bool first = store == from.stores.front();
    if (!first && other.bytes.empty()) {
      CO_TRY(other, co_await units_.acquire());
    }
    const auto& memory = first ? out : other;
    CO_CHECK_OK(co_await read_blocks(store, id, offset, size, memory));
    for (std::uint32_t block = 0; block < blocks; ++block) {
      if (good[block]) continue;
      const auto at = block * kBlockBytes;
      const auto number = static_cast<std::uint32_t>(offset / kBlockBytes + block);
      const auto bytes = memory.bytes.subspan(at, std::min<std::size_t>(kBlockBytes, size - at));
      good[block] = unchecked_ || crc32c(bytes, block_seed(id, number)) == from.crcs[number];
      if (good[block] && !first) std::memcpy(out.bytes.data() + at, bytes.data(), bytes.size());
    }
    if (std::ranges::all_of(good, std::identity())) co_return std::move(out);
  }
  const auto lost = static_cast<std::uint64_t>(std::ranges::find(good, false) - good.begin());
  co_return fail(Errc::kDataLoss,
                 text_of(id) + ": no good copy of the 64 KiB at offset " + std::to_string(offset + lost * kBlockBytes));
}

Task<bool> Copier::copy(storage::ChunkInfo chunk, storage::Target& to, std::optional<std::string> place, Pace& pace) {
  CO_TRY(const auto from, co_await sources(chunk, to));
  // Gone everywhere, or nobody knows? What is taken for gone is not looked for any more.
  if (from.stores.empty() && from.error) co_return fail(Error(*from.error));
  if (from.stores.empty()) co_return false;
  if (from.crcs.empty()) co_return fail(Errc::kDataLoss, text_of(chunk.id) + ": no index has good block CRCs of it");
  auto started = place ? co_await to.chunks().start_repair(chunk.id, *std::move(place), from.crcs)
                       : co_await to.chunks().start(chunk.id, chunk.length, from.crcs, chunk.group);
  if (!started && started.error().code == Errc::kNotFound) co_return false;
  CO_TRY(const auto upload, std::move(started));
  if (!upload) co_return false;
  const auto unit = static_cast<std::uint32_t>(to.chunks().unit_bytes());
  for (std::uint32_t at = 0; at < chunk.length; at += unit) {
    const auto size = std::min(unit, chunk.length - at);
    CO_CHECK_OK(co_await pace.take(size));
    auto piece = co_await gather(chunk.id, at, size, from);
    if (!piece) {
      // Removed meanwhile? Then this is no damage.
      CO_TRY(const auto now, co_await sources(chunk, to));
      if (now.stores.empty() && !now.error) co_return false;
      co_return fail(std::move(piece).error());
    }
    CO_CHECK_OK(co_await upload->write(at, *std::move(piece), size));
  }
  auto finished = co_await upload->finish();
  if (!finished && finished.error().code == Errc::kNotFound) co_return false;
  CO_CHECK_OK(finished);
  co_return true;
}

}  // namespace cairn::server
