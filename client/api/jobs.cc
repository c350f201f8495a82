#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "client/api/handles.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn {
namespace {

constexpr std::uint32_t kPage = 200;
constexpr std::uint64_t kNamedEntriesMax = 1'000'000;  // an index larger than that is not read for names

JobInfo info_of(const wire::Job& job) {
  JobInfo out;
  out.id = job.id();
  if (job.state() >= wire::Job::RUNNING && job.state() <= wire::Job::FAILED)
    out.state = static_cast<JobState>(job.state());
  if (const auto target = Uuid::from_bytes(job.target())) out.target = target->text();
  out.directory = job.directory();
  out.chunks = job.chunks();
  out.bytes = job.bytes();
  out.chunks_total = job.chunks_total();
  out.bytes_total = job.bytes_total();
  out.damaged = job.damaged();
  out.repaired = job.repaired();
  out.left = job.left();
  out.started_unix_nanos = job.started_unix_nanos();
  out.ended_unix_nanos = job.ended_unix_nanos();
  out.errors.assign(job.errors().begin(), job.errors().end());
  return out;
}
static_assert(static_cast<int>(JobState::running) == static_cast<int>(wire::Job::RUNNING));
static_assert(static_cast<int>(JobState::failed) == static_cast<int>(wire::Job::FAILED));

Result<DamageInfo> info_of(const wire::Damage& damage) {
  TRY(const auto id, wire::from_wire(damage.chunk()));
  DamageInfo out;
  out.chunk = id.text();
  out.chunk_bytes = damage.length();
  out.offsets.assign(damage.offsets().begin(), damage.offsets().end());
  out.reason = damage.reason();
  out.repaired = damage.repaired_unix_nanos() != 0;
  out.unrepaired = damage.unrepaired();
  out.found_unix_nanos = damage.found_unix_nanos();
  out.repaired_unix_nanos = damage.repaired_unix_nanos();
  if (damage.kind() >= wire::Damage::OBJECT && damage.kind() <= wire::Damage::OPEN)
    out.kind = static_cast<DamageInfo::Kind>(damage.kind());
  out.bucket = damage.bucket();
  out.name = damage.name();
  out.step = damage.step();
  return out;
}
static_assert(static_cast<int>(DamageInfo::Kind::object) == static_cast<int>(wire::Damage::OBJECT));
static_assert(static_cast<int>(DamageInfo::Kind::open) == static_cast<int>(wire::Damage::OPEN));

Task<std::vector<JobInfo>> call_for_jobs(std::shared_ptr<client::Session> session, wire::Method method,
                                         std::string request, rt::TimePoint deadline) {
  CO_TRY(const auto sent, co_await session->plain_call(method, std::move(request), deadline));
  wire::JobListReply reply;
  CO_CHECK_OK(wire::decode(sent.message, reply, wire::name_of(method)));
  std::vector<JobInfo> out;
  for (const auto& job : reply.jobs()) out.push_back(info_of(job));
  co_return std::move(out);
}

bool touches(const std::vector<format::Extent>& extents, const ChunkId& chunk,
             const std::vector<std::uint32_t>& offsets) {
  return std::ranges::any_of(extents, [&](const format::Extent& extent) {
    if (extent.chunk != chunk) return false;
    const auto bad = [&](std::uint32_t block) {
      return block < extent.offset + extent.length && extent.offset < block + kBlockBytes;
    };
    return offsets.empty() || std::ranges::any_of(offsets, bad);
  });
}

/// Which tensors and blobs of one step have bytes in its damaged chunks. What cannot be read is not named.
Task<void> name_parts(std::shared_ptr<client::Session> session, std::vector<std::pair<ChunkId, DamageInfo*>> damaged,
                      rt::Duration timeout) {
  const auto& first = *damaged.front().second;
  auto opened = co_await client::StepReader::open(session, first.bucket, first.name, first.step, timeout);
  if (!opened) co_return {};
  std::uint64_t entries = 0;
  for (const auto& fence : (*opened)->root().fences) entries += fence.entries;
  if (entries > kNamedEntriesMax) co_return {};
  auto contents = co_await (*opened)->find({});
  if (!contents) co_return {};
  for (const auto& [chunk, damage] : damaged) {
    std::set<std::string> names;
    for (const auto& shard : contents->shards)
      if (touches(shard.extents, chunk, damage->offsets)) names.insert(shard.tensor);
    for (const auto& blob : contents->blobs)
      if (touches(blob.extents, chunk, damage->offsets)) names.insert(blob.name);
    damage->parts.assign(names.begin(), names.end());
    damage->in_index = names.empty();
  }
  co_return {};
}

Task<std::vector<JobInfo>> list_jobs(std::shared_ptr<client::Session> session, rt::TimePoint deadline) {
  return call_for_jobs(std::move(session), wire::Method::kJobList, {}, deadline);
}

Task<JobInfo> steer_job(std::shared_ptr<client::Session> session, std::string id, JobAction action,
                        rt::TimePoint deadline) {
  wire::JobControl request;
  request.set_id(id);
  request.set_action(action == JobAction::pause    ? wire::JobControl::PAUSE
                     : action == JobAction::resume ? wire::JobControl::RESUME
                                                   : wire::JobControl::CANCEL);
  CO_TRY(const auto sent, co_await session->plain_call(wire::Method::kJobControl, wire::encode(request), deadline));
  wire::Job job;
  CO_CHECK_OK(wire::decode(sent.message, job, "job"));
  co_return info_of(job);
}

Task<std::vector<JobInfo>> ask_for_scrub(std::shared_ptr<client::Session> session, std::vector<Uuid> targets,
                                         std::optional<std::uint64_t> pace, rt::TimePoint deadline) {
  wire::ScrubStart request;
  for (const auto& target : targets) request.add_targets(std::string(target.view()));
  if (pace) request.set_pace(*pace);
  return call_for_jobs(std::move(session), wire::Method::kScrubStart, wire::encode(request), deadline);
}

Task<std::vector<DamageInfo>> list_damage(std::shared_ptr<client::Session> session, Uuid target, rt::Duration timeout) {
  auto& loop = session->runtime().loop;
  wire::DamageList request;
  request.set_target(std::string(target.view()));
  request.set_limit(kPage);
  std::vector<ChunkId> ids;
  std::vector<DamageInfo> out;
  for (bool more = true; more;) {
    CO_TRY(const auto sent,
           co_await session->plain_call(wire::Method::kDamageList, wire::encode(request), loop.now() + timeout));
    wire::DamageListReply reply;
    CO_CHECK_OK(wire::decode(sent.message, reply, "damage list"));
    for (const auto& damage : reply.damage()) {
      CO_TRY(auto info, info_of(damage));
      CO_TRY(const auto id, wire::from_wire(damage.chunk()));
      out.push_back(std::move(info));
      ids.push_back(id);
      *request.mutable_after() = damage.chunk();
    }
    more = reply.more() && reply.damage_size() > 0;
  }
  using StepName = std::tuple<std::string, std::string, std::uint64_t>;
  std::map<StepName, std::vector<std::pair<ChunkId, DamageInfo*>>> steps;
  for (std::size_t i = 0; i < out.size(); ++i)
    if (out[i].kind == DamageInfo::Kind::step)
      steps[{out[i].bucket, out[i].name, out[i].step}].emplace_back(ids[i], &out[i]);
  for (auto& [name, damaged] : steps) CO_CHECK_OK(co_await name_parts(session, damaged, timeout));
  co_return std::move(out);
}

Task<std::vector<TargetInfo>> list_targets(std::shared_ptr<client::Session> session, rt::TimePoint deadline) {
  CO_TRY(const auto sent, co_await session->plain_call(wire::Method::kMap, {}, deadline));
  wire::Map map;
  CO_CHECK_OK(wire::decode(sent.message, map, "map"));
  std::vector<TargetInfo> out;
  for (const auto& target : map.targets()) {
    CO_TRY(const auto id, Uuid::from_bytes(target.uuid()));
    out.push_back({id.text(), target.directory(), target.node(), target.out()});
  }
  co_return std::move(out);
}

}  // namespace

