#include "client/core/reader.h"

#include "tests/client/session_fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

/// A call that comes from the network and of whose answer one bit changes on the way.
class Flipping final : public rpc::ServerCall {
 public:
  Flipping(std::shared_ptr<rpc::ServerCall> call, std::optional<std::uint64_t>& at) : call_(std::move(call)), at_(at) {}
  Method method() const override { return call_->method(); }
  const std::string& request() const override { return call_->request(); }
  const std::string& client() const override { return call_->client(); }
  std::uint64_t connection() const override { return call_->connection(); }
  std::weak_ptr<const void> connection_open() const override { return call_->connection_open(); }
  Task<Data> next_data() override { return call_->next_data(); }
  Task<void> send_data(std::string message, std::vector<Buffer> payload) override {
    for (auto& piece : payload) {
      if (at_ && *at_ < piece.size()) {
        std::string changed(piece.text());
        changed[*std::exchange(at_, std::nullopt)] ^= 1;
        piece = Buffer::from(std::move(changed));
      } else if (at_) {
        *at_ -= piece.size();
      }
    }
    return call_->send_data(std::move(message), std::move(payload));
  }

 private:
  std::shared_ptr<rpc::ServerCall> call_;
  std::optional<std::uint64_t>& at_;  // counted over all frames
};

/// A chunk to read.
struct ReaderFixture : SessionFixture {
  ReaderFixture() : SessionFixture([this](auto call) { return std::make_shared<Flipping>(std::move(call), flip_at); }) {
    id = {.owner = *begin_object("b", "k"), .writer = 5, .index = 0};
    sim::Prng random(1);
    bytes.resize(3 * kTestUnitBytes + kBlockBytes + 50'000);  // the last block is short
    for (auto& c : bytes) c = static_cast<char>(random.next());
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

  ChunkId id;
  std::string bytes;
  std::optional<std::uint64_t> flip_at;
};

}  // namespace

TEST_CASE("reader: a byte that changes on the way is data loss, wherever it is", "[client]") {
  ReaderFixture f;
  const auto all = static_cast<std::uint32_t>(f.bytes.size());
  CHECK(f.read(0, all) == "right");
  for (const std::uint64_t at : {std::uint64_t{0}, kBlockBytes - 1, kBlockBytes, 2 * kTestUnitBytes + 5, all - 1ul}) {
    f.flip_at = at;
    CHECK_THAT(f.read(0, all), Catch::Contains("bytes changed since the daemon checked them"));
    CHECK_FALSE(f.flip_at);
  }
  f.flip_at = 50;  // of parts of blocks, copied together
  CHECK_THAT(f.read(kBlockBytes - 100, 200), Catch::Contains("bytes changed since the daemon checked them"));
  CHECK(f.read(0, all) == "right");
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
  for (const auto& name : f.disk.names())
    if (name.starts_with("segment")) REQUIRE(f.disk.flip(name, at, 3));
  CHECK_THAT(f.read(0, all), Catch::Contains("bytes changed since the daemon checked them"));
}
