#include <algorithm>

#include "proto/common/units.h"
#include "storage/format/strided.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

using Ranges = std::vector<std::pair<std::uint32_t, std::uint32_t>>;

/// Chunks of an open object, and what is read of them.
struct ReadsFixture : Fixture {
  explicit ReadsFixture(Daemon::Options o = {}, std::size_t directories = 1) : Fixture(std::move(o), 1, directories) {
    for (const auto& range : daemon->map().groups)
      if (!range.home && range.copies == directories) data_group = range.first;
    REQUIRE(make_bucket("b"));
    owner = *begin_object("b", "k");
  }
  ChunkId store(std::uint32_t index, std::size_t size) {
    const ChunkId id{.owner = owner, .writer = 5, .index = index};
    chunks[index] = pattern(index, size);
    REQUIRE(put(id, chunks[index]));
    return id;
  }
  wire::ReadRanges request() const {
    wire::ReadRanges out;
    *out.mutable_stamp() = stamp_of(false, data_group);
    return out;
  }
  /// Adds to the request, and to what must come.
  void want(wire::ReadRanges& request, std::string& expected, const ChunkId& id, const Ranges& ranges,
            const std::vector<format::Strided>& strided = {}) const {
    auto& to = *request.add_chunks();
    wire::to_wire(id, *to.mutable_id());
    const auto& bytes = chunks.at(id.index);
    for (const auto& [offset, length] : ranges) {
      to.add_offsets(offset);
      to.add_lengths(length);
      expected += bytes.substr(offset, length);
    }
    for (const auto& runs : strided) {
      auto& out = *to.add_strided();
      out.set_offset(static_cast<std::uint32_t>(runs.offset));
      out.set_length(static_cast<std::uint32_t>(runs.length));
      for (const auto& step : runs.steps) {
        out.add_counts(static_cast<std::uint32_t>(step.count));
        out.add_strides(static_cast<std::uint32_t>(step.stride));
      }
      for (format::RunCursor at(runs); !at.done(); at.take(at.left())) expected += bytes.substr(at.at(), at.left());
    }
  }
  Answered read(const wire::ReadRanges& request) { return exchange(Method::kReadRanges, wire::encode(request), {}); }
  /// `rank`'s of `ranks` equal parts of each row of `row` bytes.
  format::Strided columns(const ChunkId& id, std::uint64_t row, std::uint64_t rank, std::uint64_t ranks) const {
    const auto length = row / ranks;
    return {.offset = rank * length,
            .length = length,
            .steps = {{.count = chunks.at(id.index).size() / row, .stride = row}}};
  }
  std::uint64_t read_from_disk() const { return target->chunks().stats().bytes_read; }

  OwnerId owner;
  std::map<std::uint32_t, std::string> chunks;
};

wire::ReadReply reply_of(const Answered& answered) {
  wire::ReadReply reply;
  REQUIRE(answered.reply);
  REQUIRE(wire::decode(*answered.reply, reply, "reply"));
  return reply;
}

}  // namespace

