#include "client/core/chunk_writer.h"

#include "tests/client/session_fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

/// Chunks of 256 KiB, in an arena that holds eight of them.
struct WriterFixture : SessionFixture {
  static constexpr std::uint32_t kChunk = 2 * kTestUnitBytes;
  WriterFixture() {
    owner = *begin_object("b", "k");
    sim::Prng random(1);
    bytes.resize(5 * kChunk + kBlockBytes + 777);
    for (auto& b : bytes) b = static_cast<std::byte>(random.next());
    arena = client::Arena::create(client, 8 * kChunk, kChunk, kTestUnitBytes).value();
  }
  std::unique_ptr<client::ChunkWriter> writer(std::optional<OwnerId> of) {
    client::ChunkWriter::Options options;
    if (of) options.groups = {data_group};
    return std::make_unique<client::ChunkWriter>(session, *arena, of, options);
  }
  std::vector<format::Extent> append(client::ChunkWriter& to, std::span<const std::byte> what) {
    auto done = world.run(client, to.append(what, client::ChunkWriter::Align::kNone));
    REQUIRE(done);
    return std::move(done->extents);
  }
  /// What the daemon has of these, all of its CRCs checked.
  std::vector<std::byte> stored(const std::vector<format::Extent>& extents) {
    std::vector<std::byte> out;
    for (const auto& e : extents)
      for (std::uint32_t at = 0; at < e.length;) {
        const auto from = e.offset + at;
        const auto size = std::min<std::uint32_t>(e.length - at, kTestUnitBytes - from % kTestUnitBytes);
        CHECK(e.group == data_group);
        const auto piece = Fixture::read(e.chunk, from, size);
        REQUIRE(piece);
        const auto part = std::as_bytes(std::span(*piece));
        out.insert(out.end(), part.begin(), part.end());
        at += size;
      }
    return out;
  }

  OwnerId owner;
  std::vector<std::byte> bytes;
  std::unique_ptr<client::Arena> arena;
};

}  // namespace

TEST_CASE("chunk writer: without owner nothing is sent, then all that was copied before and after is right",
          "[client]") {
  WriterFixture f;
  const auto writer = f.writer(std::nullopt);
  const auto half = 2 * WriterFixture::kChunk + 1000;  // in the middle of a chunk
  auto extents = f.append(*writer, std::span(f.bytes).first(half));
  f.wait(5s);
  CHECK_FALSE(f.has({.owner = f.owner, .writer = writer->writer(), .index = 0}));
  writer->start(f.owner, {f.data_group});
  for (auto& extent : f.append(*writer, std::span(f.bytes).subspan(half))) extents.push_back(extent);
  REQUIRE(f.world.run(f.client, writer->drain()));
  writer->place(extents);
  CHECK(f.stored(extents) == f.bytes);
}

TEST_CASE("chunk writer: what is held back is not sent before it is let go", "[client]") {
  WriterFixture f;
  const auto writer = f.writer(f.owner);
  const ChunkId first{.owner = f.owner, .writer = writer->writer(), .index = 0};
  writer->hold();
  const auto extents = f.append(*writer, f.bytes);
  f.wait(5s);
  CHECK_FALSE(f.has(first));
  writer->release();
  REQUIRE(f.world.run(f.client, writer->drain()));
  CHECK(f.stored(extents) == f.bytes);

  // Nor for ever: more than there is memory for goes by itself.
  const auto other = f.writer(f.owner);
  other->hold();
  f.append(*other, f.bytes);
  f.append(*other, f.bytes);
  f.wait(5s);
  CHECK(f.has({.owner = f.owner, .writer = other->writer(), .index = 0}));
}

TEST_CASE("chunk writer: one that is stopped sends nothing and says why", "[client]") {
  WriterFixture f;
  const auto writer = f.writer(std::nullopt);
  f.append(*writer, f.bytes);
  writer->stop({Errc::kFenced, "a newer launch"});
  const auto more = f.world.run(f.client, writer->append(f.bytes, client::ChunkWriter::Align::kNone));
  REQUIRE_FALSE(more);
  CHECK(more.error().code == Errc::kFenced);
  CHECK_FALSE(f.world.run(f.client, writer->drain()));
  // Only the chunk that was being filled still has its memory.
  CHECK(f.arena->free_bytes() >= 7 * std::uint64_t{WriterFixture::kChunk});
}

