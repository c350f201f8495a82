#include "storage/chunk_store/chunk_store.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

#include "proto/common/checksum.h"
#include "storage/chunk_store/layout.h"
#include "storage/index/fields.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

std::string any_machine() {
  static const auto kinds = machine_kinds();
  return GENERATE(from_range(kinds));
}

/// Names of segment files, as the disk lists them.
std::vector<std::string> segments(Engine& e) {
  auto names = e.run(e.target().disk().list());
  REQUIRE(names);
  std::erase_if(*names, [](auto& name) { return !name.starts_with(kSegmentPrefix); });
  return *names;
}

Location location_of(Engine& e, const ChunkId& id) {
  const auto key = id.key();
  auto value = e.run(e.target().index().get(Table::kChunks, {key.data(), key.size()}));
  REQUIRE(value);
  REQUIRE(*value);
  return *decode_location(**value);
}

Task<void> first_piece_only(ChunkStore& store, rt::UnitPool& units, ChunkId id, std::string bytes,
                            std::unique_ptr<ChunkStore::Upload>& out) {
  CO_TRY(out, co_await store.start(id, static_cast<std::uint32_t>(bytes.size()), crcs_of(id, bytes)));
  CO_TRY(auto memory, co_await piece_of(units, bytes, 0));
  const auto size = static_cast<std::uint32_t>(std::min(bytes.size(), units.unit_bytes()));
  co_return co_await out->write(0, std::move(memory), size);
}

}  // namespace

TEST_CASE("chunk_store: what was put is read back, also by the next process", "[storage]") {
  Engine e(any_machine());
  e.open();
  const std::vector<std::size_t> sizes = {
      1, 4095, 4096, 4097, 65535, 65536, 65537, kTestUnitBytes, 300000, 999999, kTestUnitBytes + 1, 3 * kTestUnitBytes};
  for (std::size_t i = 0; i < sizes.size(); ++i)
    REQUIRE(e.put(chunk(static_cast<std::uint32_t>(i)), pattern(i, sizes[i])));
  for (int start = 0; start < 2; ++start) {
    for (std::size_t i = 0; i < sizes.size(); ++i)
      CHECK(e.holds(chunk(static_cast<std::uint32_t>(i)), pattern(i, sizes[i])));
    CHECK(e.chunks().stats().chunks == sizes.size());
    CHECK(e.list().size() == sizes.size());
    e.reopen();
  }
  CHECK(code_of(e.get(chunk(99))) == Errc::kNotFound);
}

