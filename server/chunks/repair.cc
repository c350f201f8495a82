#include "server/chunks/repair.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "proto/common/checksum.h"
#include "proto/common/units.h"

namespace cairn::server {
namespace {

constexpr std::size_t kPage = 256;
constexpr auto kTryAgainAfter = std::chrono::seconds(1);

struct Syncing {
  DataGroup group;
  Member member;
};

/// The syncing members that can be brought up, those of the groups with the fewest copies first.
std::vector<Syncing> syncing_members(Membership& members) {
  std::multimap<std::size_t, Syncing> found;
  for (const auto& range : members.map().groups) {
    if (range.home) continue;
    const auto group = members.group(false, range.first);
    if (group->serving.empty()) continue;
    for (const auto* target : group->syncing)
      found.emplace(group->serving.size(), Syncing{range.first, *range.member(target->uuid())});
  }
  std::vector<Syncing> out;
  for (auto& [copies, one] : found) out.push_back(std::move(one));
  return out;
}

}  // namespace

Repair::Stats Repair::stats() const {
  auto out = stats_;
  out.groups = syncing_members(members_).size();
  return out;
}

Task<void> Repair::run() {
  for (;;) {
    const auto todo = syncing_members(members_);
    if (todo.empty()) {
      co_await members_.changed().wait();
      continue;
    }
    bool failed = false;
    for (const auto& [group, member] : todo) {
      auto done = co_await bring_up(group, member);
      if (done) continue;
      failed = true;
      runtime_.log.write(
          rt::Level::kWarning, "chunks_sync_failed",
          {{"group", std::to_string(group)}, {"target", member.target.text()}, {"error", done.error().message}});
    }
    if (failed) co_await runtime_.loop.sleep(kTryAgainAfter);
  }
}

Task<void> Repair::bring_up(DataGroup group, Member newcomer) {
  auto* to = members_.targets().find(newcomer.target);
  CO_TRY(const auto now, members_.group(false, group));
  if (to == nullptr || now.serving.empty()) co_return fail(Errc::kUnavailable, "it is not there any more");
  auto& donor = *now.serving.front();
  std::uint64_t copied = 0;
  for (std::optional<ChunkId> after;;) {
    CO_TRY(const auto page, co_await donor.chunks().list(after, kPage));
    for (const auto& chunk : page) {
      if (chunk.group != group) continue;
      CO_TRY(const auto there, co_await to->chunks().find(chunk.id));
      if (there && there->digest == chunk.digest && there->length == chunk.length) continue;
      CO_CHECK_OK(co_await copy(group, chunk, *to));
      ++copied;
    }
    if (page.size() < kPage) break;
    after = page.back().id;
  }
  CO_CHECK_OK(co_await members_.promote(false, group, newcomer.target, newcomer.joined));
  runtime_.log.write(
      rt::Level::kInfo, "chunks_sync_done",
      {{"group", std::to_string(group)}, {"target", newcomer.target.text()}, {"chunks", std::to_string(copied)}});
  co_return {};
}

Task<void> Repair::copy(DataGroup group, storage::ChunkInfo chunk, storage::Target& to) {
  const auto unit = static_cast<std::uint32_t>(chunks_.unit_bytes());
  std::vector<std::uint32_t> crcs;
  std::unique_ptr<storage::ChunkStore::Upload> upload;
  // Twice over the bytes: what they are must be known before they are written, and a whole chunk in memory would take
  // that of the saves. Read errors end the copy of this chunk, not the repair.
  for (const bool writing : {false, true}) {
    for (std::uint32_t at = 0; at < chunk.length; at += unit) {
      const auto size = std::min(unit, chunk.length - at);
      auto read = co_await chunks_.read(group, chunk.id, at, size);
      if (!read) {
        if (read.error().code == Errc::kNotFound) co_return {};  // removed meanwhile
        // kFailed: the disk cannot read it. One bad sector must not keep the newcomer from serving all the rest.
        if (read.error().code != Errc::kDataLoss && read.error().code != Errc::kFailed)
          co_return fail(std::move(read).error());
        ++stats_.damaged;
        runtime_.log.write(rt::Level::kError, "chunk_damaged",
                           {{"chunk", chunk.id.text()}, {"error", read.error().message}});
        co_return {};
      }
      if (!writing) {
        for (std::uint32_t block = 0; block < size; block += kBlockBytes)
          crcs.push_back(crc32c(read->bytes().subspan(block, std::min<std::size_t>(kBlockBytes, size - block)),
                                block_seed(chunk.id, static_cast<std::uint32_t>((at + block) / kBlockBytes))));
        continue;
      }
      CO_TRY(auto memory, co_await units_.acquire());
      std::memcpy(memory.bytes.data(), read->bytes().data(), size);
      read = Buffer();
      CO_CHECK_OK(co_await upload->write(at, std::move(memory), size));
    }
    if (writing) break;
    CO_TRY(upload, co_await to.chunks().start(chunk.id, chunk.length, crcs, group));
    if (!upload) co_return {};
  }
  CO_CHECK_OK(co_await upload->finish());
  ++stats_.chunks;
  stats_.bytes += chunk.length;
  co_return {};
}

}  // namespace cairn::server
