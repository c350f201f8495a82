#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "client/core/steps.h"
#include "proto/common/checksum.h"
#include "tests/sim/daemon.h"
#include "tests/sim/net.h"
#include "tests/sim/prng.h"
#include "tests/sim/sessions.h"
#include "tests/sim/workload.h"

namespace cairn::sim {
namespace {

using namespace std::chrono_literals;

constexpr const char* kBucket = "space";
constexpr const char* kRun = "run";
constexpr rt::Duration kCycle = 30min;    // virtual; one cycle must end within
constexpr rt::Duration kCalm = 20min;     // and its space be back within
constexpr std::uint64_t kBallast = kMiB;  // of SimDaemon

std::string bytes_of_step(std::uint64_t step, std::uint32_t rank, std::uint64_t size) {
  Prng draw(step * 1000 + rank, "bytes");
  std::string out(size, '\0');
  for (std::size_t i = 0; i < out.size(); i += 8) {
    const auto value = draw.next();
    std::memcpy(out.data() + i, &value, std::min<std::size_t>(8, out.size() - i));
  }
  return out;
}

/// What one rank, or the putter of an object, was told.
struct Told {
  bool ended = false;
  std::optional<Error> error;  // none: done
};

/// One save or upload on its way.
struct Cycle {
  std::uint64_t number = 0;
  std::vector<std::uint64_t> sizes;  // by rank; of an object: one
  bool declares = false;
  std::uint64_t total() const {
    std::uint64_t sum = 0;
    for (auto size : sizes) sum += size;
    return sum;
  }
  std::vector<Told> told;
  bool all_ended() const {
    return std::all_of(told.begin(), told.end(), [](const auto& t) { return t.ended; });
  }
};

class SpaceWorkload {
 public:
  explicit SpaceWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        world_(options_.seed),
        draw_(options_.seed, "space"),
        admin_(world_.make_node("admin")),
        director_(world_.make_node("director")) {
    world_.on_trace = options_.trace;
    for (int i = 0; i < 3; ++i) ranks_.push_back(&world_.make_node("rank" + std::to_string(i)));
    kills_ = draw_.chance(0.5);
    quota_ = draw_.chance(0.3);
    SimDaemon::Options daemon;
    daemon.capacity_bytes = draw_.between(24, 64) * kMiB;
    daemon.garbage_grace = std::chrono::milliseconds(draw_.between(300, 5000));
    daemon.garbage_interval = std::chrono::milliseconds(draw_.between(100, 2000));
    daemon.readers_ttl = 2s;
    daemon.bug = options_.bug;
    capacity_ = daemon.capacity_bytes;
    daemon_ = std::make_unique<SimDaemon>(world_, std::move(daemon));
  }
  ~SpaceWorkload() {
    for (auto* node : ranks_)
      if (node->alive()) node->kill(Death::kProcess);
    if (admin_.alive()) admin_.kill(Death::kProcess);
    director_.kill(Death::kProcess);
    if (daemon_->node().alive()) daemon_->node().kill(Death::kProcess);
  }
  WorkloadResult run();

 private:
  using Session = std::shared_ptr<client::Session>;

  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    trace("BROKEN " + violations_.back());
  }
  void trace(const std::string& line) {
    if (world_.tracing()) world_.trace("space", line);
  }
  bool wait(const std::function<bool()>& done, rt::Duration limit) {
    return world_.run_until([&] { return done() || !violations_.empty(); }, world_.now() + limit) &&
           violations_.empty();
  }
  template <class T>
  Result<T> admin(Task<T> task) {
    return world_.run(admin_, std::move(task), 10min);
  }
  static Task<Session> connect(SpaceWorkload* w, Node* node) { return sim::connect(node, *w->daemon_, {}); }

