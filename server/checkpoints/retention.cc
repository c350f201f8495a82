#include "server/checkpoints/retention.h"

#include <map>
#include <vector>

#include "proto/wire/records.pb.h"
#include "proto/wire/wire.pb.h"
#include "server/checkpoints/keep.h"
#include "server/checkpoints/removal.h"
#include "server/records/keys.h"
#include "server/records/merged_scan.h"

namespace cairn::server {
namespace {

constexpr std::size_t kStepsPage = 64;

KeepPolicy keep_of(const wire::BucketPolicy& policy) {
  return {.last = policy.keep_last(), .every = policy.keep_every(), .days = policy.keep_days()};
}

bool same_epoch(const wire::Epoch& a, const wire::Epoch& b) {
  return a.loss() == b.loss() && a.count() == b.count();
}

}  // namespace

void Retention::look_at(const std::string& bucket, const std::string& run) {
  due_.emplace(bucket, run);
  wake_.notify_all();
}

void Retention::look_at_all() {
  all_due_ = true;
  wake_.notify_all();
}

Task<void> Retention::woken() {
  while (due_.empty() && !all_due_) co_await wake_.wait();
  co_return {};
}

Task<void> Retention::run() {
  for (auto next = runtime_.loop.now();;) {
    (void)co_await rt::with_deadline(runtime_.loop, next, woken(), "retention");
    Result<void> done;
    if (all_due_ || runtime_.loop.now() >= next) {
      all_due_ = false;
      done = co_await pass();
      next = runtime_.loop.now() + options_.interval;
    } else if (!due_.empty()) {
      const auto [bucket, run] = due_.extract(due_.begin()).value();
      done = co_await apply(bucket, run);
    }
    if (done) continue;
    runtime_.log.write(rt::Level::kWarning, "retention_failed", {{"error", done.error().message}});
    co_await runtime_.loop.sleep(std::chrono::seconds(1));
  }
}

Task<void> Retention::pass() {
  CO_TRY(const auto buckets, co_await buckets_.list({}));
  for (const auto& bucket : buckets.buckets()) {
    if (!keep_of(bucket.policy()).any()) continue;
    const auto prefix = run_prefix(bucket.bucket());
    MergedScan runs(records_, prefix, "");
    for (;;) {
      CO_TRY(const auto record, co_await runs.next());
      if (!record) break;
      CO_CHECK_OK(co_await apply(bucket.bucket(), record->key.substr(prefix.size())));
    }
  }
  ++stats_.passes;
  co_return {};
}

Task<void> Retention::apply(std::string bucket, std::string run) {
  for (;;) {
    auto more = co_await remove_some(bucket, run);
    if (!more && more.error().code == Errc::kNotFound) co_return {};  // the bucket is gone
    if (!more) co_return fail(std::move(more).error().with("run '" + bucket + "/" + run + "'"));
    if (!*more) co_return {};
  }
}

Task<bool> Retention::remove_some(std::string bucket, std::string run) {
  CO_TRY(const auto use, co_await buckets_.use(bucket));
  wire::BucketShow show;
  show.set_bucket(bucket);
  CO_TRY(const auto info, co_await buckets_.show(std::move(show)));
  auto policy = keep_of(info.policy());
  if (!policy.any()) co_return false;
  if (options_.one_fewer && policy.last > 1) --policy.last;

  const auto group = home_group(bucket, run);
  CO_TRY(const auto head, co_await load<records::Run>(records_, group, run_key(bucket, run)));
  if (!head.exists()) co_return false;
  std::optional<std::uint64_t> held;
  if (head.value.has_resume()) held = head.value.resume().step();
  struct Found {
    OwnerId owner;
    Version version;
    std::uint64_t bytes = 0;
  };
  std::vector<CommittedStep> steps;
  std::vector<Found> found;  // side by side with `steps`
  for (std::string after;;) {
    CO_TRY(const auto page, co_await records_.scan(group, step_prefix(bucket, run), after, kStepsPage));
    for (const auto& record : page) {
      records::Step step;
      CO_CHECK_OK(parse_record(record, step));
      const auto& at = step.info();
      CO_TRY(const auto owner, owner_from(at.owner()));
      steps.push_back({.step = at.step(),
                       .committed_unix_nanos = at.committed_unix_nanos(),
                       .pinned = at.pinned() && !options_.pins_ignored});
      found.push_back({owner, record.version, at.data_bytes()});
      if (held && at.step() > *held && same_epoch(at.run_epoch(), head.value.run_epoch())) held.reset();
    }
    if (page.size() < kStepsPage) break;
    after = page.back().key;
  }
  auto doomed = steps_to_remove(policy, steps, held, runtime_.loop.wall_nanos());
  if (doomed.empty()) co_return false;
  const bool more = doomed.size() > options_.batch;
  if (more) doomed.resize(options_.batch);

  Edit edit(group);
  std::vector<std::uint64_t> bytes;
  if (!options_.blind) edit.unchanged(run_key(bucket, run), head.version).put(run_key(bucket, run), head.value);
  for (std::size_t i = 0, next = 0; next < doomed.size(); ++i) {
    if (steps[i].step != doomed[next]) continue;
    ++next;
    bytes.push_back(found[i].bytes);
    remove_step(bucket, run, {.step = steps[i].step, .owner = found[i].owner, .version = found[i].version}, edit);
  }
  auto done = co_await edit.apply(records_);
  if (!done && done.error().code == Errc::kConflict) co_return true;  // decide again
  if (!done) co_return fail(std::move(done).error());
  readers_.hidden(group);
  for (const auto size : bytes) usage_.removed(bucket, Usage::Kind::kStep, size);
  stats_.removed += doomed.size();
  runtime_.log.write(rt::Level::kInfo, "retention_removed",
                     {{"bucket", bucket},
                      {"run", run},
                      {"steps", std::to_string(doomed.size())},
                      {"first", std::to_string(doomed.front())},
                      {"last", std::to_string(doomed.back())}});
  co_return more;
}

}  // namespace cairn::server
