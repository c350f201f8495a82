#include <algorithm>
#include <map>
#include <set>

#include "proto/rt/unit_pool.h"
#include "server/coordinator/map.h"
#include "server/daemon/daemon.h"
#include "storage/record_store/record_store.h"
#include "tests/sim/bugs.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/prng.h"
#include "tests/sim/workload.h"

namespace cairn::sim {

namespace {

using namespace std::chrono_literals;

constexpr std::size_t kDirectoriesMax = 3;
constexpr std::uint64_t kKeys = 6;
constexpr rt::Duration kSyncMax = 10min;  // virtual; until every directory has everything again

/// What the writers were told of one record: its value is `known` or one of those whose outcome nobody knows.
struct RecordState {
  std::string known;
  std::set<std::string> possible;
};

class TargetsWorkload {
 public:
  explicit TargetsWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        world_(options_.seed),
        draw_(options_.seed, "targets workload"),
        node_(world_.make_node("daemon")) {
    world_.on_trace = options_.trace;
  }
  ~TargetsWorkload() {
    if (node_.alive()) node_.kill(Death::kProcess);
  }
  WorkloadResult run();

 private:
  struct Directory {
    std::string path;
    DiskImage* disk = nullptr;
    IndexImage* index = nullptr;
    std::optional<Uuid> uuid;  // once it is formatted
  };
  /// In the order in which they are made; destroyed the other way round.
  struct Process {
    std::unique_ptr<rt::UnitPool> units;
    server::TargetSet targets;
    std::unique_ptr<server::Daemon> daemon;
  };

  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    if (world_.tracing()) world_.trace("checker", "BROKEN " + violations_.back());
  }
  static HomeGroup group_of(std::uint64_t key) { return static_cast<HomeGroup>(key % 2 == 0 ? 0 : 200); }

  void add_directory();
  void start();
  bool try_start(const std::vector<std::size_t>& which);
  void begin_faults();
  void end_faults();
  void kill();
  void lose_one();
  void verify(const char* when);
  void heal();
  std::optional<server::ClusterMap> newest_map() const;
  std::vector<std::size_t> all() const {
    std::vector<std::size_t> out(directories_.size());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = i;
    return out;
  }

  static Task<void> open(TargetsWorkload* w, std::vector<std::size_t> which);
  static Task<void> write(TargetsWorkload* w);
  static Task<void> change(TargetsWorkload* w, std::uint64_t key);
  static Task<void> verify_all(TargetsWorkload* w, std::string when);

