#include "client/core/steps.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "client/core/step_reader.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr std::size_t kPage = 256;  // steps removed in one transaction

std::string name_of(const std::string& bucket, const std::string& run, std::uint64_t step) {
  return bucket + "/" + run + " step " + std::to_string(step);
}

/// The step's record, without protection.
Task<wire::StepInfo> look_at(std::shared_ptr<Session> session, std::string bucket, std::string run, std::uint64_t step,
                             rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run));
  wire::StepOpen open;
  open.set_bucket(bucket);
  open.set_run(run);
  open.mutable_step()->set_step(step);
  auto found =
      co_await session->record_call(wire::Method::kStepOpen, home_group_of(bucket, run), wire::encode(open), deadline);
  if (!found) co_return fail(std::move(found).error().with(name_of(bucket, run, step)));
  wire::StepInfo info;
  CO_CHECK_OK(wire::decode(found->message, info, "step info"));
  co_return std::move(info);
}

}  // namespace

Task<void> remove_step(std::shared_ptr<Session> session, std::string bucket, std::string run, std::uint64_t step,
                       rt::TimePoint deadline) {
  // The step that is meant, by its owner: a copy of the request that arrives late must not remove a step that has been
  // saved again since.
  CO_TRY(const auto info, co_await look_at(session, bucket, run, step, deadline));
  wire::StepRemove ask;
  ask.set_bucket(bucket);
  ask.set_run(run);
  ask.mutable_step()->set_step(step);
  ask.add_owners(info.owner());
  auto sent =
      co_await session->record_call(wire::Method::kStepRemove, home_group_of(bucket, run), wire::encode(ask), deadline);
  // Gone since it was looked up: by the first copy of this request, or by another caller.
  if (!sent && sent.error().code != Errc::kNotFound)
    co_return fail(std::move(sent).error().with(name_of(bucket, run, step)));
  co_return {};
}

Task<std::uint64_t> remove_steps_after(std::shared_ptr<Session> session, std::string bucket, std::string run,
                                       std::uint64_t after, rt::Duration timeout,
                                       std::function<void(std::uint64_t, std::uint64_t)> progress) {
  auto& loop = session->runtime().loop;
  std::vector<StepSummary> meant;
  for (auto from = after;;) {
    CO_TRY(auto page, co_await list_steps(session, bucket, run, from, 1000, loop.now() + timeout));
    meant.insert(meant.end(), page.steps.begin(), page.steps.end());
    if (!page.more || page.steps.empty()) break;
    from = page.steps.back().step;
  }
  std::string pinned;
  for (const auto& step : meant)
    if (step.pinned && pinned.size() < 100) pinned += (pinned.empty() ? "" : ", ") + std::to_string(step.step);
  if (!pinned.empty())
    co_return fail(Errc::kConflict, bucket + "/" + run + ": steps are pinned (" + pinned + "): unpin them first");

  std::uint64_t removed = 0;
  for (auto left = meant.size(); left > 0;) {
    const auto count = std::min(left, kPage);
    wire::StepRemove ask;
    ask.set_bucket(bucket);
    ask.set_run(run);
    for (auto i = left - count; i < left; ++i) {
      ask.add_steps(meant[i].step);
      ask.add_owners(std::string(meant[i].owner.view()));
    }
    auto sent = co_await session->record_call(wire::Method::kStepRemove, home_group_of(bucket, run), wire::encode(ask),
                                              loop.now() + timeout);
    if (!sent) co_return fail(std::move(sent).error().with(bucket + "/" + run));
    wire::StepRemoveReply reply;
    CO_CHECK_OK(wire::decode(sent->message, reply, "remove reply"));
    removed += sent->repeated ? count : reply.removed();  // an earlier copy may have done it
    left -= count;
    if (progress) progress(meant.size() - left, meant.size());
  }
  co_return removed;
}

Task<void> pin_step(std::shared_ptr<Session> session, std::string bucket, std::string run, std::uint64_t step,
                    bool pinned, rt::TimePoint deadline) {
  CO_TRY(const auto info, co_await look_at(session, bucket, run, step, deadline));
  wire::StepPin ask;
  ask.set_bucket(bucket);
  ask.set_run(run);
  ask.set_step(step);
  ask.set_owner(info.owner());
  ask.set_pinned(pinned);
  ask.set_revision(info.pin_revision());
  auto sent =
      co_await session->record_call(wire::Method::kStepPin, home_group_of(bucket, run), wire::encode(ask), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(name_of(bucket, run, step)));
  co_return {};
}

}  // namespace cairn::client