  static Task<void> save_rank(SpaceWorkload* w, std::shared_ptr<Cycle> cycle, std::uint32_t rank);
  static Task<void> put(SpaceWorkload* w, std::shared_ptr<Cycle> cycle);
  static Task<void> kill_daemon(SpaceWorkload* w, rt::Duration after) {
    co_await w->director_.sleep(after);
    if (!w->daemon_->node().alive()) co_return {};
    const auto death = w->draw_.chance(0.5) ? Death::kPowerLoss : Death::kProcess;
    w->daemon_->kill(death, false, 200ms);
    // A file system gives punched space to nobody before the punch is in its journal. The simulated one does, and a
    // power loss may then bring back more than the disk holds.
    auto& disk = w->daemon_->disk();
    disk.set_capacity(std::max(w->capacity_, disk.used_bytes() + kBallast));
    co_return {};
  }
  static Task<client::BucketSummary> show(SpaceWorkload* w) {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    co_return co_await client::show_bucket(session, kBucket, w->admin_.now() + kCallTimeout);
  }
  static Task<void> set_quota(SpaceWorkload* w, std::uint64_t bytes) {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    CO_CHECK_OK(co_await client::set_bucket(session, kBucket, {.quota_bytes = bytes}, w->admin_.now() + kCallTimeout));
    co_return {};
  }
  /// Which steps and objects there are; their bytes, and the owners.
  static Task<void> look(SpaceWorkload* w);
  static Task<void> read_kept(SpaceWorkload* w);
  static Task<void> remove_all_but_kept(SpaceWorkload* w);
  void run_cycle();
  void check_outcome(const Cycle& cycle, bool object);
  void calm(const char* when);
  std::size_t orphans() const {
    std::size_t n = 0;
    for (const auto& key : daemon_->index().keys(storage::Table::kChunks))
      if (auto id = ChunkId::from_key(key); !id || !owners_.contains(id->owner)) ++n;
    return n;
  }
  std::uint64_t room() {
    return capacity_ - std::min(capacity_, daemon_->disk().used_bytes() - daemon_->kept_bytes() + kBallast);
  }

