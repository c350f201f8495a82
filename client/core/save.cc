#include "client/core/save.h"

#include <algorithm>
#include <mutex>

#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"
#include "storage/format/index_pages.h"

namespace cairn::client {
namespace {

constexpr std::size_t kTokenBytesMax = 16 * kKiB;
// What stage() waits for the daemon at most, and how much of a list of chunks goes into one message.
constexpr rt::Duration kHandoverMax = std::chrono::seconds(1);
constexpr std::size_t kHandoverBytes = 512 * kKiB;
constexpr rt::Duration kAbortMax = std::chrono::seconds(5);
constexpr rt::Duration kPollEvery = std::chrono::seconds(10);

template <class Message>
void name_run(Message& message, const std::string& bucket, const std::string& run) {
  message.set_bucket(bucket);
  message.set_run(run);
}

std::string text(const Launch& launch) {
  return launch.job + ":" + std::to_string(launch.restart);
}

}  // namespace

Task<OpenedRun> open_run(std::shared_ptr<Session> session, OpenRunRequest request, rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(request.bucket));
  CO_CHECK_OK(check_run_name(request.run));
  if (request.launch.job.empty()) co_return fail(Errc::kInvalid, "open run: the launch has no job id");
  wire::OpenRun open;
  name_run(open, request.bucket, request.run);
  open.mutable_launch()->set_job(request.launch.job);
  open.mutable_launch()->set_restart(request.launch.restart);
  if (request.resume) open.mutable_resume()->set_step(*request.resume);
  open.set_discard_after(request.discard_after);
  auto sent = co_await session->record_call(wire::Method::kOpenRun, home_group_of(request.bucket, request.run),
                                            wire::encode(open), deadline);
  if (!sent)
    co_return fail(
        std::move(sent).error().with(request.bucket + "/" + request.run + " launch " + text(request.launch)));
  wire::OpenRunReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "open run reply"));
  OpenedRun opened{
      request.bucket, request.run, request.launch, {reply.run_epoch().loss(), reply.run_epoch().count()}, {}};
  if (reply.has_resume()) opened.resume = reply.resume().step();
  co_return opened;
}

Task<AttemptReport> attempt_status(std::shared_ptr<Session> session, std::string bucket, std::string run, OwnerId owner,
                                   rt::Duration wait, rt::TimePoint deadline) {
  wire::AttemptStatus ask;
  name_run(ask, bucket, run);
  ask.set_owner(std::string(owner.view()));
  ask.set_wait_millis(static_cast<std::uint32_t>(std::chrono::duration_cast<std::chrono::milliseconds>(wait).count()));
  CO_TRY(auto sent, co_await session->record_call(wire::Method::kAttemptStatus, home_group_of(bucket, run),
                                                  wire::encode(ask), deadline));
  wire::AttemptStatusReply reply;
  CO_CHECK_OK(wire::decode(sent.message, reply, "attempt status reply"));
  AttemptReport report;
  switch (reply.state()) {
    case wire::AttemptStatusReply::OPEN:
      report.phase = AttemptPhase::kOpen;
      break;
    case wire::AttemptStatusReply::MERGING:
      report.phase = AttemptPhase::kMerging;
      break;
    case wire::AttemptStatusReply::COMMITTED:
      report.phase = AttemptPhase::kCommitted;
      break;
    case wire::AttemptStatusReply::FAILED:
      report.phase = AttemptPhase::kFailed;
      break;
    default:
      break;
  }
  report.step = reply.step();
  report.world_size = reply.world_size();
  report.sealed = reply.sealed();
  report.error = {static_cast<Errc>(reply.error_code()), reply.error()};
  co_return report;
}

SaveAttempt::SaveAttempt(std::shared_ptr<Session> session, Arena& arena, OpenedRun run, SaveRequest request,
                         SaveTuning tuning)
    : session_(std::move(session)),
      arena_(arena),
      run_(std::move(run)),
      request_(request),
      tuning_(tuning),
      changed_(session_->runtime().loop) {}

SaveAttempt::~SaveAttempt() = default;

