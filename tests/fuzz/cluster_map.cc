#include <algorithm>

#include "server/coordinator/changes.h"
#include "server/coordinator/map.h"
#include "tests/fuzz/fuzz.h"

// The map as it lies in the index of each data directory, and what a start makes of one.

namespace cairn::fuzz {
namespace {

using namespace server;

Uuid uuid(char c) {
  return *Uuid::from_bytes(std::string(16, c));
}

Start start_of(const std::vector<Uuid>& targets) {
  Start start;
  for (const auto& target : targets)
    start.targets.push_back({.uuid = target, .incarnation = std::uint64_t{1} << 62, .directory = "/d"});
  start.node = "n1";
  start.addresses = {"127.0.0.1:7420"};
  start.fresh_cluster = uuid('c');
  return start;
}

void whole(const ClusterMap& map, std::string_view what) {
  const auto* home = map.find(true, 0);
  must(home != nullptr && map.find(true, kHomeGroups - 1) == home, std::string(what) + ": it has the home groups");
  must(std::ranges::any_of(home->members, &Member::serving), std::string(what) + ": somebody serves them");
  const auto again = decode_map(encode_map(map));
  must(again && *again == map, std::string(what) + ": it survives");
}

void one(std::string_view input) {
  Input in(input);
  const auto choice = in.byte();
  const auto decoded = decode_map(in.rest());
  if (!decoded) return;
  const auto again = decode_map(encode_map(*decoded));
  must(again && *again == *decoded, "a map survives");

  // A start with some of its targets, perhaps one more, perhaps one declared lost.
  std::vector<Uuid> present;
  std::set<Uuid> lost;
  for (std::size_t i = 0; i < decoded->targets.size(); ++i) {
    if (choice >> (i % 4) & 1)
      present.push_back(decoded->targets[i].uuid);
    else if (choice & 0x10)
      lost.insert(decoded->targets[i].uuid);
  }
  if (choice & 0x20) present.push_back(uuid('n'));
  if (present.empty()) return;
  const auto forced = may_start(*decoded, {present.begin(), present.end()}, lost);
  if (!forced) return;
  auto start = start_of(present);
  start.lost = lost;
  start.forced = *forced;
  const auto next = after_start(*decoded, start);
  if (!next) return;
  whole(*next, "after a start");
  if (const auto failed = after_failures(*next, {present.front()})) whole(*failed, "after a failure");
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  const auto fresh = after_start(std::nullopt, start_of({uuid('1')}));
  const auto three = after_start(std::nullopt, start_of({uuid('1'), uuid('2'), uuid('3')}));
  for (const auto choice : {0x01, 0x07, 0x23, 0x16}) {
    out.push_back(static_cast<char>(choice) + encode_map(*fresh));
    out.push_back(static_cast<char>(choice) + encode_map(*three));
    if (const auto failed = after_failures(*three, {uuid('2')}))
      out.push_back(static_cast<char>(choice) + encode_map(*failed));
  }
  return out;
}

const Register registered({.name = "cluster_map", .bytes_max = 4096, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
