#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/ids.h"

namespace cairn::server {

struct Member {
  Uuid target;
  std::uint64_t incarnation = 0;  // of the target's daemon: new at every start
  bool serving = false;           // else syncing
  std::string node;
  std::uint64_t joined = 0;  // syncing: the epoch count at which it last entered
  bool operator==(const Member&) const = default;
};

/// Groups first .. first + count - 1 of one kind, all with these values.
struct GroupRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
  bool home = false;  // home group (records), else data group (chunks)
  GroupEpoch epoch;
  std::uint32_t loss = 0;
  std::vector<Member> members;  // primary = first serving one
  bool operator==(const GroupRange&) const = default;
};

struct NodeEntry {
  std::string name;
  std::vector<std::string> addresses;
  bool operator==(const NodeEntry&) const = default;
};

/// The versioned table of nodes, targets and groups. Stored and sent as wire.Map.
struct ClusterMap {
  std::uint64_t version = 0;
  std::uint32_t generation = 0;
  Uuid cluster;
  std::vector<NodeEntry> nodes;
  std::vector<GroupRange> groups;

  const GroupRange* find(bool home, std::uint32_t group) const;
  bool operator==(const ClusterMap&) const = default;
};

struct DataGroupEntry {
  DataGroup group = 0;
  GroupEpoch epoch;
  std::uint32_t loss = 0;
};
/// Groups that take new chunks, in order.
std::vector<DataGroupEntry> data_groups(const ClusterMap& map);

std::string encode_map(const ClusterMap& map);
/// errors: kDataLoss
Result<ClusterMap> decode_map(std::string_view bytes);

/// A daemon has started: its target is a new incarnation, reachable at these addresses.
struct Start {
  Uuid target;
  std::uint64_t incarnation = 0;
  std::string node;
  std::vector<std::string> addresses;
  Uuid fresh_cluster;  // id of the cluster if this start makes it
};

inline constexpr DataGroup kFirstDataGroup = 1;  // 0 is nobody's, so that a forgotten field is noticed

/// The map after a start; a pure function.
/// - No map yet: a cluster of this target alone.
/// - A new incarnation of a member keeps its place (nothing could be acknowledged without it), and every group that
///   lists it gets a new epoch: requests of clients that knew the old incarnation are answered STALE.
/// - The same incarnation again changes no group.
/// errors: kInvalid   the target is no member of this map
///         kDataLoss  an older incarnation than the map knows: the superblock went back in time
/// source: protocol.md 1 (d)
Result<ClusterMap> after_start(const std::optional<ClusterMap>& map, const Start& start);

}  // namespace cairn::server
