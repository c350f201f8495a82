#include "tests/sim/workload.h"
#include "tests/sim/hostile.h"

#include <algorithm>

#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "client/core/steps.h"
#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"
#include "storage/chunk_store/chunk_store.h"
#include "storage/chunk_store/layout.h"
#include "tests/sim/bugs.h"
#include "tests/sim/daemon.h"
#include "tests/sim/job.h"
#include "tests/sim/memory.h"
#include "tests/sim/net.h"
#include "tests/sim/sessions.h"
#include "tests/sim/swarm.h"

namespace cairn::sim {

namespace {

using namespace std::chrono_literals;
using client::AttemptPhase;
using Time = rt::TimePoint;

constexpr const char* kBucket = "sim";
constexpr rt::Duration kCallSlack = 40s;      // a call that has not ended then never will
constexpr rt::Duration kSafetyPhase = 60min;  // virtual; a rank that never joins is waited for ten minutes
constexpr rt::Duration kHealedSave = 150s;    // a new launch's save must be committed within, once all is well
constexpr rt::Duration kGarbageGone = 30min;
constexpr rt::Duration kReaderTtl = 10s;
constexpr rt::Duration kSkew = 50ms;  // between what a reader and the daemon take for it
constexpr std::uint64_t kEventsMax = 20'000'000;

std::string tag_text(Tag tag) {
  return std::to_string(tag.launch) + ":" + std::to_string(tag.operation);
}
std::optional<Tag> tag_of(const std::string& text) {
  const auto colon = text.find(':');
  if (colon == std::string::npos) return std::nullopt;
  return Tag{static_cast<std::uint32_t>(std::stoul(text.substr(0, colon))),
             static_cast<std::uint32_t>(std::stoul(text.substr(colon + 1)))};
}
std::size_t blob_bytes(std::uint32_t rank) {
  return 10 + 37 * rank;
}
bool certain_refusal(Errc code) {
  return code == Errc::kFenced || code == Errc::kExists || code == Errc::kInvalid || code == Errc::kAttemptFailed ||
         code == Errc::kNoSpace;
}

class Workload {
 public:
  explicit Workload(WorkloadOptions options)
      : options_(std::move(options)),
        swarm_(draw_swarm(options_.seed)),
        world_(options_.seed),
        draw_(options_.seed, "workload"),
        director_(world_.make_node("director")),
        admin_(world_.make_node("admin")),
        putter_(world_.make_node("putter")),
        hostile_(world_.make_node("hostile")) {
    world_.on_trace = options_.trace;
    SimDaemon::Options daemon;
    if (options_.directories) {
      // Faults of the medium strike one directory at a time, and what is lost comes from there; damage is not for here.
      daemon.directories = draw_.between(2, 3);
      copies_ = static_cast<std::uint32_t>(draw_.between(2, daemon.directories));
      swarm_.rot = 0;
      swarm_.disk.lost_write = swarm_.disk.misdirected_write = 0;
      swarm_.index_older = swarm_.small_disk = false;
      swarm_.daemon_kills = std::max(swarm_.daemon_kills, 1U);
    }
    daemon.segment_bytes = swarm_.segment_bytes;
    daemon.garbage_grace = swarm_.garbage_grace;
    daemon.garbage_interval = swarm_.garbage_interval;
    daemon.readers_ttl = kReaderTtl;
    daemon.duplicates = swarm_.duplicates;
    daemon.liveness_lies = swarm_.liveness_lies;
    daemon.bug = options_.bug;
    daemon_ = std::make_unique<SimDaemon>(world_, std::move(daemon));
  }
  ~Workload() {
    // Frames name the jobs: they go first.
    for (auto* node : nodes_)
      if (node->alive()) node->kill(Death::kProcess);
    if (admin_.alive()) admin_.kill(Death::kProcess);
    if (putter_.alive()) putter_.kill(Death::kProcess);
    if (hostile_.alive()) hostile_.kill(Death::kProcess);
    director_.kill(Death::kProcess);
    if (daemon_->node().alive()) daemon_->node().kill(Death::kProcess);
  }

  WorkloadResult run();

 private:
  // ---- Calls that must end (P7)

  struct OpenCall {
    std::string what;
    Time due;
  };
  class Call {
   public:
    Call(Workload& w, std::string what, rt::Duration limit = kCallTimeout + kCallSlack)
        : workload_(w), id_(++w.next_call_) {
      w.calls_.emplace(id_, OpenCall{std::move(what), w.world_.now() + limit});
    }
    Call(const Call&) = delete;
    ~Call() { workload_.calls_.erase(id_); }

   private:
    Workload& workload_;
    std::uint64_t id_;
  };
  void check_calls() {
    for (const auto& [_, call] : calls_)
      if (call.due < world_.now()) broken("P7", call.what + " has not ended");
  }

  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    if (world_.tracing()) world_.trace("checker", "BROKEN " + violations_.back());
  }
  bool any_violation() const {
    return !violations_.empty() || !objects_.violations().empty() ||
           std::any_of(jobs_.begin(), jobs_.end(), [](const auto& j) { return !j->history.violations().empty(); });
  }

  // ---- Drawing

  Launch& make_launch(Job& job, bool healing);

  // ---- Actors

  static Task<void> drive_job(Workload* w, Job* job);
  static Task<void> drive_daemon(Workload* w);
  void strike();
  static Task<void> drive_disk(Workload* w);
  static Task<void> administer(Workload* w);
  static Task<void> use_objects(Workload* w);
  static Task<void> put_object(Workload* w, std::shared_ptr<client::Session> session, client::Arena* arena,
                               std::uint64_t key);
  static Task<void> get_object(Workload* w, Node* node, std::shared_ptr<client::Session> session, std::uint64_t key,
                               bool must_read);
  static Task<void> read_objects_back(Workload* w);
  static Task<void> run_rank(Workload* w, Launch* launch, std::uint32_t rank);
  static Task<bool> save(Workload* w, Launch* launch, std::uint32_t rank, std::shared_ptr<client::Session> session,
                         client::Arena* arena, client::OpenedRun run, const Operation* op);
  /// A broken client: other bytes under a chunk id that is taken. They must be refused: "done" would be a promise to
  /// keep bytes that are not there.
  static Task<void> reuse_id(Workload* w, Node* node, std::shared_ptr<client::Session> session, OwnerId owner);
  static Task<client::SaveOutcome> wait_outcome(Workload* w, Node* node, std::shared_ptr<client::SaveAttempt> attempt) {
    Call call(*w, node->name() + " wait", 100s + kCallSlack);
    co_return co_await attempt->outcome(node->now() + 100s);
  }
  static Task<void> resolve(Workload* w, Launch* launch, std::uint64_t step, Tag tag,
                            std::shared_ptr<client::Session> session, client::OpenedRun run, OwnerId owner,
                            bool* committed, bool* failed);
  static Task<std::shared_ptr<client::Session>> connect(Workload* w, Node* node);
  /// Opens a step (nullopt: the highest), reads all of it in a layout of its own, compares every byte.
  static Task<void> check_step(Workload* w, Job* job, Node* node, std::shared_ptr<client::Session> session,
                               std::optional<std::uint64_t> step, std::uint32_t parts, std::size_t axis,
                               bool must_read);
  static Task<void> read_back(Workload* w, Job* job);
  void start(Launch& launch);
  void end_rank(Launch& launch) { --launch.running; }

