#include "tests/sim/world.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/net.h"

namespace cairn::sim {

namespace {
constexpr std::uint64_t kLivelockEvents = 20'000'000;
}

World::World(std::uint64_t seed) : seed_(seed), random_(seed, "world"), net_(std::make_unique<SimNet>(*this)) {}

World::~World() {
  for (auto& node : nodes_)
    if (node->alive()) node->kill(Death::kProcess);
  // Dropping a job may schedule another (a lease that goes back): repeat until none is left.
  for (bool any = true; any;) {
    any = false;
    for (std::size_t i = 0; i < slots_.size(); ++i)
      if (slots_[i].used) {
        auto job = std::move(slots_[i].job);
        slots_[i].used = false;
        any = true;
      }
  }
}

Node& World::make_node(std::string name, NodeOptions options) {
  const auto number = static_cast<std::uint32_t>(nodes_.size());
  if (options.host.empty()) options.host = "10.0.0." + std::to_string(number + 1);
  nodes_.push_back(std::unique_ptr<Node>(new Node(*this, number, std::move(name), std::move(options))));
  return *nodes_.back();
}
Node& World::make_node(std::string name) {
  return make_node(std::move(name), NodeOptions{});
}
DiskImage& World::make_disk(std::string name, DiskOptions options) {
  disks_.push_back(std::make_unique<DiskImage>(*this, std::move(name), options));
  return *disks_.back();
}
IndexImage& World::make_index(std::string name) {
  indexes_.push_back(std::make_unique<IndexImage>(*this, std::move(name)));
  return *indexes_.back();
}

void World::injected(Fault fault, std::string_view detail) {
  faults.add(fault);
  mix(static_cast<std::uint64_t>(fault) + 1);
  if (tracing()) trace("world", "fault " + std::string(name_of(fault)) + " " + std::string(detail));
}

rt::TimerId World::schedule(rt::TimePoint when, Node* node, rt::Job job) {
  std::uint32_t slot;
  if (free_slots_.empty()) {
    slot = static_cast<std::uint32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  auto& s = slots_[slot];
  s.job = std::move(job);
  s.node = node;
  s.used = true;
  Entry entry{std::max(when, now_), ++sequence_, slot, s.generation};
  if (entry.when == now_) {
    ready_.push_back(entry);
  } else {
    heap_.push_back(entry);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }
  return (static_cast<std::uint64_t>(s.generation) << 32 | slot) + 1;
}

void World::cancel(rt::TimerId timer) {
  if (timer == 0) return;
  const auto slot = static_cast<std::uint32_t>(timer - 1);
  const auto generation = static_cast<std::uint32_t>((timer - 1) >> 32);
  if (slot >= slots_.size()) return;
  auto& s = slots_[slot];
  if (!s.used || s.generation != generation) return;
  auto job = std::move(s.job);  // destroyed last: its destructor may come back here
  s.job = nullptr;
  s.used = false;
  ++s.generation;
  free_slots_.push_back(slot);  // the queue's entry is stale by its generation
}

void World::drop_events_of(const Node* node) {
  for (std::size_t i = 0; i < slots_.size(); ++i)  // slots_ may grow meanwhile
    if (slots_[i].used && slots_[i].node == node)
      cancel((static_cast<std::uint64_t>(slots_[i].generation) << 32 | i) + 1);
}

bool World::next(Entry& out, rt::TimePoint limit) {
  auto stale = [&](const Entry& e) { return !slots_[e.slot].used || slots_[e.slot].generation != e.generation; };
  while (!ready_.empty() && stale(ready_.front())) ready_.pop_front();
  while (!heap_.empty() && stale(heap_.front())) {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
  }
  const bool from_heap = ready_.empty() || (!heap_.empty() && ready_.front() > heap_.front());
  if (from_heap) {
    if (heap_.empty() || heap_.front().when > limit) return false;
    out = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
  } else {
    if (ready_.front().when > limit) return false;
    out = ready_.front();
    ready_.pop_front();
  }
  return true;
}

bool World::step() {
  Entry entry;
  if (!next(entry, rt::kNever)) return false;
  // A world that makes no progress in time will never end: say so instead of hanging.
  same_instant_ = entry.when == now_ ? same_instant_ + 1 : 0;
  now_ = entry.when;
  auto& s = slots_[entry.slot];
  auto job = std::move(s.job);
  Node* node = s.node;
  s.job = nullptr;
  s.used = false;
  ++s.generation;
  free_slots_.push_back(entry.slot);
  if (same_instant_ > kLivelockEvents) {
    std::fprintf(stderr, "sim: livelock: %llu events at one instant, last on %s, seed %llu\n",
                 static_cast<unsigned long long>(same_instant_), node ? node->name().c_str() : "the world",
                 static_cast<unsigned long long>(seed_));
    std::abort();
  }
  ++events_;
  mix(static_cast<std::uint64_t>(now_.time_since_epoch().count()) ^ (entry.sequence << 20) ^
      (node ? (static_cast<std::uint64_t>(node->number_) + 1) << 56 : 0));
  current_ = node;
  job();
  current_ = nullptr;
  return true;
}

bool World::run_until(const std::function<bool()>& done, rt::TimePoint limit) {
  while (!done()) {
    Entry entry;
    auto stale = [&](const Entry& e) { return !slots_[e.slot].used || slots_[e.slot].generation != e.generation; };
    while (!ready_.empty() && stale(ready_.front())) ready_.pop_front();
    if (ready_.empty()) {
      while (!heap_.empty() && stale(heap_.front())) {
        std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
        heap_.pop_back();
      }
      if (heap_.empty()) return done();
      if (heap_.front().when > limit) {
        now_ = std::max(now_, limit);
        return done();
      }
    }
    step();
  }
  return true;
}

void World::run_until(rt::TimePoint when) {
  run_until([] { return false; }, when);
  now_ = std::max(now_, when);
}

void World::mix(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3;
  mix(h);
}

void World::trace(std::string_view node, std::string_view line) {
  char stamp[32];
  std::snprintf(stamp, sizeof stamp, "%.6f ",
                static_cast<double>((now_.time_since_epoch() - std::chrono::hours(1)).count()) / 1e9);
  if (on_trace) on_trace(stamp + std::string(node) + " " + std::string(line));
}

// ---- Node

struct Node::Seams {
  class SimOffload final : public rt::Offload {
   public:
    explicit SimOffload(Node& node) : node_(node) {}
    void submit(rt::Job work, rt::Job done) override {
      if (!node_.options_.offload_delays) {
        work();
        node_.post(std::move(done));
        return;
      }
      const auto delay = node_.world_.random().between(std::chrono::microseconds(1), std::chrono::microseconds(50));
      node_.world_.schedule(node_.world_.now() + delay, &node_,
                            [work = std::move(work), done = std::move(done)]() mutable {
                              work();
                              done();
                            });
    }

   private:
    Node& node_;
  };
  class SimLog final : public rt::Log {
   public:
    explicit SimLog(Node& node) : node_(node) {}
    void write(rt::Level level, std::string_view event, std::initializer_list<rt::Field> fields) override {
      auto& world = node_.world_;
      world.mix(event);
      for (const auto& field : fields) {
        world.mix(field.key);
        world.mix(field.value);
      }
      if (!world.tracing() || level < world.trace_level) return;
      static constexpr const char* kLevels[] = {"debug", "info", "warning", "error"};
      std::string line = kLevels[static_cast<int>(level)];
      line += " ";
      line += event;
      for (const auto& field : fields) line += " " + std::string(field.key) + "=" + field.value;
      world.trace(node_.name_ + "#" + std::to_string(node_.incarnation_), line);
    }

   private:
    Node& node_;
  };

  explicit Seams(Node& node)
      : random(node.world_.seed(), node.name_, node.incarnation_),
        offload(node),
        log(node),
        net(node.world_.net().endpoint(node)) {}
  Prng random;
  SimOffload offload;
  SimLog log;
  std::unique_ptr<rt::Net> net;
};

Node::Node(World& world, std::uint32_t number, std::string name, World::NodeOptions options)
    : world_(world), number_(number), name_(std::move(name)), options_(std::move(options)) {
  seams_ = std::make_unique<Seams>(*this);
  scope_.emplace(*this);
}

Node::~Node() = default;

rt::Runtime Node::runtime() {
  return {.loop = *this, .random = seams_->random, .net = *seams_->net, .offload = seams_->offload, .log = seams_->log};
}

void Node::spawn(Task<void> task, rt::Scope::Done done) {
  assert(alive_);
  scope_->spawn(std::move(task), std::move(done));
}

void Node::kill(Death death, bool silent) {
  assert(alive_ && "a node dies once; restart() it first");
  assert(world_.current_ != this && "a node cannot destroy the frame that runs: kill_soon()");
  alive_ = false;  // from here on its posts are dropped
  world_.injected(death == Death::kPowerLoss ? Fault::kPowerLoss : Fault::kProcessKill, name_);
  world_.net().node_died(*this, silent);
  world_.drop_events_of(this);
  scope_.reset();
  while (!held_.empty()) held_.pop_back();
  world_.drop_events_of(this);
  if (death == Death::kPowerLoss) {
    for (auto* disk : disks_) disk->power_loss();
    for (auto* index : indexes_) index->power_loss();
  }
  for (auto* index : indexes_) index->process_gone();
  disks_.clear();
  indexes_.clear();
}

void Node::kill_soon(Death death, bool silent) {
  world_.after(rt::Duration(0), [this, death, silent, incarnation = incarnation_] {
    if (alive_ && incarnation_ == incarnation) kill(death, silent);
  });
}

void Node::restart() {
  assert(!alive_);
  ++incarnation_;
  alive_ = true;
  world_.net().node_restarted(*this);
  seams_ = std::make_unique<Seams>(*this);
  scope_.emplace(*this);
  if (world_.tracing()) world_.trace(name_ + "#" + std::to_string(incarnation_), "restarts");
}

void Node::post(rt::Job job) {
  if (!alive_) return;
  world_.schedule(world_.now(), this, std::move(job));
}

rt::TimerId Node::at(rt::TimePoint when, rt::Job job) {
  if (!alive_ || when == rt::kNever) return 0;
  return world_.schedule(world_time(when), this, std::move(job));
}

std::int64_t Node::wall_nanos() const {
  return 1'700'000'000'000'000'000 + now().time_since_epoch().count();
}

rt::TimePoint Node::local(rt::TimePoint world_time) const {
  const auto t = world_time.time_since_epoch().count();
  return rt::TimePoint(rt::Duration(t + t / 1'000'000 * options_.clock_ppm) + options_.clock_offset);
}

rt::TimePoint Node::world_time(rt::TimePoint local_time) const {
  const auto l = (local_time.time_since_epoch() - options_.clock_offset).count();
  auto t = rt::TimePoint(
      rt::Duration(static_cast<std::int64_t>(static_cast<__int128>(l) * 1'000'000 / (1'000'000 + options_.clock_ppm))));
  while (local(t) < local_time) t += std::chrono::microseconds(1);  // never early; the rounding is at most 1 ms
  return std::max(t, world_.now());
}

}  // namespace cairn::sim