TEST_CASE("strided reads: any runs and ranges come back to the byte", "[server]") {
  Daemon::Options options;
  options.chunks.frame_bytes = GENERATE(0U, 1000U, 70'000U);
  const bool client_verifies = GENERATE(false, true);
  ReadsFixture f(options);
  std::vector<ChunkId> ids;
  for (const auto size : {kTestUnitBytes * 5 + 777, kTestUnitBytes, std::size_t{3000}})
    ids.push_back(f.store(static_cast<std::uint32_t>(ids.size()), size));
  sim::Prng random(1);
  for (int round = 0; round < 60; ++round) {
    auto request = f.request();
    request.set_client_verifies(client_verifies);
    std::string expected;
    for (std::uint64_t n = random.between(1, 4); n > 0; --n) {
      const auto& id = ids[random.below(ids.size())];
      const auto size = f.chunks[id.index].size();
      Ranges ranges;
      for (auto k = random.below(4); k > 0; --k) {
        const auto offset = random.below(size), most = std::min<std::uint64_t>(size - offset, 40'000);
        ranges.emplace_back(offset, random.between(1, most));
      }
      std::vector<format::Strided> strided;
      for (auto k = random.below(3); k > 0; --k) {
        format::Strided runs{.offset = random.below(size / 8), .length = random.between(1, size / 64)};
        auto span = runs.length;
        for (auto steps = random.between(1, 3); steps > 0; --steps) {
          const format::Strided::Step step{.count = random.between(2, 9), .stride = span + random.below(span + 9)};
          if (runs.offset + span + (step.count - 1) * step.stride > size) break;
          runs.steps.insert(runs.steps.begin(), step);
          span += (step.count - 1) * step.stride;
        }
        if (!runs.steps.empty()) strided.push_back(runs);
      }
      f.want(request, expected, id, ranges, strided);
    }
    const auto answered = f.read(request);
    const auto reply = reply_of(answered);
    INFO("round " << round);
    CHECK(reply.bytes() == expected.size());
    REQUIRE(answered.bytes == expected);
    if (round % 10 == 9) f.wait(3s);  // what is held goes
  }
}

TEST_CASE("reads: every frame has the CRC of its bytes, wherever parts, blocks, chunks and frames end", "[server]") {
  Daemon::Options options;
  options.chunks.frame_bytes = GENERATE(0U, 65'536U, 70'000U);
  ReadsFixture f(options);
  constexpr std::uint32_t kBlock = kBlockBytes, kShort = 50'000, kAll = 5 * kBlock + kShort;
  const auto long_one = f.store(0, kAll), short_one = f.store(1, kShort), tiny = f.store(2, 3000);
  const auto right = [&](const std::vector<std::pair<ChunkId, Ranges>>& wanted) {
    auto request = f.request();
    std::string expected;
    for (const auto& [id, ranges] : wanted) f.want(request, expected, id, ranges);
    return f.read(request).bytes == expected;  // it has checked the CRCs
  };
  CHECK(right({{long_one, {{0, 4 * kBlock}}}}));                         // aligned
  CHECK(right({{long_one, {{kBlock, kBlock}, {3 * kBlock, kBlock}}}}));  // in any order of blocks
  CHECK(right({{long_one, {{kBlock + 1, 3 * kBlock}}}}));                // unaligned at both ends
  CHECK(right({{long_one, {{kBlock - 20'000, 2 * kBlock + 20'000}}}}));  // at the beginning
  CHECK(right({{long_one, {{4 * kBlock, kBlock + kShort}}}}));           // a short last block
  CHECK(right({{long_one, {{4 * kBlock, kBlock + kShort - 1}}}}));       // nearly all of it
  CHECK(right({{short_one, {{0, kShort}}}, {long_one, {{0, kAll}}}}));   // blocks that begin inside a frame's 64 KiB
  CHECK(right({{tiny, {{0, 3000}}}, {long_one, {{0, kAll}}}, {short_one, {{0, kShort}}}, {tiny, {{7, 1000}}}}));
  Ranges small;
  for (std::uint32_t at = 0; at + 900 < 2 * kBlock; at += 1000) small.emplace_back(at, 900);
  small.emplace_back(2 * kBlock, 2 * kBlock);
  CHECK(right({{long_one, small}, {long_one, small}}));
}

TEST_CASE("strided reads: readers that together want everything read every block once", "[server]") {
  // Goal: also when there is memory for a part of it only, and when they are not in step. Method: 40 pieces, of which 8
  // are held at a time; each rank first reads as many others as its number says.
  ReadsFixture f;
  constexpr std::uint64_t kRanks = 6, kRow = 6 * 200;
  std::vector<ChunkId> ids;
  for (std::uint32_t i = 0; i < 5; ++i) ids.push_back(f.store(i, 8 * kTestUnitBytes / kRow * kRow));
  const auto other = f.store(9, 8 * kTestUnitBytes);
  const auto before = f.read_from_disk();
  std::vector<std::string> requests, expected(kRanks);
  std::uint64_t others = 0;
  for (std::uint64_t rank = 0; rank < kRanks; ++rank) {
    auto request = f.request();
    if (rank > 0) {
      f.want(request, expected[rank], other, {{0, static_cast<std::uint32_t>(rank * kTestUnitBytes)}});
      others += rank * kTestUnitBytes;
    }
    for (const auto& id : ids) f.want(request, expected[rank], id, {}, {f.columns(id, kRow, rank, kRanks)});
    requests.push_back(wire::encode(request));
  }
  const auto stands = GENERATE(false, true);
  const auto begun = f.world.now();
  const auto answers = f.exchange_all(Method::kReadRanges, requests, stands ? rt::Duration(30s) : rt::Duration());
  std::uint64_t all = 0, told = 0;
  std::string by_rank;
  for (const auto& [_, bytes] : f.chunks) all += round_up(bytes.size(), kSectorBytes);
  all -= 8 * kTestUnitBytes;
  for (std::uint64_t rank = 0; rank < kRanks; ++rank) {
    CHECK(answers[rank].bytes == expected[rank]);
    told += reply_of(answers[rank]).bytes_from_disk();
    by_rank += " " + std::to_string(reply_of(answers[rank]).bytes_from_disk());
  }
  const auto read = f.read_from_disk() - before - others;
  INFO("read by rank:" << by_rank << ", of others' " << others);
  if (!stands) {
    CHECK(read == all);
    CHECK(told - others <= read);
    CHECK(told - others + ids.size() * kSectorBytes >= read);  // padding of the chunks' ends
    return;
  }
  // One that stands still is not waited for long, and reads for itself, again what it lost meanwhile.
  CHECK(told - reply_of(answers[0]).bytes_from_disk() - others <= all);
  for (std::uint64_t rank = 1; rank < kRanks; ++rank) CHECK(answers[rank].at - begun < 20s);
}

TEST_CASE("strided reads: what is held is dropped after a moment, for others' needs, and not asked by a scrub",
          "[server]") {
  ReadsFixture f;
  const auto id = f.store(0, 6 * kTestUnitBytes);
  auto request = f.request();
  std::string expected;
  f.want(request, expected, id, {}, {f.columns(id, 1024, 3, 8)});
  auto before = f.read_from_disk();
  const auto read_bytes = [&] { return f.read_from_disk() - std::exchange(before, f.read_from_disk()); };
  const auto again = [&](const wire::ReadRanges& what) {
    const auto answered = f.read(what);
    CHECK(answered.bytes == expected);
    return read_bytes();
  };
  CHECK(again(request) == 6 * kTestUnitBytes);
  CHECK(again(request) == 0);
  auto fresh = request;
  fresh.set_fresh(true);
  CHECK(again(fresh) == 6 * kTestUnitBytes);
  CHECK(again(request) == 0);
  f.wait(3s);
  CHECK(again(request) == 6 * kTestUnitBytes);

  // Whoever needs memory gets all of it.
  std::vector<rt::MutableBuffer> mine;
  while (auto unit = f.units->try_acquire()) mine.push_back(*std::move(unit));
  CHECK(mine.size() == f.units->units());
  mine.clear();
  CHECK(again(request) == 6 * kTestUnitBytes);
}

TEST_CASE("strided reads: a damaged block is told to all who want it, and to nobody else", "[server]") {
  ReadsFixture f;
  const auto id = f.store(0, 4 * kTestUnitBytes);
  for (const auto& name : f.disk.names())
    if (name.starts_with("segment")) REQUIRE(f.disk.flip(name, 2 * kTestUnitBytes + 5, 3));
  std::vector<std::string> requests, expected(6);
  for (std::uint64_t rank = 0; rank < 6; ++rank) {
    auto request = f.request();
    f.want(request, expected[rank], id, {}, {f.columns(id, 6 * 100, rank, 6)});
    requests.push_back(wire::encode(request));
  }
  for (const auto& answered : f.exchange_all(Method::kReadRanges, requests)) {
    REQUIRE_FALSE(answered.reply);
    CHECK(answered.reply.error().code == Errc::kDataLoss);
    CHECK_THAT(answered.reply.error().message, Catch::Contains(id.text() + " block 4"));
  }
  auto request = f.request();
  std::string beside;
  f.want(request, beside, id, {}, {{.offset = 10, .length = 3, .steps = {{.count = 40, .stride = 6000}}}});
  CHECK(f.read(request).bytes == beside);
  // Absent although its owner lives.
  wire::to_wire(ChunkId{.owner = f.owner, .writer = 5, .index = 7}, *request.mutable_chunks(0)->mutable_id());
  CHECK(f.read(request).reply.error().code == Errc::kDataLoss);
}

TEST_CASE("strided reads: a copy answers for damaged blocks", "[server]") {
  ReadsFixture f({}, 2);
  const auto id = f.store(0, 4 * kTestUnitBytes), next = f.store(1, 4 * kTestUnitBytes);
  // Neighbours are read from different directories first: of one of the two chunks the damaged copy comes first.
  for (const auto& name : f.disk.names())
    if (name.starts_with("segment"))
      for (const auto at : {1, 5}) REQUIRE(f.disk.flip(name, at * kTestUnitBytes + 5, 3));
  std::vector<std::string> requests, expected(6);
  for (std::uint64_t rank = 0; rank < 6; ++rank) {
    auto request = f.request();
    for (const auto& chunk : {id, next})
      f.want(request, expected[rank], chunk, {}, {f.columns(chunk, 6 * 100, rank, 6)});
    requests.push_back(wire::encode(request));
  }
  const auto answers = f.exchange_all(Method::kReadRanges, requests);
  for (std::size_t rank = 0; rank < 6; ++rank) {
    REQUIRE(answers[rank].reply);
    CHECK(answers[rank].bytes == expected[rank]);
  }
  CHECK(f.target->chunks().stats().blocks_bad == 1);
}

TEST_CASE("strided reads: what breaks the rules is refused before anything is read", "[server]") {
  Daemon::Options options;
  options.chunks.read.runs_max = 100;
  ReadsFixture f(options);
  const auto id = f.store(0, 100'000);
  const auto before = f.read_from_disk();
  const auto refused = [&](const format::Strided& runs, int more_counts = 0) {
    auto request = f.request();
    auto& chunk = *request.add_chunks();
    wire::to_wire(id, *chunk.mutable_id());
    auto& strided = *chunk.add_strided();
    strided.set_offset(static_cast<std::uint32_t>(runs.offset));
    strided.set_length(static_cast<std::uint32_t>(runs.length));
    for (const auto& step : runs.steps) {
      strided.add_counts(static_cast<std::uint32_t>(step.count));
      strided.add_strides(static_cast<std::uint32_t>(step.stride));
    }
    for (int i = 0; i < more_counts; ++i) strided.add_counts(2);
    const auto answered = f.read(request);
    UNSCOPED_INFO((answered.reply ? "done" : answered.reply.error().message));
    return !answered.reply && answered.reply.error().code == Errc::kInvalid && answered.frames == 0;
  };
  constexpr std::uint64_t kMost = UINT32_MAX;
  CHECK_FALSE(refused({.offset = 1, .length = 9, .steps = {{.count = 100, .stride = 10}}}));
  const auto read = f.read_from_disk();
  CHECK(read > before);
  CHECK(refused({.offset = 1, .length = 9, .steps = {{.count = 101, .stride = 10}}}));
  CHECK(refused({.offset = 1, .length = 9, .steps = {{.count = 20, .stride = 1000}, {.count = 10, .stride = 10}}}));
  CHECK(refused({.offset = 1, .length = 9}));  // no steps: a range
  CHECK(refused({.offset = 1, .length = 9, .steps = {{.count = 2, .stride = 10}}}, 1));
  CHECK(refused({.offset = 1, .length = 0, .steps = {{.count = 2, .stride = 10}}}));
  CHECK(refused({.offset = 1, .length = 9, .steps = {{.count = 2, .stride = 8}}}));
  CHECK(refused({.offset = kMost, .length = kMost, .steps = {{.count = kMost, .stride = kMost}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 2, .stride = kChunkBytesMax}}}));
  CHECK(refused({.offset = kMost, .length = 1, .steps = {{.count = 2, .stride = 1}}}));
  f.wait(3s);
  CHECK(f.read_from_disk() == read);
  // Inside a chunk of any size, outside of this one.
  CHECK(refused({.offset = 99'000, .length = 1, .steps = {{.count = 2, .stride = 1000}}}));
  CHECK(refused({.offset = 200'000, .length = 1, .steps = {{.count = 2, .stride = 1000}}}));
}
