#include "server/chunks/chunks.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <map>

#include "proto/common/checksum.h"
#include "server/coordinator/coordinator.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

using namespace cairn;
using namespace cairn::server;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t kUnitBytes = 128 * kKiB;
constexpr std::uint32_t kLength = 200'000;  // two units, four blocks

/// Chunks over three data directories, with nothing else at work: what one says is what the test did.
class Copies {
 public:
  explicit Copies(std::vector<std::size_t> here = {0, 1, 2}) : world(1), node(world.make_node("daemon")) {
    for (std::size_t i = 0; i < 3; ++i) {
      disks.push_back(&world.make_disk("d" + std::to_string(i), {}));
      indexes.push_back(&world.make_index("d" + std::to_string(i) + "/index"));
    }
    start({0, 1, 2});
    if (here.size() < 3) {
      end();
      start(std::move(here));
    }
  }
  ~Copies() { end(); }

  void start(std::vector<std::size_t> here) {
    units = *rt::UnitPool::create(node, 64, kUnitBytes);
    targets = std::make_unique<TargetSet>();
    storage::Target::Options options;
    options.chunks.segment_bytes = 16 * kMiB;
    options.chunks.ballast_bytes = 1 * kMiB;
    for (const auto i : here) {
      auto opened =
          run(storage::Target::open(node.runtime(), disks[i]->attach(node), indexes[i]->attach(node), *units, options));
      REQUIRE(opened);
      ids[i] = (*opened)->uuid();
      targets->add("/d" + std::to_string(i), *std::move(opened));
    }
    auto local = run(open_local_coordinator(*targets));
    REQUIRE(local);
    coordinator = std::move(local->coordinator);
    members = std::make_unique<Membership>(node.runtime(), *targets, *coordinator, MembershipBugs{});
    REQUIRE(run(members->start({.node = "n", .addresses = {}, .lost = {}})));
    chunks = std::make_unique<Chunks>(node.runtime(), *members);
  }
  void end() {
    chunks.reset();
    node.hold(std::move(members));
    node.hold(std::move(coordinator));
    node.hold(std::move(targets));
    node.hold(std::move(units));
    node.kill(sim::Death::kProcess);
    node.restart();
  }

  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  storage::Target& target(std::size_t i) { return *targets->find(ids.at(i)); }