  WorkloadOptions options_;
  World world_;
  Prng draw_;
  Node& admin_;
  Node& director_;
  std::vector<Node*> ranks_;
  std::unique_ptr<SimDaemon> daemon_;
  std::uint64_t capacity_ = 0, quota_bytes_ = 0, next_ = 1, kept_bytes_ = 0, used_at_quota_ = 0;
  bool kills_ = false, quota_ = false, killed_ = false;
  std::set<OwnerId> owners_;
  std::uint64_t listed_bytes_ = 0;
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

Task<void> SpaceWorkload::save_rank(SpaceWorkload* w, std::shared_ptr<Cycle> cycle, std::uint32_t rank) {
  auto* node = w->ranks_[rank];
  auto& told = cycle->told[rank];
  struct Ended {
    Told& told;
    ~Ended() { told.ended = true; }
  } ended{told};
  told.error = Error{Errc::kUnavailable, "nothing was heard"};
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, client::Arena::create(*node, 1 * kMiB, 128 * kKiB, session->unit_bytes()));
  auto run = co_await client::open_run(
      session, {.bucket = kBucket, .run = kRun, .launch = {"job", cycle->number}, .resume = {}, .discard_after = false},
      node->now() + kCallTimeout);
  if (!run) {
    told.error = run.error();
    co_return {};
  }
  const auto size = cycle->sizes[rank];
  client::SaveTuning tuning;
  tuning.timeout = kCallTimeout;
  auto attempt = co_await client::SaveAttempt::begin(session, *arena, *run,
                                                     {.step = cycle->number,
                                                      .rank = rank,
                                                      .world_size = static_cast<std::uint32_t>(cycle->sizes.size()),
                                                      .declared_bytes = cycle->declares ? size : 0},
                                                     tuning);
  if (!attempt) {
    told.error = attempt.error();
    co_return {};
  }
  const auto bytes = bytes_of_step(cycle->number, rank, size);
  CO_CHECK_OK((*attempt)->add_blob("state", bytes_of(bytes)));
  (void)co_await (*attempt)->stage(true);  // a failure is the outcome, too
  auto outcome = co_await (*attempt)->outcome(node->now() + 5min);
  told.error.reset();
  if (!outcome) told.error = outcome.error();
  // As a job does that gives up: the others are not kept waiting.
  if (!outcome && outcome.error().code != Errc::kNoSpace)
    (void)co_await (*attempt)->abort("the rank gave up", node->now() + kCallTimeout);
  co_return {};
}

Task<void> SpaceWorkload::put(SpaceWorkload* w, std::shared_ptr<Cycle> cycle) {
  auto* node = w->ranks_[0];
  auto& told = cycle->told[0];
  struct Ended {
    Told& told;
    ~Ended() { told.ended = true; }
  } ended{told};
  told.error = Error{Errc::kUnavailable, "nothing was heard"};
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, client::Arena::create(*node, 1 * kMiB, 128 * kKiB, session->unit_bytes()));
  client::ChunkWriter::Options options;
  options.timeout = kCallTimeout;
  client::PutTerms terms;
  if (cycle->declares) terms.size_bytes = cycle->total();
  auto writer = co_await client::ObjectWriter::begin(session, *arena, kBucket, "o" + std::to_string(cycle->number),
                                                     terms, options);
  if (!writer) {
    told.error = writer.error();
    co_return {};
  }
  const auto bytes = bytes_of_step(cycle->number, 0, cycle->total());
  Result<void> done;
  for (std::size_t at = 0; done && at < bytes.size(); at += 300'000)
    done = co_await (*writer)->write(bytes_of(std::string_view(bytes).substr(at, 300'000)));
  if (done) {
    auto sealed = co_await (*writer)->seal();
    if (!sealed) done = fail(sealed.error());
  }
  told.error.reset();
  if (!done) told.error = done.error();
  // Half of the clients clean up; the others are found idle.
  if (!done && cycle->number % 2 == 0) (void)co_await (*writer)->abort(node->now() + kCallTimeout);
  co_return {};
}

Task<void> SpaceWorkload::look(SpaceWorkload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_));
  CloseSession close(session);
  const auto soon = w->admin_.now() + kCallTimeout;
  w->owners_.clear();
  w->listed_bytes_ = 0;
  auto steps = co_await client::list_steps(session, kBucket, kRun, std::nullopt, 1000, soon);
  if (!steps && steps.error().code != Errc::kNotFound) co_return fail(steps.error());
  if (steps)
    for (const auto& step : steps->steps) {
      w->owners_.insert(step.owner);
      w->listed_bytes_ += step.data_bytes;
    }
  CO_TRY(const auto objects, co_await client::list_objects(session, kBucket, {}, soon));
  for (const auto& object : objects.objects) {
    w->owners_.insert(object.owner);
    w->listed_bytes_ += object.size;
  }
  co_return {};
}

Task<void> SpaceWorkload::read_kept(SpaceWorkload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_));
  CloseSession close(session);
  CO_TRY(auto reader, co_await client::StepReader::open(session, kBucket, kRun, 1, kCallTimeout));
  CO_TRY(auto contents, co_await reader->find({}));
  if (contents.blobs.size() != 1) co_return fail(Errc::kFailed, "its blob is missing");
  CO_TRY(const auto got, co_await reader->blob(contents.blobs.front()));
  if (got != bytes_of_step(1, 0, w->kept_bytes_)) co_return fail(Errc::kFailed, "wrong bytes");
  ++w->result_.restores;
  co_return {};
}

Task<void> SpaceWorkload::remove_all_but_kept(SpaceWorkload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_));
  CloseSession close(session);
  CO_CHECK_OK(co_await client::remove_steps_after(session, kBucket, kRun, 1, kCallTimeout, {}));
  CO_TRY(const auto objects, co_await client::list_objects(session, kBucket, {}, w->admin_.now() + kCallTimeout));
  for (const auto& object : objects.objects)
    CO_CHECK_OK(co_await client::remove_object(session, kBucket, object.key, {}, w->admin_.now() + kCallTimeout));
  co_return {};
}

