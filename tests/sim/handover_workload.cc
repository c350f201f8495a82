#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/core/buckets.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "server/daemon/daemon.h"
#include "tests/sim/daemon.h"
#include "tests/sim/history.h"
#include "tests/sim/job.h"
#include "tests/sim/memory.h"
#include "tests/sim/net.h"
#include "tests/sim/payload.h"
#include "tests/sim/prng.h"
#include "tests/sim/sessions.h"
#include "tests/sim/workload.h"

namespace cairn::sim {
namespace {

using namespace std::chrono_literals;
using client::AttemptPhase;

constexpr const char* kBucket = "b";
constexpr const char* kRun = "run";
constexpr rt::Duration kEnds = 12min;  // virtual: an attempt, whatever becomes of its ranks: join_max and more
constexpr std::size_t kWindowBytes = 256 * kKiB;

enum class Fate { kDiesAtOnce, kDiesLater, kLives, kDiesBefore };  // of a rank, as it has handed over
enum class Trouble { kNone, kNewerLaunch, kDaemonDies, kScribble };

/// One save of all ranks, of a launch of its own.
struct Round {
  std::uint32_t launch = 0;
  Trouble trouble = Trouble::kNone;
  struct Rank {
    Node* node = nullptr;
    Fate fate = Fate::kDiesAtOnce;
    rt::Duration later{};  // until it dies
    std::shared_ptr<SimMemory> memory;
    std::vector<std::byte> bytes;
    std::optional<OwnerId> owner;                           // of the attempt that it has joined
    bool handed_over = false, saved = false, over = false;  // over: it is dead, or has told its outcome
  };
  std::vector<Rank> ranks;
  std::optional<OwnerId> owner;  // of the last attempt: one may fail before all ranks have come
  std::uint64_t step() const { return launch; }
  Tag tag() const { return {launch, 1}; }
  bool struck = false;  // the trouble has happened
};

class HandoverWorkload {
 public:
  explicit HandoverWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        world_(options_.seed),
        draw_(options_.seed, "handover"),
        admin_(world_.make_node("admin")) {
    world_.on_trace = options_.trace;
    SimDaemon::Options daemon;
    daemon.bug = options_.bug;
    if (draw_.chance(0.3)) daemon.duplicates = 0.1;
    daemon_ = std::make_unique<SimDaemon>(world_, std::move(daemon));
    world_.net().options.shares_memory = true;
    if (draw_.chance(0.5)) daemon_->disk().faults.slow = 0.02;
    if (draw_.chance(0.5)) world_.net().faults.slow = 0.1;
    if (draw_.chance(0.5)) world_.net().faults.split_read = 0.1;
    if (draw_.chance(0.3)) world_.net().faults.cut = 0.002;
    tensor_bytes_ = draw_.chance(0.5) ? 40'000 : 400'000;
    arena_bytes_ = draw_.chance(0.3) ? 256 * kKiB : 2 * kMiB;
  }
  ~HandoverWorkload() {
    for (auto* node : nodes_)
      if (node->alive()) node->kill(Death::kProcess);
    if (admin_.alive()) admin_.kill(Death::kProcess);
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
    if (world_.tracing()) world_.trace("handover", line);
  }
  template <class T>
  Result<T> admin(Task<T> task) {
    return world_.run(admin_, std::move(task), 15min);
  }
  /// Evenly on a logarithmic scale: moments that matter lie close together at the start.
  rt::Duration soon() {
    const auto scale = rt::Duration(1us) * (1 << draw_.below(18));
    return scale + draw_.between(rt::Duration(0), scale);
  }

  static Task<Session> connect(HandoverWorkload* w, Node* node, std::shared_ptr<rt::SharedMemory> memory);
  static Task<client::OpenedRun> open(HandoverWorkload* w, Node* node, Session session, std::uint32_t launch);
  static Task<void> make_bucket(HandoverWorkload* w);
  static Task<void> run_rank(HandoverWorkload* w, Round* round, std::uint32_t rank);
  static Task<void> open_newer(HandoverWorkload* w, std::uint32_t launch);
  static Task<client::AttemptReport> ended(HandoverWorkload* w, OwnerId owner);
  static Task<void> read(HandoverWorkload* w, const Round* round);

  void play(Round& round);
  void strike(Round& round);
  void scribble(Round& round, int times);
  void check(Round& round);
  bool kept_nothing();

