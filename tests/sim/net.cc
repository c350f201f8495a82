#include "tests/sim/net.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>

namespace cairn::sim {

namespace {

/// Which process a socket belongs to.
struct Owner {
  Node* node = nullptr;
  std::uint32_t incarnation = 0;
  bool gone() const { return !node->alive() || node->incarnation() != incarnation; }
};

struct Segment {
  std::vector<std::byte> bytes;  // empty: the end of the stream
  rt::TimePoint due;
};

/// One direction of a connection.
struct Pipe {
  std::deque<Segment> on_the_way;
  bool pump_scheduled = false;
  rt::TimePoint last_due{};
  std::deque<std::vector<std::byte>> arrived;
  std::size_t head = 0;    // read of arrived.front()
  std::size_t unread = 0;  // bytes in `arrived`
  std::size_t flying = 0;  // bytes on the way
  bool ended = false;      // the sender closed and the end arrived
  bool ghost = false;      // cut, but what is on the way still arrives
};

struct End {
  Owner owner;
  rt::Signal wake;
  bool closed = false;  // by its own side
  bool reset = false;
  bool silent = false;  // its machine lost power: it answers nothing, not even with a reset
  explicit End(Owner o) : owner(o), wake(*o.node) {}
};

struct Connection {
  Connection(std::uint64_t n, Owner a, Owner b) : number(n), ends{End(a), End(b)} {}
  std::uint64_t number;
  std::array<End, 2> ends;                                    // 0 dialled, 1 accepted
  std::array<Pipe, 2> pipes;                                  // pipes[i] is what end i sends
  std::array<std::shared_ptr<rt::SharedMemory>, 2> attached;  // by end i
};
using ConnectionPtr = std::shared_ptr<Connection>;

struct Listening {
  Owner owner;
  std::string address;
  std::deque<ConnectionPtr> backlog;
  rt::Signal wake;
  bool closed = false;
  Listening(Owner o, std::string a) : owner(o), address(std::move(a)), wake(*o.node) {}
};

Failure reset_error(const std::string& peer) {
  return fail(Errc::kUnavailable, peer + ": connection reset");
}

}  // namespace

struct SimNet::State : std::enable_shared_from_this<SimNet::State> {
  State(SimNet& n, World& w) : net(n), world(w), random(w.seed(), "net") {}
  SimNet& net;
  World& world;
  Prng random;
  std::map<std::string, std::shared_ptr<Listening>> listeners;         // by name as key_of() gives it
  std::map<std::uint64_t, std::weak_ptr<Connection>> connections;      // by number
  std::map<std::pair<std::string, std::string>, rt::TimePoint> clogs;  // (from host, to host) -> until
  std::uint64_t next_connection = 1;
  std::uint16_t next_port = 20000;

  /// Loopback and unix addresses belong to one host.
  static std::string key_of(const std::string& address, const std::string& host) {
    if (address.starts_with("unix:")) return host + "!" + address;
    const auto colon = address.rfind(':');
    auto name = address.substr(0, colon);
    if (name == "127.0.0.1" || name == "localhost" || name == "0.0.0.0") name = host;
    return name + address.substr(colon);
  }
  static bool valid(const std::string& address) {
    return address.starts_with("unix:") || (address.rfind(':') != std::string::npos && address.rfind(':') > 0);
  }

