#include "server/scrub/jobs.h"

#include <algorithm>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/records.h"

namespace cairn::server {
namespace {

constexpr std::size_t kIdDigits = 8;

std::string id_of(std::string_view kind, const Uuid& target) {
  return std::string(kind) + "-" + target.text().substr(0, kIdDigits);
}

wire::Job job_of(std::string_view kind, const Scrub::Look& look) {
  wire::Job job;
  job.set_id(id_of(kind, look.target.uuid()));
  job.set_target(std::string(look.target.uuid().view()));
  job.set_directory(look.directory);
  job.set_left(look.damage.left());
  if (const auto& failure = look.target.committer().failure()) {
    job.set_state(wire::Job::FAILED);
    job.add_errors("the target has failed: " + failure->message);
  }
  return job;
}

wire::Job scrub_job(const Scrub::Look& look) {
  auto job = job_of("scrub", look);
  const auto& pass = look.pass;
  const auto stats = look.target.chunks().stats();
  job.set_chunks(pass.chunks);
  job.set_bytes(pass.bytes);
  job.set_chunks_total(std::max(stats.chunks, pass.chunks));
  job.set_bytes_total(std::max(stats.live_bytes, pass.bytes));
  job.set_damaged(pass.damaged);
  job.set_repaired(pass.repaired);
  job.set_started_unix_nanos(pass.started_unix_nanos);
  job.set_ended_unix_nanos(pass.ended_unix_nanos);
  for (const auto& error : pass.errors) job.add_errors(error);
  if (job.state() == wire::Job::UNKNOWN) job.set_state(static_cast<wire::Job::State>(pass.state));
  if (pass.state == Scrub::State::kDone) {
    job.set_chunks_total(pass.chunks);
    job.set_bytes_total(pass.bytes);
  }
  return job;
}

wire::Job repair_job(const Scrub::Look& look) {
  auto job = job_of("repair", look);
  job.set_repaired(look.repaired);
  if (job.state() == wire::Job::UNKNOWN) job.set_state(look.repair_paused ? wire::Job::PAUSED : wire::Job::RUNNING);
  return job;
}

wire::Job resync_job(const Scrub::Look& look, const Repair::Job& progress) {
  auto job = job_of("resync", look);
  job.set_chunks(progress.chunks);
  job.set_bytes(progress.bytes);
  job.set_damaged(progress.damaged);
  job.set_started_unix_nanos(progress.started_unix_nanos);
  if (job.state() == wire::Job::UNKNOWN) job.set_state(progress.paused ? wire::Job::PAUSED : wire::Job::RUNNING);
  return job;
}

}  // namespace

std::vector<wire::Job> Jobs::all() const {
  std::vector<wire::Job> out;
  const auto resyncs = repair_.jobs();
  for (const auto& look : scrub_.looks()) {
    if (look->pass.state != Scrub::State::kNone) out.push_back(scrub_job(*look));
    if (look->damage.left() > 0) out.push_back(repair_job(*look));
    const auto resync = resyncs.find(look->target.uuid());
    if (resync != resyncs.end()) out.push_back(resync_job(*look, resync->second));
  }
  return out;
}

Result<Scrub::Look*> Jobs::find(const std::string& uuid) const {
  TRY(const auto id, Uuid::from_bytes(uuid));
  for (const auto& look : scrub_.looks())
    if (look->target.uuid() == id) return look.get();
  return fail(Errc::kNotFound, "target " + id.text() + " is not here");
}

Task<wire::JobListReply> Jobs::list(wire::JobList /*request*/) {
  wire::JobListReply reply;
  for (auto& job : all()) *reply.add_jobs() = std::move(job);
  co_return std::move(reply);
}

Task<wire::Job> Jobs::control(wire::JobControl request) {
  const auto& id = request.id();
  const auto jobs = all();
  const auto found = std::ranges::find(jobs, id, [](const wire::Job& job) { return job.id(); });
  if (found == jobs.end()) co_return fail(Errc::kNotFound, "job '" + printable(id) + "': there is none");
  CO_TRY(auto* const look, find(found->target()));
  const auto action = request.action();
  const bool pausing = action == wire::JobControl::PAUSE;
  Result<void> done;
  if (id.starts_with("scrub-")) {
    if (pausing)
      done = co_await scrub_.pause(*look);
    else if (action == wire::JobControl::RESUME)
      done = co_await scrub_.resume(*look);
    else if (action == wire::JobControl::CANCEL)
      done = co_await scrub_.cancel(*look);
    else
      done = fail(Errc::kInvalid, "nothing that this version can do to it");
  } else if (action == wire::JobControl::CANCEL) {
    done = fail(Errc::kInvalid, "it ends by itself when every copy is whole: pause it instead");
  } else if (!pausing && action != wire::JobControl::RESUME) {
    done = fail(Errc::kInvalid, "nothing that this version can do to it");
  } else if (id.starts_with("repair-")) {
    scrub_.pause_repair(*look, pausing);
  } else {
    repair_.pause(look->target.uuid(), pausing);
  }
  if (!done) co_return fail(std::move(done).error().with("job " + id));
  for (auto& job : all())
    if (job.id() == id) co_return std::move(job);
  co_return *found;  // it has ended
}

Task<wire::JobListReply> Jobs::scrub(wire::ScrubStart request) {
  std::vector<Scrub::Look*> wanted;
  for (const auto& uuid : request.targets()) {
    CO_TRY(auto* const look, find(uuid));
    wanted.push_back(look);
  }
  const bool every = wanted.empty();
  if (every)
    for (const auto& look : scrub_.looks()) wanted.push_back(look.get());
  const auto pace = request.has_pace() ? std::optional(request.pace()) : std::nullopt;
  wire::JobListReply reply;
  for (auto* look : wanted) {
    auto started = co_await scrub_.start(*look, pace);
    // Of all targets, those that have failed say so in their job.
    if (!started && !(every && look->target.committer().failure())) co_return fail(std::move(started).error());
    *reply.add_jobs() = scrub_job(*look);
  }
  co_return std::move(reply);
}

Task<wire::DamageListReply> Jobs::damage(wire::DamageList request) {
  CO_TRY(auto* const look, find(request.target()));
  std::optional<ChunkId> after;
  if (request.has_after()) {
    CO_TRY(after, wire::from_wire(request.after()));
  }
  const auto limit = std::clamp<std::uint32_t>(request.limit(), 1, kListMax);
  CO_TRY(const auto page, co_await look->damage.page(after, limit));
  wire::DamageListReply reply;
  reply.set_more(page.size() == limit);
  std::size_t bytes = 0;
  for (const auto& damage : page) {
    if (bytes >= kListBytesMax) {
      reply.set_more(true);
      break;
    }
    auto& out = *reply.add_damage();
    wire::to_wire(damage.chunk.id, *out.mutable_chunk());
    out.mutable_offsets()->Assign(damage.offsets.begin(), damage.offsets.end());
    out.set_reason(damage.reason);
    out.set_found_unix_nanos(damage.found_unix_nanos);
    out.set_repaired_unix_nanos(damage.repaired_unix_nanos);
    out.set_unrepaired(damage.unrepaired);
    out.set_length(damage.chunk.length);
    CO_CHECK_OK(co_await name(out));
    bytes += out.ByteSizeLong();
  }
  co_return std::move(reply);
}

/// What the chunk belongs to, as its owner's record says.
Task<void> Jobs::name(wire::Damage& damage) {
  CO_TRY(const auto id, wire::from_wire(damage.chunk()));
  if (id.owner.home_group() >= kHomeGroups) co_return {};
  CO_TRY(const auto record, co_await load<records::Owner>(records_, id.owner.home_group(), owner_key(id.owner)));
  if (!record.exists()) co_return {};
  const auto& owner = record.value;
  const auto kind = owner.kind();
  damage.set_kind(kind == records::Owner::OBJECT                                      ? wire::Damage::OBJECT
                  : kind == records::Owner::STEP                                      ? wire::Damage::STEP
                  : kind == records::Owner::UPLOAD || kind == records::Owner::ATTEMPT ? wire::Damage::OPEN
                                                                                      : wire::Damage::UNKNOWN);
  damage.set_bucket(owner.bucket());
  damage.set_name(owner.name());
  damage.set_step(owner.step());
  co_return {};
}

}  // namespace cairn::server