rt::TimePoint SaveAttempt::soon() const {
  return session_->runtime().loop.now() + tuning_.timeout;
}
HomeGroup SaveAttempt::home() const {
  return home_group_of(run_.bucket, run_.run);
}

std::shared_ptr<SaveAttempt> SaveAttempt::start(std::shared_ptr<Session> session, Arena& arena, OpenedRun run,
                                                SaveRequest request, SaveTuning tuning) {
  auto self = std::shared_ptr<SaveAttempt>(new SaveAttempt(session, arena, std::move(run), request, tuning));
  ChunkWriter::Options options{.chunks_in_flight = tuning.chunks_in_flight, .timeout = tuning.timeout, .groups = {}};
  self->writer_ = std::make_unique<ChunkWriter>(session, arena, std::nullopt, std::move(options));
  session->background().spawn([](std::shared_ptr<SaveAttempt> attempt) -> Task<void> {
    auto reply = co_await attempt->ask_to_begin();
    if (reply && !attempt->sealed_) {
      attempt->writer_->start(attempt->owner_, groups_in(*reply));
      const auto every = std::chrono::milliseconds(std::max(1u, reply->heartbeat_millis()));
      attempt->session_->background().spawn(beat(attempt, attempt->session_, every));
    } else {
      // Whoever copies need not go on.
      attempt->writer_->stop(reply ? Error{Errc::kExists, "sealed before"} : reply.error());
    }
    attempt->begun_ = reply ? Result<void>() : fail(std::move(reply).error());
    attempt->changed_.notify_all();
    co_return {};
  }(self));
  return self;
}

Task<wire::BeginReply> SaveAttempt::ask_to_begin() {
  wire::Begin begin;
  name_run(begin, run_.bucket, run_.run);
  begin.set_step(request_.step);
  begin.mutable_launch()->set_job(run_.launch.job);
  begin.mutable_launch()->set_restart(run_.launch.restart);
  begin.mutable_run_epoch()->set_loss(run_.run_epoch.loss);
  begin.mutable_run_epoch()->set_count(run_.run_epoch.count);
  begin.set_rank(request_.rank);
  begin.set_world_size(request_.world_size);
  begin.set_overwrite(request_.overwrite);
  begin.set_explicit_commit(request_.explicit_commit);
  begin.set_declared_bytes(request_.declared_bytes);
  auto sent = co_await session_->record_call(wire::Method::kBegin, home(), wire::encode(begin), soon());
  if (!sent)
    co_return fail(std::move(sent).error().with(run_.bucket + "/" + run_.run + " step " +
                                                std::to_string(request_.step) + " rank " +
                                                std::to_string(request_.rank)));
  wire::BeginReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "begin reply"));
  CO_TRY(owner_, OwnerId::from_bytes(reply.owner()));
  sealed_ = reply.sealed();
  co_return std::move(reply);
}

Task<void> SaveAttempt::begun() {
  auto self = shared_from_this();
  while (!begun_) co_await changed_.wait();
  co_return *begun_;
}

Task<std::shared_ptr<SaveAttempt>> SaveAttempt::begin(std::shared_ptr<Session> session, Arena& arena, OpenedRun run,
                                                      SaveRequest request, SaveTuning tuning) {
  auto self = start(std::move(session), arena, std::move(run), request, tuning);
  CO_CHECK_OK(co_await self->begun());
  co_return self;
}

Task<void> SaveAttempt::beat(std::weak_ptr<SaveAttempt> weak, std::shared_ptr<Session> session, rt::Duration every) {
  for (;;) {
    co_await session->runtime().loop.sleep(every);
    wire::Heartbeat beat;
    HomeGroup home = 0;
    {
      auto self = weak.lock();
      if (!self || self->sealed_ || self->outcome_) co_return {};
      name_run(beat, self->run_.bucket, self->run_.run);
      beat.set_owner(std::string(self->owner_.view()));
      beat.set_rank(self->request_.rank);
      beat.set_declared_bytes(self->request_.declared_bytes);
      home = self->home();
    }
    // A failure shows in the next seal or chunk; here it is only a sign of life.
    (void)co_await session->record_call(wire::Method::kHeartbeat, home, wire::encode(beat),
                                        session->runtime().loop.now() + every);
  }
}

