#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "client/core/buckets.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "client/core/steps.h"
#include "server/checkpoints/keep.h"
#include "tests/sim/daemon.h"
#include "tests/sim/net.h"
#include "tests/sim/payload.h"
#include "tests/sim/prng.h"
#include "tests/sim/sessions.h"
#include "tests/sim/workload.h"

// Retention, removal and garbage while somebody reads (P8).

namespace cairn::sim {
namespace {

using namespace std::chrono_literals;
using server::KeepPolicy;
using Time = rt::TimePoint;

constexpr const char* kBucket = "sim";
constexpr const char* kRun = "run";
constexpr rt::Duration kTtl = 6s;     // of readers
constexpr rt::Duration kSkew = 50ms;  // between what a reader and the daemon take for its time-to-live
constexpr rt::Duration kSafetyPhase = 30min;
constexpr std::uint32_t kBlobs = 3;

std::string blob_name(std::uint32_t i) {
  return "b" + std::to_string(i);
}
std::string blob_of(std::uint64_t step, Tag tag, std::uint32_t i) {
  std::string out(1000 + (step * 7919 + tag.operation * 104'729 + i * 1'299'709) % 30'000, '\0');
  Payload(kRun, step, tag, blob_name(i)).fill(0, std::as_writable_bytes(std::span(out)));
  return out;
}

/// What one seed is made of.
struct Swarm {
  explicit Swarm(std::uint64_t seed) {
    Prng draw(seed, "retention swarm");
    auto on = [&] { return draw.chance(0.5); };
    launches = static_cast<std::uint32_t>(draw.between(3, 10));
    readers = static_cast<std::uint32_t>(draw.between(1, 4));
    if (on()) kills = static_cast<std::uint32_t>(draw.between(1, 4));
    power_loss = on();
    pauses = on();
    if (on()) duplicates = 0.3 / static_cast<double>(1u << draw.below(4));
    if (draw.chance(0.4)) lies = 0.4 / static_cast<double>(1u << draw.below(4));
    if (on()) net.cut = 0.04 / static_cast<double>(1u << draw.below(4));
    if (net.cut > 0 && on()) net.ghost = 0.8;
    if (on()) net.slow = 0.1 / static_cast<double>(1u << draw.below(4));
    grace = std::chrono::milliseconds(draw.between(100, 4000));
    interval = std::chrono::milliseconds(draw.between(50, 1000));
  }
  std::uint32_t launches = 2, readers = 2, kills = 0;
  bool power_loss = false, pauses = false;
  double duplicates = 0, lies = 0;
  NetFaults net;
  rt::Duration grace{}, interval{};
  std::string text() const {
    return "launches=" + std::to_string(launches) + " readers=" + std::to_string(readers) +
           " kills=" + std::to_string(kills) + (power_loss ? " power_loss" : "") + (pauses ? " pauses" : "") +
           " duplicates=" + std::to_string(duplicates) + " lies=" + std::to_string(lies) +
           " cut=" + std::to_string(net.cut) + " ghost=" + std::to_string(net.ghost) +
           " slow=" + std::to_string(net.slow) + " grace_ms=" + std::to_string(grace / 1ms);
  }
};

/// What was asked for and answered, and when a step may be gone. A violation is certain: only what no choice of moments
/// explains is one.
class Model {
 public:
  // ---- Saves
  void save_begins(std::uint64_t step, Time now) {
    auto& s = steps_[step];
    s.begun = true;
    s.last_begin = now;
    s.pinned_before_save = s.pin == Pin::kYes;
  }
  /// Returns why this cannot be.
  std::string save_committed(std::uint64_t step, Time now) {
    auto& s = steps_[step];
    if (s.there == There::kYes && s.pinned_before_save && s.pin == Pin::kYes) return "a pinned step was replaced";
    s.there = There::kYes;
    s.acked = now;
    s.committed_begin = s.last_begin;
    s.since = std::min(s.since, s.last_begin);
    return {};
  }

  // ---- Removals by hand: of one step, or of all after it
  std::size_t removal_begins(std::uint64_t step, bool after) {
    removals_.push_back({step, after, rt::kNever});
    return removals_.size() - 1;
  }
  void removal_ended(std::size_t number, Time now) { removals_[number].ended = now; }

  // ---- Pins
  enum class Pin { kNo, kMaybe, kYes };
  void pin_is(std::uint64_t step, Pin pin) { steps_[step].pin = pin; }
  bool pinned_for_certain(std::uint64_t step) const {
    const auto s = steps_.find(step);
    return s != steps_.end() && s->second.pin == Pin::kYes;
  }

  // ---- Policies: any that may be in force
  void policy_asked(KeepPolicy policy, Time now) { policies_.push_back({policy, now, rt::kNever}); }
  void policy_is(KeepPolicy policy, Time asked, Time now) {
    for (auto& p : policies_) p.until = std::min(p.until, now);
    policies_.push_back({policy, asked, rt::kNever});
  }

  // ---- Observations
  /// The step was not there, asked at `asked`. Returns the promise broken, or nothing.
  std::string absent(std::uint64_t step, Time asked) {
    const auto known = steps_.find(step);
    if (known == steps_.end()) return {};
    auto& s = known->second;
    if (s.there != There::kYes || s.acked > asked || s.last_begin > asked) return {};
    std::string why;
    if (s.pin == Pin::kYes) why = "pinned";
    if (why.empty() && !removable_by_hand(step) && must_keep(step, s.since))
      why = "kept by every policy that was in force";
    s.there = There::kMaybe;
    return why;
  }
  /// What a launch was told to resume from has been there, and only a removal by hand takes it.
  bool removable_by_hand(std::uint64_t step) const {
    const auto s = steps_.find(step);
    if (s == steps_.end()) return true;
    // A removal that ended before the save began named another owner.
    return std::any_of(removals_.begin(), removals_.end(), [&](const Removal& r) {
      return (r.after ? step > r.step : step == r.step) && r.ended >= s->second.committed_begin;
    });
  }

  std::vector<std::uint64_t> numbers() const {
    std::vector<std::uint64_t> out;
    for (const auto& [number, s] : steps_)
      if (s.begun) out.push_back(number);
    return out;
  }

 private:
  enum class There { kNo, kMaybe, kYes };
  struct Step {
    bool begun = false;
    There there = There::kNo;  // kYes: it was acknowledged, and nobody has missed it since
    Time last_begin{};
    Time committed_begin{};  // of the save that was acknowledged
    Time acked{};
    Time since = rt::kNever;  // it may have been there from then on
    Pin pin = Pin::kNo;
    bool pinned_before_save = false;
  };
  struct Removal {
    std::uint64_t step = 0;
    bool after = false;
    Time ended;
  };
  struct InForce {
    KeepPolicy policy;
    Time from, until;
  };
  /// Every policy that may have been in force since then keeps it, whatever else is there.
  bool must_keep(std::uint64_t step, Time since) const {
    const auto higher = static_cast<std::size_t>(
        std::count_if(steps_.upper_bound(step), steps_.end(), [](const auto& s) { return s.second.begun; }));
    return std::all_of(policies_.begin(), policies_.end(), [&](const InForce& p) {
      if (p.until < since || !p.policy.any() || p.policy.days > 0) return true;
      return higher < std::max<std::size_t>(p.policy.last, 1) || (p.policy.every > 0 && step % p.policy.every == 0);
    });
  }

  std::map<std::uint64_t, Step> steps_;
  std::vector<Removal> removals_;
  std::vector<InForce> policies_;
};

class RetentionWorkload {
 public:
  explicit RetentionWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        swarm_(options_.seed),
        world_(options_.seed),
        draw_(options_.seed, "retention"),
        director_(world_.make_node("director")),
        trainer_(world_.make_node("trainer")),
        admin_(world_.make_node("admin")) {
    world_.on_trace = options_.trace;
    SimDaemon::Options daemon;
    daemon.garbage_grace = swarm_.grace;
    daemon.garbage_interval = swarm_.interval;
    daemon.readers_ttl = kTtl;
    daemon.retention_interval = 2s;
    daemon.duplicates = swarm_.duplicates;
    daemon.liveness_lies = swarm_.lies;
    daemon.bug = options_.bug;
    daemon_ = std::make_unique<SimDaemon>(world_, std::move(daemon));
    for (std::uint32_t i = 0; i < swarm_.readers; ++i) {
      World::NodeOptions node;
      node.clock_ppm = static_cast<std::int64_t>(draw_.between(0, 400)) - 200;
      readers_.push_back(&world_.make_node("reader" + std::to_string(i), node));
    }
  }
  ~RetentionWorkload() {
    for (auto* node : readers_)
      if (node->alive()) node->kill(Death::kProcess);
    for (auto* node : {&trainer_, &admin_, &director_, &daemon_->node()})
      if (node->alive()) node->kill(Death::kProcess);
  }

  WorkloadResult run();

 private:
  using Session = std::shared_ptr<client::Session>;
  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    if (world_.tracing()) world_.trace("checker", "BROKEN " + violations_.back());
  }
  void trace(Node& node, const std::string& line) {
    if (world_.tracing()) world_.trace(node.name(), line);
  }
  std::optional<std::uint64_t> some_step() {
    const auto numbers = model_.numbers();
    if (numbers.empty()) return std::nullopt;
    // Mostly of the last ones: the others are gone.
    const auto back = std::min<std::uint64_t>(draw_.below(draw_.chance(0.7) ? 4 : numbers.size()), numbers.size() - 1);
    return numbers[numbers.size() - 1 - back];
  }
  void check_absent(std::uint64_t step, Time asked, const std::string& what) {
    if (auto why = model_.absent(step, asked); !why.empty())
      broken("P8", what + ": step " + std::to_string(step) + " is gone, though it is " + why);
  }

  static Task<Session> connect(RetentionWorkload* w, Node* node) { return sim::connect(node, *w->daemon_, {}); }
  static Task<void> train(RetentionWorkload* w);
  static Task<void> save(RetentionWorkload* w, Session session, client::Arena* arena, client::OpenedRun run,
                         std::uint64_t step, Tag tag, bool overwrite);
  static Task<void> administer(RetentionWorkload* w);
  static Task<void> list(RetentionWorkload* w, Session session);
  static Task<void> set_policy(RetentionWorkload* w, Session session, KeepPolicy policy);
  static Task<void> pin(RetentionWorkload* w, Session session, std::uint64_t step, bool pinned);
  static Task<void> remove(RetentionWorkload* w, Session session, std::uint64_t step, bool after);
  static Task<void> read(RetentionWorkload* w, Node* node);
  static Task<void> read_one(RetentionWorkload* w, Node* node, Session session, std::optional<std::uint64_t> wanted,
                             rt::Duration hold, bool must_read);
  static Task<void> break_things(RetentionWorkload* w);
  static Task<void> read_back(RetentionWorkload* w);
  void heal();
  void check_end();
  std::size_t orphans() const {
    std::size_t n = 0;
    for (const auto& key : daemon_->index().keys(storage::Table::kChunks))
      if (auto id = ChunkId::from_key(key); !id || !owners_.contains(id->owner)) ++n;
    return n;
  }
  bool wait(const std::function<bool()>& done, rt::Duration limit) {
    return world_.run_until([&] { return done() || !violations_.empty(); }, world_.now() + limit) && done();
  }

  WorkloadOptions options_;
  Swarm swarm_;
  World world_;
  Prng draw_;
  Node& director_;
  Node& trainer_;
  Node& admin_;
  std::vector<Node*> readers_;
  std::unique_ptr<SimDaemon> daemon_;
  Model model_;
  std::uint32_t next_operation_ = 0, launch_ = 0;
  bool trained_ = false;
  KeepPolicy last_policy_;
  std::set<OwnerId> owners_;  // of the steps that the last reading back found
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

// ---- The training job: one rank, several launches

Task<void> RetentionWorkload::train(RetentionWorkload* w) {
  auto* node = &w->trainer_;
  auto& draw = w->draw_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, client::Arena::create(*node, 1 * kMiB, 64 * kKiB, session->unit_bytes()));
  for (std::uint32_t left = w->swarm_.launches; left > 0; --left) {
    client::OpenRunRequest request{
        .bucket = kBucket, .run = kRun, .launch = {"job", ++w->launch_}, .resume = {}, .discard_after = false};
    // At once after the last commit: the look at what is to be removed is under way.
    if (draw.chance(0.6)) request.resume = w->some_step();
    request.discard_after = request.resume && draw.chance(0.2);
    std::optional<std::size_t> discard;
    if (request.discard_after) discard = w->model_.removal_begins(*request.resume, true);
    const auto opened = co_await client::open_run(session, request, node->now() + kCallTimeout);
    // Without an answer it may still happen: a late copy of the request opens the run.
    if (discard && opened) w->model_.removal_ended(*discard, w->world_.now());
    if (!opened) {
      w->trace(*node, "open_run: " + opened.error().message);
      co_await node->sleep(500ms);
      continue;
    }
    // What it was told to resume from must be there, however long the job takes to begin.
    if (opened->resume) {
      co_await node->sleep(w->draw_.log_between(1ms, 8s));
      const auto step = *opened->resume;
      auto reader = co_await client::StepReader::open(session, kBucket, kRun, step, kCallTimeout);
      if (!reader && reader.error().code == Errc::kNotFound && !w->model_.removable_by_hand(step))
        w->broken("P8", "launch " + std::to_string(w->launch_) + " was told to resume from step " +
                            std::to_string(step) + ", which is gone, and nobody has removed it");
    }
    auto last = opened->resume.value_or(0);
    for (auto saves = draw.chance(0.5) ? 1 : draw.between(1, 6); saves > 0; --saves) {
      co_await node->sleep(w->draw_.log_between(5ms, 8s));
      const bool overwrite = draw.chance(0.2);
      auto step = last + draw.between(1, 3);
      if (overwrite) step = w->some_step().value_or(step);
      CO_CHECK_OK(co_await save(w, session, arena.get(), *opened, step, {w->launch_, ++w->next_operation_}, overwrite));
      last = std::max(last, step);
    }
  }
  w->trained_ = true;
  co_return {};
}

Task<void> RetentionWorkload::save(RetentionWorkload* w, Session session, client::Arena* arena, client::OpenedRun run,
                                   std::uint64_t step, Tag tag, bool overwrite) {
  auto* node = &w->trainer_;
  w->model_.save_begins(step, w->world_.now());
  client::SaveRequest request{.step = step, .rank = 0, .world_size = 1, .overwrite = overwrite};
  client::SaveTuning tuning;
  tuning.timeout = kCallTimeout;
  auto attempt = co_await client::SaveAttempt::begin(session, *arena, std::move(run), request, tuning);
  if (!attempt) {
    w->trace(*node, "begin: " + attempt.error().message);
    co_return {};
  }
  std::vector<std::string> blobs;
  for (std::uint32_t i = 0; i < kBlobs; ++i) blobs.push_back(blob_of(step, tag, i));
  for (std::uint32_t i = 0; i < kBlobs; ++i)
    CO_CHECK_OK((*attempt)->add_blob(blob_name(i), std::as_bytes(std::span(blobs[i]))));
  CO_CHECK_OK((*attempt)->add_token("tag", std::to_string(tag.launch) + ":" + std::to_string(tag.operation)));
  (void)co_await (*attempt)->stage(true);
  const auto outcome = co_await (*attempt)->outcome(node->now() + 60s);
  w->trace(*node, "save step " + std::to_string(step) + ": " + (outcome ? "committed" : outcome.error().message));
  if (!outcome) co_return {};
  ++w->result_.commits;
  if (auto why = w->model_.save_committed(step, w->world_.now()); !why.empty())
    w->broken("P8", "step " + std::to_string(step) + ": " + why);
  co_return {};
}

// ---- The administrator

Task<void> RetentionWorkload::list(RetentionWorkload* w, Session session) {
  const auto asked = w->world_.now();
  const auto page =
      co_await client::list_steps(session, kBucket, kRun, std::nullopt, 1000, w->admin_.now() + kCallTimeout);
  if (!page) co_return {};
  std::set<std::uint64_t> there;
  for (const auto& step : page->steps) there.insert(step.step);
  for (const auto number : w->model_.numbers())
    if (!there.contains(number)) w->check_absent(number, asked, "list");
  co_return {};
}

Task<void> RetentionWorkload::set_policy(RetentionWorkload* w, Session session, KeepPolicy policy) {
  const auto asked = w->world_.now();
  w->model_.policy_asked(policy, asked);
  const auto done = co_await client::set_bucket(
      session, kBucket, {.keep_last = policy.last, .keep_every = policy.every, .keep_days = policy.days},
      w->admin_.now() + kCallTimeout);
  w->trace(w->admin_, "keep last " + std::to_string(policy.last) + " every " + std::to_string(policy.every) + ": " +
                          (done ? "set" : done.error().message));
  if (!done) co_return fail(done.error());
  w->model_.policy_is(policy, asked, w->world_.now());
  w->last_policy_ = policy;
  co_return {};
}

Task<void> RetentionWorkload::pin(RetentionWorkload* w, Session session, std::uint64_t step, bool pinned) {
  using Pin = Model::Pin;
  w->model_.pin_is(step, Pin::kMaybe);
  const auto done = co_await client::pin_step(session, kBucket, kRun, step, pinned, w->admin_.now() + kCallTimeout);
  w->trace(w->admin_, std::string(pinned ? "pin " : "unpin ") + std::to_string(step) + ": " +
                          (done ? "done" : done.error().message));
  if (done) w->model_.pin_is(step, pinned ? Pin::kYes : Pin::kNo);
  if (!done && done.error().code == Errc::kNotFound) w->model_.pin_is(step, Pin::kNo);
  co_return {};
}

Task<void> RetentionWorkload::remove(RetentionWorkload* w, Session session, std::uint64_t step, bool after) {
  const bool pinned = !after && w->model_.pinned_for_certain(step);
  const auto removal = w->model_.removal_begins(step, after);
  Result<void> done;
  if (after) {
    auto all = co_await client::remove_steps_after(session, kBucket, kRun, step, kCallTimeout);
    if (!all) done = fail(std::move(all).error());
  } else {
    done = co_await client::remove_step(session, kBucket, kRun, step, w->admin_.now() + kCallTimeout);
  }
  w->model_.removal_ended(removal, w->world_.now());
  w->trace(w->admin_, std::string(after ? "rm --after " : "rm ") + std::to_string(step) + ": " +
                          (done ? "done" : done.error().message));
  if (done && pinned) w->broken("P8", "step " + std::to_string(step) + " was removed though it is pinned");
  co_return {};
}

Task<void> RetentionWorkload::administer(RetentionWorkload* w) {
  auto* node = &w->admin_;
  auto& draw = w->draw_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  for (;;) {
    co_await node->sleep(w->draw_.log_between(5ms, 3s));
    const auto dice = draw.below(20);
    const auto step = w->some_step();
    if (dice < 8 || !step) {
      CO_CHECK_OK(co_await list(w, session));
    } else if (dice < 11) {
      KeepPolicy policy;
      if (draw.chance(0.7)) policy.last = static_cast<std::uint32_t>(draw.between(1, 4));
      if (draw.chance(0.3)) policy.every = draw.between(2, 5);
      if (draw.chance(0.1)) policy.days = 1;  // longer than the run
      (void)co_await set_policy(w, session, policy);
    } else if (dice < 16) {
      CO_CHECK_OK(co_await pin(w, session, *step, dice < 14));
    } else {
      CO_CHECK_OK(co_await remove(w, session, *step, dice == 19 && draw.chance(0.5)));
    }
  }
}

// ---- Readers

Task<void> RetentionWorkload::read_one(RetentionWorkload* w, Node* node, Session session,
                                       std::optional<std::uint64_t> wanted, rt::Duration hold, bool must_read) {
  const auto asked = w->world_.now();
  const auto what = node->name() + (wanted ? " step " + std::to_string(*wanted) : " highest step");
  auto opened = co_await client::StepReader::open(session, kBucket, kRun, wanted, kCallTimeout);
  const auto bad = [&](const Error& error, rt::Duration silence) {
    w->trace(*node, what + ": " + error.message);
    switch (error.code) {
      case Errc::kUnavailable:
      case Errc::kUnknown:
      case Errc::kDeadline:
      case Errc::kCancelled:
        if (must_read) w->broken("P7", what + ": " + error.message);
        break;
      case Errc::kDeleted:
        if (silence < kTtl - kSkew)
          w->broken("P8", what + ": deleted under a protected reader, which was silent for at most " +
                              std::to_string(silence / 1ms) + " ms: " + error.message);
        break;
      default:
        w->broken("P3", what + ": " + error.message);
    }
  };
  if (!opened) {
    if (opened.error().code == Errc::kNotFound) {
      if (wanted) w->check_absent(*wanted, asked, what);
      if (must_read) w->broken("P1", what + ": listed, and not there");
    } else {
      // Between the answer and the first read nothing is let go either, unless that took too long.
      bad(opened.error(), w->world_.now() - asked);
    }
    co_return {};
  }
  const auto reader = std::move(*opened);
  const auto step = reader->summary().step;
  auto contents = co_await reader->find({});
  if (!contents) {
    bad(contents.error(), reader->silence());
    co_return {};
  }
  Tag tag;
  for (const auto& token : contents->tokens) {
    const auto colon = token.bytes.find(':');
    tag = {static_cast<std::uint32_t>(std::stoul(token.bytes.substr(0, colon))),
           static_cast<std::uint32_t>(std::stoul(token.bytes.substr(colon + 1)))};
  }
  if (contents->blobs.size() != kBlobs) {
    w->broken("P2", what + ": " + std::to_string(contents->blobs.size()) + " blobs");
    co_return {};
  }
  // Again and again while it is held: whatever happens to the step meanwhile.
  const auto until = node->now() + hold;
  for (bool last = false; !last;) {
    last = node->now() >= until;
    for (std::uint32_t i = 0; i < kBlobs; ++i) {
      auto got = co_await reader->blob(contents->blobs[i]);
      if (!got) {
        bad(got.error(), reader->silence());
        co_return {};
      }
      if (*got != blob_of(step, tag, i)) w->broken("P3", what + ": wrong bytes in " + blob_name(i));
    }
    ++w->result_.restores;
    if (!last) co_await node->sleep(std::min<rt::Duration>(until - node->now(), w->draw_.log_between(50ms, 2s)));
  }
  co_return {};
}

Task<void> RetentionWorkload::read(RetentionWorkload* w, Node* node) {
  auto& draw = w->draw_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  for (;;) {
    co_await node->sleep(w->draw_.log_between(5ms, 2s));
    const auto wanted = draw.chance(0.3) ? std::nullopt : w->some_step();
    auto hold = w->draw_.log_between(1ms, 3 * kTtl);
    if (w->swarm_.pauses && draw.chance(0.2)) {
      // Its network stands still while it holds the step, sometimes for longer than the daemon waits.
      const auto from = w->world_.now() + w->draw_.log_between(1ms, 1s);
      const auto until = from + draw.between(kTtl / 2, 5 * kTtl / 2);
      hold = std::max<rt::Duration>(hold, until - w->world_.now() + kTtl / 2);
      w->world_.at(from, [w, node, until] {
        w->world_.net().clog(node->host(), w->daemon_->node().host(), until);
        w->world_.net().clog(w->daemon_->node().host(), node->host(), until);
      });
    }
    CO_CHECK_OK(co_await read_one(w, node, session, wanted, hold, false));
  }
}

// ---- The whole

Task<void> RetentionWorkload::break_things(RetentionWorkload* w) {
  auto& draw = w->draw_;
  for (std::uint32_t left = w->swarm_.kills; left > 0; --left) {
    co_await w->director_.sleep(w->draw_.log_between(100ms, 20s));
    if (!w->daemon_->node().alive()) continue;
    w->daemon_->kill(w->swarm_.power_loss && draw.chance(0.7) ? Death::kPowerLoss : Death::kProcess, draw.chance(0.3),
                     w->draw_.log_between(10ms, 3s));
  }
  co_return {};
}

/// Every step that is listed, to the byte; nothing more is to be removed.
Task<void> RetentionWorkload::read_back(RetentionWorkload* w) {
  auto* node = &w->admin_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  const auto asked = w->world_.now();
  CO_TRY(const auto page,
         co_await client::list_steps(session, kBucket, kRun, std::nullopt, 1000, node->now() + kCallTimeout));
  std::set<std::uint64_t> there;
  std::vector<server::CommittedStep> steps;
  w->owners_.clear();
  for (const auto& step : page.steps) {
    there.insert(step.step);
    w->owners_.insert(step.owner);
    steps.push_back({.step = step.step, .committed_unix_nanos = step.committed_unix_nanos, .pinned = step.pinned});
    if (w->model_.pinned_for_certain(step.step) && !step.pinned)
      w->broken("P8", "step " + std::to_string(step.step) + " is not pinned any more");
  }
  for (const auto number : w->model_.numbers())
    if (!there.contains(number)) w->check_absent(number, asked, "reading back");
  const auto rest = server::steps_to_remove(w->last_policy_, steps, std::nullopt, node->wall_nanos());
  // One may be held for the launch that was told to resume from it.
  if (rest.size() > 1)
    w->broken("P8", std::to_string(rest.size()) + " steps are never removed, though the policy does not keep them");
  for (const auto number : there) CO_CHECK_OK(co_await read_one(w, node, session, number, rt::Duration(0), true));
  co_return {};
}

void RetentionWorkload::heal() {
  world_.net().faults = {};
  world_.net().unclog();
  daemon_->stop_lying();
  daemon_->stop_duplicates();
  for (auto* node : readers_) node->kill(Death::kProcess);
  for (auto* node : {&trainer_, &admin_, &director_}) {
    node->kill(Death::kProcess);
    node->restart();
  }
  if (world_.tracing()) world_.trace("world", "heals");
}

void RetentionWorkload::check_end() {
  if (!wait([&] { return daemon_->ready(); }, 2min)) {
    if (violations_.empty()) broken("P7", "the daemon does not become ready: " + daemon_->last_error());
    return;
  }
  auto set = world_.run(admin_, [](RetentionWorkload* w) -> Task<void> {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    for (int tries = 0;; ++tries) {
      auto done = co_await set_policy(w, session, {.last = 2, .every = 4});
      if (done || tries == 5) co_return done;
    }
  }(this));
  if (!set) return broken("P7", "the policy cannot be set: " + set.error().message);
  world_.run_for(2 * kTtl + swarm_.grace + 10 * swarm_.interval + 10s);
  if (auto done = world_.run(admin_, read_back(this), 10min); !done && violations_.empty())
    broken("P7", "reading back fails: " + done.error().message);
  for (int tries = 0; orphans() > 0 && tries < 30 && violations_.empty(); ++tries) world_.run_for(20s);
  if (orphans() > 0 && violations_.empty())
    broken("P8", std::to_string(orphans()) + " chunks that no step names are never freed");
  for (const auto& key : daemon_->index().keys(storage::Table::kRecords))
    if (std::string_view(key).substr(2).starts_with("d/")) broken("P8", "a deleting record is never let go");
}

WorkloadResult RetentionWorkload::run() {
  result_.seed = options_.seed;
  result_.configuration = swarm_.text();
  const auto began = world_.now();
  daemon_->start();
  wait([&] { return daemon_->ready(); }, 1min);
  auto made = world_.run(admin_, [](RetentionWorkload* w) -> Task<void> {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    client::BucketSummary bucket;
    bucket.name = kBucket;
    CO_CHECK_OK(co_await client::create_bucket(session, std::move(bucket), w->admin_.now() + kCallTimeout));
    co_return {};
  }(this));
  if (!made) {
    broken("P7", "the bucket cannot be created: " + made.error().message);
  } else {
    auto& f = world_.faults;
    if (swarm_.kills > 0) f.enable(swarm_.power_loss ? Fault::kPowerLoss : Fault::kProcessKill);
    if (swarm_.duplicates > 0) f.enable(Fault::kDuplicate);
    if (swarm_.net.cut > 0) f.enable(Fault::kCut);
    if (swarm_.net.slow > 0) f.enable(Fault::kSlowNet);
    if (swarm_.pauses) f.enable(Fault::kClog);
    world_.net().faults = swarm_.net;
    model_.policy_asked({}, world_.now());
    const auto ends = [this](Node* node) {
      return [this, node](Result<void> done) {
        if (!done) broken("P7", node->name() + " ends: " + done.error().message);
      };
    };
    trainer_.spawn(train(this), ends(&trainer_));
    admin_.spawn(administer(this), ends(&admin_));
    for (auto* node : readers_) node->spawn(read(this, node), ends(node));
    director_.spawn(break_things(this));
    if (!wait([&] { return trained_; }, kSafetyPhase) && violations_.empty()) broken("P7", "training does not end");
    world_.run_for(violations_.empty() ? 2 * kTtl : rt::Duration(0));  // readers go on, what was removed is let go
    if (violations_.empty()) heal();
    if (violations_.empty()) check_end();
    if (violations_.empty()) {
      daemon_->kill(Death::kPowerLoss, false, 100ms);
      wait([&] { return daemon_->ready(); }, 2min);
      if (auto done = world_.run(admin_, read_back(this), 10min); !done && violations_.empty())
        broken("P7", "reading back after a power loss fails: " + done.error().message);
    }
  }
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_retention_workload(WorkloadOptions options) {
  return RetentionWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
