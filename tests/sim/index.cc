#include "tests/sim/index.h"

#include <algorithm>

namespace cairn::sim {

using storage::Batch;
using storage::IndexEntry;
using storage::Table;

struct IndexImage::State {
  State(IndexImage& i, World& w, const std::string& name) : image(i), world(w), random(w.seed(), "index " + name) {}

  struct Undo {
    Table table;
    std::string key;
    std::optional<std::string> before;
  };
  struct Applied {
    std::vector<Undo> undo;
    bool durable = false;
  };
  static constexpr std::size_t kHistory = 64;  // durable batches that come_back_older() can still take back

  IndexImage& image;
  World& world;
  Prng random;
  std::array<std::map<std::string, std::string>, storage::kTables> tables;
  std::deque<Applied> history;
  std::uint64_t life = 0;  // raised when a process is gone
  struct Pending {
    Batch batch;
    bool sync;
  };
  std::deque<Pending> in_flight;  // more than one only when a commit's Task was dropped; they land in order
  rt::TimePoint last_due{};

  std::map<std::string, std::string>& table(Table t) { return tables[static_cast<std::size_t>(t)]; }

  void apply(const Batch& batch, bool durable) {
    Applied applied;
    for (const auto& change : batch.changes()) {
      auto& t = table(change.table);
      auto it = t.find(change.key);
      applied.undo.push_back(
          {change.table, change.key, it == t.end() ? std::nullopt : std::optional(std::move(it->second))});
      if (change.value)
        t[change.key] = *change.value;
      else if (it != t.end())
        t.erase(it);
    }
    history.push_back(std::move(applied));
    if (durable) sync();
    while (history.size() > kHistory && history.front().durable) history.pop_front();
  }
  void sync() {
    for (auto it = history.rbegin(); it != history.rend() && !it->durable; ++it) it->durable = true;
  }
  void take_back() {
    auto& undo = history.back().undo;
    for (auto it = undo.rbegin(); it != undo.rend(); ++it) {
      if (it->before)
        table(it->table)[it->key] = std::move(*it->before);
      else
        table(it->table).erase(it->key);
    }
    history.pop_back();
  }
  std::size_t unsynced() const {
    return static_cast<std::size_t>(std::count_if(history.begin(), history.end(), [](auto& a) { return !a.durable; }));
  }
  rt::Duration delay() { return random.between(image.latency_min, image.latency_max); }
};

namespace {

using State = IndexImage::State;

struct Caller {
  Node* node;
  std::uint32_t incarnation;
  bool gone() const { return !node->alive() || node->incarnation() != incarnation; }
};

Failure gone(Caller caller) {
  return fail(Errc::kFailed, "index handle of a process that is gone (" + caller.node->name() + ")");
}

class SimIndex final : public storage::Index {
 public:
  SimIndex(std::shared_ptr<State> state, Caller caller) : state_(std::move(state)), caller_(caller) {}

  Task<void> commit(Batch batch, bool sync) override { return commit_on(state_, caller_, std::move(batch), sync); }
  Task<std::optional<std::string>> get(Table table, std::string key) override {
    return get_on(state_, caller_, table, std::move(key));
  }
  Task<std::vector<IndexEntry>> scan(Table table, std::string from, std::string to, std::size_t limit) override {
    return scan_on(state_, caller_, table, std::move(from), std::move(to), limit);
  }
  Task<void> verify() override { return verify_on(state_, caller_); }

 private:
  static Task<void> commit_on(std::shared_ptr<State> state, Caller caller, Batch batch, bool sync) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.commits;
    if (sync) ++s.image.counts.syncs;
    const bool error =
        (s.image.fail_commit_in > 0 && --s.image.fail_commit_in == 0) || s.random.chance(s.image.faults.commit_error);
    s.in_flight.push_back({std::move(batch), sync});
    s.last_due = std::max(s.last_due, s.world.now() + s.delay());
    rt::OneShot<Result<void>> done(*caller.node);
    s.world.at(s.last_due, [state, caller, life = s.life, error, setter = done.setter()] {
      auto& s = *state;
      if (s.life != life) return;  // its fate was drawn when the process went
      auto pending = std::move(s.in_flight.front());
      s.in_flight.pop_front();
      if (!error || s.random.chance(0.5)) s.apply(pending.batch, pending.sync && !error);
      if (error) s.world.injected(Fault::kIndexError, "commit");
      if (caller.gone()) return;
      if (error)
        setter.set(fail(Errc::kFailed, "index: write-ahead log: Input/output error"));
      else
        setter.set({});
    });
    co_return co_await done;
  }

