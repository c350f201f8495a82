#include "proto/rpc/rpc.h"

#include <catch2/catch.hpp>
#include <set>

#include "proto/rpc/hello.h"
#include "tests/proto/rpc_fixture.h"

using namespace cairn;
using namespace cairn::rpc_test;

namespace {

/// Keeps what a background call ended with.
template <class T>
Task<void> keep(Task<T> task, std::optional<Result<T>>& out) {
  out.emplace(co_await std::move(task));
  co_return {};
}

Task<void> echoes(std::shared_ptr<Channel> channel, int from, int count, int& right, rt::TimePoint deadline) {
  for (int i = from; i < from + count; ++i) {
    const auto text = std::to_string(i);
    CO_TRY(const auto reply, co_await channel->call(Method::kMap, text, deadline));
    if (reply == "echo " + text) ++right;
  }
  co_return {};
}

}  // namespace

#define BOTH OverSim, OverSockets

TEMPLATE_TEST_CASE("rpc: a call gets its own reply", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  CHECK(f.channel->agreed().node == "n1");
  CHECK(f.channel->agreed().unit_bytes == kUnitBytes);
  CHECK(f.channel->peer() == f.address());
  CHECK(f.call(Method::kMap, "hi").value() == "echo hi");
  CHECK(f.call(Method::kMap, "").value() == "echo ");
  // The largest message both ways.
  const auto large = pattern(wire::kMessageBytesMax - 5, 3);
  CHECK(f.call(Method::kMap, large).value() == "echo " + large);
  CHECK(f.server->stats().calls_total == 3);
  CHECK(f.server->stats().connections == 1);
}

TEMPLATE_TEST_CASE("rpc: an error keeps its code, the connection goes on", "[rpc]", BOTH) {
  TestType f;
  std::string map;
  auto options = channel_options();
  options.newer_map = [&](std::string m) { map = std::move(m); };
  f.connect(options);
  for (int code = 1; code <= 18; ++code) {
    const auto reply = f.call(Method::kBucketShow, std::to_string(code));
    REQUIRE(!reply);
    CHECK(static_cast<int>(reply.error().code) == code);
    CHECK(reply.error().message == "as you wish");
    CHECK(map.empty() == (code < static_cast<int>(Errc::kStale)));
  }
  CHECK(map == "\x08\x2a");
  // Over a limit: refused before it is sent; or, when it is the reply, told as an error.
  CHECK(f.call(Method::kMap, std::string(wire::kMessageBytesMax + 1, 'x')).error().code == Errc::kInvalid);
  CHECK(f.call(Method::kMap, std::string(wire::kMessageBytesMax, 'x')).error().code == Errc::kFailed);
  CHECK(f.call(static_cast<Method>(777), "").error().code == Errc::kInvalid);
  CHECK(f.call(Method::kMap, "still here").value() == "echo still here");
}

TEMPLATE_TEST_CASE("rpc: more calls at once than the daemon allows wait their turn", "[rpc]", BOTH) {
  auto options = server_options();
  options.calls_max = 7;
  TestType f(options);
  f.connect();
  int right = 0;
  std::vector<Task<void>> tasks;
  for (int i = 0; i < 50; ++i) tasks.push_back(echoes(f.channel, i * 20, 20, right, f.in(60s)));
  REQUIRE(f.run(rt::all(f.runtime().loop, std::move(tasks))));
  CHECK(right == 1000);
  CHECK(f.service.running_max <= 7);
  CHECK(f.server->stats().calls_running == 0);
  CHECK(f.server->stats().protocol_errors == 0);
}

TEMPLATE_TEST_CASE("rpc: an upload larger than credit and pool arrives whole and in order", "[rpc]", BOTH) {
  auto options = server_options();
  options.credit_units = 2;
  TestType f(options, 3);
  f.connect();
  const auto bytes = pattern(40 * kMiB + 777, 1);
  const auto reply = f.upload(bytes, kMiB);
  REQUIRE(reply);
  CHECK(*reply == std::to_string(crc32c(bytes)));
  // Pieces smaller than a unit, and empty uploads.
  CHECK(f.upload(bytes.substr(0, 100'000), 999).value() == std::to_string(crc32c(bytes.substr(0, 100'000))));
  CHECK(f.upload("", 1).value() == "0");
  CHECK(f.pool->available() == 3);
}