void SpaceWorkload::check_outcome(const Cycle& cycle, bool object) {
  const auto name = (object ? "object " : "step ") + std::to_string(cycle.number) + " of " +
                    std::to_string(cycle.total()) + " bytes" + (cycle.declares ? ", declared" : "");
  std::size_t done = 0, no_space = 0;
  for (const auto& told : cycle.told) {
    trace(name + ": " + (told.error ? told.error->message : "done"));
    done += !told.error;
    no_space += told.error && told.error->code == Errc::kNoSpace;
  }
  if (no_space > 0) world_.injected(Fault::kDiskFull, "told to a client");
  if (killed_) return;  // a call may have been cut off
  if (done != 0 && done != cycle.told.size())
    broken("P2", name + ": " + std::to_string(done) + " of " + std::to_string(cycle.told.size()) +
                     " ranks were told that it is committed");
  if (done == 0 && no_space != cycle.told.size())
    broken("P6", name + ": failed for lack of space, but only " + std::to_string(no_space) + " of " +
                     std::to_string(cycle.told.size()) + " ranks were told so");
}

void SpaceWorkload::calm(const char* when) {
  const auto limit = world_.now() + kCalm;
  for (;;) {
    if (!wait([&] { return daemon_->ready(); }, 2min)) {
      if (violations_.empty()) broken("P7", std::string(when) + ": the daemon is not ready: " + daemon_->last_error());
      return;
    }
    std::uint64_t reserved = 0;
    auto looked = admin(look(this));
    if (looked) {
      if (auto shown = admin(show(this))) {
        reserved = shown->reserved_bytes;
        if (reserved == 0 && shown->used_bytes != listed_bytes_) {
          broken("P6", std::string(when) + ": the bucket is said to hold " + std::to_string(shown->used_bytes) +
                           " bytes, listed are " + std::to_string(listed_bytes_));
          return;
        }
        // A quota below what is there keeps that.
        if (quota_bytes_ > 0 && shown->used_bytes > std::max(quota_bytes_, used_at_quota_)) {
          broken("P6", std::string(when) + ": " + std::to_string(shown->used_bytes) + " bytes in a quota of " +
                           std::to_string(quota_bytes_));
          return;
        }
        if (reserved == 0 && orphans() == 0) {
          daemon_->disk().set_capacity(capacity_);
          return;
        }
      }
    }
    if (world_.now() > limit) {
      broken("P6", std::string(when) + ": " + std::to_string(reserved) + " bytes are still reserved and " +
                       std::to_string(orphans()) + " chunks that nothing names are there");
      return;
    }
    world_.run_for(2s);
  }
}

void SpaceWorkload::run_cycle() {
  auto cycle = std::make_shared<Cycle>();
  cycle->number = ++next_;
  cycle->declares = draw_.chance(0.5);
  const bool object = draw_.chance(0.3);
  const auto ranks = object ? 1 : draw_.between(1, ranks_.size());
  // From what surely fits to what surely does not.
  const auto total = room() / 10 * draw_.between(2, 16);
  for (std::uint32_t rank = 0; rank < ranks; ++rank) cycle->sizes.push_back(total / ranks + draw_.below(5000));
  cycle->told.resize(ranks);
  killed_ = kills_ && draw_.chance(0.3);
  if (killed_) {
    world_.faults.enable(Fault::kProcessKill);
    director_.spawn(kill_daemon(this, draw_.between(rt::Duration(1ms), rt::Duration(300ms))));
  }
  const auto before = room();
  if (object)
    ranks_[0]->spawn(put(this, cycle));
  else
    for (std::uint32_t rank = 0; rank < ranks; ++rank) ranks_[rank]->spawn(save_rank(this, cycle, rank));
  if (!wait([&] { return cycle->all_ended(); }, kCycle)) {
    if (violations_.empty()) broken("P7", "a save or put does not end");
    return;
  }
  check_outcome(*cycle, object);
  const bool failed = std::any_of(cycle->told.begin(), cycle->told.end(), [](const auto& t) { return t.error; });
  if (!failed) ++result_.commits;
  // With room for twice as much, and a quota that allows it, nothing may be refused.
  if (failed && !killed_ && quota_bytes_ == 0 && 2 * cycle->total() + 4 * kMiB < before)
    broken("P6", std::to_string(cycle->total()) + " bytes are refused though " + std::to_string(before) +
                     " are free: " + cycle->told.front().error.value_or(Error{}).message);
  if (!violations_.empty()) return;
  if (!wait([&] { return daemon_->ready(); }, 2min)) return;
  if (auto read = admin(read_kept(this)); !read && violations_.empty())
    broken("P3", "the kept step, while the disk is full: " + read.error().message);
}