  static Task<std::optional<std::string>> get_on(std::shared_ptr<State> state, Caller caller, Table table,
                                                 std::string key) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.gets;
    co_await caller.node->sleep(s.delay());
    CO_CHECK_OK(readable(s, s.image.fail_get_in));
    auto& t = s.table(table);
    auto it = t.find(key);
    co_return it == t.end() ? std::nullopt : std::optional(it->second);
  }

  static Task<std::vector<IndexEntry>> scan_on(std::shared_ptr<State> state, Caller caller, Table table,
                                               std::string from, std::string to, std::size_t limit) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.scans;
    co_await caller.node->sleep(s.delay());
    CO_CHECK_OK(readable(s, s.image.fail_scan_in));
    auto& t = s.table(table);
    std::vector<IndexEntry> out;
    for (auto it = t.lower_bound(from); it != t.end() && out.size() < limit && (to.empty() || it->first < to); ++it)
      out.push_back({it->first, it->second});
    co_return out;
  }

  static Task<void> verify_on(std::shared_ptr<State> state, Caller caller) {
    if (caller.gone()) co_return gone(caller);
    co_await caller.node->sleep(state->delay());
    co_return readable(*state, state->image.fail_verify_in);
  }

  static Result<void> readable(State& s, std::uint64_t& countdown) {
    const bool counted_down = countdown > 0 && --countdown == 0;
    if (!counted_down && !s.random.chance(s.image.faults.read_error)) return {};
    s.world.injected(Fault::kIndexError, "read");
    return fail(Errc::kDataLoss, "index: block checksum mismatch");
  }

  std::shared_ptr<State> state_;
  Caller caller_;
};

}  // namespace

IndexImage::IndexImage(World& world, std::string name)
    : world_(world), name_(std::move(name)), state_(std::make_shared<State>(*this, world, name_)) {}
IndexImage::~IndexImage() = default;

std::unique_ptr<storage::Index> IndexImage::attach(Node& node) {
  if (std::find(node.indexes_.begin(), node.indexes_.end(), this) == node.indexes_.end()) node.indexes_.push_back(this);
  return std::make_unique<SimIndex>(state_, Caller{&node, node.incarnation()});
}

void IndexImage::process_gone() {
  auto& s = *state_;
  ++s.life;
  for (auto pending = std::exchange(s.in_flight, {}); !pending.empty() && s.random.chance(0.5); pending.pop_front())
    s.apply(pending.front().batch, pending.front().sync && s.random.chance(0.5));
}

void IndexImage::power_loss() {
  process_gone();  // a commit in flight is one more unsynced batch
  auto& s = *state_;
  const auto unsynced = s.unsynced();
  const auto lost = s.random.below(unsynced + 1);
  for (std::size_t i = 0; i < lost; ++i) s.take_back();
  if (lost > 0) world_.injected(Fault::kIndexLost, name_ + " " + std::to_string(lost) + " batches");
  s.sync();
}

bool IndexImage::come_back_older(std::size_t batches) {
  auto& s = *state_;
  std::size_t taken = 0;
  while (taken < batches && !s.history.empty()) {
    s.take_back();
    ++taken;
  }
  if (taken == 0) return false;
  world_.injected(Fault::kIndexOlder, name_ + " " + std::to_string(taken) + " batches");
  return true;
}

std::size_t IndexImage::unsynced_batches() const {
  return state_->unsynced();
}
std::vector<std::string> IndexImage::keys(Table table) const {
  std::vector<std::string> out;
  for (const auto& [key, _] : state_->table(table)) out.push_back(key);
  return out;
}
std::map<std::string, std::string> IndexImage::entries(Table table) const {
  return state_->table(table);
}
std::size_t IndexImage::size(Table table) const {
  return state_->table(table).size();
}

}  // namespace cairn::sim
