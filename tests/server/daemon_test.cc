#include "proto/common/checksum.h"
#include "proto/rt/mapped_pages.h"
#include "tests/server/fixture.h"
#include "tests/sim/memory.h"

using namespace cairn;
using namespace cairn::server;

namespace {

struct ChunkFixture : Fixture {
  explicit ChunkFixture(Daemon::Options o = {}) : Fixture(std::move(o)) {
    REQUIRE(make_bucket("b"));
    owner = *begin_object("b", "k");
  }
  ChunkId chunk(std::uint32_t index) const { return {.owner = owner, .writer = 5, .index = index}; }
  wire::ReadRanges request() const {
    wire::ReadRanges out;
    *out.mutable_stamp() = stamp_of(false, kFirstDataGroup);
    return out;
  }
  void want(wire::ReadRanges& request, ChunkId id, std::vector<std::pair<std::uint32_t, std::uint32_t>> ranges) const {
    auto& to = *request.add_chunks();
    wire::to_wire(id, *to.mutable_id());
    for (const auto& [offset, length] : ranges) {
      to.add_offsets(offset);
      to.add_lengths(length);
    }
  }
  OwnerId owner;
};

}  // namespace

TEST_CASE("daemon: chunks of every size come back to the byte, also after a power loss", "[server]") {
  ChunkFixture f;
  const std::vector<std::size_t> sizes = {
      1, 4095, 4096, 65535, 65536, 65537, kTestUnitBytes, kTestUnitBytes + 1, 3 * kTestUnitBytes + 777};
  for (std::uint32_t i = 0; i < sizes.size(); ++i) REQUIRE(f.put(f.chunk(i), pattern(i, sizes[i])));
  f.restart_after(sim::Death::kPowerLoss);
  for (std::uint32_t i = 0; i < sizes.size(); ++i)
    CHECK(f.read(f.chunk(i), 0, static_cast<std::uint32_t>(sizes[i])).value() == pattern(i, sizes[i]));
}

TEST_CASE("daemon: an owner's record precedes its first chunk", "[server]") {
  ChunkFixture f;
  const auto stranger = OwnerId::make(3, 0, 1, 2);
  CHECK(f.put({.owner = stranger, .writer = 5, .index = 0}, "v").error().code == Errc::kFenced);
  CHECK_FALSE(f.has({.owner = stranger, .writer = 5, .index = 0}));
  CHECK(f.put({.owner = OwnerId::make(999, 0, 1, 2), .writer = 5, .index = 0}, "v").error().code == Errc::kInvalid);
  // And its end follows the last one.
  REQUIRE(f.put(f.chunk(0), "v"));
  REQUIRE(f.seal_object("b", "k", f.owner, 5, "v"));
  CHECK(f.put(f.chunk(1), "w").error().code == Errc::kFenced);
}

TEST_CASE("daemon: the same chunk again is done, other bytes under its id are a conflict", "[server]") {
  ChunkFixture f;
  REQUIRE(f.put(f.chunk(0), "hello"));
  REQUIRE(f.put(f.chunk(0), "hello"));
  CHECK(f.put(f.chunk(0), "other").error().code == Errc::kConflict);
  CHECK(f.read(f.chunk(0), 0, 5).value() == "hello");

  // The planted bug is one that this test sees.
  Daemon::Options bad;
  bad.bugs.existing_unseen = true;
  ChunkFixture g(bad);
  REQUIRE(g.put(g.chunk(0), "hello"));
  CHECK(g.put(g.chunk(0), "other"));
}