  void heal();
  void regain_redundancy();
  bool wait(const std::function<bool()>& done, rt::Duration limit) {
    return world_.run_until([&] { return done() || any_violation() || world_.events() > kEventsMax; },
                            world_.now() + limit) &&
           done();
  }
  void converge(const char* when);
  /// Chunks in the index whose owner no visible step has.
  std::size_t orphans() const {
    std::size_t n = 0;
    for (const auto& directory : daemon_->directories())
      for (const auto& key : directory.index->keys(storage::Table::kChunks))
        if (auto id = ChunkId::from_key(key);
            !id || (!owners_.contains(id->owner) && id->owner.loss() == daemon_->loss()))
          ++n;
    return n;
  }
  void check_garbage() {
    // Long enough for a collector that believes too much to do harm, which the next reading back sees.
    world_.run_for(swarm_.garbage_grace + 3 * swarm_.garbage_interval);
    // Polled: the daemon's passes, grace time and timeouts of attempts lie in between.
    const auto limit = world_.now() + kGarbageGone;
    while (orphans() > 0 && world_.now() < limit && !any_violation()) world_.run_for(20s);
    if (orphans() > 0 && !any_violation())
      broken("P7", std::to_string(orphans()) + " chunks that no step names are never freed");
  }

  WorkloadOptions options_;
  Swarm swarm_;
  std::vector<std::unique_ptr<Job>> jobs_;
  World world_;
  Prng draw_;
  Node& director_;
  Node& admin_;
  Node& putter_;
  Node& hostile_;
  History objects_{"objects"};  // a key is a step, every put overwrites
  std::uint32_t next_put_ = 0;
  std::unique_ptr<SimDaemon> daemon_;
  std::vector<Node*> nodes_;
  std::vector<std::string> violations_;
  std::map<std::uint64_t, OpenCall> calls_;
  std::uint64_t next_call_ = 0;
  std::set<OwnerId> owners_;  // of the steps that the last reading back found
  bool healed_ = false;
  std::uint32_t copies_ = 1;
  std::size_t victim_ = 0;  // the directory that faults of the medium strike now
  WorkloadResult result_;
};

// ---- Ranks

/// A session lives in its own background work until it is closed: also when the frame that holds it is destroyed.
constexpr std::size_t kWindowBytes = 256 * kKiB, kArenaBytes = 1 * kMiB;

/// Over the memory that the session shares, if it does.
Result<std::unique_ptr<client::Arena>> make_arena(Node& node, const client::Session& session) {
  if (auto memory = session.memory())
    return client::Arena::over(node, std::move(memory), kWindowBytes, 64 * kKiB, session.unit_bytes());
  return client::Arena::create(node, kArenaBytes, 64 * kKiB, session.unit_bytes());
}

Task<std::shared_ptr<client::Session>> Workload::connect(Workload* w, Node* node) {
  client::SessionOptions options;
  options.servers = {w->daemon_->address()};
  options.name = node->name();
  if (w->swarm_.shared_memory) {
    options.window_bytes = kWindowBytes;
    options.shared_range_bytes_min = 1 * kKiB;  // the tensors here are small
    options.memory = std::make_shared<SimMemory>(kWindowBytes + kArenaBytes);
    options.shared_unchecked = w->options_.bug == kSharedUnchecked;
  }
  for (;;) {
    Call call(*w, node->name() + " connect");
    auto session = co_await client::Session::connect(node->runtime(), options, node->now() + kCallTimeout);
    if (session) co_return std::move(*session);
    if (session.error().code != Errc::kUnavailable && session.error().code != Errc::kDeadline &&
        session.error().code != Errc::kUnknown)
      co_return fail(std::move(session).error());
    co_await node->sleep(200ms);
  }
}

Task<void> Workload::run_rank(Workload* w, Launch* launch, std::uint32_t rank) {
  struct Ended {
    Workload& w;
    Launch& launch;
    ~Ended() { w.end_rank(launch); }
  } ended{*w, *launch};
  auto* node = launch->nodes[rank];
  auto& history = launch->job->history;

  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, make_arena(*node, *session));
  client::OpenedRun run;
  for (;;) {
    client::OpenRunRequest request{.bucket = kBucket,
                                   .run = history.run(),
                                   .launch = {"job", launch->number},
                                   .resume = launch->opening.resume,
                                   .discard_after = launch->opening.discard_after};
    const auto called = w->world_.now();
    history.open_called(launch->number, launch->opening, called);
    Call call(*w, node->name() + " open_run");
    auto opened = co_await client::open_run(session, std::move(request), node->now() + kCallTimeout);
    if (opened) {
      history.open_answered(launch->number, opened->resume, called, w->world_.now());
      run = std::move(*opened);
      break;
    }
    const auto code = opened.error().code;
    if (code == Errc::kFenced) {
      if (launch->number == launch->job->launches.back()->number && w->daemon_->loss() == 0)
        w->broken("P7", node->name() + " is fenced though no newer launch exists: " + opened.error().message);
      co_return {};
    }
    if (code == Errc::kNotFound && launch->opening.resume) co_return {};  // the step to resume from was removed
    if (code != Errc::kUnavailable && code != Errc::kUnknown && code != Errc::kDeadline && code != Errc::kFailed &&
        code != Errc::kNoSpace && code != Errc::kConflict)
      co_return fail(std::move(opened).error());
    co_await node->sleep(300ms);
  }

  if (launch->restores && run.resume) {
    const auto parts = launch->world_size;
    CO_CHECK_OK(co_await check_step(w, launch->job, node, session, run.resume, parts, launch->axis, false));
  }
  for (const auto& op : launch->operations) {
    co_await node->sleep(op.before);
    CO_TRY(auto go_on, co_await save(w, launch, rank, session, arena.get(), run, &op));
    if (!go_on) break;
  }
  co_return {};
}

