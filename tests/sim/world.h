#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "proto/rt/loop.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "tests/sim/faults.h"
#include "tests/sim/prng.h"

// A deterministic world: all nodes, their network and disks, on one virtual clock under one seed. Same seed, same
// binary: same events in the same order, proved by trace_hash().

namespace cairn::sim {

class Node;
class SimNet;
class DiskImage;
class IndexImage;
struct DiskOptions;

/// How a node ends.
enum class Death {
  kProcess,    // SIGKILL: its kernel closes the connections, operations in flight on its disks still land
  kPowerLoss,  // its disks and indexes keep only what was durable, and what the draw leaves of the rest
};

/// One queue of (virtual time, sequence) for all nodes.
///
/// Lifetime: outlives everything made in it. Its destructor kills the nodes, then drops the events, disks and indexes.
class World {
 public:
  explicit World(std::uint64_t seed);
  World(const World&) = delete;
  ~World();

  std::uint64_t seed() const { return seed_; }
  rt::TimePoint now() const { return now_; }
  /// The world's own draws: delays and fates. Nodes have streams of their own.
  Prng& random() { return random_; }
  SimNet& net() { return *net_; }
  FaultCounts faults;
  void injected(Fault fault, std::string_view detail = {});

  struct NodeOptions {
    std::string host{};           // several nodes may share one; default: a host of its own
    std::int64_t clock_ppm = 0;   // how much faster the node's steady clock runs
    rt::Duration clock_offset{};  // at the start
    bool offload_delays = true;   // false: offloaded work runs at the moment of submit()
  };
  Node& make_node(std::string name, NodeOptions options);
  Node& make_node(std::string name);
  DiskImage& make_disk(std::string name, DiskOptions options);
  IndexImage& make_index(std::string name);

  /// An event that belongs to no node: faults, schedules, hardware. A job that runs on no node may kill nodes.
  rt::TimerId at(rt::TimePoint when, rt::Job job) { return schedule(when, nullptr, std::move(job)); }
  rt::TimerId after(rt::Duration delay, rt::Job job) { return schedule(now_ + delay, nullptr, std::move(job)); }
  void cancel(rt::TimerId timer);

  /// Runs the next event; false when there is none.
  bool step();
  /// Runs until `done()`, at most to `limit` (inclusive). Returns done(): false = time or events ran out.
  bool run_until(const std::function<bool()>& done, rt::TimePoint limit);
  /// Runs everything up to `when`; the clock stands at `when` after it.
  void run_until(rt::TimePoint when);
  void run_for(rt::Duration duration) { run_until(now_ + duration); }
  /// Runs `task` on `node` to its end.
  /// errors: the task's;  kDeadline  not done within `limit`;  kUnavailable  the node died
  template <class T>
  Result<T> run(Node& node, Task<T> task, rt::Duration limit = std::chrono::hours(1));

  std::uint64_t events() const { return events_; }
  std::uint64_t trace_hash() const { return hash_; }
  /// Mixes what happened into the trace hash.
  void mix(std::uint64_t value) {
    hash_ ^= value + 0x9e3779b97f4a7c15 + (hash_ << 6) + (hash_ >> 2);
    hash_ *= 0xff51afd7ed558ccd;
    hash_ ^= hash_ >> 29;
  }
  void mix(std::string_view text);

  /// Called with every trace line, when set. Tracing changes nothing in the run.
  std::function<void(const std::string&)> on_trace;
  bool tracing() const { return on_trace != nullptr; }
  void trace(std::string_view node, std::string_view line);
  /// Least level of log lines that reach the trace (all are hashed).
  rt::Level trace_level = rt::Level::kDebug;

 private:
  friend class Node;
  struct Slot {
    rt::Job job;
    Node* node = nullptr;
    std::uint32_t generation = 0;
    bool used = false;
  };
  struct Entry {
    rt::TimePoint when;
    std::uint64_t sequence;
    std::uint32_t slot;
    std::uint32_t generation;
    bool operator>(const Entry& other) const {
      return when != other.when ? when > other.when : sequence > other.sequence;
    }
  };
  rt::TimerId schedule(rt::TimePoint when, Node* node, rt::Job job);
  void drop_events_of(const Node* node);
  bool next(Entry& out, rt::TimePoint limit);

