#include <algorithm>
#include <cassert>
#include <list>
#include <map>
#include <set>

#include "proto/rpc/connection.h"

namespace cairn::rpc {
namespace {

/// Peers can cause an event as often as they like; at most one line a second tells of it.
class LogLimit {
 public:
  /// How many were held back since the last line, or nothing: hold this one back, too.
  std::optional<std::uint64_t> pass(rt::TimePoint now) {
    if (last_ && now - *last_ < std::chrono::seconds(1)) {
      ++held_;
      return std::nullopt;
    }
    last_ = now;
    return std::exchange(held_, 0);
  }

 private:
  std::optional<rt::TimePoint> last_;
  std::uint64_t held_ = 0;
};

class ServerImpl final : public Server, public ConnectionHost {
 public:
  ServerImpl(rt::Runtime runtime, rt::UnitPool& pool, Options options, Handler handle, std::function<std::string()> map)
      : ConnectionHost(runtime, pool, options, std::move(handle), std::move(map), message_budget(options)),
        changed_(runtime.loop),
        tasks_(runtime.loop) {
    assert(this->options.credit_units >= 1 && this->options.credit_units <= 0xffff && this->options.calls_max >= 1);
    assert(units.unit_bytes() <= wire::kPayloadBytesMax);
    tasks_.spawn(watch());
  }
  ~ServerImpl() override {
    tasks_.cancel();
    for (auto& [id, connection] : connections_) connection->take_down();
  }

  void serve(std::unique_ptr<rt::Listener> listener) override {
    if (closing_) return listener->close();
    auto& ref = *listeners_.emplace_back(std::move(listener));
    tasks_.spawn(accept_from(ref));
  }

  void set(const Limits& limits) override { static_cast<Limits&>(options) = limits; }

  Stats stats() const override {
    auto out = totals;
    out.connections = live_;
    for (const auto& [id, connection] : connections_) {
      out.calls_running += connection->calls();
      out.bytes_received += connection->bytes_received();
      out.bytes_sent += connection->bytes_sent();
    }
    return out;
  }

  Task<void> close(rt::TimePoint deadline) override {
    closing_ = true;
    for (auto& listener : listeners_) listener->close();
    auto quiet = co_await rt::with_deadline(rt.loop, deadline, wait_for_quiet(), "close");
    if (!quiet)
      rt.log.write(rt::Level::kWarning, "rpc_calls_cut_off", {{"calls", std::to_string(stats().calls_running)}});
    tasks_.cancel();
    for (auto& [id, connection] : connections_) {
      connection->drop(Error{Errc::kUnavailable, "the server is closing"});
      connection->take_down();
      count(*connection);
    }
    connections_.clear();
    listeners_.clear();
    co_return {};
  }

  // ---- For its connections

  bool closing() const override { return closing_; }
  void changed() override {
    if (closing_) changed_.notify_all();
  }
  void bury(const Connection& gone) override {
    const auto id = gone.id();
    --live_;
    unknown_.erase(id);
    if (const auto peer = peers_.find(gone.identity()); --peer->second == 0) peers_.erase(peer);
    rt.loop.post([this, alive = std::weak_ptr(alive_), id] {
      if (alive.expired()) return;
      const auto it = connections_.find(id);
      if (it == connections_.end()) return;
      it->second->take_down();
      count(*it->second);
      connections_.erase(it);
      changed();
    });
  }
  void greeted(std::uint64_t id) override { unknown_.erase(id); }
  void log_ended(const std::string& client, bool greeted, const Error& why) override {
    const bool offence = why.code == Errc::kProtocol || why.code == Errc::kDenied || why.code == Errc::kInvalid;
    if (offence) ++totals.protocol_errors;
    if (!offence && greeted) {
      rt.log.write(rt::Level::kDebug, "rpc_connection_ended", {{"client", client}, {"reason", why.message}});
      return;
    }
    const auto held = limit_.pass(rt.loop.now());
    if (!held) return;
    rt.log.write(offence ? rt::Level::kWarning : rt::Level::kInfo,
                 greeted ? "rpc_connection_closed" : "rpc_peer_refused",
                 {{"client", client}, {"reason", why.message}, {"held_back", std::to_string(*held)}});
  }