Task<bool> Workload::save(Workload* w, Launch* launch, std::uint32_t rank, std::shared_ptr<client::Session> session,
                          client::Arena* arena, client::OpenedRun run, const Operation* op) {
  auto* node = launch->nodes[rank];
  auto& history = launch->job->history;
  auto& state = launch->saves[op->number];
  auto step = run.resume.value_or(0) + op->step_offset;
  if (launch->healing) {
    // An interrupted step can be saved again.
    const auto steps = history.steps();
    const auto interrupted = run.resume ? steps.upper_bound(*run.resume) : steps.begin();
    if (!launch->again) launch->again = interrupted == steps.end() ? step : *interrupted;
    step = *launch->again;
  }
  const Tag tag{launch->number, op->number};

  /// Whatever way this rank leaves: when all have, and none can have committed, nothing may show later.
  struct Leave {
    Workload& w;
    Launch& launch;
    Launch::SaveState& state;
    std::uint64_t step;
    Tag tag;
    Node* node;
    std::uint32_t incarnation;
    bool harmless = false;
    ~Leave() {
      if (!node->alive()) return;
      ++state.ended;
      state.harmless += harmless;
      if (state.harmless == launch.world_size) launch.job->history.gave_up(step, tag, w.world_.now());
    }
  } leave{*w, *launch, state, step, tag, node, node->incarnation()};

  client::SaveRequest request{.step = step,
                              .rank = rank,
                              .world_size = launch->world_size,
                              .overwrite = op->overwrite,
                              .explicit_commit = op->explicit_commit,
                              .stage_first = (step / 2 + rank) % 2 == 0};
  client::SaveTuning tuning;
  tuning.timeout = kCallTimeout;
  const auto called = w->world_.now();
  history.begin_called(step, tag, {.overwrite = op->overwrite, .bad = op->flaw != Flaw::kNone}, called);
  const auto attempt = client::SaveAttempt::start(session, *arena, run, request, tuning);
  // Every other rank copies before it knows its owner.
  const bool copies_ahead = (step + rank) % 2 == 0;
  const auto has_begun = [&](Result<void> begun) {
    if (begun) {
      history.begin_answered(step, tag, attempt->owner().hex(), called, w->world_.now());
      state.attempts.insert(attempt->owner().hex());
      return true;
    }
    leave.harmless = certain_refusal(begun.error().code);
    if (w->world_.tracing()) w->world_.trace(node->name(), "begin: " + begun.error().message);
    if (begun.error().code == Errc::kFenced) {
      ++w->result_.fenced;
      if (launch->number == launch->job->launches.back()->number && w->daemon_->loss() == 0)
        w->broken("P7", node->name() + " is fenced though no newer launch exists: " + begun.error().message);
    }
    return false;
  };
  if (!copies_ahead) {
    Call call(*w, node->name() + " begin_save");
    const auto begun = co_await attempt->begun();
    if (!has_begun(begun)) co_return begun.error().code != Errc::kFenced;
  }

  std::vector<std::vector<std::byte>> memory;
  auto add = [&](const TensorSpec& tensor, format::Box box, std::optional<format::Holder> holder) -> Result<void> {
    memory.push_back(tensor_bytes(Payload(history.run(), step, tag, tensor.name), tensor, box));
    format::ShardEntry entry;
    entry.tensor = tensor.name;
    entry.dtype = tensor.dtype;
    entry.global_shape = tensor.shape;
    entry.box = std::move(box);
    entry.holder = holder;
    return attempt->add_tensor(std::move(entry), memory.back());
  };
  for (const auto& tensor : launch->job->tensors) {
    switch (tensor.kind) {
      case TensorSpec::Kind::kSplit: {
        auto box = part_of(tensor, launch->axis, launch->world_size, rank);
        // The first tensor's last rank has the largest part: its edge is where the flaw is made.
        if (rank + 1 == launch->world_size && tensor.name == "bias") {
          if (op->flaw == Flaw::kGap && box.shape[0] > 0) --box.shape[0];
          if (op->flaw == Flaw::kOverlap) {
            if (box.offset[0] > 0) {
              --box.offset[0];
              ++box.shape[0];
            } else {
              --box.shape[0];
            }
          }
        }
        CO_CHECK_OK(add(tensor, std::move(box), std::nullopt));
        break;
      }
      case TensorSpec::Kind::kHolder:
        CO_CHECK_OK(add(tensor, format::whole(tensor.shape), format::Holder{rank, launch->world_size}));
        break;
      case TensorSpec::Kind::kReplicated:
        CO_CHECK_OK(add(tensor, format::whole(tensor.shape), std::nullopt));
    }
  }
  std::vector<std::byte> blob(blob_bytes(rank));
  Payload(history.run(), step, tag, "rng").fill(rank * std::uint64_t{1000}, blob);
  CO_CHECK_OK(attempt->add_blob("rng", blob));
  CO_CHECK_OK(attempt->add_token("tag", tag_text(tag)));
  if (launch->world_size > 1)
    CO_CHECK_OK(attempt->add_token("data", op->flaw == Flaw::kTokens ? std::to_string(rank) : "position"));

  if (copies_ahead) {
    Call call(*w, node->name() + " stage ahead", 5 * kCallTimeout + kCallSlack);
    (void)co_await attempt->stage(false);
    const auto begun = co_await attempt->begun();
    if (!has_begun(begun)) co_return begun.error().code != Errc::kFenced;
  }
  const auto owner = attempt->owner();
  if (op->reuses_id) CO_CHECK_OK(co_await reuse_id(w, node, session, owner));
  {
    Call call(*w, node->name() + " stage", 5 * kCallTimeout + kCallSlack);
    (void)co_await attempt->stage(true);  // a failure is the outcome, too
  }
  if (op->explicit_commit && rank == 0 && !attempt->ended()) {
    for (int i = 0; i < 40 && !attempt->ended(); ++i) {
      Call call(*w, node->name() + " commit");
      auto done = co_await attempt->commit(node->now() + kCallTimeout);
      if (done) break;
      co_await node->sleep(250ms);
    }
  }
  auto outcome = co_await wait_outcome(w, node, attempt);
  if (w->world_.tracing())
    w->world_.trace(node->name(), "save step " + std::to_string(step) + " of " + tag_text(tag) + ": " +
                                      (outcome ? "committed" : outcome.error().message));
  if (!outcome && outcome.error().code == Errc::kNoSpace) w->world_.injected(Fault::kDiskFull, "told to a rank");
  if (outcome) {
    history.committed(step, tag, owner.hex(), w->world_.now());
    ++launch->committed;
    co_return true;
  }
  if (op->flaw != Flaw::kNone && (outcome.error().code == Errc::kConflict || outcome.error().code == Errc::kInvalid))
    ++w->result_.refused_bad;
  bool committed = false, failed = false;
  CO_CHECK_OK(co_await resolve(w, launch, step, tag, session, run, owner, &committed, &failed));
  leave.harmless = failed;
  co_return outcome.error().code != Errc::kFenced;
}