TEMPLATE_TEST_CASE("rpc: an early error stops an upload, credit comes back", "[rpc]", BOTH) {
  auto options = server_options();
  options.credit_units = 4;
  TestType f(options, 4);
  f.connect();
  const auto bytes = pattern(64 * kMiB, 1);
  for (int frames : {0, 1, 5}) {
    const auto before = f.channel->bytes_sent();
    const auto reply =
        f.run(f.channel->upload(Method::kObjectBegin, std::to_string(frames), pieces_of(bytes, kMiB), f.in(60s)));
    REQUIRE(!reply);
    CHECK(reply.error().code == Errc::kNoSpace);
    CHECK(f.channel->bytes_sent() - before < 16 * kMiB);
    // All four credits are there again: more than four units pass.
    CHECK(f.upload(bytes.substr(0, 6 * kMiB), kMiB).value() == std::to_string(crc32c(bytes.substr(0, 6 * kMiB))));
  }
  CHECK(f.pool->available() == 4);
  CHECK(f.server->stats().protocol_errors == 0);
  const auto over =
      f.run(f.channel->upload(Method::kPutChunk, "1", pieces_of(bytes.substr(0, kMiB + 1), kMiB + 1), f.in(60s)));
  CHECK(over.error().code == Errc::kInvalid);
}

