#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include "client/core/session.h"
#include "tests/sim/world.h"

namespace cairn::sim {

class SimDaemon;

constexpr rt::Duration kCallTimeout = std::chrono::seconds(20);  // what clients are given

/// A session of `node` with the daemon, which may be away for a while: waits until it is back. Of `options` servers and
/// name are set.
Task<std::shared_ptr<client::Session>> connect(Node* node, const SimDaemon& daemon, client::SessionOptions options);

/// Closes the session with the frame that holds it.
struct CloseSession {
  std::shared_ptr<client::Session> session;
  explicit CloseSession(std::shared_ptr<client::Session> s) : session(std::move(s)) {}
  CloseSession(const CloseSession&) = delete;
  ~CloseSession() { session->close(); }
};

}  // namespace cairn::sim
