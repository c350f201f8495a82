#include <catch2/catch.hpp>

#include "proto/rpc/hello.h"
#include "tests/proto/rpc_fixture.h"

// Peers that break the rules: bytes sent by hand against the server, and by a false daemon against the channel.

using namespace cairn;
using namespace cairn::rpc_test;

namespace {

/// A log that counts lines and keeps the last.
struct CountingLog final : rt::Log {
  int lines = 0;
  std::string last;
  void write(rt::Level level, std::string_view event, std::initializer_list<rt::Field> fields) override {
    if (level < rt::Level::kInfo) return;
    ++lines;
    last = rt::log_line(level, event, fields);
  }
};

struct Hostile : OverSim {
  explicit Hostile(rpc::Server::Options options = server_options(), std::size_t units = 4)
      : OverSim(options, units, kSmallUnitBytes) {
    // The same server again, with a log that we see.
    server = rpc::Server::create({daemon, daemon.runtime().random, daemon.runtime().net, daemon.runtime().offload, log},
                                 *pool, std::move(options), service.handler(), {});
    server->serve(*daemon.runtime().net.listen("daemon:99"));
  }
  std::unique_ptr<RawPeer> dial() { return std::move(run(RawPeer::dial(runtime(), "daemon:99"))).value(); }
  std::unique_ptr<RawPeer> greeted() {
    auto peer = dial();
    REQUIRE(run(peer->send(RawPeer::frame({.kind = FrameKind::kHello}, rpc::encode_hello(channel_options())))));
    const auto reply = run(peer->receive());
    REQUIRE(reply);
    REQUIRE(reply->header.kind == FrameKind::kHelloReply);
    return peer;
  }
  /// Sends, and expects that the server closes the connection without an answer.
  void closes(RawPeer& peer, std::string bytes) {
    const auto before = server->stats().protocol_errors;
    (void)run(peer.send(std::move(bytes)));
    const auto frames = run(peer.until_end());
    REQUIRE(frames);
    for (const auto& frame : *frames) CHECK(frame.header.kind == FrameKind::kCredit);
    world.run_for(1ms);
    CHECK(server->stats().protocol_errors == before + 1);
  }
  static std::string request(std::uint64_t id, Method method, std::string_view message) {
    return RawPeer::frame({.kind = FrameKind::kRequest, .method = static_cast<std::uint16_t>(method), .call_id = id},
                          message);
  }
  static std::string data(std::uint64_t id, std::string_view message, std::string_view payload) {
    return RawPeer::frame({.kind = FrameKind::kData, .call_id = id}, message, payload);
  }

  CountingLog log;
  ~Hostile() { server.reset(); }
};

}  // namespace

TEST_CASE("rpc server: peers that are not Cairn are closed, with one line of log", "[rpc][sim]") {
  Hostile f;
  std::vector<std::string> openings = {
      "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
      std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11) + pattern(300, 1),  // a TLS client
      pattern(100'000, 7),
      std::string(64, '\0'),
  };
  for (const auto& opening : openings) {
    const auto peer = f.dial();
    f.closes(*peer, opening);
  }
  // Many at once: still about a line a second.
  const auto lines = f.log.lines;
  for (int i = 0; i < 200; ++i) {
    const auto peer = f.dial();
    (void)f.run(peer->send("GET / HTTP/1.1\r\nHost: a.b.c.d\r\n\r\n"));
    (void)f.run(peer->until_end());
  }
  CHECK(f.log.lines - lines <= 2);
  CHECK_THAT(f.log.last, Catch::Contains("rpc_peer_refused") && Catch::Contains("wrong magic"));
  CHECK(f.server->stats().connections == 0);
}