Result<std::vector<TargetInfo>> Client::targets() {
  return impl_->call<std::vector<TargetInfo>>(
      [impl = impl_.get()] { return list_targets(impl->session_, impl->deadline()); });
}

Result<std::vector<JobInfo>> Client::start_scrub(std::vector<std::string> targets, std::optional<std::uint64_t> pace) {
  std::vector<Uuid> ids;
  for (const auto& target : targets) {
    TRY(const auto id, Uuid::from_text(target));
    ids.push_back(id);
  }
  return impl_->call<std::vector<JobInfo>>(
      [impl = impl_.get(), ids, pace] { return ask_for_scrub(impl->session_, ids, pace, impl->deadline()); });
}

Result<std::vector<JobInfo>> Client::jobs() {
  return impl_->call<std::vector<JobInfo>>(
      [impl = impl_.get()] { return list_jobs(impl->session_, impl->deadline()); });
}

Result<JobInfo> Client::control_job(std::string id, JobAction action) {
  return impl_->call<JobInfo>(
      [impl = impl_.get(), id, action] { return steer_job(impl->session_, id, action, impl->deadline()); });
}

Result<std::vector<DamageInfo>> Client::damage(std::string target) {
  TRY(const auto id, Uuid::from_text(target));
  return impl_->call<std::vector<DamageInfo>>(
      [impl = impl_.get(), id] { return list_damage(impl->session_, id, impl->timeout()); });
}

}  // namespace cairn
