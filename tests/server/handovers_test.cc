// What ranks hand over, and what becomes of it when they are gone.

#include <catch2/catch.hpp>
#include <cstring>

#include "proto/common/checksum.h"
#include "tests/server/fixture.h"
#include "tests/sim/memory.h"

namespace cairn::server {
namespace {

constexpr std::size_t kMemoryBytes = 8 * kTestUnitBytes;

/// Each rank is a process with memory and a connection of its own.
struct HandoverFixture : RunFixture {
  struct Process {
    std::shared_ptr<rt::SharedMemory> memory = std::make_shared<sim::SimMemory>(kMemoryBytes);
    std::shared_ptr<const void> open = std::make_shared<bool>(true);
  };
  explicit HandoverFixture(Daemon::Options o = {}, std::size_t directories = 1)
      : RunFixture(std::move(o), 1, directories) {}

  /// A chunk as it lies in the memory.
  wire::PutChunk place(rt::SharedMemory& where, ChunkId id, const std::string& bytes, std::uint64_t at) const {
    std::memcpy(where.bytes().data() + at, bytes.data(), bytes.size());
    wire::PutChunk out;
    wire::to_wire(id, *out.mutable_id());
    out.mutable_stamp()->set_group(data_group);
    out.set_length(static_cast<std::uint32_t>(bytes.size()));
    std::vector<std::uint32_t> crcs;
    for (std::size_t b = 0; b < bytes.size(); b += kBlockBytes)
      crcs.push_back(crc32c(bytes.substr(b, kBlockBytes), block_seed(id, static_cast<std::uint32_t>(b / kBlockBytes))));
    out.mutable_block_crcs()->Assign(crcs.begin(), crcs.end());
    out.set_digest(storage::chunk_digest(crcs));
    for (std::size_t b = 0; b < bytes.size(); b += kTestUnitBytes) out.add_shared(at + b);
    return out;
  }
  static std::string data_of(std::uint32_t rank) { return std::string(1000, static_cast<char>('a' + rank)); }