  /// The data group whose copies are on exactly these directories.
  DataGroup group_of(const std::vector<std::size_t>& on) const {
    for (const auto& range : members->map().groups) {
      if (range.home || range.members.size() != on.size()) continue;
      if (std::ranges::all_of(on, [&](auto i) { return range.member(ids.at(i)) != nullptr; })) return range.first;
    }
    FAIL("no such group");
    return 0;
  }
  static ChunkId id(std::uint32_t index) { return {.owner = OwnerId::make(1, 0, 2, 3), .writer = 4, .index = index}; }
  static std::string bytes_of(std::uint32_t index, std::uint32_t length = kLength) {
    std::string out(length, '\0');
    for (std::uint32_t i = 0; i < length; ++i) out[i] = static_cast<char>((i * 131) ^ (i >> 9) ^ index);
    return out;
  }
  static std::vector<std::uint32_t> crcs_of(const ChunkId& id, std::string_view bytes) {
    std::vector<std::uint32_t> crcs;
    for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
      crcs.push_back(
          crc32c(bytes.substr(at, kBlockBytes), block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
    return crcs;
  }
  Result<void> put(DataGroup group, std::uint32_t index) { return put(group, index, bytes_of(index)); }
  Result<void> put(DataGroup group, std::uint32_t index, const std::string& bytes) {
    auto upload =
        run(chunks->start(group, id(index), static_cast<std::uint32_t>(bytes.size()), crcs_of(id(index), bytes)));
    if (!upload) return fail(upload.error());
    skipped = *upload == nullptr;
    if (skipped) return {};
    for (std::size_t at = 0; at < bytes.size(); at += kUnitBytes) {
      auto memory = *units->try_acquire();
      const auto size = std::min(kUnitBytes, bytes.size() - at);
      std::memcpy(memory.bytes.data(), bytes.data() + at, size);
      CHECK_OK(
          run((*upload)->write(static_cast<std::uint32_t>(at), std::move(memory), static_cast<std::uint32_t>(size))));
    }
    return run((*upload)->finish());
  }
  /// "right", "wrong", or the name of the error.
  std::string read(DataGroup group, std::uint32_t index) {
    last = {};
    std::string out;
    for (std::uint32_t at = 0; at < kLength; at += kUnitBytes) {
      auto got = run(chunks->read(group, id(index), at, std::min<std::uint32_t>(kUnitBytes, kLength - at)));
      if (!got) {
        last = got.error();
        return std::string(name_of(got.error().code));
      }
      out += got->bytes.text();
    }
    return out == bytes_of(index) ? "right" : "wrong";
  }
  /// Of one directory alone.
  bool has(std::size_t i, std::uint32_t index) { return run(target(i).chunks().find(id(index)))->has_value(); }
  void lose(std::size_t i, std::uint32_t index) { REQUIRE(run(target(i).chunks().remove({id(index)}))); }
  /// Flips a bit of the first chunk that was put.
  void damage(std::size_t i) {
    for (const auto& name : disks[i]->names())
      if (name.starts_with("segment-")) {
        REQUIRE(disks[i]->flip(name, 1000, 3));
        // Now and not before: locations are cached, bytes are not.
        return;
      }
    FAIL("no segment");
  }
  std::uint64_t reads(std::size_t i) const { return disks[i]->counts.reads; }

  sim::World world;
  sim::Node& node;
  std::vector<sim::DiskImage*> disks;
  std::vector<sim::IndexImage*> indexes;
  std::map<std::size_t, Uuid> ids;
  std::unique_ptr<rt::UnitPool> units;
  std::unique_ptr<TargetSet> targets;
  std::unique_ptr<Coordinator> coordinator;
  std::unique_ptr<Membership> members;
  std::unique_ptr<Chunks> chunks;
  bool skipped = false;  // by the last put: it was there already
  std::optional<Error> last;
};

}  // namespace

TEST_CASE("chunks: a chunk lies on the members of its group, and neighbours are read from different ones", "[server]") {
  Copies c;
  const auto group = c.group_of({0, 1});
  for (std::uint32_t i = 0; i < 4; ++i) REQUIRE(c.put(group, i));
  for (std::uint32_t i = 0; i < 4; ++i) {
    CHECK((c.has(0, i) && c.has(1, i)));
    CHECK_FALSE(c.has(2, i));
    const auto first = c.reads(0), second = c.reads(1), third = c.reads(2);
    CHECK(c.read(group, i) == "right");
    const bool even = c.reads(0) > first;
    CHECK(even != (c.reads(1) > second));
    CHECK(even == (i % 2 == 0));
    CHECK(c.reads(2) == third);
  }
  CHECK(c.chunks->reads_elsewhere() == 0);
  CHECK(c.run(c.chunks->list(std::nullopt, 100))->size() == 4);  // each once
  CHECK(c.run(c.chunks->list(Copies::id(1), 1))->front().id == Copies::id(2));
}

TEST_CASE("chunks: damage on one copy is read around, whichever it is", "[server]") {
  for (const std::size_t bad : {0, 1}) {
    Copies c;
    const auto group = c.group_of({0, 1});
    REQUIRE(c.put(group, 0));
    c.damage(bad);
    CHECK(c.read(group, 0) == "right");
    // The read that goes to the good copy first does not notice.
    CHECK(c.chunks->reads_elsewhere() == (bad == 0 ? 1 : 0));
  }
}

TEST_CASE("chunks: a disk that cannot read is read around, also for blocks as they lie", "[server]") {
  Copies c;
  const auto group = c.group_of({0, 1});
  REQUIRE(c.put(group, 0));
  c.disks[0]->faults.read_error = 1;
  CHECK(c.read(group, 0) == "right");
  CHECK(c.chunks->reads_elsewhere() == 2);  // one of each unit
  auto memory = *c.units->try_acquire();
  const auto bytes = memory.bytes;
  const auto raw = c.run(c.chunks->read_raw(group, Copies::id(0), 0, kBlockBytes, memory));
  REQUIRE(raw);
  CHECK(std::memcmp(bytes.data(), Copies::bytes_of(0).data(), kBlockBytes) == 0);
  CHECK(c.chunks->reads_elsewhere() == 3);
  c.disks[1]->faults.read_error = 1;
  CHECK(c.read(group, 0) == "data loss");
  CHECK(c.run(c.chunks->read_raw(group, Copies::id(0), 0, kBlockBytes, memory)).error().code == Errc::kDataLoss);
  CHECK_FALSE(c.target(0).committer().failure());  // reads prove nothing about writes
}

TEST_CASE("chunks: damage of all copies is told with the chunk and the place", "[server]") {
  Copies c;
  const auto group = c.group_of({0, 1});
  REQUIRE(c.put(group, 0));
  c.damage(0);
  c.damage(1);
  CHECK(c.read(group, 0) == "data loss");
  CHECK_THAT(c.last->message,
             Catch::Contains(Copies::id(0).text()) && Catch::Contains("segment-") && Catch::Contains("block 0"));
}

TEST_CASE("chunks: a missing copy is read around, and damage says more than absence", "[server]") {
  for (const std::size_t lost : {0, 1}) {
    Copies c;
    const auto group = c.group_of({0, 1});
    REQUIRE(c.put(group, 0));
    c.lose(lost, 0);
    CHECK(c.read(group, 0) == "right");
    CHECK(c.chunks->reads_elsewhere() == (lost == 0 ? 2 : 0));
    CHECK(c.run(c.chunks->find(Copies::id(0)))->has_value());
    c.damage(1 - lost);
    CHECK(c.read(group, 0) == "data loss");
    c.lose(1 - lost, 0);
    CHECK(c.read(group, 0) == "not found");
    CHECK_FALSE(c.run(c.chunks->find(Copies::id(0)))->has_value());
  }
}

TEST_CASE("chunks: a wrong question is not asked of every copy", "[server]") {
  Copies c;
  const auto group = c.group_of({0, 1});
  REQUIRE(c.put(group, 0));
  int bad = 0;
  c.chunks->on_bad_copy = [&bad](storage::Target&, const ChunkId&) { ++bad; };
  CHECK(c.run(c.chunks->read(group, Copies::id(0), kLength, 1)).error().code == Errc::kInvalid);
  CHECK(bad == 0);  // or good copies would be looked at for damage
  CHECK(c.chunks->reads_elsewhere() == 0);
  CHECK(c.run(c.chunks->read(999, Copies::id(0), 0, 1)).error().code == Errc::kUnavailable);
}

TEST_CASE("chunks: a target that fails while it is written is out before the chunk is acknowledged", "[server]") {
  for (const bool flush : {false, true}) {
    Copies c;
    const auto group = c.group_of({0, 1});
    REQUIRE(c.put(group, 0));
    (flush ? c.disks[0]->faults.flush_error : c.disks[0]->faults.write_error) = 1;
    REQUIRE(c.put(group, 1));
    CHECK(c.target(0).committer().failure());
    CHECK(c.members->map().find(false, group)->member(c.ids[0]) == nullptr);
    CHECK(c.members->map().target(c.ids[0])->out);
    CHECK_FALSE(c.target(1).committer().failure());
    CHECK(c.has(1, 1));
    for (std::uint32_t i = 0; i < 2; ++i) CHECK(c.read(group, i) == "right");
    REQUIRE(c.put(group, 2));  // and without it from now on
    CHECK(c.read(group, 2) == "right");
    // What is removed is removed from those that still write.
    REQUIRE(c.run(c.chunks->remove({Copies::id(0), Copies::id(2)})));
    CHECK_FALSE((c.has(1, 0) || c.has(1, 2)));
    CHECK(c.has(0, 0));
  }
}

TEST_CASE("chunks: when every member fails nothing is acknowledged, and what they have can still be read", "[server]") {
  Copies c;
  const auto group = c.group_of({2});
  REQUIRE(c.put(group, 0));
  c.disks[2]->faults.write_error = 1;
  const auto refused = c.put(group, 1);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kFailed);
  CHECK(c.put(group, 3).error().code == Errc::kUnavailable);
  CHECK(c.read(group, 0) == "right");
  CHECK(c.read(group, 1) == "not found");
  const auto both = c.group_of({0, 1});
  CHECK(c.put(both, 2));  // other groups go on
}