WorkloadResult SpaceWorkload::run() {
  result_.seed = options_.seed;
  const auto began = world_.now();
  world_.faults.enable(Fault::kDiskFull);
  daemon_->start();
  wait([&] { return daemon_->ready(); }, 1min);
  auto made = admin([](SpaceWorkload* w) -> Task<void> {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    client::BucketSummary bucket;
    bucket.name = kBucket;
    CO_CHECK_OK(co_await client::create_bucket(session, std::move(bucket), w->admin_.now() + kCallTimeout));
    co_return {};
  }(this));
  if (!made) broken("P7", "the bucket cannot be created: " + made.error().message);

  // A step that must survive it all.
  kept_bytes_ = draw_.between(200'000, 3'000'000);
  auto kept = std::make_shared<Cycle>(Cycle{.number = 1, .sizes = {kept_bytes_}, .declares = true, .told = {{}}});
  ranks_[0]->spawn(save_rank(this, kept, 0));
  if (wait([&] { return kept->all_ended(); }, kCycle) && kept->told[0].error)
    broken("P7", "the first save fails: " + kept->told[0].error->message);
  if (violations_.empty()) calm("at first");
  const auto first = room();

  const auto cycles = draw_.between(4, 12);
  result_.configuration = "capacity=" + std::to_string(capacity_) + " cycles=" + std::to_string(cycles) +
                          (kills_ ? " kills" : "") + (quota_ ? " quota" : "");
  for (std::uint64_t i = 0; i < cycles && violations_.empty(); ++i) {
    if (quota_ && draw_.chance(0.4)) {
      quota_bytes_ = draw_.chance(0.3) ? 0 : kept_bytes_ + draw_.below(first);
      used_at_quota_ = listed_bytes_;
      if (auto set = admin(set_quota(this, quota_bytes_)); !set) broken("P7", "set quota: " + set.error().message);
    }
    run_cycle();
    if (violations_.empty()) calm("after a cycle");
    if (!violations_.empty() || draw_.chance(0.2)) continue;  // sometimes it fills up step by step
    if (auto removed = admin(remove_all_but_kept(this)); !removed)
      broken("P7", "removing fails: " + removed.error().message);
    if (violations_.empty()) calm("after removals");
  }
  if (violations_.empty()) {
    if (quota_bytes_ > 0)
      if (auto set = admin(set_quota(this, quota_bytes_ = 0)); !set) broken("P7", "set quota: " + set.error().message);
    if (auto removed = admin(remove_all_but_kept(this)); !removed)
      broken("P7", "removing fails: " + removed.error().message);
    calm("at the end");
  }
  // What is open of this process is closed by the next: then not a byte is missing.
  if (violations_.empty()) {
    daemon_->kill(Death::kPowerLoss, false, 100ms);
    calm("after a last power loss");
    world_.run_for(10s);
    if (violations_.empty() && room() + 4096 < first)
      broken("P6", std::to_string(first - room()) + " bytes of " + std::to_string(first) + " are lost");
  }
  if (violations_.empty()) {
    killed_ = kills_ = false;
    auto again =
        std::make_shared<Cycle>(Cycle{.number = ++next_, .sizes = {first / 10 * 7}, .declares = true, .told = {{}}});
    ranks_[0]->spawn(save_rank(this, again, 0));
    if (wait([&] { return again->all_ended(); }, kCycle) && again->told[0].error)
      broken("P6", "a save of 7/10 of the room fails at the end: " + again->told[0].error->message);
    if (auto read = admin(read_kept(this)); !read && violations_.empty())
      broken("P3", "the kept step at the end: " + read.error().message);
  }
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_space_workload(WorkloadOptions options) {
  return SpaceWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