TEST_CASE("daemon: puts that do not fit together are refused and store nothing", "[server]") {
  ChunkFixture f;
  const auto bytes = pattern(1, kTestUnitBytes + 10);
  const auto id = f.chunk(0);
  wire::PutChunk good;
  *good.mutable_stamp() = f.stamp_of(false, kFirstDataGroup);
  wire::to_wire(id, *good.mutable_id());
  good.set_length(static_cast<std::uint32_t>(bytes.size()));
  std::vector<std::uint32_t> crcs;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    crcs.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                          block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  good.mutable_block_crcs()->Assign(crcs.begin(), crcs.end());
  good.set_digest(storage::chunk_digest(crcs));
  const auto header = [](std::uint32_t offset) {
    wire::DataHeader out;
    out.set_offset(offset);
    return wire::encode(out);
  };
  const std::vector<Fixture::Piece> pieces = {{header(0), bytes.substr(0, kTestUnitBytes)},
                                              {header(kTestUnitBytes), bytes.substr(kTestUnitBytes)}};
  const auto outcome = [&](const wire::PutChunk& request, std::vector<Fixture::Piece> sent) {
    auto answered = f.exchange(Method::kPutChunk, wire::encode(request), std::move(sent));
    return answered.reply ? std::optional<Errc>() : answered.reply.error().code;
  };
  auto wrong = good;
  wrong.set_length(0);
  CHECK(outcome(wrong, pieces) == Errc::kInvalid);
  wrong.set_length(kChunkBytesMax + 1);
  CHECK(outcome(wrong, pieces) == Errc::kInvalid);
  wrong = good;
  wrong.mutable_block_crcs()->RemoveLast();
  CHECK(outcome(wrong, pieces) == Errc::kInvalid);
  wrong = good;
  wrong.set_digest(good.digest() + 1);
  CHECK(outcome(wrong, pieces) == Errc::kInvalid);
  CHECK(outcome(good, {pieces[1], pieces[0]}) == Errc::kInvalid);
  CHECK(outcome(good, {{header(0), bytes.substr(0, 100)}, pieces[1]}) == Errc::kInvalid);
  CHECK(outcome(good, {pieces[0]}) == Errc::kUnavailable);  // the connection was lost in between
  auto flipped = pieces;
  flipped[1].payload[3] ^= 1;
  CHECK(outcome(good, flipped) == Errc::kDataLoss);
  auto garbled = pieces;
  garbled[0].message = "\xff\xff";
  CHECK(outcome(good, garbled) == Errc::kProtocol);
  CHECK_FALSE(f.has(id));
  CHECK_FALSE(outcome(good, pieces));
  CHECK(f.has(id));
}

TEST_CASE("daemon: pages of its clients' memory do not add up in its own size", "[server]") {
  struct Mapped final : rt::SharedMemory, rt::MappedPages {
    std::span<std::byte> bytes() const override { return memory.bytes(); }
    void unmap_pages() override { ++times; }
    sim::SimMemory memory{8 * kTestUnitBytes};
    int times = 0;
  };
  Daemon::Options options;
  options.chunks.mapped_bytes_max = 3 * kTestUnitBytes;
  ChunkFixture f(options);
  const auto mapped = std::make_shared<Mapped>();
  f.memory = mapped;
  const auto block = std::string(kBlockBytes, 'x');
  std::memcpy(mapped->bytes().data(), block.data(), block.size());
  const auto put = [&](std::uint32_t index) {
    const auto id = f.chunk(index);
    wire::PutChunk request;
    *request.mutable_stamp() = f.stamp_of(false, kFirstDataGroup);
    wire::to_wire(id, *request.mutable_id());
    request.set_length(kBlockBytes);
    const std::vector<std::uint32_t> crcs{crc32c(block, block_seed(id, 0))};
    request.add_block_crcs(crcs[0]);
    request.set_digest(storage::chunk_digest(crcs));
    request.add_shared(0);
    return f.exchange(Method::kPutChunk, wire::encode(request), {}).reply.has_value();
  };
  constexpr auto kBlocks = 3 * kTestUnitBytes / kBlockBytes;
  for (std::uint32_t i = 0; i < kBlocks; ++i) REQUIRE(put(i));
  CHECK(mapped->times == 0);
  REQUIRE(put(kBlocks));
  CHECK(mapped->times == 1);
  for (std::uint32_t i = 1; i <= 2 * kBlocks + 2; ++i) REQUIRE(put(kBlocks + i));
  CHECK(mapped->times == 3);
}

