#include "tests/sim/sessions.h"

#include "tests/sim/daemon.h"

namespace cairn::sim {

Task<std::shared_ptr<client::Session>> connect(Node* node, const SimDaemon& daemon, client::SessionOptions options) {
  options.servers = {daemon.address()};
  options.name = node->name();
  for (;;) {
    auto session = co_await client::Session::connect(node->runtime(), options, node->now() + kCallTimeout);
    if (session || (session.error().code != Errc::kUnavailable && session.error().code != Errc::kDeadline &&
                    session.error().code != Errc::kUnknown))
      co_return std::move(session);
    co_await node->sleep(std::chrono::milliseconds(200));
  }
}

}  // namespace cairn::sim
