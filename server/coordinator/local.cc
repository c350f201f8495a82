#include <algorithm>
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

}  // namespace

Task<std::optional<ClusterMap>> stored_map(storage::Target& target) {
  CO_TRY(auto stored, co_await target.index().get(storage::Table::kMeta, kMapKey));
  if (!stored) co_return std::nullopt;
  CO_TRY(auto map, decode_map(*stored));
  co_return map;
}

Task<LocalMap> open_local_coordinator(TargetSet& targets, std::set<Uuid> lost) {
  std::optional<ClusterMap> newest;
  std::vector<std::pair<const TargetSet::Entry*, ClusterMap>> found;
  std::vector<storage::Target*> all;
  std::set<Uuid> present;
  std::uint64_t term = 0;
  for (const auto& entry : targets.all()) {
    auto map = co_await stored_map(*entry.target);
    if (!map) co_return fail(std::move(map).error().with(entry.directory));
    CO_TRY(const auto known, co_await stored_term(*entry.target));
    term = std::max(term, known);
    present.insert(entry.target->uuid());
    all.push_back(entry.target.get());
    if (!*map) continue;
    if (!newest || age(*newest) < age(**map)) newest = *map;
    found.emplace_back(&entry, **std::move(map));
  }
  LocalMap out;
  if (newest) {
    for (const auto& [entry, map] : found) {
      if (map.cluster != newest->cluster)
        co_return fail(Errc::kInvalid, entry->directory + " belongs to cluster " + map.cluster.text() +
                                           ", the other directories to " + newest->cluster.text());
      if (newest->target(entry->target->uuid()) == nullptr)
        co_return fail(Errc::kInvalid, entry->directory + ": target " + entry->target->uuid().text() +
                                           " was declared lost; empty the directory to use it again");
    }
    CO_TRY(out.forced, may_start(*newest, present, lost));
    term = std::max(term, newest->term);
  } else if (!lost.empty()) {
    co_return fail(Errc::kInvalid, "--lost-target names a target, but no directory holds a map");
  }
  std::string value;
  storage::put_field(value, term + 1);
  CO_CHECK_OK(co_await write_everywhere(std::move(all), kTermKey, std::move(value)));
  out.coordinator = std::make_unique<Local>(targets, std::move(newest), term + 1);
  co_return out;
}

}  // namespace cairn::server