TEST_CASE("daemon: a chunk is written from the memory that its client shares, and read into it", "[server]") {
  ChunkFixture f;
  f.memory = std::make_shared<sim::SimMemory>(16 * kTestUnitBytes);
  const auto mine = f.memory->bytes();
  const auto bytes = pattern(1, 2 * kTestUnitBytes + 777);
  const auto id = f.chunk(0);
  // Its units lie wherever the client has them.
  const std::uint64_t places[] = {5 * kTestUnitBytes, 1 * kTestUnitBytes, 9 * kTestUnitBytes + kSectorBytes};
  for (std::size_t i = 0; i < 3; ++i) {
    const auto part = std::string_view(bytes).substr(i * kTestUnitBytes, kTestUnitBytes);
    std::memcpy(mine.data() + places[i], part.data(), part.size());
  }
  wire::PutChunk put;
  *put.mutable_stamp() = f.stamp_of(false, kFirstDataGroup);
  wire::to_wire(id, *put.mutable_id());
  put.set_length(static_cast<std::uint32_t>(bytes.size()));
  std::vector<std::uint32_t> crcs;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    crcs.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                          block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  put.mutable_block_crcs()->Assign(crcs.begin(), crcs.end());
  put.set_digest(storage::chunk_digest(crcs));
  put.mutable_shared()->Assign(std::begin(places), std::end(places));
  const auto outcome = [&](const wire::PutChunk& request) {
    auto answered = f.exchange(Method::kPutChunk, wire::encode(request), {});
    return answered.reply ? std::optional<Errc>() : answered.reply.error().code;
  };

  // Places outside of it, not at a sector, too few, too many; bytes that do not match.
  const auto with = [&](int piece, std::uint64_t place) {
    auto wrong = put;
    wrong.set_shared(piece, place);
    return wrong;
  };
  CHECK(outcome(with(0, mine.size())) == Errc::kInvalid);
  CHECK(outcome(with(1, mine.size() - kSectorBytes)) == Errc::kInvalid);
  CHECK(outcome(with(1, UINT64_MAX - kSectorBytes + 1)) == Errc::kInvalid);
  CHECK(outcome(with(0, 1)) == Errc::kInvalid);
  auto wrong = put;
  wrong.mutable_shared()->RemoveLast();
  CHECK(outcome(wrong) == Errc::kInvalid);
  wrong = put;
  wrong.add_shared(0);
  CHECK(outcome(wrong) == Errc::kInvalid);
  CHECK(outcome(with(0, 0)) == Errc::kDataLoss);
  const auto memory = std::exchange(f.memory, nullptr);
  CHECK(outcome(put) == Errc::kInvalid);  // a connection that shares nothing
  f.memory = memory;
  CHECK_FALSE(f.has(id));

  CHECK_FALSE(outcome(put));
  CHECK(f.read(id, 0, static_cast<std::uint32_t>(bytes.size())).value() == bytes);
  // What the client does with its memory afterwards is its own affair.
  std::ranges::fill(mine, std::byte{0xee});
  f.restart_after(sim::Death::kPowerLoss);
  CHECK(f.read(id, 0, static_cast<std::uint32_t>(bytes.size())).value() == bytes);

  // And back, blocks of two units at once.
  wire::ReadShared read;
  *read.mutable_stamp() = f.stamp_of(false, kFirstDataGroup);
  const auto piece = [&](ChunkId chunk, std::uint32_t offset, std::uint32_t length, std::uint64_t to) {
    auto& out = *read.add_pieces();
    wire::to_wire(chunk, *out.mutable_id());
    out.set_offset(offset);
    out.set_length(length);
    out.set_to(to);
  };
  const auto read_outcome = [&] {
    auto answered = f.exchange(Method::kReadShared, wire::encode(read), {});
    return answered.reply ? std::optional<Errc>() : answered.reply.error().code;
  };
  piece(id, kBlockBytes, kBlockBytes, 4 * kTestUnitBytes);
  piece(id, 2 * kTestUnitBytes, kBlockBytes, 7 * kTestUnitBytes);
  auto answered = f.exchange(Method::kReadShared, wire::encode(read), {});
  wire::ReadSharedReply reply;
  REQUIRE(answered.reply);
  REQUIRE(wire::decode(*answered.reply, reply, "reply"));
  CHECK(text_of(mine.subspan(4 * kTestUnitBytes, kBlockBytes)) == bytes.substr(kBlockBytes, kBlockBytes));
  CHECK(text_of(mine.subspan(7 * kTestUnitBytes, 777)) == bytes.substr(2 * kTestUnitBytes));
  REQUIRE(reply.pieces_size() == 2);
  CHECK(reply.pieces(0).length() == kBlockBytes);
  CHECK(reply.pieces(1).length() == 777);
  CHECK(reply.pieces(0).block_crcs(0) == crcs[1]);
  CHECK(reply.pieces(1).block_crcs(0) == crcs.back());
  CHECK(mine[3 * kTestUnitBytes] == std::byte{0xee});

  for (const auto& [offset, length, to] :
       std::initializer_list<std::tuple<std::uint32_t, std::uint32_t, std::uint64_t>>{
           {0, kBlockBytes, mine.size()},                 // outside of it
           {0, kBlockBytes, mine.size() - kSectorBytes},  // reaching out of it
           {0, kBlockBytes, 12},                          // not at a sector
           {100, 100, 0},                                 // not at a block
           {0, kTestUnitBytes + kBlockBytes, 0},          // two units
           {0, 0, 0},
           {4 * kTestUnitBytes, kBlockBytes, 0},  // behind its end
           {0, UINT32_MAX, 0}}) {
    read.clear_pieces();
    piece(id, offset, length, to);
    CHECK(read_outcome() == Errc::kInvalid);
  }
  read.clear_pieces();
  CHECK(read_outcome() == Errc::kInvalid);
  for (int i = 0; i < 1000; ++i) piece(id, 0, 100, 0);
  CHECK(read_outcome() == Errc::kInvalid);
  read.clear_pieces();
  piece(f.chunk(1), 0, 100, 0);
  CHECK(read_outcome() == Errc::kDataLoss);  // its owner lives
}