Result<void> SaveAttempt::add_tensor(format::ShardEntry entry, std::span<const std::byte> bytes) {
  const auto where = "tensor '" + entry.tensor + "'";
  CHECK_OK(check_free_name("tensor", entry.tensor));
  if (auto ok = format::check_box(entry.box, entry.global_shape); !ok) return fail(std::move(ok).error().with(where));
  if (auto ok = format::elements(entry.global_shape); !ok) return fail(std::move(ok).error().with(where));
  auto count = format::elements(entry.box.shape);
  if (!count) return fail(std::move(count).error().with(where));
  auto size = format::bytes_of(entry.dtype, *count);
  if (!size) return fail(std::move(size).error().with(where));
  if (*size != bytes.size())
    return fail(Errc::kInvalid, where + " box " + format::text(entry.box) + ": takes " + std::to_string(*size) +
                                    " bytes, but was given " + std::to_string(bytes.size()));
  if (entry.holder && (entry.holder->count == 0 || entry.holder->index >= entry.holder->count))
    return fail(Errc::kInvalid, where + ": holder " + std::to_string(entry.holder->index) + " of " +
                                    std::to_string(entry.holder->count));
  const std::lock_guard lock(adding_);
  if (staged_) return fail(Errc::kInvalid, where + ": added after stage()");
  if (!seen_.insert("t" + entry.tensor + '\0' + format::text(entry.box)).second)
    return fail(Errc::kInvalid, where + " box " + format::text(entry.box) + ": added twice by this rank");
  if (entry.holder) {
    const auto part = format::holder_range(entry.dtype, *count, *entry.holder);
    TRY(auto first, format::bytes_of(entry.dtype, part.first));
    TRY(auto last, format::bytes_of(entry.dtype, part.last));
    bytes = bytes.subspan(first, last - first);
  }
  entry.rank = request_.rank;
  items_.push_back({Item::Kind::kShard, contents_.shards.size(), bytes});
  contents_.shards.push_back(std::move(entry));
  return {};
}

Result<void> SaveAttempt::add_blob(std::string name, std::span<const std::byte> bytes) {
  CHECK_OK(check_free_name("blob", name));
  const std::lock_guard lock(adding_);
  if (staged_) return fail(Errc::kInvalid, "blob '" + name + "': added after stage()");
  if (!seen_.insert("b" + name).second) return fail(Errc::kInvalid, "blob '" + name + "': added twice by this rank");
  items_.push_back({Item::Kind::kBlob, contents_.blobs.size(), bytes});
  contents_.blobs.push_back(
      {.name = std::move(name), .rank = request_.rank, .size = bytes.size(), .crc = 0, .extents = {}});
  return {};
}

Result<void> SaveAttempt::add_token(std::string stream, std::string bytes) {
  CHECK_OK(check_free_name("stream", stream));
  if (bytes.size() > kTokenBytesMax) return fail(Errc::kInvalid, "token of stream '" + stream + "': over 16 KiB");
  const std::lock_guard lock(adding_);
  if (staged_ || !seen_.insert("s" + stream).second)
    return fail(Errc::kInvalid, "token of stream '" + stream + "': added twice, or after stage()");
  contents_.tokens.push_back({std::move(stream), std::move(bytes)});
  return {};
}

Result<void> SaveAttempt::add_meta(format::MetaEntry entry) {
  CHECK_OK(check_free_name("scope", entry.scope));
  const std::lock_guard lock(adding_);
  if (staged_) return fail(Errc::kInvalid, "metadata of '" + entry.scope + "': added after stage()");
  if (!seen_.insert("m" + entry.scope + '\0' + entry.key).second)
    return fail(Errc::kInvalid, "metadata '" + entry.key + "' of '" + entry.scope + "': added twice");
  contents_.meta.push_back(std::move(entry));
  return {};
}