  WorkloadOptions options_;
  World world_;
  Prng draw_;
  Node& admin_;
  std::unique_ptr<SimDaemon> daemon_;
  History history_{kRun};
  std::vector<Node*> nodes_;
  std::vector<std::unique_ptr<Round>> rounds_;
  std::vector<const Round*> committed_;
  std::uint32_t tensor_bytes_ = 0;
  std::size_t arena_bytes_ = 0;
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

Task<HandoverWorkload::Session> HandoverWorkload::connect(HandoverWorkload* w, Node* node,
                                                          std::shared_ptr<rt::SharedMemory> memory) {
  client::SessionOptions options;
  if (memory) {
    options.memory = std::move(memory);
    options.window_bytes = kWindowBytes;
  }
  return sim::connect(node, *w->daemon_, std::move(options));
}

Task<void> HandoverWorkload::make_bucket(HandoverWorkload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_, nullptr));
  CloseSession close(session);
  client::BucketSummary bucket;
  bucket.name = kBucket;
  co_return co_await client::create_bucket(session, bucket, w->admin_.now() + kCallTimeout);
}

Task<client::OpenedRun> HandoverWorkload::open(HandoverWorkload* w, Node* node, Session session, std::uint32_t launch) {
  for (;;) {
    const auto called = w->world_.now();
    w->history_.open_called(launch, {}, called);
    auto opened = co_await client::open_run(
        session,
        {.bucket = kBucket, .run = kRun, .launch = {"job", launch}, .resume = std::nullopt, .discard_after = false},
        node->now() + kCallTimeout);
    if (opened) {
      w->history_.open_answered(launch, opened->resume, called, w->world_.now());
      co_return std::move(opened);
    }
    const auto code = opened.error().code;
    if (code != Errc::kUnavailable && code != Errc::kUnknown && code != Errc::kDeadline)
      co_return fail(std::move(opened).error());
    co_await node->sleep(300ms);
  }
}

Task<void> HandoverWorkload::run_rank(HandoverWorkload* w, Round* round, std::uint32_t number) {
  auto& rank = round->ranks[number];
  auto* node = rank.node;
  struct Over {
    bool& over;
    ~Over() { over = true; }
  } over{rank.over};
  CO_TRY(auto session, co_await connect(w, node, rank.memory));
  CloseSession close(session);
  auto arena = client::Arena::over(*node, session->memory(), kWindowBytes, 64 * kKiB, session->unit_bytes());
  CO_TRY(auto run, co_await open(w, node, session, round->launch));
  const auto called = w->world_.now();
  w->history_.begin_called(round->step(), round->tag(), {}, called);
  client::SaveRequest request;
  request.step = round->step();
  request.rank = number;
  request.world_size = static_cast<std::uint32_t>(round->ranks.size());
  client::SaveTuning tuning;
  tuning.timeout = kCallTimeout;
  CO_TRY(auto attempt, co_await client::SaveAttempt::begin(session, *arena, run, request, tuning));
  round->owner = rank.owner = attempt->owner();
  w->history_.begin_answered(round->step(), round->tag(), attempt->owner().hex(), called, w->world_.now());

  format::ShardEntry entry;
  entry.tensor = "w";
  entry.dtype = format::DType::kU8;
  entry.global_shape = {round->ranks.size(), rank.bytes.size()};
  entry.box = {{number, 0}, {1, rank.bytes.size()}};
  CO_CHECK_OK(attempt->add_tensor(std::move(entry), rank.bytes));
  CO_CHECK_OK(attempt->add_blob("state", std::span(rank.bytes).first(10)));
  CO_CHECK_OK(co_await attempt->stage(true));
  if (attempt->survives()) {
    rank.handed_over = true;
    if (w->world_.tracing()) w->world_.trace(node->name(), "has handed over");
    if (rank.fate == Fate::kDiesAtOnce) {
      node->kill_soon(Death::kProcess, w->draw_.chance(0.2));
      co_await node->sleep(24h);
    }
    if (rank.fate == Fate::kDiesLater)
      w->world_.after(rank.later, [node, incarnation = node->incarnation()] {
        if (node->alive() && node->incarnation() == incarnation) node->kill(Death::kProcess);
      });
  }
  auto outcome = co_await attempt->outcome(node->now() + kEnds);
  if (w->world_.tracing())
    w->world_.trace(node->name(), outcome ? "committed" : "not committed: " + outcome.error().message);
  if (outcome) {
    rank.saved = true;
    w->history_.committed(round->step(), round->tag(), attempt->owner().hex(), w->world_.now());
  }
  co_return {};
}

Task<void> HandoverWorkload::open_newer(HandoverWorkload* w, std::uint32_t launch) {
  CO_TRY(auto session, co_await connect(w, &w->admin_, nullptr));
  CloseSession close(session);
  CO_CHECK_OK(co_await open(w, &w->admin_, session, launch));
  co_return {};
}

Task<client::AttemptReport> HandoverWorkload::ended(HandoverWorkload* w, OwnerId owner) {
  CO_TRY(auto session, co_await connect(w, &w->admin_, nullptr));
  CloseSession close(session);
  const auto until = w->world_.now() + kEnds;
  for (;;) {
    auto report = co_await client::attempt_status(session, kBucket, kRun, owner, 5s, w->admin_.now() + kCallTimeout);
    if (report && (report->phase == AttemptPhase::kCommitted || report->phase == AttemptPhase::kFailed))
      co_return std::move(report);
    if (w->world_.now() >= until) co_return fail(Errc::kDeadline, "the attempt does not end");
    co_await w->admin_.sleep(100ms);
  }
}

Task<void> HandoverWorkload::read(HandoverWorkload* w, const Round* round) {
  const auto what = "step " + std::to_string(round->step());
  // Between the daemon's look and its disk the memory may have changed: that is told, by its CRC, when it is read.
  const auto excused = [&](const Error& error) {
    return round->trouble == Trouble::kScribble && error.code == Errc::kDataLoss;
  };
  CO_TRY(auto session, co_await connect(w, &w->admin_, nullptr));
  CloseSession close(session);
  const auto asked = w->world_.now();
  auto opened = co_await client::StepReader::open(session, kBucket, kRun, round->step(), kCallTimeout);
  if (!opened) {
    w->broken("P1", what + " is committed and cannot be opened: " + opened.error().message);
    co_return {};
  }
  w->history_.saw(round->step(), round->tag(), asked, w->world_.now());
  std::vector<std::byte> expected;
  for (const auto& rank : round->ranks) expected.insert(expected.end(), rank.bytes.begin(), rank.bytes.end());
  std::vector<std::byte> out(expected.size(), std::byte{0xee});
  std::vector<client::StepReader::Wanted> wants;
  wants.push_back({"w", format::whole({round->ranks.size(), round->ranks.front().bytes.size()})});
  std::vector<std::span<std::byte>> destinations{out};
  auto restored = co_await (*opened)->restore(std::move(wants), destinations);
  if (!restored && !excused(restored.error())) w->broken("P3", what + " cannot be read: " + restored.error().message);
  if (restored && out != expected) w->broken("P3", what + ": wrong bytes");
  ++w->result_.restores;
  co_return {};
}

/// What the round is about, at some moment after the first hand-over.
void HandoverWorkload::strike(Round& round) {
  round.struck = true;
  switch (round.trouble) {
    case Trouble::kNone:
      break;
    case Trouble::kNewerLaunch:
      trace("a newer launch opens the run");
      admin_.spawn(open_newer(this, round.launch + 1));
      break;
    case Trouble::kDaemonDies:
      if (daemon_->node().alive())
        daemon_->kill(draw_.chance(0.5) ? Death::kPowerLoss : Death::kProcess, draw_.chance(0.2), soon() + 10ms);
      break;
    case Trouble::kScribble:
      scribble(round, 100);
  }
}

/// From the death of a rank on somebody writes into its memory.
void HandoverWorkload::scribble(Round& round, int times) {
  for (auto& rank : round.ranks) {
    if (rank.node->alive()) continue;
    const auto arena = rank.memory->bytes().subspan(kWindowBytes);
    for (int i = 0; i < 4; ++i) arena[draw_.below(std::min<std::size_t>(arena.size(), 64 * kKiB))] ^= std::byte{1};
  }
  if (times > 0) world_.after(50us, [this, &round, times] { scribble(round, times - 1); });
}

void HandoverWorkload::play(Round& round) {
  const auto world_size = static_cast<std::uint32_t>(draw_.between(1, 4));
  const auto bytes = draw_.between(1, tensor_bytes_);
  for (std::uint32_t i = 0; i < world_size; ++i) {
    Round::Rank rank;
    const auto dice = draw_.below(20);
    rank.fate = dice < 12   ? Fate::kDiesAtOnce
                : dice < 17 ? Fate::kDiesLater
                : dice < 19 ? Fate::kLives
                            : Fate::kDiesBefore;
    rank.later = soon();
    rank.memory = std::make_shared<SimMemory>(kWindowBytes + arena_bytes_);
    rank.bytes.resize(bytes);
    Payload(kRun, round.step(), round.tag(), "w").fill(i * bytes, rank.bytes);
    rank.node = &world_.make_node("launch" + std::to_string(round.launch) + ".rank" + std::to_string(i));
    nodes_.push_back(rank.node);
    round.ranks.push_back(std::move(rank));
  }
  for (std::uint32_t i = 0; i < world_size; ++i) {
    auto& rank = round.ranks[i];
    rank.node->spawn(run_rank(this, &round, i));
    if (rank.fate == Fate::kDiesBefore)
      world_.after(rank.later, [node = rank.node] {
        if (node->alive()) node->kill(Death::kProcess);
      });
  }
  // The trouble comes at some moment after a hand-over, the first or the last.
  const bool late = draw_.chance(0.7);
  const auto ripe = [&] {
    const auto handed = [](const Round::Rank& rank) { return rank.handed_over || rank.over; };
    return late ? std::ranges::all_of(round.ranks, handed) : std::ranges::any_of(round.ranks, handed);
  };
  if (world_.run_until(ripe, world_.now() + kEnds)) {
    world_.run_for(soon());
    strike(round);
  }
  const auto over = [&] {
    return std::ranges::all_of(round.ranks, [](const Round::Rank& rank) { return rank.over || !rank.node->alive(); });
  };
  if (!world_.run_until(over, world_.now() + kEnds)) broken("P7", "ranks do not end");
}

void HandoverWorkload::check(Round& round) {
  if (!world_.run_until([&] { return daemon_->ready() || daemon_->refused(); }, world_.now() + 2min)) {
    broken("P7", "the daemon does not start: " + daemon_->last_error());
    return;
  }
  if (!round.owner) return;
  auto report = admin(ended(this, *round.owner));
  if (!report) {
    broken("P7", "step " + std::to_string(round.step()) + ": " + report.error().message);
    return;
  }
  const bool all = std::ranges::all_of(round.ranks, [&](const Round::Rank& rank) {
    return rank.owner == round.owner && (rank.handed_over || rank.saved);
  });
  if (report->phase == AttemptPhase::kCommitted) {
    history_.committed(round.step(), round.tag(), round.owner->hex(), world_.now());
    committed_.push_back(&round);
    ++result_.commits;
    if (auto done = admin(read(this, &round)); !done) broken("P7", "reading: " + done.error().message);
    return;
  }
  history_.failed(round.step(), round.tag(), round.owner->hex(), world_.now());
  trace("step " + std::to_string(round.step()) + " failed: " + report->error.message);
  if (all && round.trouble == Trouble::kNone)
    broken("handover", "all ranks have handed over step " + std::to_string(round.step()) +
                           ", nothing went wrong, and it failed: " + report->error.message);
  if (round.trouble == Trouble::kScribble && all && report->error.code != Errc::kDataLoss)
    broken("handover", "scribbled memory is told as " + report->error.message);
}

bool HandoverWorkload::kept_nothing() {
  if (!daemon_->ready()) return false;
  const auto text = daemon_->process().metrics({});
  return text.find("\ncairn_handovers 0\n") != text.npos &&
         text.find("\ncairn_handovers_memory_bytes 0\n") != text.npos;
}

WorkloadResult HandoverWorkload::run() {
  result_.seed = options_.seed;
  const auto began = world_.now();
  daemon_->start();
  if (!world_.run_until([&] { return daemon_->ready(); }, world_.now() + 1min) || !admin(make_bucket(this)))
    broken("P7", "the daemon does not start");
  const auto rounds = draw_.between(2, 6);
  for (std::uint32_t i = 0; i < rounds && violations_.empty(); ++i) {
    auto& round = *rounds_.emplace_back(std::make_unique<Round>());
    round.launch = i + 1;
    const auto dice = draw_.below(10);
    round.trouble = dice < 4   ? Trouble::kNone
                    : dice < 6 ? Trouble::kNewerLaunch
                    : dice < 8 ? Trouble::kDaemonDies
                               : Trouble::kScribble;
    trace("round " + std::to_string(round.launch) + ", trouble " + std::to_string(static_cast<int>(round.trouble)));
    play(round);
    if (violations_.empty()) check(round);
    for (const auto& rank : round.ranks)
      if (rank.node->alive()) rank.node->kill(Death::kProcess);
  }
  if (violations_.empty() && !world_.run_until([&] { return kept_nothing(); }, world_.now() + 1min))
    broken("P6", "memory of ranks that are gone is kept");
  if (violations_.empty()) {
    daemon_->kill(Death::kPowerLoss, false, 100ms);
    if (!world_.run_until([&] { return daemon_->ready(); }, world_.now() + 2min))
      broken("P1", "the daemon does not start after a power loss: " + daemon_->last_error());
    for (const auto* round : committed_)
      if (auto done = admin(read(this, round)); !done) broken("P7", "reading: " + done.error().message);
  }
  for (const auto& v : history_.violations()) violations_.push_back(v.promise + ": " + v.what);
  if (world_.tracing() && !violations_.empty()) world_.trace("checker", history_.text());
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_handover_workload(WorkloadOptions options) {
  return HandoverWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