  /// All that is left of a rank's part: data at the beginning of its memory, the manifest behind it.
  wire::Handover staged(Process& rank_process, OwnerId owner, std::uint32_t rank, std::uint32_t world_size) const {
    const auto writer = writer_of(rank);
    const auto manifest = *format::encode(contents(owner, rank, world_size));
    wire::Handover out;
    out.set_bucket(bucket);
    out.set_run(run_name);
    out.set_owner(std::string(owner.view()));
    out.set_rank(rank);
    out.set_writer(writer);
    *out.add_chunks() = place(*rank_process.memory, {.owner = owner, .writer = writer, .index = 0}, data_of(rank), 0);
    *out.add_chunks() =
        place(*rank_process.memory, {.owner = owner, .writer = writer, .index = 1}, manifest, kTestUnitBytes);
    auto seal = seal_request(owner, rank, manifest);
    seal.clear_bucket();
    seal.clear_run();
    seal.clear_owner();
    seal.clear_rank();
    seal.clear_writer();
    *out.mutable_seal() = std::move(seal);
    return out;
  }
  Result<void> hand_over(Process& by, const wire::Handover& request) {
    memory = by.memory;
    connection_open = by.open;
    auto reply = call<wire::Empty>(Method::kHandover, request);
    if (!reply) return fail(reply.error());
    return {};
  }
  std::optional<Errc> outcome(Process& by, const wire::Handover& request) {
    auto done = hand_over(by, request);
    return done ? std::optional<Errc>() : done.error().code;
  }
  void die(Process& process) {
    memory.reset();
    connection_open.reset();
    process.open.reset();
  }
  bool kept_nothing() const { return metric("cairn_handovers") == 0 && metric("cairn_handovers_memory_bytes") == 0; }
};

using State = wire::AttemptStatusReply;

}  // namespace

TEST_CASE("handovers: what ranks have handed over is finished when they are gone, not before", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  REQUIRE(f.begin(launched, 1, 1, {.world_size = 2}));
  HandoverFixture::Process first, second;
  REQUIRE(f.hand_over(first, f.staged(first, owner, 0, 2)));
  REQUIRE(f.hand_over(second, f.staged(second, owner, 1, 2)));
  f.wait(5s);
  CHECK(f.status(owner).sealed() == 0);
  CHECK_FALSE(f.has({.owner = owner, .writer = f.writer_of(0), .index = 0}));
  CHECK(f.metric("cairn_handovers_memory_bytes") == 2 * kMemoryBytes);

  f.die(first);
  f.wait(1s);
  CHECK(f.status(owner).sealed() == 1);
  CHECK(f.steps().empty());
  f.die(second);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  for (std::uint32_t rank = 0; rank < 2; ++rank)
    CHECK(f.read({.owner = owner, .writer = f.writer_of(rank), .index = 0}, 0, 1000).value() == f.data_of(rank));
  f.wait(1s);
  CHECK(f.kept_nothing());
  CHECK(f.metric("cairn_handovers_finished_total") == 2);
}

TEST_CASE("handovers: a rank that lives does it all itself, and may use its memory again", "[server]") {
  // Goal: what the rank has stored is not read from its memory later. Method: it stores one chunk, puts other bytes in
  // its place and dies.
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank;
  const auto handover = f.staged(rank, owner, 0, 1);
  REQUIRE(f.hand_over(rank, handover));
  REQUIRE(f.put({.owner = owner, .writer = f.writer_of(0), .index = 0}, f.data_of(0)));
  std::ranges::fill(rank.memory->bytes().first(kTestUnitBytes), std::byte{0xee});
  f.die(rank);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  CHECK(f.read({.owner = owner, .writer = f.writer_of(0), .index = 0}, 0, 1000).value() == f.data_of(0));

  // One that seals, too, leaves nothing to do; nor does one that comes too late with it.
  const auto next = *f.begin(launched, 2, 0, {});
  HandoverFixture::Process living;
  const auto late = f.staged(living, next, 0, 1);
  REQUIRE(f.hand_over(living, late));
  REQUIRE(f.save_rank(next, 0, 1));
  CHECK(f.final_status(next).state() == State::COMMITTED);
  f.wait(1s);
  CHECK(f.kept_nothing());
  CHECK(f.hand_over(living, late));
  CHECK(f.kept_nothing());
  CHECK(f.metric("cairn_handovers_finished_total") == 1);
}

TEST_CASE("handovers: a rank that hangs, or whose connection somebody holds open, is finished before it is missed",
          "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 1)));
  f.wait(f.options.checkpoints.rank_silence_max / 2 - 1s);
  CHECK(f.status(owner).sealed() == 0);
  f.wait(3s);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
}

TEST_CASE("handovers: the trainer does not wait for a change of records that is being flushed", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  const auto called = f.world.now();
  REQUIRE(f.begin(launched, 2, 0, {}));
  const auto takes = f.world.now() - called;
  // To the middle of the flush: a look at the records would wait for that.
  const auto change = f.begin_call(Method::kBegin, f.begin_request(launched, 3, 0, {}));
  f.wait(takes / 2);
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 1)));
  CHECK_FALSE(change->has_value());
}

TEST_CASE("handovers: a plan without progress fails its save, for the silence of its rank", "[server]") {
  // Method: the only directory that has the chunks' group fails, which may heal, so it is tried again.
  HandoverFixture f({}, 2);
  const auto launched = *f.open("a");
  const auto second = f.targets->all().at(1).target->uuid();
  for (const auto& data : data_groups(f.daemon->map(), 1))
    if (f.daemon->map().find(false, data.group)->member(second) != nullptr) f.data_group = data.group;
  REQUIRE(f.daemon->map().find(false, f.data_group)->copies == 1);
  const auto owner = *f.begin(launched, 1, 0, {});
  f.disks[1]->fail_write_in = 1;
  REQUIRE_FALSE(f.put({.owner = owner, .writer = 1, .index = 0}, "x"));
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 1)));
  f.die(rank);
  f.wait(f.options.checkpoints.rank_silence_max - 1s);
  CHECK(f.status(owner).state() == State::OPEN);
  f.wait(3s);
  const auto status = f.status(owner);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error().find("rank 0 silent for 30 s") != std::string::npos);
  f.wait(2s);
  CHECK(f.kept_nothing());
  CHECK(f.steps().empty());
}