/// With `last`, closes the list when it is copied to its end.
Task<void> SaveAttempt::copy_items(bool last) {
  auto self = shared_from_this();
  std::uint64_t total = 0;
  {
    const std::lock_guard lock(adding_);
    for (const auto& item : items_) total += item.bytes.size();
  }
  if (!tuning_.wait_for_memory && total + arena_.unit_bytes() > arena_.free_bytes())
    co_return fail(Errc::kBusy, "stage: " + std::to_string(total) + " bytes do not fit into the arena now (" +
                                    std::to_string(arena_.free_bytes()) + " of " +
                                    std::to_string(arena_.total_bytes()) + " bytes free)");
  writer_->expect(total);
  if (request_.stage_first && total + arena_.unit_bytes() <= arena_.free_bytes()) writer_->hold();
  // In turns: more may be added while one waits for memory.
  for (std::size_t begin = 0;;) {
    std::vector<ChunkWriter::Source> sources;
    {
      const std::lock_guard lock(adding_);
      if (begin == items_.size()) {
        items_.clear();
        staged_ = last;
        co_return {};
      }
      for (auto i = begin; i < items_.size(); ++i)
        sources.push_back({.bytes = items_[i].bytes, .align = ChunkWriter::Align::kSector});
    }
    CO_TRY(auto appended, co_await writer_->append(std::move(sources)));
    const std::lock_guard lock(adding_);
    for (auto& done : appended) {
      const auto& item = items_[begin++];
      bytes_ += item.bytes.size();
      auto& extents =
          item.kind == Item::Kind::kShard ? contents_.shards[item.entry].extents : contents_.blobs[item.entry].extents;
      auto& crc = item.kind == Item::Kind::kShard ? contents_.shards[item.entry].crc : contents_.blobs[item.entry].crc;
      extents = std::move(done.extents);
      crc = done.crc;
    }
  }
}

void SaveAttempt::place_items() {
  for (auto& shard : contents_.shards) writer_->place(shard.extents);
  for (auto& blob : contents_.blobs) writer_->place(blob.extents);
}

Task<void> SaveAttempt::stage(bool last) {
  auto self = shared_from_this();
  if (begun_) CO_CHECK_OK(*begun_);
  if (staged_) co_return fail(Errc::kInvalid, "stage: this save is staged already");
  if (!sealed_) {
    auto copied = co_await copy_items(last);
    writer_->release();
    if (!copied && copied.error().code == Errc::kBusy) co_return fail(std::move(copied).error());
    if (!copied || last) CO_CHECK_OK(co_await begun());
    if (!copied && !sealed_) {
      copied = co_await explain(std::move(copied).error());
      // The chunks that did not arrive are part of this rank's save: it cannot succeed any more.
      end(fail(copied.error()));
      // The others learn at once, by name, instead of after the silence.
      session_->background().spawn([](std::shared_ptr<SaveAttempt> attempt, Error why) -> Task<void> {
        (void)co_await attempt->send_abort(why.code, why.message, attempt->soon());
        co_return {};
      }(self, copied.error()));
      co_return fail(std::move(copied).error());
    }
  }
  if (!last) co_return {};
  {
    const std::lock_guard lock(adding_);
    staged_ = true;
  }
  if (!sealed_ && !outcome_) {
    place_items();
    // Insurance: whatever is wrong with it, or with the manifest, shows again behind.
    auto handed = co_await hand_over();
    survives_ = handed && *handed;
  } else {
    survives_ = sealed_;
  }
  session_->background().spawn([](std::shared_ptr<SaveAttempt> attempt) -> Task<void> {
    auto done = co_await attempt->finish();
    attempt->writer_.reset();
    attempt->end(std::move(done));
    co_return {};
  }(self));
  co_return {};
}

void SaveAttempt::end(Result<SaveOutcome> outcome) {
  if (outcome_) return;
  if (!outcome)
    outcome =
        fail(std::move(outcome).error().with("save " + run_.bucket + "/" + run_.run + " step " +
                                             std::to_string(request_.step) + " rank " + std::to_string(request_.rank)));
  outcome_.emplace(std::move(outcome));
  changed_.notify_all();
}