Task<void> Workload::reuse_id(Workload* w, Node* node, std::shared_ptr<client::Session> session, OwnerId owner) {
  const ChunkId id{.owner = owner, .writer = w->draw_.next(), .index = 0};
  CO_TRY(auto group, session->choose_data_group({1}, 0));
  for (int content = 1; content <= 2; ++content) {
    std::string bytes(1000, static_cast<char>(content));
    const auto crc = crc32c(bytes, block_seed(id, 0));
    wire::PutChunk put;
    wire::to_wire(id, *put.mutable_id());
    put.set_length(static_cast<std::uint32_t>(bytes.size()));
    put.set_digest(storage::chunk_digest({crc}));
    put.add_block_crcs(crc);
    wire::DataHeader header;
    header.set_offset(0);
    std::vector<rpc::Piece> pieces;
    pieces.push_back({wire::encode(header), Buffer::from(std::move(bytes))});
    Call call(*w, node->name() + " put chunk");
    auto done = co_await session->put_chunk(group, wire::encode(put), std::move(pieces), node->now() + kCallTimeout);
    if (content == 2 && done) w->broken("P1", "other bytes under the id " + id.text() + " were acknowledged");
    if (!done) break;
  }
  co_return {};
}

Task<void> Workload::resolve(Workload* w, Launch* launch, std::uint64_t step, Tag tag,
                             std::shared_ptr<client::Session> session, client::OpenedRun run, OwnerId owner,
                             bool* committed, bool* failed) {
  auto& history = launch->job->history;
  // P7: status() resolves what the save could not say. An open attempt ends by itself: a silent rank fails it.
  const auto until = w->world_.now() + 3min;
  while (w->world_.now() < until) {
    Call call(*w, history.run() + " status");
    auto report = co_await client::attempt_status(session, run.bucket, run.run, owner, 5s,
                                                  session->runtime().loop.now() + kCallTimeout);
    if (report && report->phase == AttemptPhase::kCommitted) {
      *committed = true;
      history.committed(step, tag, owner.hex(), w->world_.now());
      co_return {};
    }
    if (report && report->phase == AttemptPhase::kFailed) {
      *failed = true;
      history.failed(step, tag, owner.hex(), w->world_.now());
      co_return {};
    }
    if (report && report->phase == AttemptPhase::kUnknown) co_return {};  // removed, or an hour has passed
    if (!report && report.error().code != Errc::kUnavailable && report.error().code != Errc::kUnknown &&
        report.error().code != Errc::kDeadline)
      co_return {};
    co_await session->runtime().loop.sleep(500ms);
  }
  if (w->healed_) w->broken("P7", history.run() + " step " + std::to_string(step) + ": the attempt does not end");
  co_return {};
}

// ---- Reading back

Task<void> Workload::check_step(Workload* w, Job* job, Node* node, std::shared_ptr<client::Session> session,
                                std::optional<std::uint64_t> wanted, std::uint32_t parts, std::size_t axis,
                                bool must_read) {
  auto& history = job->history;
  const auto asked = w->world_.now();
  auto what = [&] {
    return node->name() + " " + history.run() + (wanted ? " step " + std::to_string(*wanted) : " highest step");
  };
  // What a read may end in: unavailable while the world is broken, data loss when a fault damaged the only copy.
  auto excused = [&](const Error& error) {
    if (w->world_.tracing()) w->world_.trace(node->name(), "read: " + error.message);
    if (error.code == Errc::kDataLoss) return w->swarm_.excuses(error);
    if (error.code == Errc::kConflict || error.code == Errc::kProtocol || error.code == Errc::kInvalid) return false;
    return !must_read;
  };
  std::shared_ptr<client::StepReader> reader;
  {
    Call call(*w, what() + " open", 3 * kCallTimeout + kCallSlack);
    auto opened = co_await client::StepReader::open(session, kBucket, history.run(), wanted, kCallTimeout);
    const auto answered = w->world_.now();
    if (!opened) {
      if (opened.error().code == Errc::kNotFound) {
        if (wanted)
          history.saw_absent(*wanted, asked, answered);
        else
          history.saw_highest(std::nullopt, asked, answered);
      } else if (opened.error().code == Errc::kDeleted) {
        if (wanted && !history.may_be_gone(*wanted, asked, answered))
          w->broken("P1", what() + ": told deleted, though nothing removed or replaced it: " + opened.error().message);
      } else if (!excused(opened.error())) {
        w->broken("P3", what() + ": " + opened.error().message);
      }
      co_return {};
    }
    reader = std::move(*opened);
  }
  const auto answered = w->world_.now();
  const auto step = reader->summary().step;
  if (wanted && step != *wanted) w->broken("P3", what() + ": got step " + std::to_string(step));
  if (!wanted) history.saw_highest(step, asked, answered);
  auto gone = [&](const Error& error) {
    if (error.code == Errc::kDeleted) {
      if (reader->silence() < kReaderTtl - kSkew)
        w->broken("P8", what() + ": deleted under a protected reader: " + error.message);
      if (!history.may_be_gone(step, asked, w->world_.now()))
        w->broken("P1", what() + ": told deleted, though nothing removed or replaced it: " + error.message);
      return;
    }
    if (!excused(error)) w->broken("P3", what() + ": " + error.message);
  };

  Call call(*w, what() + " read", 10 * kCallTimeout + kCallSlack);
  auto contents = co_await reader->find({});
  if (!contents) {
    gone(contents.error());
    co_return {};
  }
  std::optional<Tag> tag;
  for (const auto& token : contents->tokens)
    if (token.stream == "tag") tag = tag_of(token.bytes);
  if (!tag) {
    w->broken("P3", what() + ": the index has no tag");
    co_return {};
  }
  history.saw(step, *tag, asked, answered);
  if (reader->summary().launch.restart != tag->launch)
    w->broken("P4", what() + ": the step record names launch " + std::to_string(reader->summary().launch.restart) +
                        ", its bytes launch " + std::to_string(tag->launch));

  std::set<std::string> names;
  for (const auto& shard : contents->shards) names.insert(shard.tensor);
  std::vector<client::StepReader::Wanted> wants;
  std::vector<std::vector<std::byte>> out, expected;
  std::vector<std::span<std::byte>> destinations;
  for (const auto& tensor : job->tensors) {
    if (!names.contains(tensor.name)) {
      w->broken("P2", what() + ": tensor " + tensor.name + " is missing");
      co_return {};
    }
    for (std::uint32_t part = 0; part < parts; ++part) {
      auto box = part_of(tensor, axis, parts, part);
      expected.push_back(tensor_bytes(Payload(history.run(), step, *tag, tensor.name), tensor, box));
      out.emplace_back(expected.back().size(), std::byte{0xee});
      wants.push_back({tensor.name, std::move(box)});
    }
  }
  for (auto& bytes : out) destinations.emplace_back(bytes);
  auto names_of = wants;
  auto restored = co_await reader->restore(std::move(wants), destinations);
  if (!restored) {
    gone(restored.error());
    co_return {};
  }
  for (std::size_t i = 0; i < out.size(); ++i)
    if (out[i] != expected[i])
      w->broken("P3", what() + ": wrong bytes in tensor " + names_of[i].tensor + " " + format::text(*names_of[i].box) +
                          " of " + tag_text(*tag));
  if (contents->blobs.size() != reader->summary().world_size)
    w->broken("P2", what() + ": " + std::to_string(contents->blobs.size()) + " blobs of " +
                        std::to_string(reader->summary().world_size) + " ranks");
  for (auto entry : contents->blobs) {
    std::string want(blob_bytes(entry.rank), '\0');
    Payload(history.run(), step, *tag, "rng")
        .fill(entry.rank * std::uint64_t{1000}, std::as_writable_bytes(std::span(want)));
    const auto rank = entry.rank;
    auto got = co_await reader->blob(std::move(entry));
    if (!got) {
      gone(got.error());
      co_return {};
    }
    if (*got != want) w->broken("P3", what() + ": wrong bytes in the blob of rank " + std::to_string(rank));
  }
  ++w->result_.restores;
  co_return {};
}