TEST_CASE("handovers: scribbled memory fails its own save as DATA_LOSS, nothing else", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 1)));
  f.die(rank);
  rank.memory->bytes()[17] ^= std::byte{1};
  const auto status = f.final_status(owner);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error_code() == static_cast<int>(Errc::kDataLoss));
  CHECK(status.error().find("rank 0 had handed over its part") != std::string::npos);
  f.wait(1s);
  CHECK(f.kept_nothing());
  CHECK(f.metric("cairn_handovers_failed_total") == 1);
  CHECK(f.save(launched, 2));
}

TEST_CASE("handovers: a newer launch fences what older ones have handed over", "[server]") {
  HandoverFixture f;
  const auto older = *f.open("a");
  const auto owner = *f.begin(older, 1, 0, {});
  HandoverFixture::Process rank;
  const auto handover = f.staged(rank, owner, 0, 1);
  REQUIRE(f.hand_over(rank, handover));
  const auto newer = *f.open("a", 1);
  CHECK_FALSE(newer.resume);
  f.die(rank);
  f.wait(10s);
  CHECK(f.final_status(owner).error_code() == static_cast<int>(Errc::kFenced));
  CHECK(f.steps().empty());
  CHECK(f.kept_nothing());
  // What arrives after that is not taken.
  HandoverFixture::Process again;
  (void)f.staged(again, owner, 0, 1);
  CHECK(f.outcome(again, handover) == Errc::kFenced);
  CHECK(f.save(newer, 1));
}

TEST_CASE("handovers: a rank that joins again finds itself sealed", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 2});
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 2)));
  f.die(rank);
  f.eventually([&] { return f.metric("cairn_handovers_running") > 0; });
  auto joined = f.call<wire::BeginReply>(Method::kBegin, f.begin_request(launched, 1, 0, {.world_size = 2}));
  REQUIRE(joined);
  CHECK(joined->sealed());
}

TEST_CASE("handovers: a daemon that is stopped finishes what it has begun, one that dies forgets it", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank;
  REQUIRE(f.hand_over(rank, f.staged(rank, owner, 0, 1)));
  f.die(rank);
  f.eventually([&] { return f.metric("cairn_handovers_running") > 0; });
  f.stop();
  f.start();
  CHECK(f.final_status(owner).state() == State::COMMITTED);

  const auto lost = *f.begin(launched, 2, 0, {});
  HandoverFixture::Process other;
  REQUIRE(f.hand_over(other, f.staged(other, lost, 0, 1)));
  f.wait(2s);  // who has joined is written down
  f.restart_after(sim::Death::kProcess);
  f.die(other);
  CHECK(f.kept_nothing());
  f.wait(f.options.checkpoints.rank_silence_max);
  const auto status = f.final_status(lost);
  CHECK(status.state() == State::FAILED);
  CHECK(status.error().find("rank 0 silent") != std::string::npos);
}

TEST_CASE("handovers: memory that plans keep is bounded, and refused beyond", "[server]") {
  Daemon::Options options;
  options.handovers.memory_bytes_max = 2 * kMemoryBytes;
  HandoverFixture f(options);
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 4});
  for (std::uint32_t rank = 1; rank < 4; ++rank) REQUIRE(f.begin(launched, 1, rank, {.world_size = 4}));
  HandoverFixture::Process first, second, third;
  REQUIRE(f.hand_over(first, f.staged(first, owner, 0, 4)));
  REQUIRE(f.hand_over(second, f.staged(second, owner, 1, 4)));
  CHECK(f.outcome(third, f.staged(third, owner, 2, 4)) == Errc::kBusy);
  // Two plans in one memory count once.
  CHECK(f.hand_over(second, f.staged(second, owner, 3, 4)));
  CHECK(f.metric("cairn_handovers_memory_bytes") == 2 * kMemoryBytes);
  CHECK(f.metric("cairn_handovers_refused_total") == 1);
  // The refused one seals itself, as ever. (The second one's memory holds the fourth's bytes now: that one is left
  // out.)
  REQUIRE(f.save_rank(owner, 2, 4));
  REQUIRE(f.save_rank(owner, 1, 4));
  f.die(first);
  f.wait(1s);
  CHECK(f.metric("cairn_handovers_memory_bytes") == kMemoryBytes);
  f.die(second);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
  f.wait(1s);
  CHECK(f.kept_nothing());

  auto none = f.options;
  none.handovers.memory_bytes_max = 0;
  HandoverFixture off(none);
  const auto there = *off.begin(*off.open("a"), 1, 0, {});
  HandoverFixture::Process rank;
  CHECK(off.outcome(rank, off.staged(rank, there, 0, 1)) == Errc::kBusy);
}

