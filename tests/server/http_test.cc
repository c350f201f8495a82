#include "server/http/http.h"

#include <catch2/catch.hpp>
#include <limits>
#include <optional>

#include "proto/common/buffer.h"
#include "proto/rt/sync.h"
#include "proto/runtime/runtime.h"
#include "server/http/metrics_text.h"
#include "server/http/request.h"
#include "tests/sim/net.h"
#include "tests/sim/world.h"

using namespace cairn;
using namespace std::chrono_literals;
using namespace cairn::server;

namespace {

HttpReply answer(const std::string& path) {
  if (path == "/healthz") return {.body = "ok\n"};
  if (path == "/readyz") return {.status = 503, .body = "recovering\n"};
  return {.status = 404, .body = "Not Found\n"};
}

/// Writes `request`, then reads to the end of the stream or until `replies` bodies of known size have come.
Task<std::string> exchange(rt::Runtime runtime, std::string address, std::string request, std::string until) {
  CO_TRY(auto stream, co_await runtime.net.dial(std::move(address)));
  CO_CHECK_OK(co_await stream->write_all({bytes_of(request)}));
  std::string all;
  std::array<std::byte, 1000> bytes;
  for (;;) {
    auto got = co_await stream->read_some(bytes);
    if (!got || *got == 0) co_return all;
    all += text_of(std::span(bytes).first(*got));
    if (!until.empty() && all.ends_with(until)) co_return all;
  }
}

struct OverSim {
  explicit OverSim(HttpServer::Options options = {})
      : world(3), daemon(world.make_node("daemon")), client(world.make_node("client")) {
    server = HttpServer::create(daemon.runtime(), answer, std::move(options));
    server->serve(*daemon.runtime().net.listen("daemon:7421"));
  }
  std::string get(std::string request, std::string until = {}) {
    return std::move(world.run(client, exchange(client.runtime(), "daemon:7421", std::move(request), until))).value();
  }
  sim::World world;
  sim::Node& daemon;
  sim::Node& client;
  std::unique_ptr<HttpServer> server;
};

struct OverSockets {
  OverSockets() : real(*rt::RealRuntime::create({.log_min = rt::Level::kError})) {
    server = HttpServer::create(real->seams(), answer);
    auto listener = *real->seams().net.listen("127.0.0.1:0");
    address = listener->address();
    server->serve(std::move(listener));
  }
  std::string get(std::string request, std::string until = {}) {
    return std::move(rt::run(real->loop(), exchange(real->seams(), address, std::move(request), until))).value();
  }
  std::unique_ptr<rt::RealRuntime> real;
  std::string address;
  std::unique_ptr<HttpServer> server;
};

std::string status_of(const std::string& reply) {
  return reply.substr(0, reply.find("\r\n"));
}

}  // namespace

