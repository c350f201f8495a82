#include "server/coordinator/map.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {

const Member* GroupRange::member(const Uuid& target) const {
  const auto found = std::ranges::find(members, target, &Member::target);
  return found == members.end() ? nullptr : &*found;
}

const GroupRange* ClusterMap::find(bool home, std::uint32_t group) const {
  for (const auto& range : groups)
    if (range.home == home && group >= range.first && group - range.first < range.count) return &range;
  return nullptr;
}

const TargetEntry* ClusterMap::target(const Uuid& uuid) const {
  const auto found = std::ranges::find(targets, uuid, &TargetEntry::uuid);
  return found == targets.end() ? nullptr : &*found;
}

std::vector<DataGroupEntry> data_groups(const ClusterMap& map, std::uint32_t copies) {
  std::vector<DataGroupEntry> out;
  std::ptrdiff_t best = 1;
  for (const auto& range : map.groups) {
    if (range.home || range.copies != copies) continue;
    const auto serving = std::ranges::count_if(range.members, [&](const Member& member) {
      const auto* target = map.target(member.target);
      return member.serving && target != nullptr && !target->out;
    });
    if (serving < best) continue;
    if (serving > best) out.clear();
    best = serving;
    for (std::uint32_t i = 0; i < range.count; ++i) out.push_back({range.first + i, range.epoch, range.loss});
  }
  return out;
}

std::uint32_t copies_max(const ClusterMap& map) {
  return static_cast<std::uint32_t>(std::min<std::size_t>(kCopiesMax, map.targets.size()));
}

std::vector<std::uint32_t> data_losses(const ClusterMap& map) {
  std::vector<std::uint32_t> out;
  for (const auto& range : map.groups) {
    if (range.home) continue;
    const std::size_t end = range.first - kFirstDataGroup + range.count;
    if (out.size() < end) out.resize(end);
    std::fill_n(out.begin() + (range.first - kFirstDataGroup), range.count, range.loss);
  }
  return out;
}

std::string encode_map(const ClusterMap& map) {
  wire::Map out;
  out.set_version(map.version);
  out.set_generation(map.generation);
  out.set_term(map.term);
  out.set_cluster(std::string(map.cluster.view()));
  for (const auto& target : map.lost) out.add_lost(std::string(target.view()));
  for (const auto& node : map.nodes) {
    auto& entry = *out.add_nodes();
    entry.set_name(node.name);
    for (const auto& address : node.addresses) entry.add_addresses(address);
  }
  for (const auto& target : map.targets) {
    auto& entry = *out.add_targets();
    entry.set_uuid(std::string(target.uuid.view()));
    entry.set_incarnation(target.incarnation);
    entry.set_node(target.node);
    entry.set_directory(target.directory);
    entry.set_out(target.out);
  }
  for (const auto& range : map.groups) {
    auto& entry = *out.add_groups();
    entry.set_first(range.first);
    entry.set_count(range.count);
    entry.set_home(range.home);
    entry.set_generation(range.epoch.generation);
    entry.set_epoch(range.epoch.count);
    entry.set_loss(range.loss);
    entry.set_copies(range.copies);
    for (const auto& target : range.placement) entry.add_placement(std::string(target.view()));
    for (const auto& member : range.members) {
      auto& to = *entry.add_members();
      to.set_target(std::string(member.target.view()));
      to.set_incarnation(member.incarnation);
      to.set_serving(member.serving);
      to.set_node(member.node);
      to.set_joined(member.joined);
    }
  }
  return wire::encode(out);
}

