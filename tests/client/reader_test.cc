#include "client/core/reader.h"

#include <algorithm>

#include "storage/chunk_store/layout.h"
#include "tests/client/session_fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

/// What changes on the way: a bit of the byte `at` of an answer's data, in the next `answers` of them.
struct Flips {
  std::uint64_t at = 0;
  int answers = 0;
};

/// A call that comes from the network.
class Flipping final : public rpc::ServerCall {
 public:
  Flipping(std::shared_ptr<rpc::ServerCall> call, Flips& flips) : call_(std::move(call)), flips_(flips) {}
  Method method() const override { return call_->method(); }
  const std::string& request() const override { return call_->request(); }
  const std::string& client() const override { return call_->client(); }
  std::uint64_t connection() const override { return call_->connection(); }
  std::weak_ptr<const void> connection_open() const override { return call_->connection_open(); }
  Task<Data> next_data() override { return call_->next_data(); }
  Task<void> send_data(std::string message, std::vector<Buffer> payload) override {
    for (auto& piece : payload) {
      if (flips_.answers > 0 && flips_.at >= sent_ && flips_.at < sent_ + piece.size()) {
        std::string changed(piece.text());
        changed[flips_.at - sent_] ^= 1;
        piece = Buffer::from(std::move(changed));
        --flips_.answers;
      }
      sent_ += piece.size();
    }
    return call_->send_data(std::move(message), std::move(payload));
  }

 private:
  std::shared_ptr<rpc::ServerCall> call_;
  Flips& flips_;
  std::uint64_t sent_ = 0;  // in all frames
};

/// A chunk to read.
struct ReaderFixture : SessionFixture {
  explicit ReaderFixture(std::size_t directories = 1)
      : SessionFixture([this](auto call) { return std::make_shared<Flipping>(std::move(call), flips); }, directories) {
    id = {.owner = *begin_object("b", "k"), .writer = 5, .index = 0};
    bytes = pattern(1, 3 * kTestUnitBytes + kBlockBytes + 50'000);  // the last block is short
    REQUIRE(put(id, bytes));
  }
  /// "right", "wrong", or the error.
  std::string read(std::uint32_t offset, std::uint32_t size) {
    std::string out(size, '\0');
    const auto got = world.run(client, client::read_extents(session, {{data_group, id, offset, size}},
                                                            std::as_writable_bytes(std::span(out)), 20s));
    if (!got) return std::string(name_of(got.error().code)) + ": " + got.error().message;
    return out == bytes.substr(offset, size) ? "right" : "wrong";
  }

  storage::ChunkStore& chunks(std::size_t directory) { return targets->all()[directory].target->chunks(); }
  void flip(std::size_t directory, std::uint32_t at) {
    const auto location = *storage::decode_location((*run(chunks(directory).entry(id)))->place);
    REQUIRE(disks[directory]->flip(storage::segment_name(location.segment), location.offset() + at, 3));
  }

  ChunkId id;
  std::string bytes;
  Flips flips;
};

}  // namespace

TEST_CASE("reader: a byte that changes on the way is asked for again, wherever it is", "[client]") {
  ReaderFixture f;
  const auto all = static_cast<std::uint32_t>(f.bytes.size());
  CHECK(f.read(0, all) == "right");
  for (const std::uint64_t at : {std::uint64_t{0}, kBlockBytes - 1, kBlockBytes, 2 * kTestUnitBytes + 5, all - 1ul}) {
    f.flips = {at, 1};
    CHECK(f.read(0, all) == "right");
    CHECK(f.flips.answers == 0);
    f.flips = {at, 2};  // once more, and it is told
    CHECK_THAT(f.read(0, all), Catch::Contains("bytes are not as they were stored"));
    CHECK(f.flips.answers == 0);
  }
  f.flips = {50, 2};  // of parts of blocks, copied together
  CHECK_THAT(f.read(kBlockBytes - 100, 200), Catch::Contains("bytes are not as they were stored"));
  CHECK(f.read(0, all) == "right");
}

TEST_CASE("reader: a block that the daemon leaves to the client to verify, and that is damaged, is named", "[client]") {
  // Offsets that are no block's, so that frames of one unit would end within blocks.
  const auto offset = GENERATE(as<std::uint32_t>(), 0, 1, 30'000, kBlockBytes, kTestUnitBytes + 5000);
  const auto cut = GENERATE(as<std::uint32_t>(), 0, 1, 20'000);
  ReaderFixture f;
  const auto size = static_cast<std::uint32_t>(f.bytes.size()) - offset - cut;
  CHECK(f.read(offset, size) == "right");
  std::vector<std::uint32_t> places{static_cast<std::uint32_t>(f.bytes.size()) - 1};
  for (std::uint32_t at = 0; at < f.bytes.size(); at += 13'000) places.push_back(at);
  for (const auto at : places) {
    f.flip(0, at);
    f.wait(2s);  // blocks that readers share are forgotten
    const auto block = at / kBlockBytes;
    const bool touched = (block + 1) * kBlockBytes > offset && block * kBlockBytes < offset + size;
    const auto got = f.read(offset, size);
    if (touched) {
      CHECK_THAT(got, Catch::Contains("block " + std::to_string(block) + " in "));
    } else {
      CHECK(got == "right");
    }
    f.flip(0, at);  // back
  }
  f.wait(2s);
  CHECK(f.read(offset, size) == "right");
}

TEST_CASE("reader: of a block that the daemon leaves to the client the other copy is read, and the bad one repaired",
          "[client]") {
  ReaderFixture f(2);
  const auto all = static_cast<std::uint32_t>(f.bytes.size());
  f.flip(0, kBlockBytes + 5);
  f.flip(1, 5 * kBlockBytes);
  CHECK(f.read(0, all) == "right");
  f.wait(10s);
  CHECK(f.run(f.chunks(0).read(f.id, kBlockBytes, 100)));
}

TEST_CASE("reader: a byte of a whole block that changes in the daemon after its check is data loss", "[client]") {
  // Method: the daemon takes what the disk has changed for good, as if it had been so when it looked.
  ReaderFixture f;
  f.server.reset();
  f.storage_bugs.no_read_check = true;
  f.restart_after(sim::Death::kProcess);
  f.serve();
  const auto all = static_cast<std::uint32_t>(f.bytes.size());
  const auto at = GENERATE_COPY(as<std::uint32_t>(), 0, kBlockBytes + 5, all - 1);
  f.flip(0, at);
  CHECK_THAT(f.read(0, all), Catch::Contains("bytes are not as they were stored"));
}
