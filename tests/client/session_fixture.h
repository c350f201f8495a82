#pragma once

#include "client/core/session.h"
#include "proto/rpc/rpc.h"
#include "tests/server/fixture.h"
#include "tests/sim/net.h"

namespace cairn::server {

/// A daemon behind a simulated network, and a client's session with it.
struct SessionFixture : Fixture {
  using Wrap = std::function<std::shared_ptr<rpc::ServerCall>(std::shared_ptr<rpc::ServerCall>)>;
  /// `w`: what the daemon gets in place of a call.
  explicit SessionFixture(Wrap w = {}, std::size_t directories = 1)
      : Fixture({}, 1, directories), client(world.make_node("client")), wrap(std::move(w)) {
    use_group_of(directories);
    REQUIRE(make_bucket("b"));
    serve();
  }
  ~SessionFixture() {
    session->close();
    session.reset();
    client.kill(sim::Death::kProcess);
    server.reset();
  }
  void serve() {
    rpc::Server::Options of_server;
    of_server.node = "n1";
    of_server.cluster = daemon->cluster();
    auto handler = [this, handle = daemon->handler()](std::shared_ptr<rpc::ServerCall> call) {
      return handle(wrap ? wrap(std::move(call)) : std::move(call));
    };
    server = rpc::Server::create(node.runtime(), *units, std::move(of_server), std::move(handler), daemon->stale_map());
    auto listener = node.runtime().net.listen(node.host() + ":7420");
    REQUIRE(listener);
    server->serve(*std::move(listener));
    client::SessionOptions of_client;
    of_client.servers = {node.host() + ":7420"};
    session = world.run(client, client::Session::connect(client.runtime(), of_client, client.now() + 20s)).value();
  }

  sim::Node& client;
  Wrap wrap;
  std::unique_ptr<rpc::Server> server;
  std::shared_ptr<client::Session> session;
};

}  // namespace cairn::server