TEST_CASE("chunk writer: a list of sources arrives byte for byte, held back or not, whenever the owner is known",
          "[client]") {
  enum class Owner { kKnown, kWhileCopying, kAfterwards };
  const auto known = GENERATE(Owner::kKnown, Owner::kWhileCopying, Owner::kAfterwards);
  const bool held = GENERATE(false, true);
  const auto align = GENERATE(client::ChunkWriter::Align::kNone, client::ChunkWriter::Align::kSector);
  INFO("owner " << static_cast<int>(known) << ", held " << held << ", align " << static_cast<int>(align));
  WriterFixture f;
  const auto writer = f.writer(known == Owner::kKnown ? std::optional(f.owner) : std::nullopt);
  if (held) writer->hold();
  // Together seven chunks: an end of a chunk inside a source, at its end, and inside what fills up a sector.
  const std::size_t sizes[] = {
      0, 1,    100,           kBlockBytes, kBlockBytes + 1, WriterFixture::kChunk, 5000, 300000, 2 * 262144 + 3,
      0, 4096, 131072 - 4096, 1,           200000};
  std::vector<client::ChunkWriter::Source> sources;
  std::uint32_t seed = 0;
  for (const auto size : sizes)
    sources.push_back({.bytes = std::span(f.bytes).subspan(seed * 7, size), .align = align, .crc = seed++});
  std::vector<client::ChunkWriter::Appended> done;
  std::vector<Task<void>> both;
  both.push_back([](client::ChunkWriter* to, std::vector<client::ChunkWriter::Source> what,
                    std::vector<client::ChunkWriter::Appended>* out) -> Task<void> {
    CO_TRY(*out, co_await to->append(std::move(what)));
    co_return {};
  }(writer.get(), sources, &done));
  if (known == Owner::kWhileCopying)
    both.push_back([](client::ChunkWriter* of, WriterFixture* fixture) -> Task<void> {
      of->start(fixture->owner, {fixture->data_group});
      co_return {};
    }(writer.get(), &f));
  REQUIRE(f.world.run(f.client, rt::all(f.client, std::move(both))));
  if (known == Owner::kAfterwards) writer->start(f.owner, {f.data_group});
  writer->release();
  REQUIRE(f.world.run(f.client, writer->drain()));
  REQUIRE(done.size() == sources.size());
  for (std::size_t i = 0; i < done.size(); ++i) {
    INFO("source " << i);
    const auto& source = sources[i];
    CHECK(done[i].crc == crc32c(source.bytes, source.crc));
    writer->place(done[i].extents);
    CHECK(std::ranges::equal(f.stored(done[i].extents), source.bytes));
    if (align == client::ChunkWriter::Align::kSector && source.bytes.size() >= kBlockBytes)
      CHECK(done[i].extents.front().offset % kSectorBytes == 0);
  }
  CHECK(f.arena->free_bytes() == f.arena->total_bytes());
}

TEST_CASE("chunk writer: after an append that was given up in the middle of the copy nothing goes on", "[client]") {
  WriterFixture f;
  const auto writer = f.writer(f.owner);
  writer->hold();  // all in one pass, that ends in the middle of a chunk
  {
    auto given_up = writer->append(f.bytes, client::ChunkWriter::Align::kNone);
    CHECK_FALSE(f.world.run(f.client, rt::with_deadline(f.client, f.client.now(), std::move(given_up), "append")));
  }
  const auto more = f.world.run(f.client, writer->append(f.bytes, client::ChunkWriter::Align::kNone));
  REQUIRE_FALSE(more);
  CHECK(more.error().code == Errc::kInvalid);
  CHECK_FALSE(f.world.run(f.client, writer->drain()));
}