TEST_CASE("daemon: ranges come back concatenated in the order asked for", "[server]") {
  ChunkFixture f;
  const auto size = static_cast<std::uint32_t>(5 * kTestUnitBytes / 2);
  for (std::uint32_t i = 0; i < 3; ++i) REQUIRE(f.put(f.chunk(i), pattern(i, size)));
  sim::Prng random(5);
  for (int round = 0; round < 30; ++round) {
    auto request = f.request();
    std::string expected;
    for (int k = 0; k < 4; ++k) {
      const auto i = static_cast<std::uint32_t>(random.below(3));
      std::vector<std::pair<std::uint32_t, std::uint32_t>> ranges;
      for (int n = static_cast<int>(random.below(6)); n > 0; --n) {
        const auto offset = static_cast<std::uint32_t>(random.below(size));
        const auto length = static_cast<std::uint32_t>(
            1 + random.below(std::min<std::uint64_t>(size - offset, random.chance(0.5) ? 300 : size)));
        ranges.emplace_back(offset, length);
        expected += pattern(i, size).substr(offset, length);
      }
      f.want(request, f.chunk(i), ranges);
    }
    const auto answered = f.exchange(Method::kReadRanges, wire::encode(request), {});
    REQUIRE(answered.reply);
    CHECK(answered.bytes == expected);
    wire::ReadReply reply;
    REQUIRE(wire::decode(*answered.reply, reply, "reply"));
    CHECK(reply.bytes() == expected.size());
  }
}