Task<SaveOutcome> SaveAttempt::finish() {
  auto self = shared_from_this();
  if (!sealed_) {
    auto sealed = co_await seal();
    if (!sealed) {
      auto error = (co_await explain(std::move(sealed).error())).error();
      // The others learn at once, by name, instead of after the silence.
      if (error.code != Errc::kFenced && error.code != Errc::kAttemptFailed)
        (void)co_await send_abort(error.code, error.message, session_->runtime().loop.now() + kAbortMax);
      co_return fail(std::move(error));
    }
    sealed_ = true;
    changed_.notify_all();
  }
  // Waiting for the others may take long: what only this rank's part of the save needed goes now.
  writer_.reset();
  contents_ = {};
  seen_ = {};
  CO_CHECK_OK(co_await await_commit());
  co_return SaveOutcome{request_.step, bytes_};
}

Task<void> SaveAttempt::store_manifest(std::string manifest) {
  CO_CHECK_OK(co_await writer_->cut());
  writer_->expect(manifest.size());
  CO_TRY(auto written, co_await writer_->append(cairn::bytes_of(manifest), ChunkWriter::Align::kNone));
  CO_CHECK_OK(co_await writer_->cut());

  auto seal = std::make_unique<wire::Seal>();
  name_run(*seal, run_.bucket, run_.run);
  seal->set_owner(std::string(owner_.view()));
  seal->set_rank(request_.rank);
  seal->set_writer(writer_->writer());
  std::vector<wire::ExtentRun> runs;
  to_runs(written.extents, owner_, runs);
  for (auto& run : runs) *seal->add_manifest() = std::move(run);
  seal->set_manifest_bytes(manifest.size());
  seal->set_digest(sha256(manifest));
  seal->set_data_bytes(bytes_);
  for (auto group : writer_->groups()) seal->add_groups(group);
  seal_ = std::move(seal);
  co_return {};
}

Task<bool> SaveAttempt::hand_over() {
  if (!session_->shares_memory()) co_return false;
  CO_TRY(auto manifest, format::encode(contents_));
  // Waiting for memory would stall a caller who has not waited for it yet: then it is done behind his back.
  const bool waits = bytes_ > arena_.total_bytes() && tuning_.wait_for_memory;
  if (round_up(manifest.size(), arena_.unit_bytes()) > arena_.free_bytes() && !waits) co_return false;
  CO_CHECK_OK(co_await store_manifest(std::move(manifest)));
  const auto chunks = writer_->unacknowledged();
  if (!chunks) co_return false;
  const auto deadline = session_->runtime().loop.now() + kHandoverMax;
  std::size_t next = 0;
  for (std::uint32_t part = 0;; ++part) {
    wire::Handover request;
    name_run(request, run_.bucket, run_.run);
    request.set_owner(std::string(owner_.view()));
    request.set_rank(request_.rank);
    request.set_writer(writer_->writer());
    request.set_part(part);
    for (std::size_t bytes = 0; next < chunks->size() && bytes < kHandoverBytes; ++next) {
      bytes += (*chunks)[next].size();
      CO_CHECK_OK(wire::decode((*chunks)[next], *request.add_chunks(), "chunk handed over"));
    }
    const bool last = next == chunks->size();
    if (last) {
      auto& seal = *request.mutable_seal();
      seal = *seal_;
      seal.clear_bucket();
      seal.clear_run();
      seal.clear_owner();
      seal.clear_rank();
      seal.clear_writer();
    }
    CO_CHECK_OK(co_await session_->record_call(wire::Method::kHandover, home(), wire::encode(request), deadline));
    if (last) co_return true;
  }
}