TEST_CASE("handovers: parts come in order on one connection, and again without harm", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank, stranger;
  const auto whole = f.staged(rank, owner, 0, 1);
  auto begin = whole, end = whole;
  begin.clear_seal();
  begin.mutable_chunks()->DeleteSubrange(1, 1);
  end.mutable_chunks()->DeleteSubrange(0, 1);
  end.set_part(1);
  CHECK(f.outcome(rank, end) == Errc::kInvalid);
  REQUIRE(f.hand_over(rank, begin));
  CHECK(f.hand_over(rank, begin));
  CHECK(f.outcome(stranger, end) == Errc::kInvalid);  // the first part was of another's memory
  f.die(rank);
  f.wait(1s);
  CHECK(f.kept_nothing());  // half of a plan is none

  rank.open = std::make_shared<bool>(true);
  REQUIRE(f.hand_over(rank, begin));
  REQUIRE(f.hand_over(rank, end));
  CHECK(f.hand_over(rank, begin));  // copies that arrive late
  CHECK(f.hand_over(rank, end));
  auto more = begin;
  more.set_part(2);
  CHECK(f.outcome(rank, more) == Errc::kConflict);
  auto other = whole;
  other.set_writer(77);
  for (auto& put : *other.mutable_chunks()) put.mutable_id()->set_writer(77);
  other.mutable_seal()->mutable_manifest(0)->set_writer(77);
  CHECK(f.outcome(rank, other) == Errc::kConflict);
  f.die(rank);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
}

TEST_CASE("handovers: what does not fit together is refused, and leaves nothing", "[server]") {
  HandoverFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {});
  HandoverFixture::Process rank;
  const auto whole = f.staged(rank, owner, 0, 1);
  const auto wrong = [&](const std::function<void(wire::Handover&)>& change) {
    auto request = whole;
    change(request);
    return f.outcome(rank, request);
  };
  using H = wire::Handover;
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->set_shared(0, kMemoryBytes); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->set_shared(0, 1); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->clear_shared(); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->set_length(0); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->add_block_crcs(1); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->mutable_id()->set_writer(5); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_chunks(0)->mutable_id()->set_owner(std::string(16, 'x')); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { *h.add_chunks() = h.chunks(0); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_seal()->set_digest("short"); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.mutable_seal()->set_manifest_bytes(1); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.set_rank(1); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.set_owner("short"); }) == Errc::kInvalid);
  CHECK(wrong([](H& h) { h.set_part(3); }) == Errc::kInvalid);
  CHECK(wrong([&](H& h) {
          // More bytes than the memory has cannot all lie in it at once.
          for (std::uint32_t i = 2; i < 12; ++i)
            *h.add_chunks() = f.place(*rank.memory, {.owner = owner, .writer = f.writer_of(0), .index = i},
                                      std::string(kTestUnitBytes, 'x'), 2 * kTestUnitBytes);
        }) == Errc::kInvalid);
  const auto shared = std::exchange(rank.memory, nullptr);
  CHECK(f.outcome(rank, whole) == Errc::kInvalid);
  rank.memory = shared;
  CHECK(f.kept_nothing());
  CHECK(f.hand_over(rank, whole));
  f.die(rank);
  CHECK(f.final_status(owner).state() == State::COMMITTED);
}

}  // namespace cairn::server