TEST_CASE("chunk_store: a read returns exactly the range, and refuses ranges that are not of the chunk", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(5, 300'000);
  REQUIRE(e.put(chunk(0), bytes));
  auto range = [&](std::uint32_t offset, std::uint32_t size) { return e.run(e.chunks().read(chunk(0), offset, size)); };
  for (auto [offset, size] : {std::pair{0u, 1u}, {65535u, 2u}, {131072u, 131072u}, {262144u, 37856u}, {299'999u, 1u}}) {
    auto read = range(offset, size);
    REQUIRE(read);
    CHECK(read->bytes.text() == std::string_view(bytes).substr(offset, size));
    CHECK(read->crc_of(0, size) == crc32c(read->bytes.bytes()));
  }
  CHECK(code_of(range(0, 0)) == Errc::kInvalid);
  CHECK(code_of(range(300'000, 1)) == Errc::kInvalid);
  CHECK(code_of(range(299'999, 2)) == Errc::kInvalid);
  CHECK(code_of(range(0, 0xffffffff)) == Errc::kInvalid);
  CHECK(code_of(range(kTestUnitBytes - 1, 2)) == Errc::kInvalid);  // spans two pieces
}

TEST_CASE("chunk_store: an id stands for one content for ever", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(1, 200'000);
  REQUIRE(e.put(chunk(0), bytes));
  const auto written = e.chunks().stats().bytes_written;
  CHECK(e.put(chunk(0), bytes));  // the same again: nothing to do
  CHECK(e.chunks().stats().bytes_written == written);
  CHECK(code_of(e.put(chunk(0), pattern(2, 200'000))) == Errc::kConflict);
  CHECK(code_of(e.put(chunk(0), pattern(1, 200'001))) == Errc::kConflict);
  CHECK(e.holds(chunk(0), bytes));
}

TEST_CASE("chunk_store: two uploads of one id at once end as one chunk", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(1, 200'000);
  auto& store = e.chunks();
  std::vector<Result<void>> outcomes;
  rt::Scope scope(e.loop());
  auto note = [&](Result<void> result) { outcomes.push_back(std::move(result)); };
  scope.spawn(put_chunk(e.loop(), store, e.units(), chunk(0), bytes), note);
  scope.spawn(put_chunk(e.loop(), store, e.units(), chunk(0), bytes), note);
  scope.spawn(put_chunk(e.loop(), store, e.units(), chunk(0), pattern(2, 200'000)), note);
  REQUIRE(e.eventually([&] { return outcomes.size() == 3; }));
  CHECK(std::ranges::count_if(outcomes, [](auto& o) { return o.has_value(); }) == 2);
  CHECK(store.stats().chunks == 1);
  CHECK(store.stats().live_bytes == round_up(bytes.size(), kSectorBytes));
  CHECK(e.holds(chunk(0), bytes));
}

TEST_CASE("chunk_store: bytes that do not match their CRC are refused on arrival, and may be sent again", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(1, 200'000);
  auto upload = e.run(e.chunks().start(chunk(0), 200'000, crcs_of(chunk(0), bytes)));
  REQUIRE(upload);
  auto damaged = bytes;
  damaged[70'000] ^= 1;
  CHECK(code_of(e.run(write_pieces(**upload, e.units(), damaged))) == Errc::kDataLoss);
  CHECK(code_of(e.run((*upload)->finish())) == Errc::kInvalid);  // nothing is complete
  CHECK(e.run(write_pieces(**upload, e.units(), bytes)));
  CHECK(code_of(e.run(write_pieces(**upload, e.units(), bytes))) == Errc::kInvalid);  // written twice
  CHECK(e.run((*upload)->finish()));
  CHECK(code_of(e.run((*upload)->finish())) == Errc::kInvalid);
  CHECK(e.holds(chunk(0), bytes));
}

TEST_CASE("chunk_store: sizes and pieces out of bounds are refused", "[storage]") {
  Engine e("sim");
  e.open();
  auto start = [&](std::uint32_t length, std::size_t blocks) {
    return e.run(e.chunks().start(chunk(0), length, std::vector<std::uint32_t>(blocks)));
  };
  CHECK(code_of(start(0, 0)) == Errc::kInvalid);
  CHECK(code_of(start(kChunkBytesMax + 1, 1025)) == Errc::kInvalid);
  CHECK(code_of(start(0xffffffff, 65536)) == Errc::kInvalid);
  CHECK(code_of(start(65537, 1)) == Errc::kInvalid);
  const auto bytes = pattern(1, 200'000);
  auto upload = e.run(e.chunks().start(chunk(0), 200'000, crcs_of(chunk(0), bytes)));
  REQUIRE(upload);
  auto write = [&](std::uint32_t offset, std::uint32_t size) {
    return e.run((*upload)->write(offset, *e.run(e.units().acquire()), size));
  };
  CHECK(code_of(write(4096, 4096)) == Errc::kInvalid);
  CHECK(code_of(write(0, 4096)) == Errc::kInvalid);  // shorter, and not the last
  CHECK(code_of(write(kTestUnitBytes, kTestUnitBytes)) == Errc::kInvalid);
  CHECK(code_of(write(2 * kTestUnitBytes, 1)) == Errc::kInvalid);
  CHECK(code_of(write(0xfffe0000, 131072)) == Errc::kInvalid);
}

TEST_CASE("chunk_store: an upload that is dropped leaves nothing and its space comes back", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(1, 1'000'000);
  std::unique_ptr<ChunkStore::Upload> upload;
  REQUIRE(e.run(first_piece_only(e.chunks(), e.units(), chunk(0), bytes, upload)));
  CHECK(e.chunks().stats().uploading_bytes == round_up(bytes.size(), kSectorBytes));
  upload.reset();
  CHECK(e.chunks().stats().uploading_bytes == 0);
  CHECK(e.list().empty());
  REQUIRE(e.put(chunk(0), bytes));  // the id is free again
  CHECK(e.holds(chunk(0), bytes));
  CHECK(e.chunks().stats().live_bytes == round_up(bytes.size(), kSectorBytes));
}

TEST_CASE("chunk_store: a dropped upload is punched only after its writes in flight have landed", "[storage]") {
  Engine e("sim");
  e.open();
  auto& image = e.sim().image;
  const auto bytes = pattern(1, kTestUnitBytes);
  REQUIRE(e.put(chunk(9), bytes));  // so that the segment exists and stays
  const auto used = image.used_bytes();
  image.faults.slow = 1;
  {
    auto upload = e.run(e.chunks().start(chunk(0), kTestUnitBytes, crcs_of(chunk(0), bytes)));
    REQUIRE(upload);
    const auto writes = image.counts.writes;
    rt::Scope scope(e.loop());
    scope.spawn(write_pieces(**upload, e.units(), bytes));
    REQUIRE(e.eventually([&] { return image.counts.writes > writes; }));
    REQUIRE(scope.running() == 1);
    scope.cancel();  // the caller is gone, the kernel still writes
  }
  image.faults.slow = 0;
  e.sim().world.run_for(std::chrono::seconds(5));
  // Punched after the write: the segment is smaller than it was preallocated by exactly this extent.
  CHECK(image.used_bytes() == used - kTestUnitBytes);
}

TEST_CASE("chunk_store: removed chunks are gone, also for the next process, and their space comes back", "[storage]") {
  Engine e(any_machine());
  e.open();
  for (std::uint32_t i = 0; i < 10; ++i) REQUIRE(e.put(chunk(i), pattern(i, 100'000)));
  REQUIRE(e.remove({chunk(1), chunk(3), chunk(77), chunk(3)}));
  for (int start = 0; start < 2; ++start) {
    CHECK(code_of(e.get(chunk(1))) == Errc::kNotFound);
    CHECK(code_of(e.get(chunk(3))) == Errc::kNotFound);
    CHECK(e.holds(chunk(2), pattern(2, 100'000)));
    CHECK(e.chunks().stats().chunks == 8);
    CHECK(e.chunks().stats().live_bytes == 8 * round_up(100'000, kSectorBytes));
    e.reopen();
  }
  REQUIRE(e.put(chunk(3), pattern(33, 50'000)));  // the id may live again
  CHECK(e.holds(chunk(3), pattern(33, 50'000)));
}

TEST_CASE("chunk_store: segments that hold nothing any more are unlinked", "[storage]") {
  Engine e(any_machine());
  e.open();
  std::vector<ChunkId> ids;
  for (std::uint32_t i = 0; i < 12; ++i) {
    ids.push_back(chunk(i));
    REQUIRE(e.put(chunk(i), pattern(i, 1'000'000)));
  }
  CHECK(segments(e).size() >= 3);  // of 4 MiB each
  const auto full = e.run(e.target().disk().space())->free_bytes;
  SECTION("while open") {
    REQUIRE(e.remove(ids));
    // One may be left that was made ahead of need.
    CHECK(e.eventually([&] { return e.chunks().stats().segments <= 1; }));
    CHECK(e.eventually([&] { return segments(e).size() <= 1; }));
  }
  SECTION("at the next open, after a process that had no time for it") {
    REQUIRE(e.remove(ids));
    e.reopen();
    CHECK(e.eventually([&] { return segments(e).empty(); }));
  }
  if (dynamic_cast<SimMachine*>(&e.machine()) != nullptr)
    CHECK(e.run(e.target().disk().space())->free_bytes >= full + 8'000'000);
}

TEST_CASE("chunk_store: the unused rest of a segment is given back when the next one begins", "[storage]") {
  Engine e("sim");
  e.open();
  const auto empty = e.sim().image.used_bytes();
  const std::uint64_t size = 1'000'000, padded = round_up(size, kSectorBytes);
  for (std::uint32_t i = 0; i < 8; ++i) REQUIRE(e.put(chunk(i), pattern(i, size)));  // four fit a segment of 4 MiB
  REQUIRE(e.put(chunk(8), "x"));                                                     // into the rest of the second
  REQUIRE(e.put(chunk(9), pattern(9, size)));
  e.sim().world.run_for(std::chrono::seconds(1));
  CHECK(e.sim().image.used_bytes() == empty + 8 * padded + kSectorBytes + 4 * kMiB);
}

TEST_CASE("chunk_store: behind a chunk's last byte lie zeros, not what the memory held before", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 5000)));
  const auto location = location_of(e, chunk(0));
  const auto bytes = e.sim().image.contents(segment_name(location.segment));
  REQUIRE(bytes);
  CHECK(bytes->substr(location.offset(), 5000) == pattern(0, 5000));
  CHECK(bytes->substr(location.offset() + 5000, 8192 - 5000) == std::string(8192 - 5000, '\0'));
}

TEST_CASE("chunk_store: a reader keeps its extent from being punched", "[storage]") {
  // Goal: a read that has begun returns the chunk's bytes, or NOT_FOUND, never zeros. Method: reads and a removal in
  // every order that eighty seeds give, with slow reads.
  for (std::uint64_t seed = 0; seed < 80; ++seed) {
    Engine e(std::make_unique<SimMachine>(seed));
    e.open();
    const auto bytes = pattern(seed, 65536);
    REQUIRE(e.put(chunk(0), bytes));
    REQUIRE(e.put(chunk(1), bytes));
    auto& faults = e.sim().image.faults;
    faults.slow = 0.5;
    faults.slow_by = std::chrono::milliseconds(2);
    std::size_t ended = 0;
    rt::Scope scope(e.loop());
    struct Reader {
      static Task<void> run(ChunkStore& store, std::string expected, std::size_t& ended) {
        for (int i = 0; i < 3; ++i) {
          auto read = co_await store.read(chunk(0), 0, 65536);
          if (read)
            CHECK(read->bytes.text() == expected);
          else
            CHECK(read.error().code == Errc::kNotFound);
        }
        ++ended;
        co_return {};
      }
    };
    for (int i = 0; i < 4; ++i) scope.spawn(Reader::run(e.chunks(), bytes, ended));
    scope.spawn(e.chunks().remove({chunk(0)}), [&](Result<void> removed) {
      CHECK(removed);
      ++ended;
    });
    REQUIRE(e.eventually([&] { return ended == 5; }));
    CHECK(code_of(e.get(chunk(0))) == Errc::kNotFound);
    e.close();
    // The space did come back.
    e.open();
    e.sim().world.run_for(std::chrono::seconds(1));
    CHECK(e.chunks().stats().live_bytes == 65536);
  }
}

TEST_CASE("chunk_store: a flipped bit is reported with chunk, block, segment and offset, never returned", "[storage]") {
  PlantedBugs bugs;
  const bool planted = GENERATE(false, true);
  bugs.no_read_check = planted;
  Engine e(std::make_unique<SimMachine>(), Engine::small(bugs));
  e.open();
  const auto bytes = pattern(1, 200'000);
  REQUIRE(e.put(chunk(0), pattern(0, 10'000)));
  REQUIRE(e.put(chunk(1), bytes));
  const auto location = location_of(e, chunk(1));
  const auto name = segment_name(location.segment);
  REQUIRE(e.sim().image.flip(name, location.offset() + 70'000, 3));
  auto read = e.run(e.chunks().read(chunk(1), 65536, 65536));
  if (planted) {  // this check is what finds the planted bug
    REQUIRE(read);
    CHECK(read->bytes.text() != std::string_view(bytes).substr(65536, 65536));
    return;
  }
  REQUIRE(code_of(read) == Errc::kDataLoss);
  for (const auto& part : {chunk(1).text(), std::string("block 1"), name, std::to_string(location.offset() + 65536)})
    CHECK_THAT(read.error().message, Catch::Contains(part));
  CHECK(e.chunks().stats().blocks_bad == 1);
  CHECK(e.run(e.chunks().read(chunk(1), 0, 65536)));  // the other blocks are as good as ever
  CHECK(e.holds(chunk(0), pattern(0, 10'000)));
}

TEST_CASE("chunk_store: every flipped byte of a small chunk is seen", "[storage]") {
  Engine e("sim");
  e.open();
  const auto bytes = pattern(1, 2000);
  REQUIRE(e.put(chunk(0), bytes));
  const auto location = location_of(e, chunk(0));
  for (std::uint64_t at = 0; at < bytes.size(); ++at) {
    const unsigned bit = at % 8;
    REQUIRE(e.sim().image.flip(segment_name(location.segment), location.offset() + at, bit));
    CHECK(code_of(e.run(e.chunks().read(chunk(0), 0, 2000))) == Errc::kDataLoss);
    REQUIRE(e.sim().image.flip(segment_name(location.segment), location.offset() + at, bit));
  }
  CHECK(e.holds(chunk(0), bytes));
}

TEST_CASE("chunk_store: bytes and CRCs of another chunk are not taken for this one's", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  REQUIRE(e.put(chunk(1), pattern(1, 65536)));
  // All that the index says of one chunk under the id of the other: consistent in itself, but the CRCs are seeded.
  auto key = [](const ChunkId& id) {
    const auto raw = id.key();
    return std::string(raw.data(), raw.size());
  };
  Batch batch;
  for (auto table : {Table::kChunks, Table::kBlockCrcs}) {
    auto other = e.run(e.target().index().get(table, key(chunk(1))));
    REQUIRE(other);
    batch.put(table, key(chunk(0)), other->value());
  }
  REQUIRE(e.run(e.target().committer().commit(std::move(batch))));
  CHECK(code_of(e.run(e.chunks().read(chunk(0), 0, 65536))) == Errc::kDataLoss);
  CHECK(e.holds(chunk(1), pattern(1, 65536)));
}

TEST_CASE("chunk_store: lists come in key order and in pages", "[storage]") {
  Engine e(any_machine());
  e.open();
  std::vector<ChunkId> all;
  for (std::uint64_t owner : {9, 2, 5})
    for (std::uint32_t i = 0; i < 7; ++i) {
      REQUIRE(e.put(chunk(i, owner), "x"));
      all.push_back(chunk(i, owner));
    }
  std::ranges::sort(all);
  CHECK(e.list() == all);
  std::vector<ChunkId> paged;
  std::optional<ChunkId> after;
  for (;;) {
    auto page = e.run(e.chunks().list(after, 4));
    REQUIRE(page);
    if (page->empty()) break;
    CHECK(page->size() <= 4);
    for (auto& info : *page) {
      CHECK(info.length == 1);
      paged.push_back(info.id);
    }
    after = paged.back();
  }
  CHECK(paged == all);
}

TEST_CASE("chunk_store: chunks larger than a segment get one of their own size", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(1, 6 * kMiB);
  REQUIRE(e.put(chunk(0), bytes));
  REQUIRE(e.put(chunk(1), pattern(2, 1000)));
  CHECK(e.holds(chunk(0), bytes));
  CHECK(e.holds(chunk(1), pattern(2, 1000)));
}

TEST_CASE("chunk_store: a full disk refuses uploads, keeps what it has, and deleting makes room", "[storage]") {
  sim::DiskOptions disk;
  disk.capacity_bytes = 40 * kMiB;
  Engine e(std::make_unique<SimMachine>(1, disk));
  e.open();
  std::uint32_t stored = 0;
  Result<void> last;
  for (; stored < 1000; ++stored)
    if (last = e.put(chunk(stored), pattern(stored, 500'000)); !last) break;
  REQUIRE(code_of(last) == Errc::kNoSpace);
  CHECK(stored > 60);
  CHECK(e.sim().image.free_bytes() >= e.options.chunks.ballast_bytes);
  CHECK_FALSE(e.target().committer().failure());  // no reason to stop
  for (std::uint32_t i = 0; i < stored; ++i) CHECK(e.holds(chunk(i), pattern(i, 500'000)));
  std::vector<ChunkId> half;
  for (std::uint32_t i = 0; i < stored / 2; ++i) half.push_back(chunk(i));
  REQUIRE(e.remove(half));
  e.sim().world.run_for(std::chrono::seconds(2));
  auto again = e.put(chunk(1000), pattern(7, 500'000));
  INFO((again ? "" : again.error().message));
  CHECK(again);
  // Forty times full and empty again leaks nothing.
  const auto used = e.sim().image.used_bytes();
  for (int cycle = 0; cycle < 40; ++cycle) {
    std::vector<ChunkId> ids;
    for (std::uint32_t i = 2000; e.put(chunk(i), pattern(i, 1'500'000)); ++i) ids.push_back(chunk(i));
    REQUIRE(ids.size() > 5);
    REQUIRE(e.remove(ids));
    e.sim().world.run_for(std::chrono::seconds(2));
  }
  CHECK(e.sim().image.used_bytes() <= used + 8 * kMiB);  // the preallocated rest of one or two segments
}

TEST_CASE("chunk_store: at open, what no index entry names is given back", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  std::vector<std::unique_ptr<ChunkStore::Upload>> uploads(3);
  for (std::uint32_t i = 0; i < 3; ++i)
    REQUIRE(e.run(first_piece_only(e.chunks(), e.units(), chunk(i + 1), pattern(i, 500'000), uploads[i])));
  REQUIRE(e.put(chunk(9), pattern(9, 65536)));
  uploads.clear();
  e.crash(sim::Death::kProcess);
  e.open();
  e.sim().world.run_for(std::chrono::seconds(1));
  // Two chunks, superblock and mark.
  CHECK(e.sim().image.used_bytes() == 2 * 65536 + 3 * kSectorBytes);
  CHECK(e.holds(chunk(0), pattern(0, 65536)));
  CHECK(e.holds(chunk(9), pattern(9, 65536)));
}

TEST_CASE("chunk_store: an open punches what was left, and no hole twice", "[storage]") {
  Engine e(any_machine());
  e.open();
  auto* sim = dynamic_cast<SimMachine*>(&e.machine());
  const auto punches = [&] { return sim == nullptr ? 0 : sim->image.counts.punches; };
  const auto allocated = [&] {
    std::uint64_t bytes = 0;
    for (const auto& name : segments(e)) {
      auto file = e.run(e.target().disk().open(name));
      REQUIRE(file);
      bytes += (*file)->allocated();
    }
    return bytes;
  };
  constexpr std::uint32_t kChunks = 600;
  for (std::uint32_t i = 0; i < kChunks; ++i) REQUIRE(e.put(chunk(i), pattern(i, kSectorBytes)));
  std::vector<ChunkId> every_other;
  for (std::uint32_t i = 0; i < kChunks; i += 2) every_other.push_back(chunk(i));
  REQUIRE(e.remove(every_other));
  e.reopen();  // some of the holes, and the rest of the last segment, were left to this process
  const std::uint64_t live = kChunks / 2 * kSectorBytes;
  const auto slack = sim == nullptr ? 64 * kKiB : 0;  // what a file system takes for itself
  REQUIRE(e.eventually([&] { return allocated() <= live + slack; }));
  const auto before = punches();
  for (int start = 0; start < 2; ++start) {
    e.reopen();
    CHECK(e.eventually([&] { return allocated() <= live + slack; }));
    if (sim != nullptr) sim->world.run_for(std::chrono::seconds(1));
    CHECK(punches() == before);
    CHECK(e.holds(chunk(1), pattern(1, kSectorBytes)));
  }
  REQUIRE(e.remove({chunk(1)}));
  e.reopen();
  CHECK(e.eventually([&] { return allocated() <= live - kSectorBytes + slack; }));
}

TEST_CASE("chunk_store: a write that outlives its process meets no chunk of the next one", "[storage]") {
  const bool planted = GENERATE(false, true);
  PlantedBugs bugs;
  bugs.append_foreign_segment = planted;
  Engine e(std::make_unique<SimMachine>(), Engine::small(bugs));
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  auto& image = e.sim().image;
  image.faults.slow = 1;
  std::unique_ptr<ChunkStore::Upload> upload;
  const auto writes = image.counts.writes;
  e.sim().node.spawn(first_piece_only(e.chunks(), e.units(), chunk(1), pattern(1, 65536), upload));
  REQUIRE(e.sim().world.run_until([&] { return image.counts.writes > writes; },
                                  e.sim().world.now() + std::chrono::hours(1)));
  e.crash(sim::Death::kProcess);  // its write is on the way to the disk
  upload.reset();
  image.faults.slow = 0;
  e.open();
  REQUIRE(e.put(chunk(2), pattern(2, 65536)));
  e.sim().world.run_for(std::chrono::seconds(5));
  CHECK(e.holds(chunk(0), pattern(0, 65536)));
  CHECK(e.holds(chunk(2), pattern(2, 65536)) == !planted);
}

TEST_CASE("chunk_store: index entries that contradict the segments are refused at open", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  REQUIRE(e.put(chunk(1), pattern(1, 65536)));
  auto location = location_of(e, chunk(0));
  std::string expected = segment_name(location.segment);
  std::optional<std::string> damaged;
  SECTION("a segment that is missing") {
    REQUIRE(e.run(e.target().disk().unlink(expected)));
  }
  SECTION("a segment that is too short") {
    location.sector = 1u << 20;
    damaged = encode_location(location);
  }
  SECTION("chunks that overlap") {
    location.sector = location_of(e, chunk(1)).sector;
    damaged = encode_location(location);
  }
  SECTION("an entry of another size") {
    damaged = "short";
    expected = chunk(0).text();
  }
  SECTION("a length out of bounds") {
    location.length = kChunkBytesMax + 1;
    damaged = encode_location(location);
    expected = chunk(0).text();
  }
  SECTION("a segment of a later start") {
    expected = segment_name({.incarnation = 77, .number = 0});
    REQUIRE(e.run(e.target().disk().create(expected, 4 * kMiB)));
  }
  SECTION("a segment with a name that is none") {
    expected = "segment-12";
    REQUIRE(e.run(e.target().disk().create(expected, 4 * kMiB)));
  }
  if (damaged) {
    const auto key = chunk(0).key();
    Batch batch;
    batch.put(Table::kChunks, {key.data(), key.size()}, *damaged);
    REQUIRE(e.run(e.target().committer().commit(std::move(batch))));
  }
  e.close();
  auto opened = e.try_open();
  REQUIRE(code_of(opened) == Errc::kDataLoss);
  CHECK_THAT(opened.error().message, Catch::Contains(expected));
}

TEST_CASE("chunk_store: a write that fails stops the target, a full disk does not", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  e.sim().image.fail_write_in = 1;
  auto failed = e.put(chunk(1), pattern(1, 65536));
  CHECK(code_of(failed) == Errc::kFailed);
  REQUIRE(e.target().committer().failure());
  CHECK(code_of(e.put(chunk(2), pattern(2, 65536))) == Errc::kFailed);
  CHECK(code_of(e.remove({chunk(0)})) == Errc::kFailed);
  CHECK(e.holds(chunk(0), pattern(0, 65536)));  // reading goes on
  e.crash(sim::Death::kProcess);
  e.open();
  CHECK(e.holds(chunk(0), pattern(0, 65536)));
  CHECK(e.put(chunk(1), pattern(1, 65536)));
}

TEST_CASE("chunk_store: a read error is an error of that read only", "[storage]") {
  Engine e("sim");
  e.open();
  REQUIRE(e.put(chunk(0), pattern(0, 65536)));
  e.sim().image.fail_read_in = 1;
  CHECK(code_of(e.run(e.chunks().read(chunk(0), 0, 100))) == Errc::kDataLoss);
  CHECK(e.holds(chunk(0), pattern(0, 65536)));
}

TEST_CASE("chunk_store: an unfinished chunk is not found, listed, read or counted", "[storage]") {
  Engine e("sim");
  e.open();
  const auto bytes = pattern(0, 65536);
  // While the commit is under way the index may hold it already: step through every event of it.
  Result<void> done = fail(Errc::kUnknown, "");
  bool ended = false;
  rt::Scope scope(e.loop());
  scope.spawn(put_chunk(e.loop(), e.chunks(), e.units(), chunk(0), bytes), [&](Result<void> result) {
    done = std::move(result);
    ended = true;
  });
  std::size_t seen_early = 0;
  while (!ended) {
    auto found = e.run(e.chunks().find(chunk(0)));
    auto listed = e.list();
    if (ended) break;  // it became visible while we looked
    seen_early += (found && *found ? 1 : 0) + listed.size();
  }
  CHECK(done);
  CHECK(seen_early == 0);
  CHECK(e.list().size() == 1);
}

TEST_CASE("chunk_store: close waits for what is in flight and refuses what comes later", "[storage]") {
  Engine e(any_machine());
  e.open();
  const auto bytes = pattern(0, 1'000'000);
  bool put = false;
  rt::Scope scope(e.loop());
  auto upload = e.run(e.chunks().start(chunk(1), 65536, crcs_of(chunk(1), pattern(1, 65536))));
  REQUIRE(upload);
  REQUIRE(e.run(write_pieces(**upload, e.units(), pattern(1, 65536))));
  scope.spawn((*upload)->finish(), [&](Result<void> result) { put = result.has_value(); });
  REQUIRE(e.run(e.chunks().close()));
  CHECK(e.eventually([&] { return scope.running() == 0; }));
  CHECK(put);
  CHECK(code_of(e.put(chunk(2), bytes)) == Errc::kUnavailable);
  CHECK(code_of(e.run(e.chunks().find(chunk(1)))) == Errc::kUnavailable);
  upload->reset();
  e.close();
  e.open();
  CHECK(e.holds(chunk(1), pattern(1, 65536)));
}
