#include "server/coordinator/changes.h"

#include <algorithm>
#include <utility>

namespace cairn::server {
namespace {

bool usable(const ClusterMap& map, const Uuid& uuid) {
  const auto* target = map.target(uuid);
  return target != nullptr && !target->out;
}

std::set<Uuid> not_out(const ClusterMap& map) {
  std::set<Uuid> out;
  for (const auto& target : map.targets)
    if (!target.out) out.insert(target.uuid);
  return out;
}

std::string name_of(const TargetEntry& target) {
  return target.uuid.text() + (target.directory.empty() ? "" : " (last at " + target.directory + ")");
}

std::string names_of(const ClusterMap& map, const std::set<Uuid>& targets) {
  std::string out;
  for (const auto& target : map.targets)
    if (targets.contains(target.uuid)) out += (out.empty() ? "" : ", ") + name_of(target);
  return out;
}

std::size_t majority(std::size_t of) {
  return of / 2 + 1;
}

bool has_other_serving(const ClusterMap& map, const GroupRange& range, const Uuid& but) {
  return std::ranges::any_of(range.members,
                             [&](const Member& m) { return m.serving && m.target != but && usable(map, m.target); });
}

/// Takes targets that are out from their groups, except where nobody else serves.
void remove_out(ClusterMap& map) {
  for (auto& range : map.groups) {
    const auto removed = std::erase_if(range.members, [&](const Member& m) {
      return !usable(map, m.target) && (!m.serving || has_other_serving(map, range, m.target));
    });
    if (removed > 0) ++range.epoch.count;
  }
}

Result<void> check_home(const ClusterMap& map) {
  for (const auto& range : map.groups) {
    if (!range.home) continue;
    if (std::ranges::any_of(range.members, [&](const Member& m) { return m.serving && usable(map, m.target); }))
      continue;
    std::set<Uuid> needed;
    for (const auto& member : range.members)
      if (member.serving) needed.insert(member.target);
    return fail(Errc::kUnavailable, "only target " + names_of(map, needed) +
                                        " has all records, and it has failed or is missing: give its directory with "
                                        "--data; without it everything is lost");
  }
  return {};
}

/// Where one more copy of a group goes: to the target with the fewest places; the first of equals.
std::optional<Uuid> best_place(const ClusterMap& map, const GroupRange& range) {
  std::optional<Uuid> best;
  std::ptrdiff_t fewest = 0;
  for (const auto& target : map.targets) {
    if (target.out || std::ranges::find(range.placement, target.uuid) != range.placement.end()) continue;
    const auto places = std::ranges::count_if(map.groups, [&](const GroupRange& other) {
      return std::ranges::find(other.placement, target.uuid) != other.placement.end();
    });
    if (best && places >= fewest) continue;
    best = target.uuid;
    fewest = places;
  }
  return best;
}

void fill_placements(ClusterMap& map) {
  for (auto& range : map.groups)
    while (range.placement.size() < range.copies) {
      const auto place = best_place(map, range);
      if (!place) break;
      range.placement.push_back(*place);
    }
}

/// Placed targets that are here become members.
void enter(ClusterMap& map) {
  for (auto& range : map.groups) {
    const bool empty = range.members.empty();  // nobody has what it held: there is nothing to bring
    bool changed = false;
    for (const auto& uuid : range.placement) {
      const auto* target = map.target(uuid);
      if (target == nullptr || target->out || range.member(uuid) != nullptr) continue;
      if (!std::exchange(changed, true)) ++range.epoch.count;
      range.members.push_back({.target = uuid,
                               .incarnation = target->incarnation,
                               .serving = empty,
                               .node = target->node,
                               .joined = empty ? 0 : range.epoch.count});
    }
  }
}

/// Forgets targets that are lost for good.
void drop(ClusterMap& map, const std::set<Uuid>& lost) {
  for (auto& range : map.groups) {
    for (auto place = range.placement.begin(); place != range.placement.end();) {
      if (!lost.contains(*place)) {
        ++place;
        continue;
      }
      // The successor takes the very place, so that the groups stay those of add_data_groups().
      const auto successor = best_place(map, range);
      if (successor)
        *place++ = *successor;
      else
        place = range.placement.erase(place);
    }
    if (std::erase_if(range.members, [&](const Member& m) { return lost.contains(m.target); }) == 0) continue;
    ++range.epoch.count;
    if (range.home || std::ranges::any_of(range.members, &Member::serving)) continue;
    ++range.loss;
    for (auto& member : range.members) {
      member.serving = true;
      member.joined = 0;
    }
  }
}

}  // namespace

Result<bool> may_start(const ClusterMap& map, const std::set<Uuid>& present, const std::set<Uuid>& lost) {
  for (const auto& uuid : lost)
    if (present.contains(uuid))
      return fail(Errc::kInvalid, "target " + uuid.text() + " is said to be lost, but it is here");
  const auto named = not_out(map);
  std::set<Uuid> missing;
  std::ranges::set_difference(named, present, std::inserter(missing, missing.end()));
  if (named.size() - missing.size() >= majority(named.size())) return false;
  std::erase_if(missing, [&](const Uuid& uuid) { return lost.contains(uuid); });
  if (missing.empty()) return true;
  std::string flags;
  for (const auto& uuid : missing) flags += " --lost-target " + uuid.text();
  return fail(Errc::kUnavailable, "target " + names_of(map, missing) +
                                      " is missing, and what the others hold may be older than what it " +
                                      "holds: give its directory with --data, or, if it is lost for good," + flags);
}

Result<ClusterMap> after_start(const std::optional<ClusterMap>& before, const Start& start) {
  ClusterMap map;
  if (before) {
    map = *before;
  } else {
    map.generation = 1;
    map.cluster = start.fresh_cluster;
    map.groups = {{.first = 0,
                   .count = kHomeGroups,
                   .home = true,
                   .epoch = {.generation = 1, .count = 0},
                   .loss = 0,
                   .members = {},
                   .copies = kCopiesMax,
                   .placement = {}}};
  }

  std::set<std::string> old_nodes = {start.node};
  for (auto& target : map.targets) {
    const auto here = std::ranges::find(start.targets, target.uuid, &StartedTarget::uuid);
    target.out = here == start.targets.end();
    if (target.out) continue;
    if (here->incarnation < target.incarnation)
      return fail(Errc::kDataLoss, "target " + target.uuid.text() + " starts as incarnation " +
                                       std::to_string(here->incarnation) + ", but the map knows incarnation " +
                                       std::to_string(target.incarnation) + ": the directory is an older copy");
    target.incarnation = here->incarnation;
    old_nodes.insert(std::exchange(target.node, start.node));
    target.directory = here->directory;
  }
  for (const auto& here : start.targets)
    if (map.target(here.uuid) == nullptr)
      map.targets.push_back({.uuid = here.uuid,
                             .incarnation = here.incarnation,
                             .node = start.node,
                             .directory = here.directory,
                             .out = false});

  for (auto& range : map.groups) {
    bool changed = false;
    for (auto& member : range.members) {
      const auto& target = *map.target(member.target);
      member.node = target.node;
      changed |= std::exchange(member.incarnation, target.incarnation) != target.incarnation;
    }
    if (changed) ++range.epoch.count;
  }
  if (start.forced) {
    ++map.generation;
    for (auto& range : map.groups) {
      range.epoch = {.generation = map.generation, .count = range.epoch.count + 1};
      ++range.loss;
    }
  }
  for (const auto& uuid : start.lost)
    if (map.target(uuid) != nullptr) map.lost.push_back(uuid);
  std::erase_if(map.targets, [&](const TargetEntry& target) { return start.lost.contains(target.uuid); });
  drop(map, start.lost);
  remove_out(map);
  fill_placements(map);
  enter(map);
  CHECK_OK(check_home(map));
  add_data_groups(map);

  std::erase_if(map.nodes, [&](const NodeEntry& entry) { return old_nodes.contains(entry.name); });
  map.nodes.push_back({start.node, start.addresses});
  std::ranges::sort(map.nodes, {}, &NodeEntry::name);
  return map;
}

Result<ClusterMap> after_failures(ClusterMap map, const std::set<Uuid>& failed) {
  const auto named = not_out(map);
  std::set<Uuid> gone;
  std::ranges::set_intersection(named, failed, std::inserter(gone, gone.end()));
  if (gone.empty()) return map;
  const auto left = named.size() - gone.size();
  if (left == 0 || (named.size() > 2 && left < majority(named.size())))
    return fail(Errc::kUnavailable, "target " + names_of(map, gone) + " has failed, and of " +
                                        std::to_string(named.size()) + " targets that leaves too few to go on");
  for (auto& target : map.targets)
    if (gone.contains(target.uuid)) target.out = true;
  remove_out(map);
  CHECK_OK(check_home(map));
  return map;
}

ClusterMap after_sync(ClusterMap map, bool home, std::uint32_t group, const Uuid& target, std::uint64_t joined) {
  for (auto& range : map.groups) {
    if (range.home != home || group < range.first || group - range.first >= range.count) continue;
    for (auto& member : range.members) {
      if (member.target != target || member.serving || member.joined != joined) continue;
      member.serving = true;
      member.joined = 0;
      ++range.epoch.count;
    }
  }
  return map;
}

ClusterMap after_lack(ClusterMap map, bool home, std::uint32_t group, const Uuid& target) {
  for (auto& range : map.groups) {
    if (range.home != home || group < range.first || group - range.first >= range.count) continue;
    if (!has_other_serving(map, range, target)) continue;
    for (auto& member : range.members) {
      if (member.target != target || !member.serving) continue;
      member.serving = false;
      member.joined = ++range.epoch.count;
    }
  }
  return map;
}

void add_data_groups(ClusterMap& map) {
  DataGroup next = kFirstDataGroup;
  for (const auto& range : map.groups)
    if (!range.home) next = std::max(next, range.first + range.count);
  const auto targets = map.targets.size();
  for (std::uint32_t copies = 1; copies <= std::min<std::size_t>(kCopiesMax, targets); ++copies)
    for (std::size_t i = 0; i < targets; ++i) {
      GroupRange range{.first = next,
                       .count = 1,
                       .home = false,
                       .epoch = {.generation = map.generation, .count = 1},
                       .loss = 0,
                       .members = {},
                       .copies = copies,
                       .placement = {}};
      for (std::size_t k = 0; k < copies; ++k) {
        const auto& target = map.targets[(i + k) % targets];
        range.placement.push_back(target.uuid);
        if (!target.out)
          range.members.push_back({.target = target.uuid,
                                   .incarnation = target.incarnation,
                                   .serving = true,
                                   .node = target.node,
                                   .joined = 0});
      }
      const bool there = std::ranges::any_of(map.groups, [&](const GroupRange& other) {
        return !other.home && other.copies == copies && other.placement == range.placement;
      });
      if (there || range.members.empty()) continue;
      map.groups.push_back(std::move(range));
      ++next;
    }
}

}  // namespace cairn::server