/// The whole run: what is listed, and every byte of every step, in another layout.
Task<void> Workload::read_back(Workload* w, Job* job) {
  auto* node = &w->admin_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  const auto asked = w->world_.now();
  std::vector<std::uint64_t> steps;
  {
    Call call(*w, "list steps");
    CO_TRY(auto page, co_await client::list_steps(session, kBucket, job->history.run(), std::nullopt, 1000,
                                                  node->now() + kCallTimeout));
    for (const auto& step : page.steps) {
      steps.push_back(step.step);
      w->owners_.insert(step.owner);
    }
  }
  job->history.saw_steps(steps, std::nullopt, asked, w->world_.now());
  for (auto step : steps)
    CO_CHECK_OK(co_await check_step(w, job, node, session, step, static_cast<std::uint32_t>(w->draw_.between(1, 4)),
                                    w->draw_.below(2), true));
  CO_CHECK_OK(co_await check_step(w, job, node, session, std::nullopt, 1, 0, true));
  co_return {};
}

// ---- Those who drive

Launch& Workload::make_launch(Job& job, bool healing) {
  auto launch = std::make_unique<Launch>();
  launch->job = &job;
  launch->number = static_cast<std::uint32_t>(job.launches.size()) + 1;
  launch->world_size = static_cast<std::uint32_t>(draw_.between(1, swarm_.ranks_max));
  launch->axis = draw_.below(2);
  launch->healing = healing;
  launch->restores = healing || draw_.chance(0.6);
  if (!healing && swarm_.removals && launch->number > 1 && draw_.chance(0.2)) {
    const auto steps = job.history.steps();
    if (!steps.empty()) {
      launch->opening.resume = *std::next(steps.begin(), static_cast<std::ptrdiff_t>(draw_.below(steps.size())));
      launch->opening.discard_after = draw_.chance(0.7);
    }
  }
  const auto saves = healing ? 1 : draw_.between(1, swarm_.saves_max);
  std::uint64_t offset = 0;
  for (std::uint32_t i = 1; i <= saves; ++i) {
    Operation op;
    op.number = i;
    op.before = healing ? rt::Duration(0) : draw_.log_between(10us, 500ms);
    if (!healing) {
      op.overwrite = draw_.chance(0.2);
      op.explicit_commit = draw_.chance(0.2);
      op.reuses_id = draw_.chance(0.05);
      if (swarm_.bad_saves && draw_.chance(0.4))
        op.flaw = static_cast<Flaw>(draw_.between(1, launch->world_size > 1 ? 3 : 1));
    }
    // The same step again: to replace it, or because the try before may have failed.
    if (offset == 0 || !draw_.chance(op.overwrite ? 0.7 : 0.15)) offset += draw_.between(1, 10);
    op.step_offset = offset;
    launch->operations.push_back(op);
  }
  for (std::uint32_t rank = 0; rank < launch->world_size; ++rank) {
    World::NodeOptions options;
    options.clock_ppm = static_cast<std::int64_t>(draw_.between(0, 400)) - 200;
    auto& node = world_.make_node(
        job.history.run() + ".launch" + std::to_string(launch->number) + ".rank" + std::to_string(rank), options);
    launch->nodes.push_back(&node);
    nodes_.push_back(&node);
  }
  job.launches.push_back(std::move(launch));
  return *job.launches.back();
}

void Workload::start(Launch& launch) {
  launch.running = launch.world_size;
  auto& history = launch.job->history;
  if (launch.opening.discard_after) {
    // The removal is part of the transaction that opens the run.
    launch.job->discard = history.delete_called(*launch.opening.resume, true, world_.now());
  }
  for (std::uint32_t rank = 0; rank < launch.world_size; ++rank)
    launch.nodes[rank]->spawn(run_rank(this, &launch, rank), [this, rank, &launch](Result<void> result) {
      if (!result) {
        if (world_.tracing()) world_.trace(launch.nodes[rank]->name(), "ends: " + result.error().message);
      }
    });
}