Task<void> SaveAttempt::seal() {
  if (!seal_) {
    CO_CHECK_OK(co_await writer_->drain());
    CO_TRY(auto manifest, format::encode(contents_));
    CO_CHECK_OK(co_await store_manifest(std::move(manifest)));
  }
  CO_CHECK_OK(co_await writer_->drain());
  CO_CHECK_OK(co_await session_->record_call(wire::Method::kSeal, home(), wire::encode(*seal_), soon()));
  co_return {};
}

Task<void> SaveAttempt::await_commit() {
  for (;;) {
    CO_TRY(auto report, co_await attempt_status(session_, run_.bucket, run_.run, owner_, kPollEvery,
                                                session_->runtime().loop.now() + kPollEvery + tuning_.timeout));
    switch (report.phase) {
      case AttemptPhase::kCommitted:
        co_return {};
      case AttemptPhase::kFailed:
        co_return fail(std::move(report.error));
      case AttemptPhase::kUnknown:
        co_return fail(Errc::kUnknown,
                       "the daemon no longer knows the attempt: list the steps to see whether it was committed");
      case AttemptPhase::kOpen:
      case AttemptPhase::kMerging:
        break;
    }
  }
}

Task<void> SaveAttempt::wait_until(std::shared_ptr<SaveAttempt> attempt, bool sealed_is_enough) {
  while (!attempt->outcome_ && !(sealed_is_enough && attempt->sealed_)) co_await attempt->changed_.wait();
  co_return {};
}

Task<void> SaveAttempt::sealed(rt::TimePoint deadline) {
  auto self = shared_from_this();
  if (!staged_ && !outcome_) co_return fail(Errc::kInvalid, "wait: stage() comes first");
  CO_CHECK_OK(
      co_await rt::with_deadline(session_->runtime().loop, deadline, wait_until(self, true), "wait for the seal"));
  if (!sealed_ && !*outcome_) co_return fail(outcome_->error());
  co_return {};
}

Task<SaveOutcome> SaveAttempt::outcome(rt::TimePoint deadline) {
  auto self = shared_from_this();
  if (!staged_ && !outcome_) co_return fail(Errc::kInvalid, "wait: stage() comes first");
  CO_CHECK_OK(
      co_await rt::with_deadline(session_->runtime().loop, deadline, wait_until(self, false), "wait for commit"));
  co_return *outcome_;
}

Task<void> SaveAttempt::commit(rt::TimePoint deadline) {
  auto self = shared_from_this();
  CO_CHECK_OK(co_await rt::with_deadline(session_->runtime().loop, deadline, begun(), "wait for the begin"));
  wire::Commit commit;
  name_run(commit, run_.bucket, run_.run);
  commit.set_owner(std::string(owner_.view()));
  CO_CHECK_OK(co_await session_->record_call(wire::Method::kCommit, home(), wire::encode(commit), deadline));
  co_return {};
}

Task<void> SaveAttempt::explain(Error error) {
  if (error.code == Errc::kFenced) {
    auto report = co_await attempt_status(session_, run_.bucket, run_.run, owner_, rt::Duration{0}, soon());
    if (report && report->phase == AttemptPhase::kFailed) co_return fail(std::move(report->error));
  }
  co_return fail(std::move(error));
}

Task<void> SaveAttempt::send_abort(Errc code, std::string reason, rt::TimePoint deadline) {
  wire::Abort abort;
  name_run(abort, run_.bucket, run_.run);
  abort.set_owner(std::string(owner_.view()));
  abort.set_rank(request_.rank);
  abort.set_reason(reason.substr(0, 1000));
  abort.set_code(static_cast<int>(code));
  CO_CHECK_OK(co_await session_->record_call(wire::Method::kAbort, home(), wire::encode(abort), deadline));
  co_return {};
}

Task<void> SaveAttempt::abort(std::string reason, rt::TimePoint deadline) {
  auto self = shared_from_this();
  CO_CHECK_OK(co_await rt::with_deadline(session_->runtime().loop, deadline, begun(), "wait for the begin"));
  CO_CHECK_OK(co_await send_abort(Errc::kAttemptFailed, reason, deadline));
  end(fail(Errc::kCancelled, "aborted: " + reason));
  co_return {};
}

}  // namespace cairn::client