TEMPLATE_TEST_CASE("rpc: a download lands in whole memory, rows and single bytes alike", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  const auto expected = pattern(9 * 100'000, 5);
  for (const auto [row, gap] : {std::pair<std::size_t, std::size_t>{0, 0}, {70'000, 10}, {1000, 24}, {13, 3}}) {
    MemorySink sink(expected.size(), row, gap);
    const auto reply = f.run(f.channel->download(Method::kReadRanges, "9 100000 5", sink, f.in(60s)));
    REQUIRE(reply);
    CHECK(*reply == "900000");
    CHECK(sink.frames == 9);
    CHECK(sink.verified == 9);
    CHECK(sink.bytes() == expected);
  }
  MemorySink large(3 * wire::kPayloadBytesMax);
  REQUIRE(f.run(f.channel->download(Method::kReadRanges, "3 8388608 6", large, f.in(60s))));
  CHECK(large.bytes() == pattern(3 * wire::kPayloadBytesMax, 6));
  // An error instead of data, and a frame that the daemon may not send.
  MemorySink none(1);
  CHECK(f.run(f.channel->download(Method::kBucketShow, "8", none, f.in(60s))).error().code == Errc::kDataLoss);
  CHECK(f.run(f.channel->download(Method::kReadRanges, "1 8388609 6", none, f.in(60s))).error().code == Errc::kInvalid);
  CHECK(none.frames == 0);
}

TEMPLATE_TEST_CASE("rpc: a sink that refuses ends its call only", "[rpc]", BOTH) {
  struct Refusing final : rpc::Sink {
    bool at_place;
    explicit Refusing(bool p) : at_place(p), memory(100'000) {}
    std::vector<std::byte> memory;
    Result<std::vector<std::span<std::byte>>> place(std::string_view, std::uint32_t) override {
      if (at_place) return fail(Errc::kInvalid, "not wanted");
      return std::vector<std::span<std::byte>>{std::span(memory)};
    }
    Result<void> placed(std::string_view) override { return fail(Errc::kDataLoss, "wrong CRC"); }
  };
  TestType f;
  f.connect();
  for (const bool at_place : {true, false}) {
    Refusing sink(at_place);
    const auto reply = f.run(f.channel->download(Method::kReadRanges, "20 100000 5", sink, f.in(60s)));
    CHECK(reply.error().code == (at_place ? Errc::kInvalid : Errc::kDataLoss));
    CHECK(f.call(Method::kMap, "x").value() == "echo x");
  }
  f.settle();
  CHECK(f.service.running == 0);
}

TEMPLATE_TEST_CASE("rpc: uploads, downloads and small calls share a connection", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  const auto up = pattern(5 * kMiB, 8);
  std::optional<Result<std::string>> uploaded[3];
  for (auto& out : uploaded)
    f.scope->spawn(
        keep(f.channel->upload(Method::kPutChunk, std::to_string(up.size()), pieces_of(up, 300'000), f.in(60s)), out));
  MemorySink sinks[3] = {MemorySink(1'000'000), MemorySink(1'000'000, 5000, 7), MemorySink(1'000'000, 90'000, 1)};
  std::optional<Result<std::string>> downloaded[3];
  for (int i = 0; i < 3; ++i)
    f.scope->spawn(keep(f.channel->download(Method::kReadRanges, "10 100000 4", sinks[i], f.in(60s)), downloaded[i]));
  int right = 0;
  REQUIRE(f.run(echoes(f.channel, 0, 50, right, f.in(60s))));
  REQUIRE(f.run(f.scope->join()));
  for (const auto& out : uploaded) CHECK(out->value() == std::to_string(crc32c(up)));
  for (int i = 0; i < 3; ++i) {
    CHECK(downloaded[i]->value() == "1000000");
    CHECK(sinks[i].bytes() == pattern(1'000'000, 4));
  }
}

TEMPLATE_TEST_CASE("rpc: data never overtakes the request it belongs to", "[rpc]", BOTH) {
  // Method: more requests wait than one batch takes, and the upload's is the last of them.
  TestType f;
  f.connect();
  std::vector<std::optional<Result<std::string>>> calls(150);
  for (auto& out : calls) f.scope->spawn(keep(f.channel->call(Method::kMap, "x", f.in(60s)), out));
  std::optional<Result<std::string>> uploaded;
  f.scope->spawn(keep(f.channel->upload(Method::kPutChunk, "3", pieces_of("abc", 1), f.in(60s)), uploaded));
  REQUIRE(f.run(f.scope->join()));
  CHECK(uploaded->value() == std::to_string(crc32c("abc")));
  CHECK(f.server->stats().protocol_errors == 0);
}

TEMPLATE_TEST_CASE("rpc: a deadline ends the call on both sides", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  const auto reply = f.run(f.channel->call(Method::kHeartbeat, "", f.in(20ms)));
  REQUIRE(!reply);
  CHECK(reply.error().code == Errc::kDeadline);
  CHECK_THAT(reply.error().message, Catch::Contains("heartbeat") && Catch::Contains(f.address()));
  CHECK(f.call(Method::kMap, "x").value() == "echo x");  // its cancel came before
  CHECK(f.service.running == 0);
}

TEMPLATE_TEST_CASE("rpc: nobody listens, or somebody else does", "[rpc]", BOTH) {
  TestType f;
  const auto listener =
      std::move(f.runtime().net.listen(f.address().substr(0, f.address().rfind(':')) == "daemon" ? "client:99"
                                                                                                 : "127.0.0.1:0"))
          .value();
  const auto where = listener->address();
  struct Web {
    static Task<void> serve(rt::Listener& listener) {
      CO_TRY(auto stream, co_await listener.accept());
      std::vector<std::byte> in(1000);
      CO_CHECK_OK(co_await stream->read_some(in));
      const std::string answer = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
      CO_CHECK_OK(co_await stream->write_all({bytes_of(answer)}));
      CO_CHECK_OK(co_await stream->read_some(in));
      co_return {};
    }
  };
  rt::Scope scope(f.runtime().loop);
  scope.spawn(Web::serve(*listener));
  const auto web = f.run(Channel::connect(f.runtime(), where, channel_options(), f.in(60s)));
  REQUIRE(!web);
  CHECK(web.error().code == Errc::kProtocol);
  CHECK_THAT(web.error().message, Catch::Contains(where) && Catch::Contains("not a Cairn daemon"));
  listener->close();
  const auto nobody = f.run(Channel::connect(f.runtime(), where, channel_options(), f.in(60s)));
  CHECK(nobody.error().code == Errc::kUnavailable);
}

TEMPLATE_TEST_CASE("rpc: another cluster is refused by name", "[rpc]", BOTH) {
  TestType f;
  auto options = channel_options();
  options.cluster = std::string(16, 'x');
  const auto refused = f.run(Channel::connect(f.runtime(), f.address(), options, f.in(60s)));
  REQUIRE(!refused);
  CHECK(refused.error().code == Errc::kInvalid);
  CHECK_THAT(refused.error().message, Catch::Contains("6363") && Catch::Contains("7878"));
  options.cluster = std::string(16, 'c');
  CHECK(f.run(Channel::connect(f.runtime(), f.address(), options, f.in(60s))));
}

TEMPLATE_TEST_CASE("rpc: closing the server lets calls end, then all is gone", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  const auto bytes = pattern(3 * kMiB, 2);
  std::optional<Result<std::string>> upload;
  f.scope->spawn(keep(
      f.channel->upload(Method::kObjectSeal, std::to_string(bytes.size()), pieces_of(bytes, kMiB), f.in(60s)), upload));
  f.settle();
  REQUIRE(f.service.running == 1);
  std::optional<Result<void>> closed;
  f.scope->spawn(keep(f.server->close(f.in(30s)), closed));
  f.settle();
  CHECK(!closed);
  CHECK(f.call(Method::kMap, "late").error().code == Errc::kUnavailable);
  f.service.open_gate();
  REQUIRE(f.run(f.scope->join()));
  CHECK(upload->value() == std::to_string(crc32c(bytes)));
  CHECK(f.server->stats().connections == 0);
  f.settle();
  CHECK_FALSE(f.channel->alive());
  CHECK(f.pool->available() == f.pool->units());
}

TEMPLATE_TEST_CASE("rpc: closing the server does not wait for ever", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  std::optional<Result<std::string>> call;
  f.scope->spawn(keep(f.channel->call(Method::kHeartbeat, "", f.in(60s)), call));
  f.settle();
  REQUIRE(f.service.running == 1);
  REQUIRE(f.run(f.server->close(f.in(10ms))));
  CHECK(f.service.running == 0);
  REQUIRE(f.run(f.scope->join()));
  CHECK(call->error().code == Errc::kUnavailable);
  CHECK_THAT(call->error().message, Catch::Contains(f.address()) && Catch::Contains("connection lost"));
}

TEMPLATE_TEST_CASE("rpc: a server destroyed with calls running drops them all", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  std::optional<Result<std::string>> out[3];
  f.scope->spawn(keep(f.channel->call(Method::kHeartbeat, "", f.in(60s)), out[0]));
  f.scope->spawn(keep(
      f.channel->upload(Method::kObjectSeal, "9000000", pieces_of(pattern(9'000'000, 1), kMiB), f.in(60s)), out[1]));
  f.settle();
  REQUIRE(f.service.running == 2);
  f.server.reset();
  CHECK(f.service.running == 0);
  CHECK(f.pool->available() == f.pool->units());
  REQUIRE(f.run(f.scope->join()));
  CHECK(out[0]->error().code == Errc::kUnavailable);
  CHECK(out[1]->error().code == Errc::kUnavailable);
  CHECK_FALSE(f.channel->alive());
  // A dead channel answers at once.
  CHECK(f.call(Method::kMap, "x").error().code == Errc::kUnavailable);
}

TEMPLATE_TEST_CASE("rpc: a channel closed here ends its calls", "[rpc]", BOTH) {
  TestType f;
  f.connect();
  std::optional<Result<std::string>> out;
  f.scope->spawn(keep(f.channel->call(Method::kHeartbeat, "", f.in(60s)), out));
  f.settle();
  f.channel->close();
  REQUIRE(f.run(f.scope->join()));
  CHECK(out->error().code == Errc::kUnavailable);
  f.settle();
  CHECK(f.service.running == 0);
  CHECK(f.server->stats().connections == 0);
}