 private:
  Task<void> accept_from(rt::Listener& listener) {
    for (;;) {
      auto stream = co_await listener.accept();
      if (closing_) co_return {};
      if (stream) {
        add(*std::move(stream));
        continue;
      }
      if (const auto held = limit_.pass(rt.loop.now()))
        rt.log.write(rt::Level::kError, "rpc_accept_failed",
                     {{"address", listener.address()}, {"reason", stream.error().message}});
      co_await rt.loop.sleep(std::chrono::milliseconds(100));
    }
  }

  void add(std::unique_ptr<rt::Stream> stream) {
    const auto identity = identity_of(stream->peer());
    const auto full = [](std::string_view limit, std::uint32_t value) {
      return Error{Errc::kUnavailable, std::string(limit) + "=" + std::to_string(value) + " reached"};
    };
    // Who has not said who it is makes room, the oldest first: idlers never lock out those that speak.
    if (const auto peer = peers_.find(identity); peer != peers_.end() && peer->second >= options.connections_per_peer) {
      const auto why = full("connections_per_peer", options.connections_per_peer);
      const auto oldest =
          std::ranges::find_if(unknown_, [&](std::uint64_t id) { return connections_.at(id)->identity() == identity; });
      if (oldest == unknown_.end()) return refuse(*stream, why);
      make_room(*oldest, why);
    }
    if (unknown_.size() >= options.connections_unknown)
      make_room(*unknown_.begin(), full("connections_unknown", options.connections_unknown));
    if (live_ >= options.connections_max) {
      const auto why = full("connections_max", options.connections_max);
      if (unknown_.empty()) return refuse(*stream, why);
      make_room(*unknown_.begin(), why);
    }
    const auto id = ++last_connection_;
    ++totals.connections_total;
    ++live_;
    ++peers_[identity];
    unknown_.insert(id);
    auto connection = std::make_shared<Connection>(*this, id, std::move(stream));
    connections_.emplace(id, connection);
    connection->start();
    changed_.notify_all();
  }
  void refuse(rt::Stream& stream, const Error& why) {
    ++totals.refused;
    log_ended(stream.peer(), false, why);
    stream.close();
  }
  void make_room(std::uint64_t id, const Error& why) {
    ++totals.refused;
    connections_.at(id)->drop(why);
  }

  /// One clock for the limits of all connections: they are coarse, and a timer per frame would cost more.
  Task<void> watch() {
    for (;;) {
      const auto shortest =
          std::min({options.handshake_max, options.header_max, options.idle_max, options.body_window});
      const auto step = std::clamp<rt::Duration>(shortest / 8, std::chrono::milliseconds(1), std::chrono::seconds(1));
      while (connections_.empty()) co_await changed_.wait();
      co_await rt.loop.sleep(step);
      const auto now = rt.loop.now();
      for (auto& [id, connection] : connections_) connection->check(now);  // drops, but does not erase
    }
  }

  Task<void> wait_for_quiet() {
    const auto busy = [this] {
      return std::ranges::any_of(connections_, [](const auto& c) {
        return !c.second->dropped() && c.second->greeted() && !c.second->quiet();
      });
    };
    while (busy()) co_await changed_.wait();
    co_return {};
  }

  static std::uint64_t message_budget(const Options& options) {
    return std::max<std::uint64_t>(options.message_budget_bytes, wire::kMessageBytesMax + kCallBytes);
  }

  void count(const Connection& gone) {
    totals.bytes_received += gone.bytes_received();
    totals.bytes_sent += gone.bytes_sent();
  }

  std::list<std::unique_ptr<rt::Listener>> listeners_;
  std::map<std::uint64_t, std::shared_ptr<Connection>> connections_;
  // Of connections_, those not dropped: how many, those that have not finished the hello, how many of each identity.
  std::size_t live_ = 0;
  std::set<std::uint64_t> unknown_;  // ids are in the order of arrival
  std::map<std::string, std::size_t> peers_;
  std::uint64_t last_connection_ = 0;
  bool closing_ = false;
  LogLimit limit_;
  rt::Signal changed_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // for jobs that outlive us
  rt::Scope tasks_;
};

}  // namespace

std::unique_ptr<Server> Server::create(rt::Runtime runtime, rt::UnitPool& units, Options options, Handler handler,
                                       std::function<std::string()> stale_map) {
  return std::make_unique<ServerImpl>(runtime, units, std::move(options), std::move(handler), std::move(stale_map));
}

}  // namespace cairn::rpc