TEMPLATE_TEST_CASE("http: known paths are answered by their handlers", "[http]", OverSim, OverSockets) {
  TestType f;
  CHECK(f.get("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") ==
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 3\r\nCache-Control: no-store\r\n"
        "Connection: close\r\n\r\nok\n");
  const auto ready = f.get("GET /readyz?verbose HTTP/1.0\r\n\r\n");
  CHECK(status_of(ready) == "HTTP/1.1 503 Service Unavailable");
  CHECK(ready.ends_with("\r\n\r\nrecovering\n"));
  const auto head = f.get("HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  CHECK_THAT(head, Catch::Contains("Content-Length: 3\r\n"));
  CHECK(head.ends_with("\r\n\r\n"));
}

TEMPLATE_TEST_CASE("http: everything else is refused with the right status", "[http]", OverSim, OverSockets) {
  TestType f;
  const auto status = [&](std::string request) { return status_of(f.get(std::move(request))).substr(9, 3); };
  const std::string rest = " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  CHECK(status("GET /" + rest) == "404");
  CHECK(status("GET /healthz/" + rest) == "404");
  CHECK(status("POST /nowhere" + rest) == "405");
  CHECK(status("POST /healthz" + rest) == "405");
  CHECK(status("POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello") == "405");
  CHECK_THAT(f.get("DELETE /healthz" + rest), Catch::Contains("\r\nAllow: GET, HEAD\r\n"));
  CHECK(status("GET /healthz\r\n\r\n") == "400");
  CHECK(status("GET healthz" + rest) == "400");
  CHECK(status("GET /heal thz" + rest) == "400");
  CHECK(status("G\"T /healthz" + rest) == "400");
  CHECK(status("GET /healthz HTTP/1.1\r\n\r\n") == "400");  // no Host
  CHECK(status("GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n") == "400");
  CHECK(status("GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n") == "400");
  CHECK(status("GET /healthz HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n") == "400");
  CHECK(status("GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n") == "505");
  CHECK(status("CRN1\x01\x02\x03\x04\n\n") == "400");
  CHECK(status("GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + std::string(8000, 'x') + "\r\nConnection: close\r\n\r\n") ==
        "200");
  CHECK(status("GET /" + std::string(9000, 'x')) == "431");
}

TEMPLATE_TEST_CASE("http: a connection may be kept for further requests", "[http]", OverSim, OverSockets) {
  TestType f;
  const std::string one = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
  // Three at once; the last one ends it.
  const auto replies = f.get(one + one + "GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: Foo, CLOSE\r\n\r\n");
  CHECK(f.server->stats().requests_total == 3);
  std::size_t found = 0;
  for (auto at = replies.find("200 OK"); at != replies.npos; at = replies.find("200 OK", at + 1)) ++found;
  CHECK(found == 2);
  CHECK(replies.ends_with("Not Found\n"));
  CHECK_THAT(f.get("GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "ok\n"),
             Catch::Contains("Connection: keep-alive"));
  // A body would have to be read first: its connection ends, and the body is never taken for a request.
  const auto smuggled = f.get("GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n" + one);
  CHECK_THAT(smuggled, Catch::Contains("Connection: close"));
}

TEST_CASE("http: slow and silent peers are given up, or make room beyond connections_max", "[http][sim]") {
  OverSim f({.connections_max = 3});
  std::vector<std::optional<std::string>> out(5);
  rt::Scope scope(f.client);
  struct Peer {
    static Task<void> run(OverSim& f, std::string request, std::optional<std::string>& out) {
      CO_TRY(out, co_await exchange(f.client.runtime(), "daemon:7421", std::move(request), {}));
      co_return {};
    }
  };
  scope.spawn(Peer::run(f, "", out[0]));
  scope.spawn(Peer::run(f, "GET /hea", out[1]));
  scope.spawn(Peer::run(f, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", out[2]));  // kept, then idle
  f.world.run_for(100ms);
  CHECK(f.server->stats().connections == 3);  // nobody needs their room
  scope.spawn(Peer::run(f, "GET /healthz HTTP/1.0\r\n\r\n", out[3]));
  f.world.run_for(100ms);
  // The oldest made room at once, without an answer.
  CHECK(status_of(*out[3]) == "HTTP/1.1 200 OK");
  CHECK(out[0] == "");
  CHECK(!out[1]);
  f.world.run_for(6s);
  REQUIRE(scope.running() == 0);
  CHECK(status_of(*out[1]) == "HTTP/1.1 408 Request Timeout");
  CHECK(status_of(*out[2]) == "HTTP/1.1 200 OK");
  // Many that stay silent do not keep one out that speaks.
  std::vector<std::optional<std::string>> silent(50);
  for (auto& one : silent) scope.spawn(Peer::run(f, "GET /", one));
  f.world.run_for(100ms);
  scope.spawn(Peer::run(f, "GET /healthz HTTP/1.0\r\n\r\n", out[4]));
  f.world.run_for(100ms);
  CHECK(status_of(*out[4]) == "HTTP/1.1 200 OK");
  CHECK(f.server->stats().connections <= 3);
  f.world.run_for(6s);
  REQUIRE(scope.running() == 0);
  CHECK(f.server->stats().connections == 0);
}

TEST_CASE("http: destroying the server ends its connections", "[http][sim]") {
  OverSim f;
  std::optional<std::string> out;
  rt::Scope scope(f.client);
  struct Peer {
    static Task<void> run(OverSim& f, std::optional<std::string>& out) {
      CO_TRY(out, co_await exchange(f.client.runtime(), "daemon:7421", "GET", {}));
      co_return {};
    }
  };
  scope.spawn(Peer::run(f, out));
  f.world.run_for(100ms);
  CHECK(f.server->stats().connections == 1);
  f.server.reset();
  f.world.run_for(100ms);
  CHECK(out == "");
}

TEST_CASE("http: any bytes give a head, a refusal or a wait", "[http]") {
  const std::string good = "GET /a?b=c HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n";
  for (std::size_t size = 0; size < good.size(); ++size) CHECK(http_head_bytes(good.substr(0, size)) == 0);
  CHECK(http_head_bytes(good + "more") == good.size());
  CHECK(http_head_bytes("GET / HTTP/1.0\n\n") == 16);
  CHECK(parse_http_head(good).path == "/a");
  CHECK(parse_http_head("\n\n").error == 400);
  CHECK(parse_http_head("\r\n\r\n").error == 400);
  std::uint64_t state = 5;
  for (int round = 0; round < 20'000; ++round) {
    auto bytes = good;
    for (int flips = 0; flips <= round % 4; ++flips) {
      state = state * 6364136223846793005 + 1442695040888963407;
      bytes[(state >> 40) % bytes.size()] = static_cast<char>(state >> 56);
    }
    if (const auto size = http_head_bytes(bytes); size > 0) {
      const auto request = parse_http_head(std::string_view(bytes).substr(0, size));
      CHECK((request.error == 0 || request.error == 400 || request.error == 505));
      if (request.error == 0) CHECK(request.path.starts_with('/'));
    }
  }
}

TEST_CASE("metrics text: help, type, labels and values as Prometheus reads them", "[http]") {
  MetricsText text;
  text.counter("cairn_calls_total", "Calls begun.", std::uint64_t{18446744073709551615u});
  text.gauge("cairn_ratio", "A ratio.", 0.1);
  text.family("cairn_target_bytes", "Bytes stored.", MetricsText::Type::kGauge);
  text.sample({{"target", "d0"}, {"state", "ok"}}, 12u);
  text.sample({{"target", "d1"}}, 1.5e300);
  CHECK(text.text() ==
        "# HELP cairn_calls_total Calls begun.\n"
        "# TYPE cairn_calls_total counter\n"
        "cairn_calls_total 18446744073709551615\n"
        "# HELP cairn_ratio A ratio.\n"
        "# TYPE cairn_ratio gauge\n"
        "cairn_ratio 0.1\n"
        "# HELP cairn_target_bytes Bytes stored.\n"
        "# TYPE cairn_target_bytes gauge\n"
        "cairn_target_bytes{target=\"d0\",state=\"ok\"} 12\n"
        "cairn_target_bytes{target=\"d1\"} 1.5e+300\n");
}

TEST_CASE("metrics text: quotes, backslashes and line ends cannot break a line", "[http]") {
  MetricsText text;
  text.family("m", "back\\slash \"quote\"\nsecond line", MetricsText::Type::kGauge);
  text.sample({{"path", "C:\\a \"b\"\nc}"}}, 1u);
  CHECK(text.text() ==
        "# HELP m back\\\\slash \"quote\"\\nsecond line\n"
        "# TYPE m gauge\n"
        "m{path=\"C:\\\\a \\\"b\\\"\\nc}\"} 1\n");
}

TEST_CASE("metrics text: values that are no number", "[http]") {
  MetricsText text;
  text.family("m", "h", MetricsText::Type::kGauge);
  text.sample({}, std::numeric_limits<double>::infinity());
  text.sample({}, -std::numeric_limits<double>::infinity());
  text.sample({}, std::numeric_limits<double>::quiet_NaN());
  CHECK(text.text().ends_with("m +Inf\nm -Inf\nm NaN\n"));
}
