#include <algorithm>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/launch.h"
#include "server/records/keys.h"
#include "server/records/merged_scan.h"

// open_run and what is known of runs.

namespace cairn::server {
namespace {

constexpr std::size_t kJobBytesMax = 128;

std::string text(RunEpoch epoch) {
  return "run_epoch " + std::to_string(epoch.loss) + "." + std::to_string(epoch.count);
}

}  // namespace

Error fenced(const std::string& what, const std::string& launch, RunEpoch run_epoch, const records::Run& current) {
  return {Errc::kFenced, what + ": launch " + launch + " (" + text(run_epoch) + ") is fenced: launch " +
                             text(current.launch()) + " (" + text(epoch_of(current.run_epoch())) +
                             ") has opened the run"};
}

Task<wire::OpenRunReply> Checkpoints::open_run(wire::OpenRun request) {
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run_name));
  const auto what = "open run '" + bucket + "/" + run_name + "'";
  if (request.launch().job().empty() || request.launch().job().size() > kJobBytesMax)
    co_return fail(Errc::kInvalid, what + ": a launch has a job id of 1 .. 128 bytes");
  CO_TRY(const auto use, co_await buckets_.use(bucket));
  const auto group = home_group(bucket, run_name);
  const auto loss = coordinator_.map()->find(true, group)->loss;
  const auto key = run_key(bucket, run_name);

  for (;;) {
    CO_TRY(auto run, co_await load<records::Run>(records_, group, key));
    const auto verdict = run.exists() ? judge(run.value, request.launch()) : Verdict::kNew;
    const auto held = epoch_of(run.value.run_epoch());
    if (verdict == Verdict::kFenced || (verdict == Verdict::kCurrent && held.loss != loss)) {
      co_return fail(Errc::kFenced,
                     what + ": launch " + text(request.launch()) + " is fenced: " +
                         (verdict == Verdict::kFenced
                              ? "launch " + text(run.value.launch()) + " has opened the run after it"
                              : std::string("records were lost since; start the job again as a new launch")));
    }
    wire::OpenRunReply reply;
    if (verdict == Verdict::kCurrent) {
      // Every rank gets the answer that the first one got.
      if (request.has_resume() && (!run.value.has_resume() || run.value.resume().step() != request.resume().step()))
        co_return fail(Errc::kConflict,
                       what + ": launch " + text(request.launch()) + " resumes from " +
                           (run.value.has_resume() ? "step " + std::to_string(run.value.resume().step()) : "nothing") +
                           ", not from step " + std::to_string(request.resume().step()));
      *reply.mutable_run_epoch() = run.value.run_epoch();
      if (run.value.has_resume()) *reply.mutable_resume() = run.value.resume();
      co_return std::move(reply);
    }

    Edit edit(group);
    std::vector<std::uint64_t> removed;
    edit.unchanged(key, run.version);
    take_over(run.value, request.launch());
    set_epoch({.loss = loss, .count = held.count + 1}, *run.value.mutable_run_epoch());
    run.value.set_opened_unix_nanos(runtime_.loop.wall_nanos());
    run.value.clear_resume();
    if (request.has_resume()) {
      const auto step = step_key(bucket, run_name, request.resume().step());
      CO_TRY(const auto present, co_await records_.get(group, step));
      if (!present)
        co_return fail(Errc::kNotFound,
                       what + ": step " + std::to_string(request.resume().step()) + " to resume from does not exist");
      *run.value.mutable_resume() = request.resume();
      if (request.discard_after())
        CO_CHECK_OK(co_await add_discards(bucket, run_name, request.resume().step(), {}, edit, removed));
    } else {
      // A commit or removal meanwhile changes the run's record, and the compare of its version fails.
      CO_TRY(const auto highest, co_await highest_step(bucket, run_name));
      if (highest) run.value.mutable_resume()->set_step(number_at_end(highest->key, 8));
    }
    edit.put(key, run.value);
    auto done = co_await edit.apply(records_);
    if (!done && done.error().code == Errc::kConflict) continue;
    if (!done) co_return fail(std::move(done).error().with(what));
    steps_removed(bucket, removed);
    readers_.hidden(group);

    // Attempts of older launches can never commit; their ranks learn it at once. What is being merged ends by itself.
    fail_those([&](const Live& live) -> std::optional<Error> {
      if (live.bucket != bucket || live.run != run_name || live.phase != Phase::kOpen ||
          live.run_epoch >= epoch_of(run.value.run_epoch()))
        return std::nullopt;
      return fenced(live.name(), live.launch, live.run_epoch, run.value);
    });

    *reply.mutable_run_epoch() = run.value.run_epoch();
    if (run.value.has_resume()) *reply.mutable_resume() = run.value.resume();
    co_return std::move(reply);
  }
}

Task<wire::RunListReply> Checkpoints::run_list(wire::RunList request) {
  CO_CHECK_OK(co_await buckets_.use(request.bucket()));
  const auto limit = request.limit() == 0 ? kListMax : std::min(request.limit(), kListMax);
  const auto prefix = run_prefix(request.bucket());
  MergedScan scan(records_, prefix, request.after().empty() ? "" : prefix + request.after());
  wire::RunListReply reply;
  for (;;) {
    CO_TRY(const auto record, co_await scan.next());
    if (!record) break;
    if (static_cast<std::uint32_t>(reply.runs_size()) == limit) {
      reply.set_more(true);
      break;
    }
    reply.add_runs(record->key.substr(prefix.size()));
  }
  co_return std::move(reply);
}

Task<wire::RunActivityReply> Checkpoints::run_activity(wire::RunActivity request) {
  CO_CHECK_OK(check_bucket_name(request.bucket()));
  CO_CHECK_OK(check_run_name(request.run()));
  wire::RunActivityReply reply;
  for (const auto& [owner, live] : live_) {
    if (live->bucket != request.bucket() || live->run != request.run()) continue;
    std::uint32_t ranks = 0;
    for (const auto& [rank, heard] : live->heard)
      if (runtime_.loop.now() - heard <= options_.rank_silence_max) ++ranks;
    if (ranks == 0) continue;
    reply.set_active(true);
    reply.mutable_launch()->set_job(live->job);
    reply.mutable_launch()->set_restart(live->restart);
    reply.set_step(live->step);
    reply.set_ranks(ranks);
    break;
  }
  co_return std::move(reply);
}

}  // namespace cairn::server