namespace {

/// Written before there were several targets: the members say what there is.
void complete(ClusterMap& map) {
  for (auto& range : map.groups) {
    if (range.copies != 0) continue;
    range.copies = range.home ? kCopiesMax : static_cast<std::uint32_t>(range.members.size());
    for (const auto& member : range.members) {
      range.placement.push_back(member.target);
      if (map.target(member.target) == nullptr)
        map.targets.push_back({.uuid = member.target,
                               .incarnation = member.incarnation,
                               .node = member.node,
                               .directory = {},
                               .out = false});
    }
  }
}

Result<Uuid> uuid_of(std::string_view bytes, const char* what) {
  auto uuid = Uuid::from_bytes(bytes);
  if (!uuid) return fail(Errc::kDataLoss, std::string("map: ") + what + " id: " + uuid.error().message);
  return uuid;
}

/// No store has more; a number beyond it is not one that was handed out.
constexpr std::uint32_t kDataGroupsMax = 1 << 20;

Failure damaged(std::string what) {
  return fail(Errc::kDataLoss, "map: " + std::move(what));
}

/// Whoever is named among a range's members or placement is a target of the map, once.
Result<void> check_named(const std::set<Uuid>& known, const std::vector<Uuid>& named, const GroupRange& range) {
  std::set<Uuid> seen;
  for (const auto& uuid : named)
    if (!known.contains(uuid) || !seen.insert(uuid).second)
      return damaged((range.home ? "home groups from " : "data groups from ") + std::to_string(range.first) +
                     " name target " + uuid.text() + (known.contains(uuid) ? " twice" : ", which it does not know"));
  return {};
}

/// What the changes of a map rely on.
Result<void> check(const ClusterMap& map) {
  std::set<Uuid> known;
  for (const auto& target : map.targets)
    if (!known.insert(target.uuid).second) return damaged("target " + target.uuid.text() + " is there twice");
  std::map<std::uint32_t, std::uint32_t> home, data;  // first group, number
  for (const auto& range : map.groups) {
    if (range.copies < 1 || range.copies > kCopiesMax || range.count == 0)
      return damaged(std::to_string(range.count) + " groups of " + std::to_string(range.copies) + " copies");
    if (!(range.home ? home : data).emplace(range.first, range.count).second)
      return damaged("two groups begin with number " + std::to_string(range.first));
    std::vector<Uuid> members;
    for (const auto& member : range.members) members.push_back(member.target);
    CHECK_OK(check_named(known, members, range));
    CHECK_OK(check_named(known, range.placement, range));
  }
  std::uint64_t next = 0;
  for (const auto& [first, count] : home) {
    if (first != next) break;
    next += count;
  }
  if (next != kHomeGroups) return damaged("it does not have each home group once");
  next = kFirstDataGroup;
  for (const auto& [first, count] : data) {
    if (first < next || std::uint64_t{first} + count > kDataGroupsMax)
      return damaged("data groups from " + std::to_string(first) + " overlap others, or do not exist");
    next = std::uint64_t{first} + count;
  }
  return {};
}

}  // namespace

Result<ClusterMap> decode_map(std::string_view bytes) {
  wire::Map in;
  if (auto decoded = wire::decode(bytes, in, "map"); !decoded)
    return fail(Errc::kDataLoss, std::move(decoded.error().message));
  ClusterMap map;
  map.version = in.version();
  map.generation = in.generation();
  map.term = in.term();
  TRY(map.cluster, uuid_of(in.cluster(), "cluster"));
  for (const auto& node : in.nodes())
    map.nodes.push_back({node.name(), {node.addresses().begin(), node.addresses().end()}});
  for (const auto& target : in.targets()) {
    TRY(const auto uuid, uuid_of(target.uuid(), "target"));
    map.targets.push_back({.uuid = uuid,
                           .incarnation = target.incarnation(),
                           .node = target.node(),
                           .directory = target.directory(),
                           .out = target.out()});
  }
  for (const auto& target : in.lost()) {
    TRY(const auto uuid, uuid_of(target, "target"));
    map.lost.push_back(uuid);
  }
  for (const auto& range : in.groups()) {
    if (!range.home() && range.first() < kFirstDataGroup)
      return fail(Errc::kDataLoss, "map: data group " + std::to_string(range.first()));
    GroupRange to{.first = range.first(),
                  .count = range.count(),
                  .home = range.home(),
                  .epoch = {.generation = range.generation(), .count = range.epoch()},
                  .loss = range.loss(),
                  .members = {},
                  .copies = range.copies(),
                  .placement = {}};
    for (const auto& member : range.members()) {
      TRY(const auto target, uuid_of(member.target(), "target"));
      to.members.push_back({.target = target,
                            .incarnation = member.incarnation(),
                            .serving = member.serving(),
                            .node = member.node(),
                            .joined = member.joined()});
    }
    for (const auto& target : range.placement()) {
      TRY(const auto uuid, uuid_of(target, "target"));
      to.placement.push_back(uuid);
    }
    map.groups.push_back(std::move(to));
  }
  complete(map);
  CHECK_OK(check(map));
  return map;
}

}  // namespace cairn::server
