#include "proto/wire/frame.h"

#include <array>
#include <catch2/catch.hpp>
#include <string>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "proto/rpc/hello.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

using namespace cairn;
using wire::FrameHeader;
using wire::FrameKind;

namespace {

using Raw = std::array<std::byte, FrameHeader::kBytes>;

/// A header with fields that encode() would not write, its own CRC right.
Raw with_bytes(Raw raw, std::size_t at, std::uint32_t value, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) raw[at + i] = static_cast<std::byte>(value >> (8 * i));
  const auto crc = crc32c(std::span<const std::byte>(raw).first(28));
  for (std::size_t i = 0; i < 4; ++i) raw[28 + i] = static_cast<std::byte>(crc >> (8 * i));
  return raw;
}
bool refused(const Raw& raw) {
  const auto header = FrameHeader::decode(raw);
  return !header && header.error().code == Errc::kProtocol;
}

bool typed(const Error& error) {
  return error.code == Errc::kProtocol || error.code == Errc::kDenied || error.code == Errc::kInvalid;
}

rpc::Agreed daemon_side() {
  return {.node = "n1",
          .cluster = std::string(16, 'c'),
          .credit_units = 8,
          .unit_bytes = 1 << 20,
          .calls_max = 256,
          .unix_socket = "/run/cairn.sock",
          .host = "boot-id"};
}
std::string hello(std::uint32_t min, std::uint32_t max, std::string auth = {}, std::string cluster = {}) {
  wire::Hello h;
  h.set_version_min(min);
  h.set_version_max(max);
  h.set_features(~0ull);
  h.set_client("test[1]");
  h.set_auth(auth);
  h.set_cluster(cluster);
  return wire::encode(h);
}

}  // namespace

TEST_CASE("frame: a header reads back as it was written", "[wire]") {
  const FrameHeader header{.kind = FrameKind::kData,
                           .method = 7,
                           .call_id = 0x1122334455667788,
                           .message_bytes = wire::kDataMessageBytesMax,
                           .payload_bytes = wire::kPayloadBytesMax,
                           .message_crc = 0xdeadbeef};
  const auto back = FrameHeader::decode(header.encode());
  REQUIRE(back);
  CHECK(back->kind == header.kind);
  CHECK(back->method == header.method);
  CHECK(back->call_id == header.call_id);
  CHECK(back->message_bytes == header.message_bytes);
  CHECK(back->payload_bytes == header.payload_bytes);
  CHECK(back->message_crc == header.message_crc);
}

TEST_CASE("frame: the header is the drawn table", "[wire]") {
  // Goal: the layout never changes by accident; another implementation reads these bytes.
  const FrameHeader header{.kind = FrameKind::kRequest, .method = 0x0201, .call_id = 3, .message_bytes = 5};
  const auto raw = header.encode();
  const std::string head(reinterpret_cast<const char*>(raw.data()), 28);
  const char expected[] =
      "CRN1\x03\x00\x01\x02"
      "\x03\x00\x00\x00\x00\x00\x00\x00"
      "\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
  CHECK(head == std::string(expected, 28));
}