TEST_CASE("rpc server: any flipped bit of any header, and of any message, ends that connection only", "[rpc][sim]") {
  Hostile f;
  const auto other = f.greeted();
  const auto hello = RawPeer::frame({.kind = FrameKind::kHello}, rpc::encode_hello(channel_options()));
  const auto request = f.request(1, Method::kMap, "hello");
  for (std::size_t bit = 0; bit < request.size() * 8; bit += bit < 256 ? 1 : 5) {
    INFO("bit " << bit);
    auto flipped = request;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    const auto peer = f.greeted();
    f.closes(*peer, flipped);
  }
  for (std::size_t bit = 0; bit < 256; ++bit) {
    auto flipped = hello;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    const auto peer = f.dial();
    f.closes(*peer, flipped);
  }
  REQUIRE(f.run(other->send(request)));
  CHECK(f.run(other->receive())->message == "echo hello");
}

TEST_CASE("rpc server: frames against the rules end the connection", "[rpc][sim]") {
  Hostile f;
  const std::string cluster_hello = rpc::encode_hello(channel_options());
  SECTION("before the hello") {
    for (const auto kind :
         {FrameKind::kHelloReply, FrameKind::kRequest, FrameKind::kReply, FrameKind::kError, FrameKind::kData,
          FrameKind::kCredit, FrameKind::kCancel, FrameKind::kPing, FrameKind::kPong}) {
      const auto peer = f.dial();
      f.closes(*peer, RawPeer::frame({.kind = kind, .call_id = 1}));
    }
    const auto peer = f.dial();  // more than a peer may send before it is known
    f.closes(*peer, RawPeer::frame({.kind = FrameKind::kHello}, std::string(wire::kHelloBytesMax + 1, 'x')));
  }
  SECTION("frames that only a daemon sends, and a second hello") {
    for (const auto kind : {FrameKind::kHello, FrameKind::kHelloReply, FrameKind::kReply, FrameKind::kError,
                            FrameKind::kCredit, FrameKind::kPong}) {
      const auto peer = f.greeted();
      f.closes(*peer, RawPeer::frame({.kind = kind, .call_id = 1}, cluster_hello));
    }
  }
  SECTION("calls that do not count up or were never made") {
    f.closes(*f.greeted(), f.request(0, Method::kMap, ""));
    f.closes(*f.greeted(), f.request(5, Method::kHeartbeat, "") + f.request(5, Method::kHeartbeat, ""));
    f.closes(*f.greeted(), f.request(5, Method::kHeartbeat, "") + f.request(4, Method::kHeartbeat, ""));
    f.closes(*f.greeted(), f.data(1, "", "payload"));
    f.closes(*f.greeted(), f.data(0, "", "payload"));
    f.closes(*f.greeted(), f.request(5, Method::kHeartbeat, "") + f.data(6, "", "payload"));
    f.closes(*f.greeted(), RawPeer::frame({.kind = FrameKind::kCancel, .call_id = 1}));
    f.closes(*f.greeted(), RawPeer::frame({.kind = FrameKind::kCancel, .call_id = 0}));
    f.closes(*f.greeted(), RawPeer::frame({.kind = FrameKind::kPing}, "message"));
  }
  SECTION("data without credit, or larger than a unit") {
    std::string flood = f.request(1, Method::kHeartbeat, "");
    for (std::uint32_t i = 0; i <= server_options().credit_units; ++i) flood += f.data(1, "", "x");
    Hostile roomy(server_options(), 64);
    roomy.closes(*roomy.greeted(), flood);
    f.closes(*f.greeted(), f.request(1, Method::kHeartbeat, "") + f.data(1, "", std::string(kSmallUnitBytes + 1, 'x')));
  }
  SECTION("more calls than agreed") {
    std::string flood;
    for (std::uint32_t i = 0; i <= server_options().calls_max; ++i) flood += f.request(i + 1, Method::kHeartbeat, "");
    f.closes(*f.greeted(), flood);
  }
  SECTION("half a frame, then the end") {
    const auto whole = f.request(1, Method::kPutChunk, "5") + f.data(1, "0", "12345");
    for (std::size_t size = 0; size < whole.size(); size += 3) {
      const auto peer = f.greeted();
      REQUIRE(f.run(peer->send(whole.substr(0, size))));
      f.settle();
      peer->stream->close();
    }
  }
  f.settle();
  CHECK(f.service.running == 0);
  CHECK(f.server->stats().connections == 0);
  CHECK(f.pool->available() == f.pool->units());
}

