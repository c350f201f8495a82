#include "server/scrub/scrub.h"

#include <algorithm>
#include <utility>

#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "server/chunks/chunks.h"

namespace cairn::server {
namespace {

using storage::Table;

constexpr const char* kKey = "scrub";
constexpr std::size_t kChunksPage = 256;
constexpr std::size_t kSuspectsMax = 4096;
constexpr auto kTryAgainAfter = std::chrono::seconds(1);
constexpr auto kLookAtClockEvery = std::chrono::hours(1);

// The numbers of the wire are ours.
static_assert(static_cast<int>(wire::Job::RUNNING) == static_cast<int>(Scrub::State::kRunning));
static_assert(static_cast<int>(wire::Job::PAUSED) == static_cast<int>(Scrub::State::kPaused));
static_assert(static_cast<int>(wire::Job::DONE) == static_cast<int>(Scrub::State::kDone));
static_assert(static_cast<int>(wire::Job::CANCELLED) == static_cast<int>(Scrub::State::kCancelled));

std::string encode(const Scrub::Pass& pass) {
  records::Scrub out;
  out.set_state(static_cast<wire::Job::State>(pass.state));
  if (pass.after) {
    const auto key = pass.after->key();
    out.set_after(std::string(key.data(), key.size()));
  }
  out.set_chunks(pass.chunks);
  out.set_bytes(pass.bytes);
  out.set_damaged(pass.damaged);
  out.set_repaired(pass.repaired);
  out.set_started_unix_nanos(pass.started_unix_nanos);
  out.set_ended_unix_nanos(pass.ended_unix_nanos);
  out.set_full_pass_unix_nanos(pass.full_pass_unix_nanos);
  out.set_asked(pass.asked);
  if (pass.pace) out.set_pace(*pass.pace);
  for (const auto& error : pass.errors) out.add_errors(error);
  return wire::encode(out);
}

Result<Scrub::Pass> decode_pass(std::string_view value) {
  records::Scrub in;
  CHECK_OK(wire::decode(value, in, "scrub"));
  Scrub::Pass out;
  if (in.state() >= wire::Job::RUNNING && in.state() <= wire::Job::CANCELLED)
    out.state = static_cast<Scrub::State>(in.state());
  if (!in.after().empty()) {
    TRY(out.after, ChunkId::from_key(in.after()));
  }
  out.chunks = in.chunks();
  out.bytes = in.bytes();
  out.damaged = in.damaged();
  out.repaired = in.repaired();
  out.started_unix_nanos = in.started_unix_nanos();
  out.ended_unix_nanos = in.ended_unix_nanos();
  out.full_pass_unix_nanos = in.full_pass_unix_nanos();
  out.asked = in.asked();
  if (in.has_pace()) out.pace = in.pace();
  out.errors.assign(in.errors().begin(), in.errors().end());
  return out;
}

Task<void> wait_for(rt::Signal& signal) {
  co_await signal.wait();
  co_return {};
}

/// It will not be better the next time: told, instead of tried for ever.
bool lasting(const Error& error) {
  return error.code == Errc::kDataLoss || error.code == Errc::kFailed;
}

/// Whether the chunk belongs to something: damage in what will be freed is nobody's loss. No answer: it does.
bool matters(const Answer& answer, const ChunkId& id) {
  if (answer.kind == Answer::Kind::kNone || answer.loss != id.owner.loss()) return true;
  if (answer.kind == Answer::Kind::kAbsent) return false;
  return answer.kind == Answer::Kind::kOpen ||
         (answer.writers.contains(id.writer) && !answer.abandoned.contains({id.writer, id.index}));
}
/// Whether it was acknowledged for certain, so that every serving member must have it.
bool acknowledged(const Answer& answer, const ChunkId& id) {
  return answer.kind == Answer::Kind::kCommitted && answer.loss == id.owner.loss() && matters(answer, id);
}

}  // namespace

Scrub::Scrub(rt::Runtime runtime, Membership& members, Copier& copier, Pace& repair_pace, Liveness& liveness,
             Options options)
    : runtime_(runtime),
      members_(members),
      copier_(copier),
      repair_pace_(repair_pace),
      liveness_(liveness),
      options_(options),
      wake_(runtime.loop) {
  for (const auto& entry : members.targets().all())
    looks_.push_back(std::make_unique<Look>(runtime.loop, *entry.target, entry.directory));
}

Task<void> Scrub::load() {
  for (const auto& look : looks_) {
    // What is only about looking after a target must not keep it from serving.
    auto stored = co_await look->target.index().get(Table::kMeta, kKey);
    auto known = stored && *stored ? decode_pass(**stored) : Result<Pass>(Pass());
    if (stored && known) look->pass = *known;
    auto damage = co_await look->damage.load();
    for (const auto* error :
         {stored ? nullptr : &stored.error(), known ? nullptr : &known.error(), damage ? nullptr : &damage.error()})
      if (error != nullptr)
        runtime_.log.write(rt::Level::kError, "scrub_state_unreadable",
                           {{"target", look->target.uuid().text()}, {"error", error->message}});
    look->pace.set(look->pass.pace.value_or(options_.pace));
    // From here on the first interval counts.
    if (look->pass.state == State::kNone && options_.interval > rt::Duration(0) && look->pass.started_unix_nanos == 0) {
      look->pass.started_unix_nanos = runtime_.loop.wall_nanos();
      (void)co_await save(*look);
    }
  }
  co_return {};
}

Task<void> Scrub::run() {
  rt::Scope tasks(runtime_.loop);
  for (const auto& look : looks_) tasks.spawn(watch(*look));
  tasks.spawn(watch_members());
  tasks.spawn(repair_queue());
  co_return co_await tasks.join();
}

Task<void> Scrub::close() {
  for (const auto& look : looks_)
    if (look->pass.state == State::kRunning && !look->target.committer().failure()) (void)co_await save(*look);
  co_return {};
}

void Scrub::set(std::uint64_t pace, rt::Duration interval) {
  options_.pace = pace;
  options_.interval = interval;
  for (const auto& look : looks_) {
    look->pace.set(look->pass.pace.value_or(pace));
    look->changed.notify_all();
  }
}

// ---- Passes

Task<void> Scrub::save(Look& look) {
  storage::Batch batch;
  batch.put(Table::kMeta, kKey, encode(look.pass));
  return look.target.committer().commit(std::move(batch));
}

Task<void> Scrub::set_state(Look& look, State state) {
  look.pass.state = state;
  look.changed.notify_all();
  return save(look);
}

Task<void> Scrub::begin(Look& look, bool asked, std::optional<std::uint64_t> pace) {
  ++look.number;
  look.pass = {.state = State::kPaused,
               .after = {},
               .started_unix_nanos = runtime_.loop.wall_nanos(),
               .full_pass_unix_nanos = look.pass.full_pass_unix_nanos,
               .asked = asked,
               .pace = pace,
               .errors = {}};
  look.pace.set(pace.value_or(options_.pace));
  CO_CHECK_OK(co_await look.damage.forget_repaired());
  co_return co_await set_state(look, State::kRunning);
}

Task<void> Scrub::start(Look& look, std::optional<std::uint64_t> pace) {
  if (const auto& failure = look.target.committer().failure())
    co_return fail(Errc::kFailed, look.directory + " has failed: " + failure->message);
  const bool under_way = look.pass.state == State::kRunning || look.pass.state == State::kPaused;
  if (!look.pass.asked || !under_way) co_return co_await begin(look, true, pace);
  look.pass.pace = pace;
  look.pace.set(pace.value_or(options_.pace));
  co_return co_await set_state(look, State::kRunning);
}

Task<void> Scrub::pause(Look& look) {
  if (look.pass.state == State::kPaused) co_return {};
  if (look.pass.state != State::kRunning) co_return fail(Errc::kConflict, "it is not running");
  co_return co_await set_state(look, State::kPaused);
}
Task<void> Scrub::resume(Look& look) {
  if (look.pass.state == State::kRunning) co_return {};
  if (look.pass.state != State::kPaused) co_return fail(Errc::kConflict, "it is not paused");
  co_return co_await set_state(look, State::kRunning);
}
Task<void> Scrub::cancel(Look& look) {
  if (look.pass.state == State::kCancelled) co_return {};
  if (look.pass.state != State::kRunning && look.pass.state != State::kPaused)
    co_return fail(Errc::kConflict, "it is not under way");
  look.pass.ended_unix_nanos = runtime_.loop.wall_nanos();
  co_return co_await set_state(look, State::kCancelled);
}
void Scrub::pause_repair(Look& look, bool paused) {
  look.repair_paused = paused;
  if (!paused) retry_ = true;
  wake_.notify_all();
}

/// When the next pass begins by itself; nothing: not before something changes.
std::optional<rt::TimePoint> Scrub::due(const Look& look) const {
  if (options_.interval <= rt::Duration(0) || look.pass.state == State::kPaused) return std::nullopt;
  // The wall clock says when the last one began, in a process before. A clock that stands wrong makes a pass too early
  // or too late, no more.
  const auto since = rt::Duration(runtime_.loop.wall_nanos() - look.pass.started_unix_nanos);
  if (since < rt::Duration(0) || since >= options_.interval) return runtime_.loop.now();
  return runtime_.loop.now() + std::min<rt::Duration>(options_.interval - since, kLookAtClockEvery);
}

Task<void> Scrub::watch(Look& look) {
  for (;;) {
    const bool failed = look.target.committer().failure().has_value();
    if (!failed && look.pass.state == State::kRunning) {
      auto done = co_await pass(look);
      if (done) continue;
      runtime_.log.write(rt::Level::kWarning, "scrub_interrupted",
                         {{"target", look.target.uuid().text()}, {"error", done.error().message}});
      co_await runtime_.loop.sleep(kTryAgainAfter);
      continue;
    }
    const auto next = failed ? std::nullopt : due(look);
    if (next && *next <= runtime_.loop.now()) {
      if (auto begun = co_await begin(look, false, std::nullopt); !begun) co_await runtime_.loop.sleep(kTryAgainAfter);
      continue;
    }
    (void)co_await rt::with_deadline(runtime_.loop, next.value_or(rt::kNever), wait_for(look.changed), "next scrub");
  }
}

bool Scrub::serves(const Look& look, DataGroup number) const {
  const auto group = members_.group(false, number);
  return group && std::ranges::find(group->serving, &look.target) != group->serving.end();
}

/// What to look at next: what the target has, and what it serves and others have.
Task<Scrub::Page> Scrub::list(Look& look) {
  const auto after = look.pass.after;
  CO_TRY(const auto own, co_await list_of({&look.target}, after, kChunksPage));
  std::vector<storage::Target*> targets;
  for (const auto& entry : members_.targets().all())
    if (!entry.target->committer().failure()) targets.push_back(entry.target.get());
  // When the index of another one is damaged, its own pass tells.
  const auto all = (co_await list_of(targets, after, kChunksPage)).value_or(own);
  Page page;
  for (const auto& chunk : all)
    if (serves(look, chunk.group) || std::ranges::binary_search(own, chunk.id, {}, &storage::ChunkInfo::id))
      page.ids.push_back(chunk.id);
  if (all.size() == kChunksPage) page.end = all.back().id;
  co_return std::move(page);
}

Task<void> Scrub::pass(Look& look) {
  const auto number = look.number;
  const auto going = [&look, number] { return look.number == number && look.pass.state == State::kRunning; };
  const auto target = look.target.uuid().text();
  runtime_.log.write(rt::Level::kInfo, look.pass.after ? "scrub_resumed" : "scrub_started", {{"target", target}});
  const auto index_damaged = [&](const Error& error) {
    look.pass.errors.push_back(error.message);
    runtime_.log.write(rt::Level::kError, "target_damaged", {{"target", target}, {"error", error.message}});
  };
  if (!look.pass.after) {
    auto verified = co_await look.target.verify();
    if (!going()) co_return {};
    look.pass.errors.clear();
    if (!verified && !lasting(verified.error())) co_return fail(std::move(verified).error());
    if (!verified) index_damaged(verified.error());
  }
  bool whole = true;
  for (auto saved = runtime_.loop.now();;) {
    auto page = co_await list(look);
    if (!going()) co_return {};
    if (!page && !lasting(page.error())) co_return fail(std::move(page).error());
    if (!page) {  // nobody can say what comes behind it
      whole = false;
      index_damaged(page.error());
      break;
    }
    CO_CHECK_OK(co_await look_at_page(look, std::move(page->ids), number, saved));
    if (!going()) co_return {};
    if (!page->end) break;
    look.pass.after = page->end;
  }
  // The pass has seen what is there; what was removed since it was found damaged is no damage any more.
  CO_CHECK_OK(co_await repair_left(look, true, look.pace));
  if (!going()) co_return {};
  look.pass.ended_unix_nanos = runtime_.loop.wall_nanos();
  if (whole) look.pass.full_pass_unix_nanos = look.pass.ended_unix_nanos;
  CO_CHECK_OK(co_await set_state(look, State::kDone));
  runtime_.log.write(look.damage.left() == 0 && look.pass.errors.empty() ? rt::Level::kInfo : rt::Level::kError,
                     "scrub_done",
                     {{"target", target},
                      {"chunks", std::to_string(look.pass.chunks)},
                      {"bytes", std::to_string(look.pass.bytes)},
                      {"damaged", std::to_string(look.pass.damaged)},
                      {"repaired", std::to_string(look.pass.repaired)},
                      {"left", std::to_string(look.damage.left())}});
  co_return {};
}

Task<void> Scrub::look_at_page(Look& look, std::vector<ChunkId> ids, std::uint64_t number, rt::TimePoint& saved) {
  for (const auto& id : ids) {
    CO_TRY(const auto looked, co_await examine(look, id, look.pace));
    if (look.number != number || look.pass.state == State::kCancelled) co_return {};
    auto& pass = look.pass;
    pass.after = id;
    pass.chunks += looked.here ? 1 : 0;
    pass.bytes += looked.bytes;
    pass.damaged += looked.damaged ? 1 : 0;
    pass.repaired += looked.repaired ? 1 : 0;
    const bool pausing = pass.state != State::kRunning;
    if (pausing || runtime_.loop.now() - saved >= options_.save_every) {
      CO_CHECK_OK(co_await save(look));
      saved = runtime_.loop.now();
    }
    if (pausing) co_return {};
  }
  co_return {};
}

// ---- One copy

/// What is bad of a copy that lay still while it was read; nothing: it did not, or is not there.
Task<std::optional<Scrub::Found>> Scrub::read(Look& look, ChunkId id, Pace& pace) {
  auto& chunks = look.target.chunks();
  CO_TRY(auto entry, co_await chunks.entry(id));
  if (!entry) co_return std::nullopt;
  Found found{*std::move(entry), {}};
  for (std::uint32_t at = 0; at < found.entry.info.length;) {
    CO_CHECK_OK(co_await pace.take(std::min<std::uint64_t>(chunks.unit_bytes(), found.entry.info.length - at)));
    auto scan = co_await chunks.scan(id, at);
    if (!scan && scan.error().code == Errc::kNotFound) co_return std::nullopt;
    if (!scan) co_return fail(std::move(scan).error());
    if (scan->place != found.entry.place) co_return std::nullopt;
    std::ranges::move(scan->bad, std::back_inserter(found.bad));
    look.bytes += scan->size;
    at += scan->size;
  }
  co_return std::move(found);
}

Task<Scrub::Looked> Scrub::examine(Look& look, ChunkId id, Pace& pace) {
  Looked out;
  // A chunk is repaired once at a time, and is removed once: the third look is at one that lies still.
  for (int tries = 0; tries < 3; ++tries) {
    auto found = co_await read(look, id, pace);
    if (!found && lasting(found.error())) {
      // The index cannot say where it lies, and what cannot be found cannot be replaced.
      CO_TRY(const auto turn, co_await look.turn.acquire(1));
      CO_TRY(const auto info, co_await elsewhere(look, id));
      Damage damage{.chunk = info.value_or(storage::ChunkInfo{.id = id}),
                    .offsets = {},
                    .reason = found.error().message,
                    .found_unix_nanos = runtime_.loop.wall_nanos(),
                    .unrepaired = "the index of this target is damaged: replace the directory"};
      out.damaged = true;
      CO_CHECK_OK(co_await look.damage.put(std::move(damage)));
      co_return out;
    }
    if (!found) co_return fail(std::move(found).error());
    CO_TRY(const auto turn, co_await look.turn.acquire(1));
    CO_TRY(const auto now, co_await look.target.chunks().entry(id));
    if (!now) {
      CO_CHECK_OK(co_await absent(look, id, out));
      co_return out;
    }
    if (!*found || now->place != (*found)->entry.place) continue;
    out.here = true;
    out.bytes = now->info.length;
    CO_TRY(const bool judged, co_await judge(look, id, **std::move(found), out));
    if (judged) co_return out;
  }
  co_return out;
}

/// False: it has changed, look again.
Task<bool> Scrub::judge(Look& look, ChunkId id, Found found, Looked& out) {
  CO_TRY(const auto known, co_await look.damage.find(id));
  if (found.bad.empty()) {
    if (known && known->left()) CO_CHECK_OK(co_await look.damage.forget(id));
    co_return true;
  }
  CO_TRY(const auto answer, co_await liveness_.ask(id.owner));
  if (!matters(answer, id)) {
    if (known) CO_CHECK_OK(co_await look.damage.forget(id));
    co_return true;
  }
  Damage damage{.chunk = found.entry.info,
                .offsets = {},
                .reason = found.bad.front().reason,
                .found_unix_nanos = known && known->left() ? known->found_unix_nanos : runtime_.loop.wall_nanos(),
                .unrepaired = "it waits to be repaired"};
  for (const auto& block : found.bad) damage.offsets.push_back(block.offset);
  out.damaged = true;
  CO_CHECK_OK(co_await mend(look, std::move(damage), found.entry.place, out));
  co_return true;
}

/// `id` is not on this target; should it be?
Task<void> Scrub::absent(Look& look, ChunkId id, Looked& out) {
  CO_TRY(const auto known, co_await look.damage.find(id));
  CO_TRY(const auto other, co_await elsewhere(look, id));
  const auto info = other ? other : known ? std::optional(known->chunk) : std::nullopt;
  bool missing = false;
  if (info && serves(look, info->group)) {
    CO_TRY(const auto answer, co_await liveness_.ask(id.owner));
    // Asked after it was seen to be missing: it was acknowledged before, so it should have been there.
    missing = acknowledged(answer, id);
  }
  CO_TRY(const auto now, co_await look.target.chunks().entry(id));
  if (!missing || now) {
    if (known && known->left()) CO_CHECK_OK(co_await look.damage.forget(id));
    co_return {};
  }
  Damage damage{.chunk = *info,
                .offsets = {},
                .reason = "the index has no entry for it",
                .found_unix_nanos = known && known->left() ? known->found_unix_nanos : runtime_.loop.wall_nanos(),
                .unrepaired = "it waits to be repaired"};
  out.damaged = true;
  co_return co_await mend(look, std::move(damage), std::nullopt, out);
}

/// Notes the damage, and repairs it if that can be.
Task<void> Scrub::mend(Look& look, Damage damage, std::optional<std::string> place, Looked& out) {
  const auto id = damage.chunk.id;
  CO_TRY(const auto known, co_await look.damage.find(id));
  if (!known || !known->left())
    runtime_.log.write(rt::Level::kError, "chunk_damaged",
                       {{"target", look.target.uuid().text()},
                        {"chunk", id.text()},
                        {"blocks", std::to_string(damage.offsets.size())},
                        {"reason", damage.reason}});
  CO_CHECK_OK(co_await look.damage.put(damage));
  if (look.repair_paused) co_return {};
  auto copied = co_await copier_.copy(damage.chunk, look.target, std::move(place), repair_pace_);
  if (copied && !*copied) {  // removed meanwhile
    out.damaged = false;
    co_return co_await look.damage.forget(id);
  }
  if (copied) {
    damage.repaired_unix_nanos = runtime_.loop.wall_nanos();
    damage.unrepaired.clear();
    out.repaired = true;
    ++look.repaired;
    runtime_.log.write(rt::Level::kInfo, "chunk_repaired",
                       {{"target", look.target.uuid().text()}, {"chunk", id.text()}});
  } else {
    damage.unrepaired = copied.error().message;
    if (look.target.committer().failure()) co_return fail(std::move(copied).error());
  }
  co_return co_await look.damage.put(std::move(damage));
}

Task<std::optional<storage::ChunkInfo>> Scrub::elsewhere(const Look& look, ChunkId id) {
  for (const auto& entry : members_.targets().all()) {
    if (entry.target.get() == &look.target) continue;
    auto found = co_await entry.target->chunks().find(id);
    if (found && *found) co_return **std::move(found);
  }
  co_return std::nullopt;
}

// ---- What is left, and what reads found

void Scrub::suspect(storage::Target& target, const ChunkId& id) {
  if (suspects_.size() >= kSuspectsMax) return;  // the next read, or pass, finds it again
  suspects_.emplace(target.uuid(), id);
  wake_.notify_all();
}

Task<void> Scrub::watch_members() {
  for (;;) {
    co_await members_.changed().wait();
    retry_ = true;
    wake_.notify_all();
  }
}

Task<void> Scrub::repair_queue() {
  for (auto retry_at = runtime_.loop.now();;) {
    while (!suspects_.empty()) {
      const auto [uuid, id] = *suspects_.begin();
      suspects_.erase(suspects_.begin());
      const auto look = std::ranges::find_if(looks_, [&](const auto& one) { return one->target.uuid() == uuid; });
      if (look == looks_.end() || (*look)->target.committer().failure()) continue;
      if (auto done = co_await examine(**look, id, repair_pace_); !done)
        runtime_.log.write(rt::Level::kWarning, "repair_failed",
                           {{"target", uuid.text()}, {"chunk", id.text()}, {"error", done.error().message}});
    }
    if (std::exchange(retry_, false) || runtime_.loop.now() >= retry_at) {
      retry_at = runtime_.loop.now() + options_.retry_every;
      for (const auto& look : looks_) {
        if (look->damage.left() == 0 || look->repair_paused || look->target.committer().failure()) continue;
        if (auto done = co_await repair_left(*look, false, repair_pace_); !done)
          runtime_.log.write(rt::Level::kWarning, "repair_failed",
                             {{"target", look->target.uuid().text()}, {"error", done.error().message}});
      }
      continue;
    }
    (void)co_await rt::with_deadline(runtime_.loop, retry_at, wait_for(wake_), "repair");
  }
}

Task<void> Scrub::repair_left(Look& look, bool gone, Pace& pace) {
  for (std::optional<ChunkId> after;;) {
    CO_TRY(const auto page, co_await look.damage.page(after, kChunksPage));
    for (const auto& damage : page) {
      if (!damage.left()) continue;
      if (gone) {
        auto entry = co_await look.target.chunks().entry(damage.chunk.id);
        if (!entry || *entry) continue;
      } else if (look.repair_paused) {
        co_return {};
      }
      CO_TRY(const auto looked, co_await examine(look, damage.chunk.id, pace));
      (void)looked;
    }
    if (page.size() < kChunksPage) co_return {};
    after = page.back().chunk.id;
  }
}

}  // namespace cairn::server