TEST_CASE("frame: any flipped bit of a header is refused", "[wire]") {
  const FrameHeader header{.kind = FrameKind::kRequest, .method = 10, .call_id = 99, .message_bytes = 1000};
  const auto raw = header.encode();
  for (std::size_t bit = 0; bit < raw.size() * 8; ++bit) {
    auto flipped = raw;
    flipped[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    INFO("bit " << bit);
    CHECK(refused(flipped));
  }
}

TEST_CASE("frame: sizes over their limits and unknown kinds are refused though the CRC is right", "[wire]") {
  const auto request = FrameHeader{.kind = FrameKind::kRequest}.encode();
  const auto data = FrameHeader{.kind = FrameKind::kData}.encode();
  CHECK(refused(with_bytes(request, 4, 0, 1)));
  CHECK(refused(with_bytes(request, 4, 11, 1)));
  CHECK(refused(with_bytes(request, 5, 1, 1)));  // reserved
  CHECK(refused(with_bytes(request, 16, wire::kMessageBytesMax + 1, 4)));
  CHECK(refused(with_bytes(request, 16, 0xffffffff, 4)));
  CHECK(refused(with_bytes(request, 20, 1, 4)));  // only data has a payload
  CHECK(refused(with_bytes(data, 16, wire::kDataMessageBytesMax + 1, 4)));
  CHECK(refused(with_bytes(data, 20, wire::kPayloadBytesMax + 1, 4)));
  CHECK(refused(with_bytes(data, 20, 0xffffffff, 4)));
  CHECK_FALSE(refused(with_bytes(request, 16, wire::kMessageBytesMax, 4)));
  CHECK_FALSE(refused(with_bytes(data, 20, wire::kPayloadBytesMax, 4)));
}

TEST_CASE("frame: every method has a name of its own", "[wire]") {
  CHECK(wire::name_of(wire::Method::kPutChunk) == "put_chunk");
  CHECK(wire::name_of(wire::Method::kNone) == "none");
  CHECK(wire::name_of(static_cast<wire::Method>(9999)) == "unknown");
}

TEST_CASE("hello: both sides agree on what the daemon offers", "[rpc]") {
  rpc::Channel::Options options;
  options.client_name = "cairn[1234]";
  const auto greeting = rpc::answer_hello(rpc::encode_hello(options), daemon_side());
  REQUIRE(greeting);
  CHECK(greeting->client == "cairn[1234]");
  const auto agreed = rpc::accept_hello_reply(greeting->reply, std::string(16, 'c'));
  REQUIRE(agreed);
  CHECK(agreed->version == wire::kProtocolVersion);
  CHECK(agreed->features == 0);
  CHECK(agreed->node == "n1");
  CHECK(agreed->credit_units == 8);
  CHECK(agreed->unit_bytes == 1 << 20);
  CHECK(agreed->calls_max == 256);
  CHECK(agreed->unix_socket == "/run/cairn.sock");
  CHECK(agreed->host == "boot-id");
}

TEST_CASE("hello: without a common version the error names both sides' versions", "[rpc]") {
  const auto v = wire::kProtocolVersion;
  const auto newer = rpc::answer_hello(hello(v + 2, v + 4), daemon_side());
  REQUIRE(!newer);
  CHECK(newer.error().code == Errc::kProtocol);
  CHECK(newer.error().message == "no common protocol version: the client speaks 3 to 5, this daemon 1");
  CHECK(rpc::answer_hello(hello(0, v - 1), daemon_side()).error().code == Errc::kProtocol);
  CHECK(rpc::answer_hello(hello(v + 1, v), daemon_side()).error().code == Errc::kProtocol);
  CHECK(rpc::answer_hello(hello(0, v + 9), daemon_side()));
}

TEST_CASE("hello: another cluster and unknown authentication are refused", "[rpc]") {
  const auto other = rpc::answer_hello(hello(1, 1, {}, std::string(16, 'x')), daemon_side());
  REQUIRE(!other);
  CHECK(other.error().code == Errc::kInvalid);
  CHECK_THAT(other.error().message, Catch::Contains("6363") && Catch::Contains("7878"));
  CHECK(rpc::answer_hello(hello(1, 1, {}, std::string(16, 'c')), daemon_side()));
  CHECK(rpc::answer_hello(hello(1, 1, "secret"), daemon_side()).error().code == Errc::kDenied);
  const auto reply = rpc::answer_hello(hello(1, 1), daemon_side())->reply;
  CHECK(rpc::accept_hello_reply(reply, std::string(16, 'x')).error().code == Errc::kInvalid);
}

TEST_CASE("hello: replies with terms that cannot be kept are refused", "[rpc]") {
  wire::HelloReply good;
  good.set_version(1);
  good.set_credit_units(1);
  good.set_unit_bytes(4096);
  good.set_calls_max(1);
  CHECK(rpc::accept_hello_reply(wire::encode(good), {}));
  const auto refused_with = [&](auto change) {
    auto bad = good;
    change(bad);
    const auto agreed = rpc::accept_hello_reply(wire::encode(bad), {});
    return !agreed && agreed.error().code == Errc::kProtocol;
  };
  CHECK(refused_with([](auto& r) { r.set_version(2); }));
  CHECK(refused_with([](auto& r) { r.set_version(0); }));
  CHECK(refused_with([](auto& r) { r.set_credit_units(0); }));
  CHECK(refused_with([](auto& r) { r.set_calls_max(0); }));
  CHECK(refused_with([](auto& r) { r.set_unit_bytes(0); }));
  CHECK(refused_with([](auto& r) { r.set_unit_bytes(wire::kPayloadBytesMax + 1); }));
  CHECK(refused_with([](auto& r) { r.set_features(1ull << 40); }));
}

TEST_CASE("hello: any bytes give an answer or a protocol error", "[rpc]") {
  const auto good = hello(1, 1);
  for (std::size_t size = 0; size < good.size(); ++size)
    (void)rpc::answer_hello(std::string_view(good).substr(0, size), daemon_side());
  std::uint64_t state = 7;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes(round % 60, '\0');
    for (auto& c : bytes) c = static_cast<char>((state = state * 6364136223846793005 + 1442695040888963407) >> 56);
    const auto greeting = rpc::answer_hello(bytes, daemon_side());
    if (!greeting) CHECK(typed(greeting.error()));
    const auto agreed = rpc::accept_hello_reply(bytes, {});
    if (!agreed) CHECK(typed(agreed.error()));
    (void)rpc::decode_error(bytes);
  }
}

TEST_CASE("hello: errors keep their code, message and map", "[rpc]") {
  wire::Map map;
  map.set_version(42);
  const auto back = rpc::decode_error(rpc::encode_error({Errc::kStale, "group 3: été"}, wire::encode(map)));
  REQUIRE(back);
  CHECK(back->error.code == Errc::kStale);
  CHECK(back->error.message == "group 3: été");
  CHECK(back->map == wire::encode(map));
  // Not UTF-8 (a name from somebody's disk), far too long, or a code of a later version: still an error that says
  // something.
  CHECK(rpc::decode_error(rpc::encode_error({Errc::kInvalid, "name '\xff\xfe'"}, {}))->error.message ==
        "name '?"
        "?'");
  const auto large = rpc::encode_error({Errc::kFailed, std::string(5 << 20, 'x')}, std::string(5 << 20, 'y'));
  CHECK(large.size() < wire::kMessageBytesMax);
  wire::ErrorReply later;
  later.set_code(999);
  later.set_message("m");
  CHECK(rpc::decode_error(wire::encode(later))->error.code == Errc::kFailed);
}
