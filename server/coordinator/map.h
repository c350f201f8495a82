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

/// Groups first .. first + count - 1 of one kind, all with these values. All home groups are one range.
struct GroupRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
  bool home = false;  // home group (records), else data group (chunks)
  GroupEpoch epoch;
  std::uint32_t loss = 0;
  std::vector<Member> members;  // primary = first serving one
  std::uint32_t copies = 1;     // members that it should have, as far as there are targets
  std::vector<Uuid> placement;  // the targets where its copies belong; those that are there are members

  const Member* member(const Uuid& target) const;
  bool operator==(const GroupRange&) const = default;
};

struct NodeEntry {
  std::string name;
  std::vector<std::string> addresses;
  bool operator==(const NodeEntry&) const = default;
};

/// A data directory that the cluster knows.
struct TargetEntry {
  Uuid uuid;
  std::uint64_t incarnation = 0;
  std::string node;
  std::string directory;  // where it was seen last, for messages
  bool out = false;       // failed or missing: it is a member only where nobody else can serve
  bool operator==(const TargetEntry&) const = default;
};

/// The versioned table of nodes, targets and groups. Stored and sent as wire.Map.
struct ClusterMap {
  std::uint64_t version = 0;
  std::uint32_t generation = 0;
  std::uint64_t term = 0;  // set by the local coordinator
  Uuid cluster;
  std::vector<NodeEntry> nodes;
  std::vector<TargetEntry> targets;  // in the order in which they joined
  std::vector<GroupRange> groups;
  std::vector<Uuid> lost;  // targets that were declared lost: never taken back

  const GroupRange* find(bool home, std::uint32_t group) const;
  const TargetEntry* target(const Uuid& uuid) const;
  bool operator==(const ClusterMap&) const = default;
};

struct DataGroupEntry {
  DataGroup group = 0;
  GroupEpoch epoch;
  std::uint32_t loss = 0;
};
/// Groups of a bucket with so many copies that take new chunks, in order of their numbers: those of that size whose
/// members all serve; when there is none, those that have the most left.
std::vector<DataGroupEntry> data_groups(const ClusterMap& map, std::uint32_t copies);
/// Most copies that a bucket may ask for.
std::uint32_t copies_max(const ClusterMap& map);
/// Lost chunks of every data group, by number from kFirstDataGroup on.
std::vector<std::uint32_t> data_losses(const ClusterMap& map);

std::string encode_map(const ClusterMap& map);
/// Maps of before there were several targets get what they lack.
/// errors: kDataLoss
Result<ClusterMap> decode_map(std::string_view bytes);

inline constexpr DataGroup kFirstDataGroup = 1;  // 0 is nobody's, so that a forgotten field is noticed
/// Copies of records, and most copies of chunks, when there are as many targets.
inline constexpr std::uint32_t kCopiesMax = 3;

}  // namespace cairn::server