TEST_CASE("rpc server: lengths are refused from the header alone", "[rpc][sim]") {
  // Method: nothing but the header is ever sent, so a server that waited for the bytes would keep the connection.
  Hostile f;
  FrameHeader header{.kind = FrameKind::kData, .call_id = 1};
  for (const auto& [message, payload] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
           {0xffffffff, 0}, {wire::kDataMessageBytesMax + 1, 0}, {0, 0xffffffff}, {0, kSmallUnitBytes + 1}}) {
    header.message_bytes = message;
    header.payload_bytes = payload;
    f.closes(*f.greeted(), f.request(1, Method::kHeartbeat, "") + std::string(text_of(header.encode())));
  }
}

TEST_CASE("rpc server: data for a call that has ended is thrown away and its credit comes back", "[rpc][sim]") {
  Hostile f;
  const auto peer = f.greeted();
  REQUIRE(f.run(peer->send(f.request(1, Method::kObjectBegin, "0"))));
  CHECK(f.run(peer->receive())->header.kind == FrameKind::kError);
  for (int i = 0; i < 40; ++i) {  // far more than credit_units
    REQUIRE(f.run(peer->send(f.data(1, "m", std::string(kSmallUnitBytes, 'x')))));
    const auto credit = f.run(peer->receive());
    REQUIRE(credit);
    CHECK(credit->header.kind == FrameKind::kCredit);
    CHECK(credit->header.method == 1);
  }
  REQUIRE(f.run(peer->send(f.request(2, Method::kMap, "x"))));
  CHECK(f.run(peer->receive())->message == "echo x");
}