TEST_CASE("daemon: rising ranges read each block once, and small ones share frames", "[server]") {
  ChunkFixture f;
  const auto size = static_cast<std::uint32_t>(2 * kTestUnitBytes);
  REQUIRE(f.put(f.chunk(0), pattern(0, size)));
  auto request = f.request();
  std::vector<std::pair<std::uint32_t, std::uint32_t>> ranges;
  for (std::uint32_t at = 0; at + 10 < size; at += 1000) ranges.emplace_back(at, 10);
  f.want(request, f.chunk(0), ranges);
  const auto answered = f.exchange(Method::kReadRanges, wire::encode(request), {});
  REQUIRE(answered.reply);
  wire::ReadReply reply;
  REQUIRE(wire::decode(*answered.reply, reply, "reply"));
  CHECK(reply.bytes_from_disk() == size);
  CHECK(answered.frames == 1);
}

TEST_CASE("daemon: what cannot be read is told, never guessed", "[server]") {
  ChunkFixture f;
  REQUIRE(f.put(f.chunk(0), pattern(0, 100'000)));
  CHECK(f.read(f.chunk(0), 99'999, 2).error().code == Errc::kInvalid);
  CHECK(f.read(f.chunk(0), 0, 0).error().code == Errc::kInvalid);
  CHECK(f.read(f.chunk(0), UINT32_MAX, 1).error().code == Errc::kInvalid);
  // Absent although its owner lives: damage. Absent because what it belonged to was removed: deleted.
  CHECK(f.read(f.chunk(1), 0, 1).error().code == Errc::kDataLoss);
  CHECK(f.read({.owner = OwnerId::make(3, 0, 1, 2), .writer = 5, .index = 0}, 0, 1).error().code == Errc::kDeleted);
  // A flipped bit: the chunk and the block are named.
  for (const auto& name : f.disk.names())
    if (name.starts_with("segment")) REQUIRE(f.disk.flip(name, kBlockBytes + 5, 3));
  f.wait(3s);  // blocks that were right a moment ago are held no longer
  const auto bad = f.read(f.chunk(0), 0, 100'000);
  REQUIRE_FALSE(bad);
  CHECK(bad.error().code == Errc::kDataLoss);
  CHECK(bad.error().message.find(f.chunk(0).text() + " block 1") != std::string::npos);
  CHECK(f.read(f.chunk(0), 0, 60'000).value() == pattern(0, 100'000).substr(0, 60'000));
}

TEST_CASE("daemon: requests beyond the limits are refused before anything is read", "[server]") {
  Daemon::Options options;
  options.chunks.read.ranges_max = 10;
  options.chunks.read.bytes_max = 1000;
  ChunkFixture f(options);
  REQUIRE(f.put(f.chunk(0), pattern(0, 5000)));
  auto request = f.request();
  f.want(request, f.chunk(0), std::vector<std::pair<std::uint32_t, std::uint32_t>>(11, {0, 1}));
  CHECK(f.exchange(Method::kReadRanges, wire::encode(request), {}).reply.error().code == Errc::kInvalid);
  CHECK(f.read(f.chunk(0), 0, 1001).error().code == Errc::kInvalid);
  CHECK(f.read(f.chunk(0), 0, 1000));
  request = f.request();
  f.want(request, f.chunk(0), {{0, 1}});
  request.mutable_chunks(0)->add_offsets(3);
  CHECK(f.exchange(Method::kReadRanges, wire::encode(request), {}).reply.error().code == Errc::kInvalid);
}

TEST_CASE("daemon: a request under another epoch is stale, one for another group wrong", "[server]") {
  Fixture f;
  REQUIRE(f.make_bucket("b"));
  wire::BucketShow show;
  show.set_bucket("b");
  *show.mutable_stamp() = f.stamp_of(true, bucket_group("b"));
  REQUIRE(f.call<wire::BucketInfo>(Method::kBucketShow, show));
  auto wrong = show;
  wrong.mutable_stamp()->set_group((bucket_group("b") + 1) % kHomeGroups);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketShow, wrong).error().code == Errc::kInvalid);
  wrong = show;
  wrong.mutable_stamp()->set_generation(2);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketShow, wrong).error().code == Errc::kStale);
  wrong.mutable_stamp()->Clear();
  CHECK(f.call<wire::BucketInfo>(Method::kBucketShow, wrong).error().code == Errc::kInvalid);
  f.restart_after(sim::Death::kProcess);
  CHECK(f.call<wire::BucketInfo>(Method::kBucketShow, show).error().code == Errc::kStale);
  wire::Map map;
  REQUIRE(wire::decode(f.daemon->stale_map()(), map, "map"));
  CHECK(map.groups(0).epoch() == 2);
  wire::ReadRanges read;
  read.mutable_stamp()->set_group(55);
  read.mutable_stamp()->set_epoch(1);
  CHECK(f.exchange(Method::kReadRanges, wire::encode(read), {}).reply.error().code == Errc::kStale);
}

TEST_CASE("daemon: garbage in place of a message is answered, with its name", "[server]") {
  Fixture f;
  for (const auto method : {Method::kPutChunk, Method::kReadRanges, Method::kBegin, Method::kSeal, Method::kOpenRun,
                            Method::kObjectSeal, Method::kStepList}) {
    const auto answered = f.exchange(method, "\xff\xfe\xfd", {});
    REQUIRE_FALSE(answered.reply);
    CHECK(answered.reply.error().code == Errc::kProtocol);
    CHECK(answered.reply.error().message.find(wire::name_of(method)) != std::string::npos);
  }
  CHECK(f.exchange(static_cast<Method>(999), "", {}).reply.error().code == Errc::kInvalid);
}

TEST_CASE("daemon: a record call goes on when its caller goes away", "[server]") {
  // Goal: what follows a transaction is not lost with the connection. Method: destroy the call right after its start.
  RunFixture f;
  const auto launched = *f.open("a");
  const auto owner = *f.begin(launched, 1, 0, {.world_size = 1});
  const auto seal = f.upload(owner, 0, 1);
  {
    rt::Scope caller(f.node);
    auto request = seal;
    *request.mutable_stamp() = f.stamp_of(true, home_group(f.bucket, f.run_name));
    struct Call final : rpc::ServerCall {
      explicit Call(std::string r) : bytes(std::move(r)) {}
      Method method() const override { return Method::kSeal; }
      const std::string& request() const override { return bytes; }
      const std::string& client() const override { return bytes; }
      std::uint64_t connection() const override { return 0; }
      std::weak_ptr<const void> connection_open() const override { return {}; }
      Task<Data> next_data() override { co_return fail(Errc::kUnavailable, "none"); }
      Task<void> send_data(std::string, std::vector<Buffer>) override { co_return {}; }
      std::string bytes;
    };
    struct Run {
      static Task<void> it(Task<std::string> task) {
        (void)co_await std::move(task);
        co_return {};
      }
    };
    caller.spawn(Run::it(f.daemon->handler()(std::make_shared<Call>(wire::encode(request)))));
    caller.cancel();
  }
  CHECK(f.final_status(owner).state() == wire::AttemptStatusReply::COMMITTED);
}

TEST_CASE("daemon: metrics describe each name once", "[server]") {
  Fixture f;
  const auto text = f.daemon->metrics({});
  CHECK(text.find("\ncairn_chunk_store_live_bytes ") != std::string::npos);
  CHECK(text.find("\ncairn_chunk_store_orphaned_bytes 0\n") != std::string::npos);
  std::size_t helps = 0, types = 0, values = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto end = text.find('\n', at);
    const auto line = text.substr(at, end - at);
    at = end + 1;
    if (line.starts_with("# HELP "))
      ++helps;
    else if (line.starts_with("# TYPE "))
      ++types;
    else
      ++values;
  }
  CHECK(helps == values);
  CHECK(types == values);
}