  std::uint64_t seed_;
  Prng random_;
  rt::TimePoint now_{std::chrono::hours(1)};  // so that "a while ago" is never negative
  std::uint64_t sequence_ = 0, events_ = 0, hash_ = 0x243f6a8885a308d3, same_instant_ = 0;
  std::vector<Entry> heap_;
  std::deque<Entry> ready_;  // due at now_, in order: most events are posts
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  Node* current_ = nullptr;
  std::unique_ptr<SimNet> net_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::unique_ptr<DiskImage>> disks_;
  std::vector<std::unique_ptr<IndexImage>> indexes_;
};

/// A simulated machine (or process) on virtual time: the loop and every other seam of one rt::Runtime.
///
///   auto& node = world.make_node("daemon");
///   auto opened = world.run(node, Target::open(node.runtime(), disk.attach(node), index.attach(node), ...));
///   Target& target = node.hold(*std::move(opened));
///   node.kill(Death::kPowerLoss);   // drops jobs and timers, then frames, then held objects, last first
///   node.restart();
class Node final : public rt::Loop {
 public:
  ~Node() override;
  const std::string& name() const { return name_; }
  const std::string& host() const { return options_.host; }
  std::uint32_t incarnation() const { return incarnation_; }
  bool alive() const { return alive_; }
  World& world() { return world_; }
  rt::Runtime runtime();

  /// Where the node's coroutines live; its kill() destroys their frames.
  rt::Scope& scope() { return *scope_; }
  void spawn(Task<void> task, rt::Scope::Done done = {});
  /// Keeps an object until the node dies; then destroyed after the frames, last first.
  template <class T>
  T& hold(std::unique_ptr<T> object) {
    T& ref = *object;
    held_.push_back(std::shared_ptr<T>(std::move(object)));
    return ref;
  }
  template <class T>
  T& hold(std::shared_ptr<T> object) {
    held_.push_back(object);
    return *object;
  }

  /// Ends this incarnation. Never from one of the node's own events: use kill_soon() there.
  /// `silent`: peers see nothing until the node restarts or a minute has passed.
  void kill(Death death, bool silent = false);
  /// The same as the very next event of the world.
  void kill_soon(Death death, bool silent = false);
  void restart();

  // rt::Loop
  void post(rt::Job job) override;
  rt::TimerId at(rt::TimePoint when, rt::Job job) override;
  void cancel(rt::TimerId timer) override { world_.cancel(timer); }
  rt::TimePoint now() const override { return local(world_.now()); }
  std::int64_t wall_nanos() const override;

 private:
  friend class World;
  struct Seams;
  Node(World& world, std::uint32_t number, std::string name, World::NodeOptions options);
  rt::TimePoint local(rt::TimePoint world_time) const;
  rt::TimePoint world_time(rt::TimePoint local_time) const;

  World& world_;
  std::uint32_t number_;
  std::string name_;
  World::NodeOptions options_;
  std::uint32_t incarnation_ = 1;
  bool alive_ = true;
  std::unique_ptr<Seams> seams_;
  std::vector<std::shared_ptr<void>> held_;
  std::optional<rt::Scope> scope_;
  friend class DiskImage;
  friend class IndexImage;
  std::vector<DiskImage*> disks_;
  std::vector<IndexImage*> indexes_;
};

template <class T>
Result<T> World::run(Node& node, Task<T> task, rt::Duration limit) {
  // The outcome is shared: the frame may outlive this call when the limit passes.
  auto outcome = std::make_shared<std::optional<Result<T>>>();
  struct Into {
    static Task<void> run(Task<T> inner, std::shared_ptr<std::optional<Result<T>>> out) {
      out->emplace(co_await std::move(inner));
      co_return {};
    }
  };
  const auto incarnation = node.incarnation();
  node.spawn(Into::run(std::move(task), outcome));
  run_until([&] { return outcome->has_value() || node.incarnation() != incarnation || !node.alive(); }, now_ + limit);
  if (outcome->has_value()) return std::move(**outcome);
  if (node.incarnation() != incarnation || !node.alive())
    return fail(Errc::kUnavailable, node.name() + " died meanwhile");
  return fail(Errc::kDeadline, "not done within the limit of World::run on " + node.name());
}

}  // namespace cairn::sim