Task<void> Workload::drive_job(Workload* w, Job* job) {
  auto& loop = w->director_;
  auto& draw = w->draw_;
  for (std::uint32_t i = 0; i < w->swarm_.launches; ++i) {
    auto& launch = w->make_launch(*job, false);
    w->start(launch);
    auto over = [&] { return launch.running == 0; };
    if (w->swarm_.zombies && draw.chance(0.5)) {
      co_await loop.sleep(w->draw_.log_between(100us, 3s));
      continue;  // the next launch opens the run while this one goes on
    }
    if (w->swarm_.rank_kills && draw.chance(0.7)) {
      co_await loop.sleep(w->draw_.log_between(200us, 3s));
      const bool all = draw.chance(0.6);
      const auto first = draw.below(launch.world_size);
      for (std::uint32_t k = 0; k < launch.world_size; ++k) {
        auto* node = launch.nodes[(first + k) % launch.world_size];
        if (node->alive() && (all || k == 0)) node->kill(Death::kProcess, w->swarm_.silent_death && draw.chance(0.5));
      }
    } else if (w->swarm_.pauses && draw.chance(0.5)) {
      co_await loop.sleep(w->draw_.log_between(200us, 1s));
      const auto& host = launch.nodes[draw.below(launch.world_size)]->host();
      const auto until = w->world_.now() + w->draw_.log_between(100ms, 60s);
      w->world_.net().clog(host, w->daemon_->node().host(), until);
      w->world_.net().clog(w->daemon_->node().host(), host, until);
    }
    for (int waited = 0; !over() && waited < 8000; ++waited) co_await loop.sleep(50ms);
  }
  job->driven = true;
  co_return {};
}

Task<void> Workload::drive_daemon(Workload* w) {
  auto& loop = w->director_;
  auto& draw = w->draw_;
  for (std::uint32_t i = 0; i < w->swarm_.daemon_kills; ++i) {
    const auto death = w->swarm_.power_loss && draw.chance(0.8) ? Death::kPowerLoss : Death::kProcess;
    if (draw.chance(0.4)) {
      co_await loop.sleep(w->draw_.log_between(100us, 5s));
    } else {
      // At the n-th operation of the disk or the index from now: in the middle of what it does.
      auto count = [&] {
        return w->daemon_->disk().counts.writes + w->daemon_->disk().counts.flushes +
               w->daemon_->index().counts.commits;
      };
      const auto at = count() + draw.between(1, 60);
      for (int waited = 0; count() < at && waited < 3000; ++waited) co_await loop.sleep(waited < 1000 ? 20us : 10ms);
    }
    if (!w->daemon_->node().alive() || w->daemon_->refused()) continue;
    const bool silent = w->swarm_.silent_death && draw.chance(0.5);
    if (w->swarm_.index_older && i + 1 == w->swarm_.daemon_kills) {
      w->daemon_->kill(death, silent, w->draw_.log_between(10ms, 3s));
      w->daemon_->index().come_back_older(draw.between(1, 3));
    } else {
      w->daemon_->kill(death, silent, w->draw_.log_between(10ms, 3s));
      if (w->options_.directories) w->strike();
    }
  }
  co_return {};
}

/// While the daemon is down: a directory is lost or missing at the next start, and another one is the victim.
void Workload::strike() {
  auto& directories = daemon_->directories();
  const auto dice = draw_.below(10);
  if (dice < 3)
    daemon_->lose(draw_.below(directories.size()));
  else if (dice < 6)
    daemon_->leave_out(draw_.below(directories.size()));
  for (auto& directory : directories) {
    directory.disk->faults = {};
    directory.index->faults = {};
  }
  victim_ = draw_.below(directories.size());
  directories[victim_].disk->faults = swarm_.disk;
  directories[victim_].index->faults = swarm_.index;
  if (draw_.chance(0.3)) directories[victim_].disk->fail_flush_in = draw_.between(1, 200);
}

