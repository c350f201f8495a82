#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "server/coordinator/changes.h"
#include "server/coordinator/coordinator.h"
#include "storage/index/fields.h"

namespace cairn::server {
namespace {

constexpr const char* kMapKey = "map";
/// The highest term of a start that had this target, 8 bytes little-endian.
constexpr const char* kTermKey = "map.term";

auto age(const ClusterMap& map) {
  return std::tuple(map.generation, map.term, map.version);
}

/// Durable on every one of `targets`, or an error: then it is not known where.
Task<void> write_everywhere(std::vector<storage::Target*> targets, std::string key, std::string value) {
  // One after the other: a map changes when a disk fails, not when it should be fast, and a failed write must not cut
  // off the others.
  Result<void> outcome;
  for (auto* target : targets) {
    storage::Batch batch;
    batch.put(storage::Table::kMeta, key, value);
    auto written = co_await target->committer().commit(std::move(batch));
    if (!written && outcome) outcome = fail(std::move(written).error().with("target " + target->uuid().text()));
  }
  co_return outcome;
}

class Local final : public Coordinator {
 public:
  Local(TargetSet& targets, std::optional<ClusterMap> map, std::uint64_t term)
      : targets_(targets), map_(std::move(map)), version_(map_ ? map_->version : 0), term_(term) {}

  const std::optional<ClusterMap>& map() const override { return map_; }

  Task<void> propose(ClusterMap next, std::uint64_t expected) override {
    if (const auto version = map_ ? map_->version : 0; version != expected || writing_)
      co_return fail(Errc::kConflict,
                     writing_ ? "the map is being changed"
                              : "map has version " + std::to_string(version) + ", not " + std::to_string(expected));
    struct Writing {
      bool& flag;
      explicit Writing(bool& f) : flag(f) { flag = true; }
      ~Writing() { flag = false; }
    } writing(writing_);
    // Also above proposals that failed: they may lie somewhere.
    next.version = ++version_;
    next.term = term_;
    std::vector<storage::Target*> named;
    for (const auto& entry : next.targets)
      if (auto* target = targets_.find(entry.uuid); target != nullptr && !entry.out) named.push_back(target);
    CO_CHECK_OK(co_await write_everywhere(std::move(named), kMapKey, encode_map(next)));
    map_ = std::move(next);
    co_return {};
  }

 private:
  TargetSet& targets_;
  std::optional<ClusterMap> map_;
  std::uint64_t version_;  // of the last proposal
  std::uint64_t term_;
  bool writing_ = false;
};

Task<std::uint64_t> stored_term(storage::Target& target) {
  CO_TRY(const auto stored, co_await target.index().get(storage::Table::kMeta, kTermKey));
  if (!stored) co_return 0;
  if (stored->size() != 8) co_return fail(Errc::kDataLoss, "the stored term of the map is damaged");
  co_return storage::get_field<std::uint64_t>(*stored, 0);
}

/// The map that lies on a target; nothing when it never belonged to a cluster.
Task<std::optional<ClusterMap>> stored_map(storage::Target& target) {
  CO_TRY(auto stored, co_await target.index().get(storage::Table::kMeta, kMapKey));
  if (!stored) co_return std::nullopt;
  CO_TRY(auto map, decode_map(*stored));
  co_return map;
}

Result<void> check_belong(const TargetSet& targets, const std::map<Uuid, ClusterMap>& maps, const ClusterMap& newest) {
  for (const auto& entry : targets.all()) {
    const auto found = maps.find(entry.target->uuid());
    if (found == maps.end()) continue;
    if (found->second.cluster != newest.cluster)
      return fail(Errc::kInvalid, entry.directory + " belongs to cluster " + found->second.cluster.text() +
                                      ", the other directories to " + newest.cluster.text());
    // One that the map does not know joins: the start that took it in was cut off.
    if (std::ranges::find(newest.lost, found->first) != newest.lost.end())
      return fail(Errc::kInvalid, entry.directory + ": target " + found->first.text() +
                                      " was declared lost; empty the directory to use it again");
  }
  return {};
}

std::set<Uuid> usable(const TargetSet& targets) {
  std::set<Uuid> out;
  for (const auto& entry : targets.all())
    if (!entry.target->committer().failure()) out.insert(entry.target->uuid());
  return out;
}

}  // namespace

Result<bool> may_start_here(const ClusterMap& map, const TargetSet& targets, const std::set<Uuid>& lost) {
  auto answer = may_start(map, usable(targets), lost);
  if (answer || answer.error().code != Errc::kUnavailable) return answer;
  for (const auto& entry : targets.all())
    if (const auto& failure = entry.target->committer().failure())
      return fail(failure->code, "--data " + entry.directory + ": its target has failed: " + failure->message + "; " +
                                     answer.error().message);
  return answer;
}

Task<std::optional<ClusterMap>> newest_map(const TargetSet& targets) {
  std::optional<ClusterMap> newest;
  std::optional<Error> failure;
  bool read = false;
  for (const auto& entry : targets.all()) {
    auto map = co_await stored_map(*entry.target);
    if (!map) {
      failure = std::move(map).error().with(entry.directory);
      continue;
    }
    read = true;
    if (*map && (!newest || age(*newest) < age(**map))) newest = **std::move(map);
  }
  if (!read && failure) co_return fail(*std::move(failure));
  co_return newest;
}

Task<LocalMap> open_local_coordinator(TargetSet& targets, std::set<Uuid> lost, MembershipBugs bugs) {
  std::map<Uuid, ClusterMap> maps;
  std::uint64_t term = 0;
  CO_TRY(auto newest, co_await newest_map(targets));
  for (const auto& entry : targets.all()) {
    // One on which they cannot be read has failed, as one that cannot be opened.
    auto map = co_await stored_map(*entry.target);
    auto known = co_await stored_term(*entry.target);
    if (!map || !known) {
      entry.target->committer().fail_stop(map ? std::move(known).error() : std::move(map).error());
      continue;
    }
    term = std::max(term, *known);
    if (*map) maps.emplace(entry.target->uuid(), **std::move(map));
  }
  LocalMap out;
  if (newest) {
    CO_CHECK_OK(check_belong(targets, maps, *newest));
    if (!bugs.start_alone) CO_CHECK_OK(may_start_here(*newest, targets, lost));
    term = std::max(term, newest->term);
  } else if (!lost.empty()) {
    co_return fail(Errc::kInvalid, "--lost-target names a target, but no directory holds a map");
  }
  std::string value;
  storage::put_field(value, term + 1);
  std::vector<storage::Target*> all;
  for (const auto& uuid : usable(targets)) all.push_back(targets.find(uuid));
  if (auto written = co_await write_everywhere(std::move(all), kTermKey, std::move(value)); !written) {
    if (!newest) co_return fail(std::move(written).error());
  }
  if (newest && !bugs.start_alone) {  // again: some may have failed
    CO_TRY(out.forced, may_start_here(*newest, targets, lost));
  }
  out.coordinator = std::make_unique<Local>(targets, std::move(newest), term + 1);
  co_return out;
}

}  // namespace cairn::server