  rt::Duration latency(std::size_t bytes) {
    return random.between(net.options.latency_min, net.options.latency_max) +
           rt::Duration(static_cast<std::int64_t>(bytes * 1'000'000'000 / net.options.bytes_per_second));
  }
  rt::TimePoint clogged_until(const std::string& from, const std::string& to) {
    auto it = clogs.find({from, to});
    if (it == clogs.end()) return {};
    if (it->second <= world.now()) {
      clogs.erase(it);
      return {};
    }
    return it->second;
  }

  static bool counted_down(std::uint64_t& countdown) { return countdown > 0 && --countdown == 0; }

  // ---- sending

  void send(const ConnectionPtr& c, int from, std::vector<std::byte> bytes) {
    auto& pipe = c->pipes[from];
    const auto& host = c->ends[from].owner.node->host();
    const auto& peer = c->ends[1 - from].owner.node->host();
    if (random.chance(net.faults.clog)) {
      const auto until = world.now() + random.between(rt::Duration(0), net.faults.clog_max);
      auto& clog = clogs[{host, peer}];
      clog = std::max(clog, until);
      world.injected(Fault::kClog, host + " to " + peer);
    }
    auto due = world.now() + latency(bytes.size());
    if (random.chance(net.faults.slow)) {
      world.injected(Fault::kSlowNet, host + " to " + peer);
      due += random.between(rt::Duration(0), net.faults.slow_max);
    }
    pipe.last_due = std::max(pipe.last_due, due);
    pipe.flying += bytes.size();
    pipe.on_the_way.push_back({std::move(bytes), pipe.last_due});
    schedule_pump(c, from);
    if (random.chance(net.faults.cut))  // what was sent just now is what its sender cannot know the fate of
      cut(c, random.chance(net.faults.ghost), random.chance(0.9) ? from : 1 - from);
  }

  void schedule_pump(const ConnectionPtr& c, int from) {
    auto& pipe = c->pipes[from];
    if (pipe.pump_scheduled || pipe.on_the_way.empty()) return;
    pipe.pump_scheduled = true;
    auto due = pipe.on_the_way.front().due;
    due = std::max(due, clogged_until(c->ends[from].owner.node->host(), c->ends[1 - from].owner.node->host()));
    world.at(due, [self = shared_from_this(), c, from] { self->pump(c, from); });
  }

  void pump(const ConnectionPtr& c, int from) {
    auto& pipe = c->pipes[from];
    pipe.pump_scheduled = false;
    auto& to = c->ends[1 - from];
    const auto& host = c->ends[from].owner.node->host();
    if (clogged_until(host, to.owner.node->host()) > world.now()) return schedule_pump(c, from);
    bool any = false;
    while (!pipe.on_the_way.empty() && pipe.on_the_way.front().due <= world.now()) {
      auto segment = std::move(pipe.on_the_way.front());
      pipe.on_the_way.pop_front();
      pipe.flying -= segment.bytes.size();
      any = true;
      if (to.reset || to.closed || to.owner.gone()) {
        if (to.closed && !to.silent && !segment.bytes.empty() && !c->ends[from].reset) {
          // Data for a closed socket is answered with a reset.
          world.after(latency(0), [self = shared_from_this(), c, from] { self->reset_end(*c, from); });
        }
        continue;
      }
      if (segment.bytes.empty()) {
        pipe.ended = true;
      } else {
        if (pipe.ghost) world.injected(Fault::kGhost, host + " to " + to.owner.node->host());
        pipe.unread += segment.bytes.size();
        pipe.arrived.push_back(std::move(segment.bytes));
      }
    }
    if (pipe.ghost && pipe.on_the_way.empty() && !to.reset) {
      // The reset follows the last byte; it does not overtake what the receiver has not read yet.
      pipe.ended = false;
      to.reset = true;
    }
    if (any) to.wake.notify_all();
    schedule_pump(c, from);
  }

  // ---- cutting

  /// Both ends are reset. With `ghost` what `sender` had sent still arrives, late.
  void cut(const ConnectionPtr& c, bool ghost, int sender) {
    if (c->ends[0].reset && c->ends[1].reset) return;
    world.injected(Fault::kCut, c->ends[0].owner.node->name() + " - " + c->ends[1].owner.node->name());
    if (!ghost) return reset_both(*c);
    // The sender learns of the cut now.
    auto& pipe = c->pipes[sender];
    reset_end(*c, sender);
    if (pipe.on_the_way.empty()) return reset_end(*c, 1 - sender);
    pipe.ghost = true;
    const auto late = random.between(rt::Duration(0), net.faults.clog_max / (1 << random.below(8)));
    for (auto& segment : pipe.on_the_way) segment.due += late;
    pipe.last_due += late;
    c->pipes[1 - sender].on_the_way.clear();
    c->pipes[1 - sender].flying = 0;
  }
  void reset_end(Connection& c, int end) {
    c.ends[end].reset = true;
    auto& incoming = c.pipes[1 - end];
    if (!incoming.ghost) {
      incoming.arrived.clear();
      incoming.head = incoming.unread = 0;
    }
    c.ends[end].wake.notify_all();
  }
  void reset_both(Connection& c) {
    for (int end : {0, 1}) {
      c.pipes[end].on_the_way.clear();
      c.pipes[end].flying = 0;
      c.pipes[end].ghost = false;
    }
    for (int end : {0, 1}) reset_end(c, end);
  }

  /// The socket of `end` is closed or its process is gone: what was sent still arrives, then the end of the stream.
  void close(const ConnectionPtr& c, int end) {
    auto& own = c->ends[end];
    if (own.closed) return;
    own.closed = true;
    own.wake.notify_all();
    if (own.reset) return;
    const bool unread = c->pipes[1 - end].unread > 0;
    c->pipes[end].last_due = std::max(c->pipes[end].last_due, world.now() + latency(0));
    c->pipes[end].on_the_way.push_back({{}, c->pipes[end].last_due});
    schedule_pump(c, end);
    if (unread)  // closing with unread data resets: the peer may lose what it has not read yet
      world.at(c->pipes[end].last_due, [self = shared_from_this(), c, end] { self->reset_end(*c, 1 - end); });
  }
};

namespace {

using State = SimNet::State;

class SimStream final : public rt::Stream {
 public:
  SimStream(std::shared_ptr<State> state, ConnectionPtr connection, int end)
      : state_(std::move(state)), connection_(std::move(connection)), end_(end) {}
  ~SimStream() override { state_->close(connection_, end_); }

  Task<std::size_t> read_some(std::span<std::byte> into) override { return read_on(state_, connection_, end_, into); }
  Task<void> write_all(std::vector<std::span<const std::byte>> pieces) override {
    return write_on(state_, connection_, end_, std::move(pieces));
  }
  bool attach(std::shared_ptr<rt::SharedMemory> memory) override {
    if (!state_->net.options.shares_memory) return false;
    connection_->attached[end_] = std::move(memory);
    return true;
  }
  Result<std::shared_ptr<rt::SharedMemory>> take_attached() override {
    return std::exchange(connection_->attached[1 - end_], nullptr);
  }
  void close() override { state_->close(connection_, end_); }
  std::string peer() const override { return peer_of(*connection_, end_); }

 private:
  static std::string peer_of(const Connection& c, int end) {
    return c.ends[1 - end].owner.node->host() + ":" + std::to_string(10000 + c.number % 50000);
  }

  static Task<std::size_t> read_on(std::shared_ptr<State> state, ConnectionPtr c, int end, std::span<std::byte> into) {
    auto& own = c->ends[end];
    auto& pipe = c->pipes[1 - end];
    assert(!into.empty());
    if (State::counted_down(state->net.cut_read_in)) state->cut(c, false, end);
    for (;;) {
      if (own.closed) co_return fail(Errc::kUnavailable, peer_of(*c, end) + ": connection closed here");
      if (pipe.unread > 0) break;
      if (own.reset) co_return reset_error(peer_of(*c, end));
      if (pipe.ended) co_return std::size_t{0};
      co_await own.wake.wait();
    }
    auto want = std::min(into.size(), pipe.unread);
    if (want > 1 && state->random.chance(state->net.faults.split_read)) {
      want = 1 + state->random.below(want - 1);
      state->world.injected(Fault::kSplitRead);
    }
    std::size_t done = 0;
    while (done < want) {
      auto& front = pipe.arrived.front();
      const auto n = std::min(want - done, front.size() - pipe.head);
      std::memcpy(into.data() + done, front.data() + pipe.head, n);
      done += n;
      pipe.head += n;
      if (pipe.head == front.size()) {
        pipe.arrived.pop_front();
        pipe.head = 0;
      }
    }
    pipe.unread -= want;
    c->ends[1 - end].wake.notify_all();  // room for its writer
    co_return want;
  }

  static Task<void> write_on(std::shared_ptr<State> state, ConnectionPtr c, int end,
                             std::vector<std::span<const std::byte>> pieces) {
    auto& own = c->ends[end];
    std::size_t piece = 0, at = 0;
    const bool cut_at_end = State::counted_down(state->net.cut_write_in);
    for (;;) {
      while (piece < pieces.size() && at == pieces[piece].size()) {
        ++piece;
        at = 0;
      }
      if (own.closed) co_return fail(Errc::kUnavailable, peer_of(*c, end) + ": connection closed here");
      if (own.reset) co_return reset_error(peer_of(*c, end));
      if (piece == pieces.size() && cut_at_end) {
        state->cut(c, state->random.chance(state->net.faults.ghost), end);
        co_return reset_error(peer_of(*c, end));
      }
      if (piece == pieces.size()) co_return {};
      auto& pipe = c->pipes[end];
      const auto used = pipe.unread + pipe.flying;
      if (used >= state->net.options.window_bytes && !c->ends[1 - end].closed) {
        co_await own.wake.wait();
        continue;
      }
      const auto room = std::min(state->net.options.segment_bytes,
                                 std::max<std::size_t>(state->net.options.window_bytes, used + 1) - used);
      std::vector<std::byte> bytes;
      while (piece < pieces.size() && bytes.size() < room) {
        const auto n = std::min(room - bytes.size(), pieces[piece].size() - at);
        bytes.insert(bytes.end(), pieces[piece].begin() + static_cast<std::ptrdiff_t>(at),
                     pieces[piece].begin() + static_cast<std::ptrdiff_t>(at + n));
        at += n;
        if (at == pieces[piece].size()) {
          ++piece;
          at = 0;
        }
      }
      state->send(c, end, std::move(bytes));
    }
  }

  std::shared_ptr<State> state_;
  ConnectionPtr connection_;
  int end_;
};

class SimListener final : public rt::Listener {
 public:
  SimListener(std::shared_ptr<State> state, std::shared_ptr<Listening> listening, std::string key)
      : state_(std::move(state)), listening_(std::move(listening)), key_(std::move(key)) {}
  ~SimListener() override { close(); }

  Task<std::unique_ptr<rt::Stream>> accept() override { return accept_on(state_, listening_); }
  std::string address() const override { return listening_->address; }
  void close() override {
    if (listening_->closed) return;
    listening_->closed = true;
    listening_->wake.notify_all();
    for (auto& c : listening_->backlog) state_->reset_both(*c);
    listening_->backlog.clear();
    if (auto it = state_->listeners.find(key_); it != state_->listeners.end() && it->second == listening_)
      state_->listeners.erase(it);
  }

 private:
  static Task<std::unique_ptr<rt::Stream>> accept_on(std::shared_ptr<State> state,
                                                     std::shared_ptr<Listening> listening) {
    while (listening->backlog.empty() && !listening->closed) co_await listening->wake.wait();
    if (listening->closed) co_return fail(Errc::kUnavailable, listening->address + ": listener closed");
    auto c = std::move(listening->backlog.front());
    listening->backlog.pop_front();
    co_return std::make_unique<SimStream>(state, std::move(c), 1);
  }

  std::shared_ptr<State> state_;
  std::shared_ptr<Listening> listening_;
  std::string key_;
};

class Endpoint final : public rt::Net {
 public:
  Endpoint(std::shared_ptr<State> state, Node& node) : state_(std::move(state)), node_(node) {}

  Result<std::unique_ptr<rt::Listener>> listen(std::string address) override {
    if (!State::valid(address)) return fail(Errc::kInvalid, "listen " + address + ": not an address");
    if (address.ends_with(":0") && !address.starts_with("unix:"))
      address = address.substr(0, address.size() - 1) + std::to_string(state_->next_port++);
    auto key = State::key_of(address, node_.host());
    if (state_->listeners.contains(key)) return fail(Errc::kBusy, "listen " + address + ": Address already in use");
    auto listening = std::make_shared<Listening>(Owner{&node_, node_.incarnation()}, address);
    state_->listeners[key] = listening;
    return std::make_unique<SimListener>(state_, std::move(listening), std::move(key));
  }

  Task<std::unique_ptr<rt::Stream>> dial(std::string address) override {
    return dial_on(state_, Owner{&node_, node_.incarnation()}, std::move(address));
  }

 private:
  static Task<std::unique_ptr<rt::Stream>> dial_on(std::shared_ptr<State> state, Owner owner, std::string address) {
    if (!State::valid(address)) co_return fail(Errc::kInvalid, "dial " + address + ": not an address");
    const auto key = State::key_of(address, owner.node->host());
    auto& random = state->random;
    const bool refused = State::counted_down(state->net.refuse_dial_in) || random.chance(state->net.faults.refuse);
    co_await owner.node->sleep(state->latency(0));
    const auto host = key.substr(0, key.find_first_of(":!"));
    for (int attempts = 0;; ++attempts) {
      const auto until =
          std::max(state->clogged_until(owner.node->host(), host), state->clogged_until(host, owner.node->host()));
      if (until <= state->world.now()) break;
      // A connection request that meets no answer: tried again for two minutes, as a kernel does.
      if (attempts == 120) co_return fail(Errc::kUnavailable, address + ": Connection timed out");
      co_await owner.node->sleep(std::min<rt::Duration>(std::chrono::seconds(1), until - state->world.now()));
    }
    auto it = state->listeners.find(key);
    if (it == state->listeners.end() || it->second->closed || it->second->owner.gone() || refused) {
      if (refused) state->world.injected(Fault::kCut, "dial refused");
      co_return fail(Errc::kUnavailable, address + ": Connection refused");
    }
    auto listening = it->second;
    auto c = std::make_shared<Connection>(state->next_connection++, owner, listening->owner);
    state->connections[c->number] = c;
    if (state->connections.size() % 64 == 0)
      std::erase_if(state->connections, [](const auto& entry) { return entry.second.expired(); });
    listening->backlog.push_back(c);
    listening->wake.notify_all();
    auto stream = std::make_unique<SimStream>(state, std::move(c), 0);
    co_await owner.node->sleep(state->latency(0));
    co_return std::unique_ptr<rt::Stream>(std::move(stream));
  }

  std::shared_ptr<State> state_;
  Node& node_;
};

}  // namespace

SimNet::SimNet(World& world) : state_(std::make_shared<State>(*this, world)) {}
SimNet::~SimNet() = default;

std::unique_ptr<rt::Net> SimNet::endpoint(Node& node) {
  return std::make_unique<Endpoint>(state_, node);
}

void SimNet::cut(const std::string& host_a, const std::string& host_b, bool ghost) {
  for (auto& [_, weak] : std::map(state_->connections))
    if (auto c = weak.lock()) {
      const auto& x = c->ends[0].owner.node->host();
      const auto& y = c->ends[1].owner.node->host();
      auto fits = [](const std::string& want, const std::string& have) { return want.empty() || want == have; };
      if ((fits(host_a, x) && fits(host_b, y)) || (fits(host_a, y) && fits(host_b, x)))
        state_->cut(c, ghost, static_cast<int>(state_->random.below(2)));
    }
}

void SimNet::clog(const std::string& from, const std::string& to, rt::TimePoint until) {
  state_->world.injected(Fault::kClog, from + " to " + to);
  state_->clogs[{from, to}] = until;
}

void SimNet::unclog() {
  state_->clogs.clear();
  // Pumps wait for the end of the clog that they saw: give the others a new look now.
  for (auto& [_, weak] : std::map(state_->connections))
    if (auto c = weak.lock())
      for (int from : {0, 1})
        if (c->pipes[from].pump_scheduled)
          state_->world.after(rt::Duration(0), [state = state_, c, from] {
            state->pump(c, from);  // the one scheduled later finds nothing to do
          });
}

std::size_t SimNet::connections() const {
  std::size_t n = 0;
  for (auto& [_, weak] : state_->connections)
    if (auto c = weak.lock()) n += !(c->ends[0].reset && c->ends[1].reset);
  return n;
}

void SimNet::node_died(Node& node, bool silent) {
  auto& s = *state_;
  for (auto it = s.listeners.begin(); it != s.listeners.end();)
    if (it->second->owner.node == &node) {
      it->second->closed = true;
      for (auto& c : it->second->backlog) s.reset_both(*c);
      it->second->backlog.clear();
      it = s.listeners.erase(it);
    } else {
      ++it;
    }
  if (silent) s.world.injected(Fault::kSilentDeath, node.name());
  for (auto& [_, weak] : std::map(s.connections)) {
    auto c = weak.lock();
    if (!c) continue;
    for (int end : {0, 1}) {
      if (c->ends[end].owner.node != &node || c->ends[end].closed) continue;
      if (!silent) {
        s.close(c, end);
        continue;
      }
      // The machine is gone without a word: nothing more comes, and nobody says so. A minute later, or when the machine
      // is back and answers with a reset, the peer learns it.
      c->ends[end].closed = c->ends[end].silent = true;
      c->pipes[end].on_the_way.clear();
      c->pipes[end].flying = 0;
      s.world.after(std::chrono::minutes(1), [state = state_, c, end] {
        if (!c->ends[1 - end].reset) state->reset_end(*c, 1 - end);
      });
    }
  }
}

void SimNet::node_restarted(Node& node) {
  auto& s = *state_;
  for (auto& [_, weak] : std::map(s.connections))
    if (auto c = weak.lock())
      for (int end : {0, 1})
        if (c->ends[end].owner.node == &node && c->ends[end].silent && !c->ends[1 - end].reset)
          s.world.after(s.latency(0), [state = state_, c, end] { state->reset_end(*c, 1 - end); });
}

}  // namespace cairn::sim