TEST_CASE("chunks: of a directory that is not here nothing is found missing", "[server]") {
  Copies c;
  const auto alone = c.group_of({0}), both = c.group_of({0, 1});
  REQUIRE(c.put(alone, 0));
  REQUIRE(c.put(both, 1));
  c.end();
  c.start({1, 2});
  CHECK(c.read(alone, 0) == "unavailable");  // not "not found": it would be taken for removed
  CHECK_THAT(c.last->message, Catch::Contains("failed or are missing"));
  CHECK(c.put(alone, 2).error().code == Errc::kUnavailable);
  CHECK(c.read(both, 1) == "right");
}

TEST_CASE("chunks: sent again, a chunk is written where it is missing only", "[server]") {
  Copies c;
  const auto group = c.group_of({0, 1});
  REQUIRE(c.put(group, 0));
  REQUIRE(c.put(group, 0));
  CHECK(c.skipped);
  c.lose(1, 0);
  const auto writes = c.disks[0]->counts.bytes_written;
  REQUIRE(c.put(group, 0));
  CHECK_FALSE(c.skipped);
  CHECK(c.has(1, 0));
  CHECK(c.disks[0]->counts.bytes_written == writes);
  CHECK(c.read(group, 0) == "right");
  auto other = Copies::bytes_of(0);
  other[5] ^= 1;
  CHECK(c.put(group, 0, other).error().code == Errc::kConflict);
}