/// Rot, a disk that fills, and the supervisor's eye on a target that has failed.
Task<void> Workload::drive_disk(Workload* w) {
  auto& loop = w->director_;
  auto& draw = w->draw_;
  auto rot = w->swarm_.rot;
  auto next_rot = w->world_.now() + w->draw_.log_between(1ms, 2s);
  bool small = w->swarm_.small_disk;
  for (;;) {
    co_await loop.sleep(10ms);
    if (rot > 0 && w->world_.now() >= next_rot) {
      if (w->daemon_->disk().rot()) --rot;
      next_rot = w->world_.now() + w->draw_.log_between(1ms, 2s);
    }
    if (small && w->daemon_->ready()) {
      small = false;
      w->daemon_->disk().set_capacity(w->daemon_->disk().used_bytes() + draw.below(200'000) +
                                      (draw.chance(0.5) ? 1 * kMiB : 0));
    }
    const bool failed = w->daemon_->fail_stopped() || (w->daemon_->any_failed() && draw.chance(0.02));
    if (failed && draw.chance(0.05))
      w->daemon_->kill(w->swarm_.power_loss && draw.chance(0.5) ? Death::kPowerLoss : Death::kProcess, false, 100ms);
    w->check_calls();
  }
}

Task<void> Workload::administer(Workload* w) {
  auto* node = &w->admin_;
  auto& draw = w->draw_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  for (int operation = 0; !w->healed_; ++operation) {
    co_await node->sleep(w->draw_.log_between(5ms, 3s) * (1 + operation / 20));
    auto& job = *w->jobs_[draw.below(w->jobs_.size())];
    auto& history = job.history;
    const auto steps = history.steps();
    const auto dice = draw.below(10);
    const auto asked = w->world_.now();
    if (dice < 3) {
      Call call(*w, "admin list_steps");
      auto page =
          co_await client::list_steps(session, kBucket, history.run(), std::nullopt, 1000, node->now() + kCallTimeout);
      if (!page) continue;
      std::vector<std::uint64_t> listed;
      for (const auto& step : page->steps) listed.push_back(step.step);
      history.saw_steps(listed, std::nullopt, asked, w->world_.now());
    } else if (dice < 8 || !w->swarm_.removals || steps.empty()) {
      std::optional<std::uint64_t> step;
      if (!steps.empty() && draw.chance(0.5))
        step = *std::next(steps.begin(), static_cast<std::ptrdiff_t>(draw.below(steps.size())));
      CO_CHECK_OK(co_await check_step(w, &job, node, session, step, static_cast<std::uint32_t>(draw.between(1, 3)),
                                      draw.below(2), false));
    } else {
      const auto step = *std::next(steps.begin(), static_cast<std::ptrdiff_t>(draw.below(steps.size())));
      const bool after = draw.chance(0.3);
      const auto number = history.delete_called(step, after, asked);
      Call call(*w, "admin remove_steps");
      Result<void> removed;
      if (after) {
        auto all = co_await client::remove_steps_after(session, kBucket, history.run(), step, kCallTimeout);
        if (!all) removed = fail(std::move(all).error());
      } else {
        removed = co_await client::remove_step(session, kBucket, history.run(), step, node->now() + kCallTimeout);
      }
      history.delete_ended(number, removed ? History::Deleted::kYes : History::Deleted::kMaybe, w->world_.now());
    }
  }
  co_return {};
}

// ---- Objects

namespace {
constexpr std::uint64_t kObjectKeys = 3;
std::string object_key(std::uint64_t key) {
  return "object/" + std::to_string(key);
}
/// The first bytes name the put, the others are a function of it.
std::vector<std::byte> object_bytes(std::uint64_t key, Tag tag) {
  std::vector<std::byte> out(8 + (tag.operation * 7919) % 30'000);
  Payload("object", key, tag, "").fill(0, out);
  const std::uint64_t number = tag.operation;
  std::memcpy(out.data(), &number, 8);
  return out;
}
}  // namespace

Task<void> Workload::put_object(Workload* w, std::shared_ptr<client::Session> session, client::Arena* arena,
                                std::uint64_t key) {
  const Tag tag{0, ++w->next_put_};
  const bool if_absent = w->draw_.chance(0.2);
  const auto bytes = object_bytes(key, tag);
  const auto asked = w->world_.now();
  w->objects_.begin_called(key, tag, {.overwrite = true}, asked);
  Call call(*w, "put", 4 * kCallTimeout + kCallSlack);
  client::ChunkWriter::Options options;
  options.timeout = kCallTimeout;
  auto writer = co_await client::ObjectWriter::begin(session, *arena, kBucket, object_key(key),
                                                     {.if_absent = if_absent}, options);
  bool certain = true;  // it has not happened
  Result<void> done;
  if (!writer) {
    done = fail(std::move(writer).error());
  } else {
    done = co_await (*writer)->write(bytes);
    if (done && w->draw_.chance(0.9)) {
      auto sealed = co_await (*writer)->seal();
      if (sealed) {
        if (if_absent) w->objects_.saw_absent(key, asked, w->world_.now());
        w->objects_.committed(key, tag, {}, w->world_.now());
        co_return {};
      }
      certain = sealed.error().code == Errc::kExists;
      done = fail(std::move(sealed).error());
    }
  }
  if (!done && w->world_.tracing()) w->world_.trace("putter", done.error().message);
  if (certain) w->objects_.gave_up(key, tag, w->world_.now());
  co_return {};
}

Task<void> Workload::get_object(Workload* w, Node* node, std::shared_ptr<client::Session> session, std::uint64_t key,
                                bool must_read) {
  const auto asked = w->world_.now();
  const auto what = node->name() + " get " + object_key(key);
  Call call(*w, what, 4 * kCallTimeout + kCallSlack);
  auto excused = [&](const Error& error) {
    if (w->world_.tracing()) w->world_.trace(node->name(), what + ": " + error.message);
    if (error.code == Errc::kDataLoss) return w->swarm_.excuses(error);
    return !must_read && error.code != Errc::kInvalid && error.code != Errc::kProtocol;
  };
  auto opened = co_await client::open_object(session, kBucket, object_key(key), node->now() + kCallTimeout);
  const auto answered = w->world_.now();
  if (!opened) {
    if (opened.error().code == Errc::kNotFound)
      w->objects_.saw_absent(key, asked, answered);
    else if (!excused(opened.error()))
      w->broken("P3", what + ": " + opened.error().message);
    co_return {};
  }
  w->owners_.insert(opened->summary.owner);
  auto object = std::make_shared<const client::OpenedObject>(std::move(*opened));
  std::vector<std::byte> out(object->summary.size);
  auto read = co_await client::read_object(session, kBucket, object, 0, out, kCallTimeout);
  if (!read) {
    const bool gone = read.error().code == Errc::kDeleted || read.error().code == Errc::kNotFound;
    if (gone && object->held->silence() < kReaderTtl - kSkew)
      w->broken("P8", what + ": deleted under a protected reader: " + read.error().message);
    if (gone && !w->objects_.may_be_gone(key, asked, w->world_.now()))
      w->broken("P1", what + ": told deleted, though nothing removed or replaced it: " + read.error().message);
    else if (!gone && !excused(read.error()))
      w->broken("P3", what + ": " + read.error().message);
    co_return {};
  }
  std::uint64_t number = 0;
  if (out.size() >= 8) std::memcpy(&number, out.data(), 8);
  const Tag tag{0, static_cast<std::uint32_t>(number)};
  if (out.size() < 8 || out != object_bytes(key, tag)) {
    w->broken("P3", what + ": wrong bytes");
    co_return {};
  }
  w->objects_.saw(key, tag, asked, answered);
  ++w->result_.restores;
  co_return {};
}

Task<void> Workload::use_objects(Workload* w) {
  auto* node = &w->putter_;
  auto& draw = w->draw_;
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, make_arena(*node, *session));
  for (int operation = 0;; ++operation) {
    // Busy at first, then ever less: a run that waits long for something else stays cheap.
    co_await node->sleep(w->draw_.log_between(1ms, 1s) * (1 + operation / 20));
    const auto key = draw.below(kObjectKeys);
    const auto dice = draw.below(10);
    if (dice < 5) {
      CO_CHECK_OK(co_await put_object(w, session, arena.get(), key));
    } else if (dice < 8) {
      CO_CHECK_OK(co_await get_object(w, node, session, key, false));
    } else {
      const auto number = w->objects_.delete_called(key, false, w->world_.now());
      Call call(*w, "remove object", 2 * kCallTimeout + kCallSlack);
      auto removed = co_await client::remove_object(session, kBucket, object_key(key), {}, node->now() + kCallTimeout);
      w->objects_.delete_ended(number, removed ? History::Deleted::kYes : History::Deleted::kMaybe, w->world_.now());
    }
  }
}

Task<void> Workload::read_objects_back(Workload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_));
  CloseSession close(session);
  for (std::uint64_t key = 0; key < kObjectKeys; ++key)
    CO_CHECK_OK(co_await get_object(w, &w->admin_, session, key, true));
  co_return {};
}

// ---- The whole

void Workload::heal() {
  world_.net().faults = {};
  world_.net().unclog();
  for (auto& directory : daemon_->directories()) {
    directory.disk->faults = {};
    directory.disk->fail_write_in = directory.disk->fail_flush_in = directory.disk->fail_read_in = 0;
    directory.disk->set_capacity(256 << 20);
    directory.index->faults = {};
  }
  daemon_->stop_lying();
  daemon_->stop_duplicates();
  for (auto* node : nodes_)
    if (node->alive()) node->kill(Death::kProcess);
  admin_.kill(Death::kProcess);
  admin_.restart();
  putter_.kill(Death::kProcess);
  director_.kill(Death::kProcess);
  director_.restart();
  calls_.clear();
  if (world_.tracing()) world_.trace("world", "heals");
}