  WorkloadOptions options_;
  World world_;
  Prng draw_;
  Node& node_;
  std::vector<Directory> directories_;
  std::set<Uuid> lost_;  // to be declared at the next start
  std::size_t made_ = 0;
  Process* process_ = nullptr;  // held by the node
  std::string last_error_;
  std::map<std::uint64_t, RecordState> records_;
  std::uint64_t next_value_ = 0;
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

void TargetsWorkload::add_directory() {
  const auto name = "d" + std::to_string(made_++);
  auto& index = world_.make_index(name + "/index");
  index.latency_max = draw_.chance(0.3) ? rt::Duration(3ms) : rt::Duration(100us);
  directories_.push_back(
      {.path = name, .disk = &world_.make_disk(name, {.capacity_bytes = 64 * kMiB}), .index = &index, .uuid = {}});
}

// ---- Starts

Task<void> TargetsWorkload::open(TargetsWorkload* w, std::vector<std::size_t> which) {
  auto runtime = w->node_.runtime();
  auto& p = w->node_.hold(std::make_unique<Process>());
  CO_TRY(p.units, rt::UnitPool::create(w->node_, 8, 64 * kKiB));
  storage::Target::Options target_options;
  target_options.chunks.segment_bytes = 4 * kMiB;
  target_options.chunks.ballast_bytes = 1 * kMiB;
  for (const auto i : which) {
    auto& directory = w->directories_[i];
    auto target = co_await storage::Target::open(runtime, directory.disk->attach(w->node_),
                                                 directory.index->attach(w->node_), *p.units, target_options);
    if (!target) {
      // As the daemon does it: left out.
      if (w->world_.tracing()) w->world_.trace("daemon", directory.path + ": " + target.error().message);
      if (target.error().code == Errc::kDataLoss) w->broken("P1", directory.path + ": " + target.error().message);
      continue;
    }
    directory.uuid = (*target)->uuid();
    p.targets.add(directory.path, *std::move(target));
  }
  if (p.targets.all().empty()) co_return fail(Errc::kFailed, "no directory opens");
  server::Daemon::Options options;
  options.node = "daemon";
  options.lost_targets = w->lost_;
  options.membership_bugs = membership_bugs(w->options_.bug);
  CO_TRY(p.daemon, co_await server::Daemon::create(runtime, p.targets, *p.units, std::move(options)));
  w->process_ = &p;
  co_return {};
}

bool TargetsWorkload::try_start(const std::vector<std::size_t>& which) {
  if (world_.tracing()) {
    std::string text = "starts with";
    for (const auto i : which) text += " " + directories_[i].path;
    world_.trace("daemon", text);
  }
  auto opened = world_.run(node_, open(this, which), 5min);
  if (opened) return true;
  last_error_ = opened.error().message;
  if (world_.tracing()) world_.trace("daemon", "does not start: " + last_error_);
  if (opened.error().code == Errc::kDataLoss) broken("P1", "a start is refused: " + last_error_);
  kill();
  return false;
}

/// With all directories, or with some; those that are refused get all.
void TargetsWorkload::start() {
  auto which = all();
  const auto dice = draw_.below(100);
  if (lost_.empty() && result_.commits > 0 && directories_.size() > 1 && dice < 45) {
    if (dice < 25) {
      which.erase(which.begin() + static_cast<std::ptrdiff_t>(draw_.below(which.size())));
    } else {
      while (which.size() > 1) which.erase(which.begin() + static_cast<std::ptrdiff_t>(draw_.below(which.size())));
    }
    // A new one is not taken while others are missing: alone it would be a new cluster.
    std::erase_if(
        which, [&](std::size_t i) { return !directories_[i].index->entries(storage::Table::kMeta).contains("map"); });
    world_.injected(Fault::kDirectoryGone);
    if (!which.empty() && try_start(which)) return;
  }
  for (int tries = 0; tries < 5 && violations_.empty(); ++tries) {
    if (try_start(all())) {
      lost_.clear();
      return;
    }
  }
  if (violations_.empty()) broken("P7", "the daemon does not start: " + last_error_);
}

void TargetsWorkload::kill() {
  process_ = nullptr;
  end_faults();
  node_.kill(draw_.chance(0.6) ? Death::kPowerLoss : Death::kProcess);
  if (draw_.chance(0.3)) world_.run_for(draw_.between(rt::Duration(0), rt::Duration(500ms)));
  node_.restart();
}

std::optional<server::ClusterMap> TargetsWorkload::newest_map() const {
  std::optional<server::ClusterMap> newest;
  const auto age = [](const server::ClusterMap& map) { return std::tuple(map.generation, map.term, map.version); };
  for (const auto& directory : directories_) {
    const auto meta = directory.index->entries(storage::Table::kMeta);
    const auto stored = meta.find("map");
    if (stored == meta.end()) continue;
    auto map = server::decode_map(stored->second);
    if (map && (!newest || age(*newest) < age(*map))) newest = *std::move(map);
  }
  return newest;
}

/// Between two lives a directory is lost, and an empty one takes its place: when another one serves by the newest map,
/// it has everything.
void TargetsWorkload::lose_one() {
  const auto map = newest_map();
  if (!map) return;
  std::vector<std::size_t> may_go;
  for (std::size_t i = 0; i < directories_.size(); ++i) {
    if (!directories_[i].uuid || map->target(*directories_[i].uuid) == nullptr) continue;
    const auto& members = map->find(true, 0)->members;
    if (std::ranges::any_of(members, [&](const server::Member& member) {
          return member.serving && member.target != *directories_[i].uuid && !map->target(member.target)->out &&
                 std::ranges::any_of(directories_, [&](const Directory& d) { return d.uuid == member.target; });
        }))
      may_go.push_back(i);
  }
  if (may_go.empty()) return;
  const auto gone = may_go[draw_.below(may_go.size())];
  if (world_.tracing()) world_.trace("world", directories_[gone].path + " is lost");
  world_.injected(Fault::kDirectoryLost);
  lost_.insert(*directories_[gone].uuid);
  directories_.erase(directories_.begin() + static_cast<std::ptrdiff_t>(gone));
  add_directory();
}

// ---- Faults while it runs

void TargetsWorkload::begin_faults() {
  for (auto& directory : directories_) {
    if (draw_.chance(0.3)) directory.disk->faults.slow = 0.05;
    directory.disk->faults.slow_by = draw_.between(rt::Duration(1ms), rt::Duration(300ms));
  }
  for (std::uint64_t victims = draw_.below(3); victims > 0; --victims) {
    auto& victim = directories_[draw_.below(directories_.size())];
    const auto at = draw_.between(1, 60);
    switch (draw_.below(4)) {
      case 0:
        victim.index->fail_commit_in = at;
        break;
      case 1:
        victim.disk->fail_write_in = at;
        break;
      case 2:
        victim.disk->fail_flush_in = at;
        break;
      default:
        victim.index->faults.read_error = 0.02;
    }
  }
}

void TargetsWorkload::end_faults() {
  for (auto& directory : directories_) {
    directory.disk->faults = {};
    directory.disk->fail_write_in = directory.disk->fail_flush_in = directory.disk->fail_read_in = 0;
    directory.index->faults = {};
    directory.index->fail_commit_in = 0;
  }
}

// ---- Writers

Task<void> TargetsWorkload::change(TargetsWorkload* w, std::uint64_t key) {
  auto& model = w->records_[key];
  auto& records = w->process_->daemon->records();
  const auto group = group_of(key);
  const auto name = "k" + std::to_string(key);
  CO_TRY(auto now, co_await records.get(group, name));
  const auto value = now ? now->value : std::string();
  if (value != model.known && !model.possible.contains(value))
    w->broken("P1", "record " + name + " is '" + value + "', acknowledged was '" + model.known + "'");
  ++w->result_.restores;
  storage::Transaction t;
  t.group = group;
  t.compares.push_back({name, now ? now->version : Version{}});
  const auto next = std::to_string(++w->next_value_);
  t.puts.emplace_back(name, next);
  t.puts.emplace_back(name + ".twin", next);
  if (w->draw_.chance(0.2)) t.puts.emplace_back("unique." + next, std::string(w->draw_.below(2000), 'x'));
  model.possible.insert(next);
  auto done = co_await records.apply(std::move(t));
  if (done) {
    // Whoever read an older version got a conflict: this is the value now, unless a later one is under way.
    model.known = next;
    std::erase_if(model.possible, [&](const auto& v) { return std::stoull(v) <= std::stoull(next); });
    ++w->result_.commits;
  } else if (done.error().code == Errc::kConflict) {
    model.possible.erase(next);
  }
  co_return {};
}

Task<void> TargetsWorkload::write(TargetsWorkload* w) {
  for (;;) {
    co_await w->node_.sleep(w->draw_.between(rt::Duration(0), rt::Duration(w->draw_.chance(0.7) ? 100us : 5ms)));
    if (w->process_->daemon->failure()) co_await w->node_.sleep(100ms);
    (void)co_await change(w, w->draw_.below(kKeys));
  }
}

// ---- After a start

Task<void> TargetsWorkload::verify_all(TargetsWorkload* w, std::string when) {
  auto& records = w->process_->daemon->records();
  for (auto& [key, model] : w->records_) {
    const auto name = "k" + std::to_string(key);
    CO_TRY(auto now, co_await records.get(group_of(key), name));
    CO_TRY(auto twin, co_await records.get(group_of(key), name + ".twin"));
    const auto value = now ? now->value : std::string();
    if (value != (twin ? twin->value : std::string()))
      w->broken("P2", when + ": half a transaction: " + name + " is '" + value + "'");
    if (value != model.known && !model.possible.contains(value))
      w->broken("P1", when + ": record " + name + " is '" + value + "', acknowledged was '" + model.known + "'");
    model.known = value;
    model.possible.clear();
  }
  co_return {};
}

void TargetsWorkload::verify(const char* when) {
  if (auto done = world_.run(node_, verify_all(this, when), 10min); !done)
    broken("P7", std::string(when) + ": " + done.error().message);
}

/// Redundancy comes back: all directories serve, and hold the same.
void TargetsWorkload::heal() {
  if (!try_start(all())) {
    broken("P7", "the daemon does not start though everything is well: " + last_error_);
    return;
  }
  lost_.clear();
  verify("after healing");
  const auto whole = [&] {
    const auto& members = process_->daemon->map().find(true, 0)->members;
    return members.size() == directories_.size() && std::ranges::all_of(members, &server::Member::serving);
  };
  if (!world_.run_until(whole, world_.now() + kSyncMax)) {
    broken("P1", "the redundancy of records does not come back");
    return;
  }
  for (std::uint64_t key = 0; key < kKeys; ++key)
    if (auto done = world_.run(node_, change(this, key)); !done)
      broken("P7", "a change fails though everything is well: " + done.error().message);
  const auto first = directories_.front().index->entries(storage::Table::kRecords);
  for (const auto& directory : directories_)
    if (directory.index->entries(storage::Table::kRecords) != first)
      broken("P1", directory.path + " serves, and holds other records than " + directories_.front().path);
}

WorkloadResult TargetsWorkload::run() {
  result_.seed = options_.seed;
  const auto began = world_.now();
  const auto count = draw_.between(1, kDirectoriesMax);
  for (std::uint64_t i = 0; i < count; ++i) add_directory();
  const auto lives = draw_.between(2, 8);
  result_.configuration = "directories=" + std::to_string(count) + " lives=" + std::to_string(lives);
  for (std::uint64_t life = 0; life < lives && violations_.empty(); ++life) {
    if (life > 0 && directories_.size() < kDirectoriesMax && draw_.chance(0.3)) add_directory();
    start();
    if (!violations_.empty()) break;
    verify("after a start");
    if (draw_.chance(0.8)) begin_faults();
    for (std::uint64_t writers = 1 + draw_.below(5); writers > 0; --writers) node_.spawn(write(this));
    const auto quiet = [&] { return !violations_.empty(); };
    const auto failed = [&] { return !violations_.empty() || !process_->targets.failed().empty(); };
    if (draw_.chance(0.5)) {
      // The end comes close to a failure.
      world_.run_until(failed, world_.now() + 2s);
      world_.run_until(quiet, world_.now() + draw_.log_between(5us, 300ms));
    } else {
      world_.run_until(quiet, world_.now() + draw_.log_between(100us, 3s));
    }
    kill();
    if (violations_.empty() && draw_.chance(0.3)) lose_one();
  }
  if (violations_.empty()) heal();
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_targets_workload(WorkloadOptions options) {
  return TargetsWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
