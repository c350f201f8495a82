#include "server/membership/replicated_records.h"

#include <algorithm>
#include <map>
#include <utility>

#include "storage/index/fields.h"
#include "storage/record_store/layout.h"

namespace cairn::server {
namespace {

using storage::Batch;
using storage::IndexEntry;
using storage::Table;

constexpr std::size_t kPage = 128;  // records of a page; each is at most 64 KiB
constexpr auto kTryAgainAfter = std::chrono::seconds(1);

std::string log_key(HomeGroup group) {
  return storage::record_key(group, "");
}

std::string encode_log(const storage::RecordRound& round) {
  std::string out;
  storage::put_version(out, round.before);
  storage::put_version(out, round.after);
  for (const auto& change : round.changes.changes()) {
    if (change.table != Table::kRecords) continue;
    storage::put_field(out, static_cast<std::uint32_t>(change.key.size()));
    out += change.key;
  }
  return out;
}

struct LogEntry {
  Version before, after;
  std::vector<std::string> keys;
};

Result<LogEntry> decode_log(std::string_view in) {
  LogEntry out;
  TRY(out.before, storage::get_version(in));
  in.remove_prefix(storage::kVersionBytes);
  TRY(out.after, storage::get_version(in));
  in.remove_prefix(storage::kVersionBytes);
  while (!in.empty()) {
    if (in.size() < 4) return fail(Errc::kDataLoss, "a log entry ends in the length of a key");
    const auto size = storage::get_field<std::uint32_t>(in, 0);
    in.remove_prefix(4);
    if (size > in.size()) return fail(Errc::kDataLoss, "a log entry ends in a key");
    out.keys.emplace_back(in.substr(0, size));
    in.remove_prefix(size);
  }
  return out;
}

Task<Version> last_of(storage::Target& target, HomeGroup group) {
  CO_TRY(const auto stored, co_await target.index().get(Table::kMeta, storage::group_key(group)));
  if (!stored) co_return Version{};
  auto version = storage::get_version(*stored);
  if (!version) co_return fail(std::move(version).error().with("sequence of group " + std::to_string(group)));
  co_return *version;
}

/// As `from` has it, or not at all.
Task<void> copy_entry(storage::Target& from, Table table, std::string key, Batch& out) {
  CO_TRY(auto value, co_await from.index().get(table, key));
  if (value)
    out.put(table, std::move(key), *std::move(value));
  else
    out.erase(table, std::move(key));
  co_return {};
}

Task<void> commit_to(storage::Target& target, Batch batch) {
  return target.committer().commit(std::move(batch));
}

}  // namespace

storage::Target* ReplicatedRecords::primary() const {
  const auto group = members_.group(true, 0);
  if (!group->serving.empty()) return group->serving.front();
  // What it acknowledged before it failed can be read all the same.
  for (const auto& uuid : group->missing) {
    const auto* member = members_.map().find(true, 0)->member(uuid);
    if (auto* target = members_.targets().find(uuid); target != nullptr && member->serving) return target;
  }
  return nullptr;
}

bool ReplicatedRecords::give_up(storage::Target& target, const Error& error) {
  // Also when another read has given it up meanwhile.
  const auto serving = members_.group(true, 0)->serving;
  const bool others = std::ranges::any_of(serving, [&](const auto* other) { return other != &target; });
  if (error.code != Errc::kDataLoss || !others) return false;
  target.committer().fail_stop({Errc::kDataLoss, "records cannot be read: " + error.message});
  return true;
}

Task<std::optional<std::string>> ReplicatedRecords::get(Table table, std::string key) {
  for (;;) {
    auto* target = primary();
    if (target == nullptr) co_return fail(Errc::kUnavailable, "no member of the home groups is here");
    auto value = co_await target->index().get(table, key);
    if (value || !give_up(*target, value.error())) co_return value;
  }
}

Task<std::vector<IndexEntry>> ReplicatedRecords::scan(Table table, std::string from, std::string to,
                                                      std::size_t limit) {
  for (;;) {
    auto* target = primary();
    if (target == nullptr) co_return fail(Errc::kUnavailable, "no member of the home groups is here");
    auto entries = co_await target->index().scan(table, from, to, limit);
    if (entries || !give_up(*target, entries.error())) co_return entries;
  }
}

Result<void> ReplicatedRecords::usable() const {
  if (!members_.group(true, 0)->serving.empty()) return {};
  const auto failure = members_.failure();
  return fail(Errc::kFailed, "the target has failed: " + (failure ? failure->message : "it is missing"));
}

Task<void> ReplicatedRecords::commit(storage::RecordRound round) {
  auto group = *members_.group(true, round.group);
  auto targets = std::move(group.serving);
  targets.insert(targets.end(), group.syncing.begin(), group.syncing.end());
  if (targets.size() > 1) round.changes.put(Table::kLog, log_key(round.group), encode_log(round));
  if (bugs_.acknowledge_early && targets.size() > 1) {
    for (std::size_t i = 1; i < targets.size(); ++i) background_.spawn(commit_to(*targets[i], round.changes));
    co_return co_await commit_to(*targets.front(), std::move(round.changes));
  }

  // All are waited for, also when one fails: what the others have counts.
  std::set<Uuid> have;
  rt::Scope writes(runtime_.loop);
  for (auto* target : targets)
    writes.spawn(commit_to(*target, round.changes), [&have, target](Result<void> done) {
      if (done) have.insert(target->uuid());
    });
  CO_CHECK_OK(co_await writes.join());
  co_return co_await members_.may_acknowledge(true, round.group, std::move(have));
}

Task<void> ReplicatedRecords::take_over() {
  for (std::uint32_t group = 0; group < kHomeGroups; ++group) {
    const auto members = members_.group(true, group)->serving;
    if (members.size() > 1) CO_CHECK_OK(co_await level(static_cast<HomeGroup>(group), members));
  }
  // A member that has failed meanwhile may be behind.
  const auto group = *members_.group(true, 0);
  std::set<Uuid> have;
  for (const auto* target : group.serving) have.insert(target->uuid());
  for (const auto* target : group.syncing) have.insert(target->uuid());
  co_return co_await members_.may_acknowledge(true, 0, std::move(have));
}

Task<void> ReplicatedRecords::level(HomeGroup group, std::vector<storage::Target*> members) {
  std::vector<std::pair<storage::Target*, Version>> versions;
  for (auto* target : members) {
    auto version = co_await last_of(*target, group);
    if (version)
      versions.emplace_back(target, *version);
    else if (!give_up(*target, version.error()))
      co_return fail(std::move(version).error());
  }
  const auto furthest =
      std::ranges::max_element(versions, {}, [](const auto& entry) { return entry.second; });  // the first of equals
  if (furthest == versions.end()) co_return {};
  auto& source = *furthest->first;
  const auto newest = furthest->second;
  for (auto [target, version] : versions) {
    if (version == newest) continue;
    CO_TRY(const auto stored, co_await source.index().get(Table::kLog, log_key(group)));
    auto log = stored ? decode_log(*stored) : Result<LogEntry>(LogEntry{});
    if (!log) co_return fail(std::move(log).error().with("log of group " + std::to_string(group)));
    if (log->before != version || log->after != newest) {
      // More than one round behind: nobody should be. It must not serve as it is.
      runtime_.log.write(rt::Level::kError, "records_lacking",
                         {{"target", target->uuid().text()},
                          {"group", std::to_string(group)},
                          {"seq", std::to_string(version.seq)},
                          {"newest", std::to_string(newest.seq)}});
      CO_CHECK_OK(co_await members_.demote(true, group, target->uuid()));
      continue;
    }
    Batch batch;
    for (auto& key : log->keys) CO_CHECK_OK(co_await copy_entry(source, Table::kRecords, std::move(key), batch));
    CO_CHECK_OK(co_await copy_entry(source, Table::kMeta, storage::group_key(group), batch));
    batch.put(Table::kLog, log_key(group), *stored);
    // One that cannot take it has failed; take_over() goes on without it.
    if (auto done = co_await commit_to(*target, std::move(batch)); !done && !target->committer().failure())
      co_return fail(std::move(done).error());
  }
  co_return {};
}

Task<void> ReplicatedRecords::bring_up(storage::RecordStore& store) {
  for (;;) {
    std::optional<Member> newcomer;
    for (const auto& member : members_.map().find(true, 0)->members) {
      const auto* target = members_.targets().find(member.target);
      if (!newcomer && !member.serving && target != nullptr) newcomer = member;
    }
    if (!newcomer) {
      co_await members_.changed().wait();
      continue;
    }
    if (auto done = co_await bring_up(store, *newcomer); !done) {
      runtime_.log.write(rt::Level::kWarning, "records_sync_failed",
                         {{"target", newcomer->target.text()}, {"error", done.error().message}});
      co_await runtime_.loop.sleep(kTryAgainAfter);
    }
  }
}

Task<void> ReplicatedRecords::bring_up(storage::RecordStore& store, Member newcomer) {
  auto& target = *members_.targets().find(newcomer.target);
  runtime_.log.write(rt::Level::kInfo, "records_sync_started", {{"target", newcomer.target.text()}});
  for (std::uint32_t group = 0; group < kHomeGroups; ++group)
    CO_CHECK_OK(co_await copy_group(store, static_cast<HomeGroup>(group), target));
  CO_CHECK_OK(co_await members_.promote(true, 0, newcomer.target, newcomer.joined));
  runtime_.log.write(rt::Level::kInfo, "records_sync_done", {{"target", newcomer.target.text()}});
  co_return {};
}

Task<void> ReplicatedRecords::copy_group(storage::RecordStore& store, HomeGroup group, storage::Target& to) {
  const auto end = storage::after_prefix(storage::record_key(group, ""));
  for (auto from = storage::record_key(group, ""); !from.empty();) {
    // While it is held no round of the group is under way: what is copied is what all members have, and rounds after it
    // reach the newcomer by themselves.
    CO_TRY(const auto held, co_await store.hold(group));
    CO_TRY(auto page, co_await scan(Table::kRecords, from, end, kPage));
    const auto next = page.size() < kPage ? std::string() : page.back().key + '\0';
    const auto& page_end = next.empty() ? end : next;

    std::map<std::string, std::string> there;
    for (auto at = from;;) {
      CO_TRY(auto entries, co_await to.index().scan(Table::kRecords, at, page_end, kPage));
      const bool last = entries.size() < kPage;
      if (!last) at = entries.back().key + '\0';
      for (auto& entry : entries) there.emplace(std::move(entry.key), std::move(entry.value));
      if (last) break;
    }
    Batch batch;
    for (auto& entry : page) {
      const auto old = there.find(entry.key);
      const bool same = old != there.end() && old->second == entry.value;
      if (old != there.end()) there.erase(old);
      if (!same) batch.put(Table::kRecords, std::move(entry.key), std::move(entry.value));
    }
    for (auto& [key, value] : there) batch.erase(Table::kRecords, key);
    if (next.empty()) {
      for (const auto& [table, key] :
           {std::pair(Table::kMeta, storage::group_key(group)), std::pair(Table::kLog, log_key(group))}) {
        CO_TRY(auto ours, co_await get(table, key));
        CO_TRY(const auto theirs, co_await to.index().get(table, key));
        if (ours == theirs) continue;
        if (ours)
          batch.put(table, key, *std::move(ours));
        else
          batch.erase(table, key);
      }
    }
    if (!batch.empty()) CO_CHECK_OK(co_await to.committer().commit(std::move(batch)));
    from = next;
  }
  co_return {};
}

}  // namespace cairn::server