/// Every directory that was away is there again: all groups are whole, and every chunk lies on every member.
void Workload::regain_redundancy() {
  daemon_->kill(Death::kProcess, false, 10ms);
  if (!wait([&] { return daemon_->redundant(); }, 10min)) {
    if (!any_violation()) broken("P1", "the redundancy does not come back: " + daemon_->last_error());
    return;
  }
  std::map<std::string, std::size_t> copies;
  for (const auto& directory : daemon_->directories())
    for (const auto& [key, value] : directory.index->entries(storage::Table::kChunks))
      if (const auto location = storage::decode_location(value); location && daemon_->copies_of(location->group) > 1)
        ++copies[key];
  for (const auto& [key, count] : copies) {
    const auto id = ChunkId::from_key(key);
    if (id && owners_.contains(id->owner) && count < copies_)
      broken("P1", "chunk " + id->text() + " has " + std::to_string(count) + " copies of " + std::to_string(copies_));
  }
}

void Workload::converge(const char* when) {
  if (!wait([&] { return daemon_->ready() || daemon_->refused(); }, 2min)) {
    if (!any_violation())
      broken("P7", std::string(when) + ": the daemon does not become ready: " + daemon_->last_error());
    return;
  }
  if (daemon_->refused()) {
    if (!swarm_.damages())
      broken("P1", std::string(when) +
                       ": the target refuses to open, and nothing damaged it: " + daemon_->refused()->message);
    return;
  }
  owners_.clear();
  for (auto& job : jobs_) {
    bool done = false;
    admin_.spawn(read_back(this, job.get()), [&](Result<void> result) {
      done = true;
      if (!result) broken("P7", std::string(when) + ": reading back fails: " + result.error().message);
    });
    if (!wait([&] { return done; }, 10min) && !any_violation())
      broken("P7", std::string(when) + ": reading back does not end");
    if (any_violation()) return;
  }
  if (auto done = world_.run(admin_, read_objects_back(this), 10min); !done && !any_violation())
    broken("P7", std::string(when) + ": reading objects back fails: " + done.error().message);
}

WorkloadResult Workload::run() {
  result_.seed = options_.seed;
  result_.configuration = swarm_.text();
  const auto began = world_.now();

  // A quiet start: the bucket exists before anything breaks.
  daemon_->start();
  if (!wait([&] { return daemon_->ready(); }, 1min)) {
    broken("P7", "the daemon does not start: " + (daemon_->refused() ? daemon_->refused()->message : "no end"));
  } else if (auto made = world_.run(admin_,
                                    [](Workload* w) -> Task<void> {
                                      CO_TRY(auto session, co_await connect(w, &w->admin_));
                                      CloseSession close(session);
                                      client::BucketSummary bucket;
                                      bucket.name = kBucket;
                                      bucket.copies = w->copies_;
                                      CO_CHECK_OK(co_await client::create_bucket(session, std::move(bucket),
                                                                                 w->admin_.now() + kCallTimeout));
                                      co_return {};
                                    }(this));
             !made) {
    broken("P7", "the bucket cannot be created: " + made.error().message);
  } else {
    enable(swarm_, world_.faults);
    world_.net().faults = swarm_.net;
    world_.net().options.shares_memory = swarm_.shared_memory;
    victim_ = options_.directories ? draw_.below(daemon_->directories().size()) : 0;
    daemon_->directories()[victim_].disk->faults = swarm_.disk;
    daemon_->directories()[victim_].index->faults = swarm_.index;
    for (std::uint32_t i = 0; i < swarm_.runs; ++i) {
      jobs_.push_back(std::make_unique<Job>("run" + std::to_string(i)));
      jobs_.back()->tensors = draw_tensors(draw_, swarm_.tensor_bytes_max);
    }
    for (auto& job : jobs_) director_.spawn(drive_job(this, job.get()));
    director_.spawn(drive_daemon(this));
    director_.spawn(drive_disk(this));
    admin_.spawn(administer(this));
    if (swarm_.objects) putter_.spawn(use_objects(this));
    if (swarm_.hostile) hostile_.spawn(hostile_peer(&hostile_, daemon_->address(), Prng(options_.seed, "hostile")));
    auto over = [&] {
      return daemon_->refused().has_value() ||
             std::all_of(jobs_.begin(), jobs_.end(), [](const auto& job) { return job->driven; });
    };
    if (!wait(over, kSafetyPhase) && !any_violation()) broken("P7", "the safety phase does not end");

    if (!any_violation()) {
      healed_ = true;
      heal();
      // Free space is looked at once a second, and what was under way may still have failed.
      world_.run_for(3s);
      if (daemon_->fail_stopped() || daemon_->any_failed()) daemon_->kill(Death::kProcess, false, 10ms);
      for (auto& job : jobs_) {  // saves succeed again
        if (!wait([&] { return daemon_->ready() || daemon_->refused(); }, 2min) || daemon_->refused()) break;
        auto& launch = make_launch(*job, true);
        start(launch);
        if (!wait([&] { return launch.running == 0; }, kHealedSave) && !any_violation())
          broken("P7", job->history.run() + ": a save does not end though everything is well");
        else if (launch.committed < launch.world_size && !any_violation())
          broken("P7", job->history.run() + ": a save fails though everything is well");
      }
      hostile_.kill(Death::kProcess);
      if (!any_violation()) converge("after healing");
      if (!any_violation() && daemon_->ready()) check_garbage();
      if (!any_violation() && daemon_->ready()) {
        if (options_.directories) regain_redundancy();
        daemon_->kill(Death::kPowerLoss, false, 100ms);
        // When all copies are back, any one directory may go.
        if (options_.directories && !daemon_->lose(draw_.below(daemon_->directories().size())) && !any_violation())
          broken("P1", "redundancy was back, and one directory is the last that has something");
        converge("after a last power loss");
      }
    }
  }

  for (const auto& v : objects_.violations()) violations_.push_back(v.promise + ": " + v.what);
  if (world_.tracing() && any_violation()) world_.trace("checker", objects_.text());
  for (const auto& job : jobs_) {
    for (const auto& v : job->history.violations()) violations_.push_back(v.promise + ": " + v.what);
    result_.commits += job->history.commits();
    if (world_.tracing() && any_violation()) world_.trace("checker", job->history.text());
  }
  if (world_.events() > kEventsMax && violations_.empty()) broken("P7", "the run does not come to an end");
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

void conclude(WorkloadResult& result, const World& world, rt::TimePoint began, std::vector<std::string> violations) {
  result.violations = std::move(violations);
  result.trace_hash = world.trace_hash();
  result.events = world.events();
  result.virtual_seconds = static_cast<double>((world.now() - began).count()) / 1e9;
  result.faults = world.faults;
}

WorkloadResult run_checkpoint_workload(WorkloadOptions options) {
  return Workload(std::move(options)).run();
}

}  // namespace cairn::sim
