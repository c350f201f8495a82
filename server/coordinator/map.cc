#include "server/coordinator/map.h"

#include <algorithm>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {

const GroupRange* ClusterMap::find(bool home, std::uint32_t group) const {
  for (const auto& range : groups)
    if (range.home == home && group >= range.first && group - range.first < range.count) return &range;
  return nullptr;
}

std::vector<DataGroupEntry> data_groups(const ClusterMap& map) {
  std::vector<DataGroupEntry> out;
  for (const auto& range : map.groups) {
    const bool serving =
        std::any_of(range.members.begin(), range.members.end(), [](const auto& m) { return m.serving; });
    if (range.home || !serving) continue;
    for (std::uint32_t i = 0; i < range.count; ++i) out.push_back({range.first + i, range.epoch, range.loss});
  }
  return out;
}

std::string encode_map(const ClusterMap& map) {
  wire::Map out;
  out.set_version(map.version);
  out.set_generation(map.generation);
  out.set_cluster(std::string(map.cluster.view()));
  for (const auto& node : map.nodes) {
    auto& entry = *out.add_nodes();
    entry.set_name(node.name);
    for (const auto& address : node.addresses) entry.add_addresses(address);
  }
  for (const auto& range : map.groups) {
    auto& entry = *out.add_groups();
    entry.set_first(range.first);
    entry.set_count(range.count);
    entry.set_home(range.home);
    entry.set_generation(range.epoch.generation);
    entry.set_epoch(range.epoch.count);
    entry.set_loss(range.loss);
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

Result<ClusterMap> decode_map(std::string_view bytes) {
  wire::Map in;
  if (auto decoded = wire::decode(bytes, in, "map"); !decoded)
    return fail(Errc::kDataLoss, std::move(decoded.error().message));
  ClusterMap map{.version = in.version(), .generation = in.generation(), .cluster = {}, .nodes = {}, .groups = {}};
  auto cluster = Uuid::from_bytes(in.cluster());
  if (!cluster) return fail(Errc::kDataLoss, "map: cluster id: " + cluster.error().message);
  map.cluster = *cluster;
  for (const auto& node : in.nodes())
    map.nodes.push_back({node.name(), {node.addresses().begin(), node.addresses().end()}});
  for (const auto& range : in.groups()) {
    GroupRange to{.first = range.first(),
                  .count = range.count(),
                  .home = range.home(),
                  .epoch = {.generation = range.generation(), .count = range.epoch()},
                  .loss = range.loss(),
                  .members = {}};
    for (const auto& member : range.members()) {
      auto target = Uuid::from_bytes(member.target());
      if (!target) return fail(Errc::kDataLoss, "map: target id: " + target.error().message);
      to.members.push_back({.target = *target,
                            .incarnation = member.incarnation(),
                            .serving = member.serving(),
                            .node = member.node(),
                            .joined = member.joined()});
    }
    map.groups.push_back(std::move(to));
  }
  return map;
}

Result<ClusterMap> after_start(const std::optional<ClusterMap>& map, const Start& start) {
  const NodeEntry node{start.node, start.addresses};
  if (!map) {
    const std::vector<Member> alone = {
        {.target = start.target, .incarnation = start.incarnation, .serving = true, .node = start.node, .joined = 0}};
    const GroupEpoch first{.generation = 1, .count = 1};
    return ClusterMap{
        .version = 1,
        .generation = 1,
        .cluster = start.fresh_cluster,
        .nodes = {node},
        .groups = {{.first = 0, .count = kHomeGroups, .home = true, .epoch = first, .loss = 0, .members = alone},
                   {.first = kFirstDataGroup, .count = 1, .home = false, .epoch = first, .loss = 0, .members = alone}}};
  }

  ClusterMap next = *map;
  bool member_of_any = false;
  std::string old_node;
  for (auto& range : next.groups)
    for (auto& member : range.members) {
      if (member.target != start.target) continue;
      member_of_any = true;
      if (start.incarnation < member.incarnation)
        return fail(Errc::kDataLoss, "target " + start.target.text() + " starts as incarnation " +
                                         std::to_string(start.incarnation) + ", but the map knows incarnation " +
                                         std::to_string(member.incarnation) + ": the directory is an older copy");
      if (start.incarnation > member.incarnation) {
        member.incarnation = start.incarnation;
        ++range.epoch.count;
      }
      old_node = std::exchange(member.node, start.node);
    }
  if (!member_of_any)
    return fail(Errc::kInvalid, "target " + start.target.text() + " is no member of cluster " + map->cluster.text());
  std::erase_if(next.nodes, [&](const NodeEntry& entry) { return entry.name == old_node || entry.name == start.node; });
  next.nodes.push_back(node);
  std::sort(next.nodes.begin(), next.nodes.end(),
            [](const NodeEntry& a, const NodeEntry& b) { return a.name < b.name; });
  if (next != *map) ++next.version;
  return next;
}

}  // namespace cairn::server
