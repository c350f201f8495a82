// Every bit of a tiny store on the simulated disk, one at a time: the right bytes, or damage that is told. The index of
// this machine is the in-memory twin; tests/faults/flips.py flips RocksDB's files.

#include <catch2/catch.hpp>

#include "storage/chunk_store/layout.h"
#include "storage/committer/mark.h"
#include "storage/index/fields.h"
#include "storage/target/superblock.h"
#include "tests/storage/engine.h"

using namespace cairn;
using namespace cairn::storage;

namespace {

struct Store : Engine {
  Store() : Engine("sim") {
    open();
    const std::size_t sizes[] = {100, 5000, kBlockBytes + 10};
    for (std::uint32_t i = 0; i < std::size(sizes); ++i) {
      contents.emplace_back(chunk(i), pattern(i, sizes[i]));
      REQUIRE(put(contents[i].first, contents[i].second));
    }
    Transaction record{.group = 1, .compares = {}, .puts = {{"key", "value"}}, .deletes = {}};
    REQUIRE(run(records().apply(std::move(record))));
    close();
  }
  bool flip(const std::string& file, std::uint64_t byte, unsigned bit) { return sim().image.flip(file, byte, bit); }
  /// Opens and reads all. Whether it was right; damage that was told is no mistake.
  enum class Seen { kRight, kDamage };
  Seen look() {
    if (const auto opened = try_open(); !opened) {
      CHECK(opened.error().code == Errc::kDataLoss);
      crash(sim::Death::kProcess);
      return Seen::kDamage;
    }
    auto seen = Seen::kRight;
    for (const auto& [id, bytes] : contents) seen = std::max(seen, look_at(id, bytes));
    CHECK(list().size() == contents.size());
    const auto record = run(records().get(1, "key"));
    REQUIRE(record);
    CHECK((record->has_value() && (*record)->value == "value"));
    close();
    return seen;
  }
  Seen look_at(const ChunkId& id, const std::string& bytes) {
    const auto got = get(id);
    if (!got) {
      CHECK(got.error().code == Errc::kDataLoss);
      return Seen::kDamage;
    }
    CHECK(*got == bytes);
    return Seen::kRight;
  }
  std::vector<std::pair<ChunkId, std::string>> contents;
};

}  // namespace

TEST_CASE("flips: each bit of each chunk on the disk is damage when it is read, and nobody else's", "[flips]") {
  Store s;
  s.open();
  std::uint64_t flips = 0;
  for (std::size_t i = 0; i < s.contents.size(); ++i) {
    const auto& [id, bytes] = s.contents[i];
    const auto key = id.key();
    const auto stored = s.run(s.target().index().get(Table::kChunks, std::string(key.data(), key.size())));
    REQUIRE((stored && *stored));
    const auto location = *decode_location(**stored);
    const auto file = segment_name(location.segment);
    for (std::uint64_t at = 0; at < location.padded(); ++at) {
      for (unsigned bit = 0; bit < 8; ++bit) {
        REQUIRE(s.flip(file, location.offset() + at, bit));
        const auto seen = s.look_at(id, bytes);
        // What pads the last sector is read and not looked at.
        if (seen != (at < bytes.size() ? Store::Seen::kDamage : Store::Seen::kRight))
          FAIL("byte " << at << " bit " << bit << " of chunk " << i);
        if (bit == 0)
          CHECK(s.look_at(s.contents[(i + 1) % 3].first, s.contents[(i + 1) % 3].second) == Store::Seen::kRight);
        REQUIRE(s.flip(file, location.offset() + at, bit));
        ++flips;
      }
    }
  }
  CHECK(flips > 500'000);
  for (const auto& [id, bytes] : s.contents) CHECK(s.holds(id, bytes));
}

TEST_CASE("flips: each bit of the superblock refuses the target", "[flips]") {
  Store s;
  for (std::uint64_t at = 0; at < Superblock::kBytes; ++at) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      REQUIRE(s.flip("superblock", at, bit));
      if (s.look() != Store::Seen::kDamage) FAIL("byte " << at << " bit " << bit);
      REQUIRE(s.flip("superblock", at, bit));
    }
  }
  CHECK(s.look() == Store::Seen::kRight);
}

TEST_CASE("flips: each bit of the mark leaves its other slot, or refuses the target", "[flips]") {
  Store s;
  std::uint64_t flips = 0;
  for (std::uint64_t at = 0; at < kMarkBytes; ++at) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      // An open writes the file anew.
      REQUIRE(s.flip("mark", at, bit));
      if (s.look() != Store::Seen::kRight) FAIL("byte " << at << " bit " << bit);
      ++flips;
    }
  }
  CHECK(flips == 8 * kMarkBytes);
  // Both slots: nothing says any more how new the index is.
  for (unsigned bit = 0; bit < 8; ++bit) {
    REQUIRE(s.flip("mark", 8, bit));
    REQUIRE(s.flip("mark", kMarkSlotBytes + 8, bit));
    CHECK(s.look() == Store::Seen::kDamage);
    REQUIRE(s.flip("mark", 8, bit));
    REQUIRE(s.flip("mark", kMarkSlotBytes + 8, bit));
  }
  CHECK(s.look() == Store::Seen::kRight);
}
