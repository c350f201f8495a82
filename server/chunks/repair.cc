#include "server/chunks/repair.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "server/chunks/chunks.h"

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

std::map<Uuid, Repair::Job> Repair::jobs() const {
  std::map<Uuid, Job> out;
  for (const auto& syncing : syncing_members(members_)) {
    const auto known = jobs_.find(syncing.member.target);
    out[syncing.member.target] = known == jobs_.end() ? Job() : known->second;
  }
  return out;
}

void Repair::pause(const Uuid& target, bool paused) {
  jobs_[target].paused = paused;
  changed_.notify_all();
}

Task<void> Repair::run() {
  for (;;) {
    auto todo = syncing_members(members_);
    std::erase_if(jobs_, [&](const auto& job) {
      return std::ranges::none_of(todo, [&](const Syncing& one) { return one.member.target == job.first; });
    });
    if (todo.empty()) {
      co_await members_.changed().wait();
      continue;
    }
    std::erase_if(todo, [&](const Syncing& one) { return jobs_[one.member.target].paused; });
    if (todo.empty()) {
      co_await changed_.wait();
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
  if (auto& job = jobs_[newcomer.target]; job.started_unix_nanos == 0)
    job.started_unix_nanos = runtime_.loop.wall_nanos();
  const auto before = stats_.chunks;
  for (std::optional<ChunkId> after;;) {
    // Of all that serve: what one of them has lost, another may have.
    CO_TRY(const auto page, co_await list_of(now.serving, after, kPage));
    for (const auto& chunk : page) {
      if (chunk.group != group) continue;
      if (jobs_[newcomer.target].paused) co_return {};
      CO_TRY(const auto there, co_await to->chunks().find(chunk.id));
      if (there && there->digest == chunk.digest && there->length == chunk.length) continue;
      CO_CHECK_OK(co_await copy(chunk, *to));
    }
    if (page.size() < kPage) break;
    after = page.back().id;
  }
  CO_CHECK_OK(co_await members_.promote(false, group, newcomer.target, newcomer.joined));
  runtime_.log.write(rt::Level::kInfo, "chunks_sync_done",
                     {{"group", std::to_string(group)},
                      {"target", newcomer.target.text()},
                      {"chunks", std::to_string(stats_.chunks - before)}});
  co_return {};
}

Task<void> Repair::copy(storage::ChunkInfo chunk, storage::Target& to) {
  auto copied = co_await copier_.copy(chunk, to, std::nullopt, pace_);
  auto& job = jobs_[to.uuid()];
  if (copied && *copied) {
    ++stats_.chunks;
    stats_.bytes += chunk.length;
    ++job.chunks;
    job.bytes += chunk.length;
  }
  if (copied) co_return {};
  if (copied.error().code != Errc::kDataLoss) co_return fail(std::move(copied).error());
  // One that is damaged everywhere must not keep the newcomer from serving all the rest.
  ++stats_.damaged;
  ++job.damaged;
  runtime_.log.write(rt::Level::kError, "chunk_damaged",
                     {{"chunk", chunk.id.text()}, {"error", copied.error().message}});
  co_return {};
}

}  // namespace cairn::server