TEST_CASE("rpc server: slow peers are given up", "[rpc][sim]") {
  Hostile f;
  const auto gone_within = [&](RawPeer& peer, rt::Duration limit) {
    const auto start = f.world.now();
    REQUIRE(f.run(peer.until_end()));
    return f.world.now() - start <= limit;
  };
  SECTION("no hello") {
    const auto peer = f.dial();
    CHECK(gone_within(*peer, 7s));
  }
  SECTION("a hello in drops") {
    const auto peer = f.dial();
    REQUIRE(f.run(peer->send("CRN1")));
    CHECK(gone_within(*peer, 7s));
  }
  SECTION("a header in drops") {
    const auto peer = f.greeted();
    REQUIRE(f.run(peer->send("C")));
    CHECK(gone_within(*peer, 12s));
  }
  SECTION("a message in drops") {
    const auto peer = f.greeted();
    REQUIRE(f.run(peer->send(f.request(1, Method::kMap, "hello").substr(0, 34))));
    CHECK(gone_within(*peer, 12s));
  }
  SECTION("a payload in drops") {
    const auto peer = f.greeted();
    const auto frames = f.request(1, Method::kPutChunk, "4000") + f.data(1, "0", std::string(4000, 'x'));
    REQUIRE(f.run(peer->send(frames.substr(0, 200))));
    CHECK(gone_within(*peer, 65s));
  }
  SECTION("nothing at all") {
    const auto peer = f.greeted();
    CHECK(gone_within(*peer, 65s));
  }
  SECTION("it takes no replies") {
    // The window is full of a reply that nobody reads; pings go on.
    const auto peer = f.greeted();
    REQUIRE(f.run(peer->send(f.request(1, Method::kMap, std::string(600'000, 'x')))));
    for (int i = 0; i < 14; ++i) {
      f.world.run_for(5s);
      (void)f.run(peer->send(RawPeer::frame({.kind = FrameKind::kPing})));
    }
    f.world.run_for(5s);
  }
  f.settle();
  CHECK(f.server->stats().connections == 0);
  CHECK(f.service.running == 0);
  CHECK(f.pool->available() == f.pool->units());
}

TEST_CASE("rpc server: at the limit of connections those that have not greeted make room", "[rpc][sim]") {
  auto options = server_options();
  options.connections_max = 4;
  Hostile f(options);
  const auto first = f.greeted(), second = f.greeted();
  const auto silent = f.dial(), younger = f.dial();
  f.world.run_for(100ms);
  CHECK(f.server->stats().connections == 4);
  const auto start = f.world.now();
  const auto third = f.greeted();  // in place of `silent`
  CHECK(f.run(silent->until_end()));
  CHECK(f.world.now() - start < 1s);  // not by the handshake's limit
  CHECK(f.server->stats().connections == 4);
  const auto fourth = f.greeted();  // in place of `younger`
  CHECK(f.run(younger->until_end()));
  // All have greeted: the newcomer goes.
  const auto fifth = f.dial();
  CHECK(f.run(fifth->until_end()));
  CHECK(f.server->stats().connections == 4);
  for (const auto* peer : {&first, &second, &third, &fourth}) {
    REQUIRE(f.run((*peer)->send(f.request(1, Method::kMap, "x"))));
    CHECK(f.run((*peer)->receive())->message == "echo x");
  }
}

TEST_CASE("rpc server: too many that have not greeted, and too many of one peer, make room or go", "[rpc][sim]") {
  auto options = server_options();
  SECTION("the oldest of the unknown goes first, whoever has greeted stays") {
    options.connections_unknown = 2;
    Hostile f(options);
    const auto first = f.greeted();
    const auto oldest = f.dial(), younger = f.dial();
    f.world.run_for(100ms);
    CHECK(f.server->stats().connections == 3);
    const auto start = f.world.now();
    const auto newcomer = f.greeted();
    CHECK(f.run(oldest->until_end()));
    CHECK(f.world.now() - start < 1s);
    CHECK(f.server->stats().refused == 1);
    CHECK(f.server->stats().connections == 3);
    REQUIRE(f.run(first->send(f.request(1, Method::kMap, "x"))));
    CHECK(f.run(first->receive())->message == "echo x");
  }
  SECTION("of one peer") {
    options.connections_per_peer = 3;
    Hostile f(options);
    const auto first = f.greeted(), second = f.greeted();
    const auto silent = f.dial();
    const auto third = f.greeted();  // in place of `silent`
    CHECK(f.run(silent->until_end()));
    const auto fourth = f.dial();
    CHECK(f.run(fourth->until_end()));
    CHECK(f.server->stats().connections == 3);
    second->stream->close();
    f.world.run_for(1s);
    const auto fifth = f.greeted();  // its place is free again
    // The limit can change while the server runs.
    auto more = options;
    more.connections_per_peer = 4;
    f.server->set(more);
    const auto sixth = f.greeted();
    CHECK(f.server->stats().connections == 4);
  }
}

TEST_CASE("rpc server: data that was announced must come, unless it waits for the server", "[rpc][sim]") {
  auto options = server_options();
  options.body_bytes_per_second = 1000;
  options.body_window = 20s;
  options.idle_max = 24h;
  Hostile f(options);
  SECTION("a call whose data never comes, with pings all the time") {
    const auto peer = f.greeted();
    REQUIRE(f.run(peer->send(f.request(1, Method::kPutChunk, "4000"))));
    for (int i = 0; i < 30 && f.server->stats().connections > 0; ++i) {
      (void)f.run(peer->send(RawPeer::frame({.kind = FrameKind::kPing})));
      f.world.run_for(1s);
      CHECK((i > 15 || f.server->stats().connections == 1));
    }
  }
  SECTION("a payload in drips") {
    const auto peer = f.greeted();
    const auto frames = f.request(1, Method::kPutChunk, "4000") + f.data(1, "0", std::string(4000, 'x'));
    REQUIRE(f.run(peer->send(frames.substr(0, 120))));
    for (std::size_t at = 120; at < frames.size() && f.server->stats().connections > 0; at += 100) {
      f.world.run_for(1s);
      (void)f.run(peer->send(frames.substr(at, 100)));
    }
    CHECK(f.service.running == 0);
  }
  SECTION("fast enough is not cut off, however long it takes") {
    const auto peer = f.greeted();
    std::string frames = f.request(1, Method::kPutChunk, "40000");
    for (int i = 0; i < 10; ++i) frames += f.data(1, std::to_string(i * 4000), std::string(4000, 'x'));
    for (std::size_t at = 0; at + 500 < frames.size(); at += 500) {  // 1100 bytes a second
      REQUIRE(f.run(peer->send(frames.substr(at, 500))));
      f.world.run_for(400ms);
    }
    CHECK(f.server->stats().connections == 1);
    peer->stream->close();
  }
  SECTION("replies in drips") {
    const auto peer = f.greeted();
    REQUIRE(f.run(peer->send(f.request(1, Method::kMap, std::string(600'000, 'x')))));
    f.world.run_for(22s);
    CHECK(f.server->stats().connections == 1);  // 600 kB may take 600 s at this rate
    options.body_bytes_per_second = 64 * kKiB;
    f.server->set(options);
    f.world.run_for(2s);
    CHECK(f.server->stats().connections == 0);
  }
  f.settle();
  CHECK(f.server->stats().connections == 0);
  CHECK(f.pool->available() == f.pool->units());
}

TEST_CASE("rpc server: replies that are not taken stay inside their budget, beyond it they are unavailable",
          "[rpc][sim]") {
  auto options = server_options();
  options.message_budget_bytes = 8 * wire::kMessageBytesMax;
  options.connection_bytes_max = 2 * wire::kMessageBytesMax;
  Hostile f(options);
  const std::string large(500'000, 'x');
  const auto greedy = f.greeted();
  std::string requests;
  for (std::uint64_t i = 1; i <= 12; ++i) requests += f.request(i, Method::kMap, large);
  REQUIRE(f.run(greedy->send(requests)));
  f.world.run_for(1s);
  CHECK(f.server->stats().busy > 0);
  // Another one is served meanwhile.
  const auto honest = f.greeted();
  REQUIRE(f.run(honest->send(f.request(1, Method::kMap, "x"))));
  CHECK(f.run(honest->receive())->message == "echo x");
  // What it takes in the end is whole, or says that it is not.
  int whole = 0, busy = 0;
  for (int i = 0; i < 12; ++i) {
    const auto frame = f.run(greedy->receive());
    REQUIRE(frame);
    if (frame->header.kind == FrameKind::kReply)
      whole += frame->message == "echo " + large ? 1 : 0;
    else
      busy += rpc::decode_error(frame->message)->error.code == Errc::kUnavailable ? 1 : 0;
  }
  CHECK(whole + busy == 12);
  CHECK(busy > 0);
  CHECK(whole > 2);
  // All of it has come back.
  REQUIRE(f.run(greedy->send(f.request(13, Method::kMap, large))));
  CHECK(f.run(greedy->receive())->message == "echo " + large);
}

TEST_CASE("rpc server: requests share a budget and wait for it", "[rpc][sim]") {
  auto options = server_options();
  options.message_budget_bytes = 2 * wire::kMessageBytesMax + 4 * kKiB;  // and what two calls cost
  Hostile f(options);
  const std::string large(wire::kMessageBytesMax, ' ');
  std::vector<std::unique_ptr<RawPeer>> peers;
  rt::Scope scope(f.client);
  for (int i = 0; i < 10; ++i) {
    peers.push_back(f.greeted());
    scope.spawn(peers.back()->send(f.request(1, Method::kHeartbeat, large)));
  }
  f.world.run_for(40s);
  CHECK(f.service.running == 2);
  CHECK(f.service.request_bytes_max == 2 * wire::kMessageBytesMax);
  // As they end, the next come in.
  for (auto& peer : peers) {
    peer->stream->close();
    f.world.run_for(1s);
  }
  f.settle();
  CHECK(f.service.request_bytes_max == 2 * wire::kMessageBytesMax);
  CHECK(f.server->stats().calls_total == 10);
  CHECK(f.service.running == 0);
}

TEST_CASE("rpc server: uploads of many clients share the pool and all end", "[rpc][sim]") {
  Hostile f(server_options(), 3);
  struct Client {
    static Task<void> run(OverSim& f, std::string bytes) {
      CO_TRY(const auto channel, co_await Channel::connect(f.runtime(), "daemon:99", channel_options(), f.in(10s)));
      CO_TRY(const auto reply, co_await channel->upload(Method::kPutChunk, std::to_string(bytes.size()),
                                                        pieces_of(bytes, kSmallUnitBytes), f.in(60s)));
      if (reply != std::to_string(crc32c(bytes))) co_return fail(Errc::kDataLoss, "wrong CRC");
      co_return {};
    }
  };
  std::vector<Task<void>> clients;
  for (int i = 0; i < 50; ++i) clients.push_back(Client::run(f, pattern(100'000, static_cast<std::uint64_t>(i))));
  CHECK(f.run(rt::all(f.client, std::move(clients))));
  f.settle();
  CHECK(f.pool->available() == 3);
  CHECK(f.server->stats().protocol_errors == 0);
}

TEST_CASE("rpc server: newer clients are told both sides' versions", "[rpc][sim]") {
  Hostile f;
  const auto peer = f.dial();
  // Hello { version_min: 7, version_max: 9 }
  REQUIRE(f.run(peer->send(RawPeer::frame({.kind = FrameKind::kHello}, "\x08\x07\x10\x09"))));
  const auto answer = f.run(peer->receive());
  REQUIRE(answer);
  CHECK(answer->header.kind == FrameKind::kError);
  const auto error = rpc::decode_error(answer->message);
  REQUIRE(error);
  CHECK(error->error.code == Errc::kProtocol);
  CHECK(error->error.message == "no common protocol version: the client speaks 7 to 9, this daemon 1");
  CHECK(f.run(peer->until_end())->empty());
}

// ---- A false daemon

namespace {

/// Answers the hello, then sends `frames` after the first request and closes when told.
struct FalseDaemon {
  explicit FalseDaemon(OverSim& fixture, std::string f, std::string hello = good_hello())
      : frames(std::move(f)), hello_reply(std::move(hello)), scope(fixture.daemon) {
    listener = *fixture.daemon.runtime().net.listen("daemon:66");
    scope.spawn(serve(this, fixture.daemon.runtime()));
  }
  static std::string good_hello() {
    rpc::Agreed self{.node = "false",
                     .cluster = std::string(16, 'c'),
                     .credit_units = 2,
                     .unit_bytes = kSmallUnitBytes,
                     .calls_max = 4};
    return RawPeer::frame({.kind = FrameKind::kHelloReply},
                          rpc::answer_hello(rpc::encode_hello(channel_options()), self)->reply);
  }
  static Task<void> serve(FalseDaemon* self, rt::Runtime runtime) {
    CO_TRY(auto stream, co_await self->listener->accept());
    RawPeer peer(runtime.loop, std::move(stream));
    CO_CHECK_OK(co_await peer.receive());
    CO_CHECK_OK(co_await peer.send(self->hello_reply));
    CO_CHECK_OK(co_await peer.receive());
    CO_CHECK_OK(co_await peer.send(self->frames));
    for (;;) CO_CHECK_OK(co_await peer.receive());
  }
  std::string frames, hello_reply;
  std::unique_ptr<rt::Listener> listener;
  rt::Scope scope;
};

}  // namespace

TEST_CASE("rpc channel: a daemon that breaks the rules loses the connection", "[rpc][sim]") {
  const auto reply = RawPeer::frame({.kind = FrameKind::kReply, .call_id = 1}, "hi");
  auto bad_crc = reply;
  bad_crc.back() ^= 1;
  for (const auto& [what, frames] : std::vector<std::pair<std::string, std::string>>{
           {"wrong magic", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"},
           {"message: CRC", bad_crc},
           {"never made", RawPeer::frame({.kind = FrameKind::kReply, .call_id = 2}, "hi")},
           {"without a call", RawPeer::frame({.kind = FrameKind::kReply, .call_id = 0}, "hi")},
           {"takes none", RawPeer::frame({.kind = FrameKind::kData, .call_id = 1}, "m", "payload")},
           {"takes none", RawPeer::frame({.kind = FrameKind::kData, .call_id = 0}, "m", "payload")},
           {"more credit", RawPeer::frame({.kind = FrameKind::kCredit, .method = 1})},
           {"from a daemon", RawPeer::frame({.kind = FrameKind::kRequest, .call_id = 1})},
           {"from a daemon", FalseDaemon::good_hello()},
           {"malformed", RawPeer::frame({.kind = FrameKind::kError, .call_id = 1}, "\xff\xff")},
       }) {
    INFO(what);
    OverSim f;
    FalseDaemon daemon(f, frames);
    const auto channel = f.run(Channel::connect(f.runtime(), "daemon:66", channel_options(), f.in(10s)));
    REQUIRE(channel);
    const auto answer = f.run((*channel)->call(Method::kMap, "x", f.in(60s)));
    REQUIRE(!answer);
    CHECK(answer.error().code == Errc::kUnavailable);
    CHECK_THAT(answer.error().message, Catch::Contains("daemon:66") && Catch::Contains(what));
    CHECK_FALSE((*channel)->alive());
  }
}

TEST_CASE("rpc channel: a false greeting is refused", "[rpc][sim]") {
  for (const auto& hello : {
           std::string("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"),
           RawPeer::frame({.kind = FrameKind::kPong}),
           RawPeer::frame({.kind = FrameKind::kHelloReply}, "\xff\xff"),
           RawPeer::frame({.kind = FrameKind::kHelloReply}, "\x08\x63"),  // version 99
           RawPeer::frame({.kind = FrameKind::kHelloReply}, std::string(wire::kHelloBytesMax + 1, 'x')),
       }) {
    OverSim f;
    FalseDaemon daemon(f, "", hello);
    const auto channel = f.run(Channel::connect(f.runtime(), "daemon:66", channel_options(), f.in(10s)));
    REQUIRE(!channel);
    CHECK(channel.error().code == Errc::kProtocol);
    CHECK_THAT(channel.error().message, Catch::Contains("daemon:66"));
  }
  // One that says nothing.
  OverSim f;
  FalseDaemon daemon(f, "", "");
  const auto channel = f.run(Channel::connect(f.runtime(), "daemon:66", channel_options(), f.in(1h)));
  CHECK(channel.error().code == Errc::kDeadline);
}

TEST_CASE("rpc channel: late frames of calls that were given up are thrown away", "[rpc][sim]") {
  OverSim f;
  FalseDaemon daemon(f, "");
  const auto channel = *f.run(Channel::connect(f.runtime(), "daemon:66", channel_options(), f.in(10s)));
  daemon.frames = RawPeer::frame({.kind = FrameKind::kData, .call_id = 1}, "0", pattern(100'000, 1)) +
                  RawPeer::frame({.kind = FrameKind::kReply, .call_id = 1}, "late") +
                  RawPeer::frame({.kind = FrameKind::kPing}) +
                  RawPeer::frame({.kind = FrameKind::kReply, .call_id = 2}, "in time") +
                  RawPeer::frame({.kind = FrameKind::kReply, .call_id = 2}, "twice");
  MemorySink sink(100'000);
  rt::Scope scope(f.client);
  struct Calls {
    static Task<void> download(std::shared_ptr<Channel> c, MemorySink& sink) {
      CO_CHECK_OK(co_await c->download(Method::kReadRanges, "", sink, rt::kNever));
      co_return {};
    }
    static Task<void> call(std::shared_ptr<Channel> c, std::string& out) {
      CO_TRY(out, co_await c->call(Method::kMap, "", rt::kNever));
      co_return {};
    }
  };
  std::string out;
  rt::Scope given_up(f.client);
  given_up.spawn(Calls::download(channel, sink));
  scope.spawn(Calls::call(channel, out));
  for (int i = 0; i < 4; ++i) f.world.step();
  given_up.cancel();
  f.settle();
  CHECK(out == "in time");
  CHECK(channel->alive());
  CHECK(sink.frames == 0);
}
