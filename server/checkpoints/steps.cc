#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "proto/common/units.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/removal.h"
#include "server/records/keys.h"

// Committed steps.

namespace cairn::server {
namespace {

constexpr std::size_t kRemovedMax = 10'000;  // in one transaction

Result<records::Step> step_of(const storage::Record& record) {
  records::Step step;
  CHECK_OK(parse_record(record, step));
  return step;
}

/// Returns false, and adds nothing, for a step that is not one of those meant. errors: kConflict  it is pinned
Result<bool> add_removal(const storage::Record& record, const std::string& bucket, const std::string& run,
                         const std::set<std::string>& owners, Edit& edit, std::vector<std::uint64_t>& removed) {
  TRY(const auto step, step_of(record));
  if (!owners.empty() && !owners.contains(step.info().owner())) return false;
  if (step.info().pinned()) return fail(pinned(bucket, run, step.info().step()));
  TRY(const auto owner, owner_from(step.info().owner()));
  remove_step(bucket, run, {.step = step.info().step(), .owner = owner, .version = record.version}, edit);
  removed.push_back(step.info().data_bytes());
  return true;
}

}  // namespace

Task<std::optional<storage::Record>> Checkpoints::highest_step(std::string bucket, std::string run) {
  return last_of(records_, home_group(bucket, run), step_prefix(bucket, run));
}

Task<void> Checkpoints::add_discards(std::string bucket, std::string run, std::uint64_t after,
                                     std::set<std::string> owners, Edit& edit, std::vector<std::uint64_t>& removed) {
  constexpr std::size_t kPage = 64;
  std::size_t count = 0;
  for (auto key = step_key(bucket, run, after);;) {
    CO_TRY(const auto page, co_await records_.scan(home_group(bucket, run), step_prefix(bucket, run), key, kPage));
    for (const auto& record : page) CO_CHECK_OK(add_removal(record, bucket, run, owners, edit, removed));
    count += page.size();
    if (count > kRemovedMax)
      co_return fail(Errc::kInvalid, "more than " + std::to_string(kRemovedMax) + " steps to remove at once");
    if (page.size() < kPage) co_return {};
    key = page.back().key;
  }
}

void Checkpoints::steps_removed(const std::string& bucket, const std::vector<std::uint64_t>& removed) {
  for (const auto bytes : removed) usage_.removed(bucket, Usage::Kind::kStep, bytes);
}

Task<wire::StepInfo> Checkpoints::step_open(wire::StepOpen request, std::uint64_t connection) {
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  CO_CHECK_OK(check_run_of(bucket, run_name));
  const auto group = home_group(bucket, run_name);
  const auto what = "run '" + bucket + "/" + run_name + "'";
  for (std::string gone;;) {
    std::optional<storage::Record> record;
    if (request.has_step()) {
      CO_TRY(record, co_await records_.get(group, step_key(bucket, run_name, request.step().step())));
    } else {
      for (;;) {
        CO_TRY(const auto before, co_await load<records::Run>(records_, group, run_key(bucket, run_name)));
        CO_TRY(record, co_await highest_step(bucket, run_name));
        // Every change of the steps changes the run's record: an equal version means that one state was seen.
        CO_TRY(const auto after, co_await load<records::Run>(records_, group, run_key(bucket, run_name)));
        if (before.version == after.version) break;
      }
    }
    if (!record) {
      CO_CHECK_OK(co_await buckets_.use(bucket));  // the better message
      co_return fail(Errc::kNotFound,
                     request.has_step() ? what + ": step " + std::to_string(request.step().step()) + " is not committed"
                                        : what + " has no committed step");
    }
    CO_TRY(auto step, step_of(*record));
    if (request.reader() == 0) co_return std::move(*step.mutable_info());
    CO_TRY(const auto owner, owner_from(step.info().owner()));
    CO_TRY(const bool there, co_await readers_.protect(request.reader(), owner, connection));
    if (there) {
      step.mutable_info()->set_reader_ttl_millis(readers_.ttl_millis());
      co_return std::move(*step.mutable_info());
    }
    // Removed in between: look again. But a step that goes on naming it contradicts the records.
    if (gone == step.info().owner())
      co_return fail(Errc::kDataLoss, what + " step " + std::to_string(step.info().step()) + ": its owner " +
                                          owner.hex() + " has no record");
    gone = step.info().owner();
  }
}

Task<wire::StepListReply> Checkpoints::step_list(wire::StepList request) {
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  CO_CHECK_OK(check_run_of(bucket, run_name));
  CO_CHECK_OK(co_await buckets_.use(bucket));
  const auto group = home_group(bucket, run_name);
  CO_TRY(const auto run, co_await records_.get(group, run_key(bucket, run_name)));
  if (!run) co_return fail(Errc::kNotFound, "run '" + bucket + "/" + run_name + "' does not exist");
  const auto limit = request.limit() == 0 ? kListMax : std::min(request.limit(), kListMax);
  constexpr std::size_t kPage = 64;
  wire::StepListReply reply;
  auto after = request.has_after() ? step_key(bucket, run_name, request.after().step()) : std::string();
  for (std::size_t bytes = 0;;) {
    CO_TRY(const auto page, co_await records_.scan(group, step_prefix(bucket, run_name), after, kPage));
    for (const auto& record : page) {
      if (static_cast<std::uint32_t>(reply.steps_size()) == limit || bytes > kListBytesMax) {
        reply.set_more(true);
        co_return std::move(reply);
      }
      CO_TRY(auto step, step_of(record));
      bytes += step.info().ByteSizeLong();
      *reply.add_steps() = std::move(*step.mutable_info());
    }
    if (page.size() < kPage) co_return std::move(reply);
    after = page.back().key;
  }
}

Task<wire::StepRemoveReply> Checkpoints::step_remove(wire::StepRemove request) {
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  CO_CHECK_OK(check_run_of(bucket, run_name));
  const auto what = "remove from run '" + bucket + "/" + run_name + "'";
  if (request.has_step() + request.has_after() + (request.steps_size() > 0) != 1 ||
      (request.steps_size() > 0 && request.steps_size() != request.owners_size()))
    co_return fail(Errc::kInvalid, what + ": name a step, or the step after which all go, or steps with their owners");
  CO_CHECK_OK(co_await buckets_.use(bucket));
  const auto group = home_group(bucket, run_name);
  const auto key = run_key(bucket, run_name);
  const std::set<std::string> owners(request.owners().begin(), request.owners().end());
  for (;;) {
    CO_TRY(const auto run, co_await load<records::Run>(records_, group, key));
    if (!run.exists()) co_return fail(Errc::kNotFound, what + ": it does not exist");
    Edit edit(group);
    std::vector<std::uint64_t> removed;
    // The steps change, so the run's record does.
    edit.unchanged(key, run.version).put(key, run.value);
    if (request.has_step()) {
      CO_TRY(const auto record, co_await records_.get(group, step_key(bucket, run_name, request.step().step())));
      if (!record)
        co_return fail(Errc::kNotFound, what + ": step " + std::to_string(request.step().step()) + " is not committed");
      CO_TRY(const bool meant, add_removal(*record, bucket, run_name, owners, edit, removed));
      if (!meant)
        co_return fail(Errc::kNotFound, what + ": step " + std::to_string(request.step().step()) +
                                            " has been removed, and saved again since");
    } else if (request.has_after()) {
      CO_CHECK_OK(co_await add_discards(bucket, run_name, request.after().step(), owners, edit, removed));
    } else {
      std::set<std::uint64_t> seen;  // a step named twice is removed once
      for (int i = 0; i < request.steps_size(); ++i) {
        if (!seen.insert(request.steps(i)).second) continue;
        CO_TRY(const auto record, co_await records_.get(group, step_key(bucket, run_name, request.steps(i))));
        if (record) CO_CHECK_OK(add_removal(*record, bucket, run_name, owners, edit, removed));
      }
    }
    if (removed.empty()) co_return wire::StepRemoveReply();
    auto done = co_await edit.apply(records_);
    if (!done && done.error().code == Errc::kConflict) continue;
    if (!done) co_return fail(std::move(done).error().with(what));
    steps_removed(bucket, removed);
    readers_.hidden(group);
    wire::StepRemoveReply reply;
    reply.set_removed(static_cast<std::uint32_t>(removed.size()));
    co_return std::move(reply);
  }
}

Task<wire::StepInfo> Checkpoints::step_pin(wire::StepPin request) {
  const auto& bucket = request.bucket();
  const auto& run = request.run();
  CO_CHECK_OK(check_run_of(bucket, run));
  const auto what = "run '" + bucket + "/" + run + "' step " + std::to_string(request.step());
  const auto group = home_group(bucket, run);
  const auto key = step_key(bucket, run, request.step());
  for (;;) {
    CO_TRY(auto step, co_await load<records::Step>(records_, group, key));
    if (!step.exists()) co_return fail(Errc::kNotFound, what + " is not committed");
    auto& info = *step.value.mutable_info();
    if (info.owner() != request.owner())
      co_return fail(Errc::kNotFound, what + " has been replaced since it was looked at");
    // The change before was this very one: the request was sent again.
    if (info.pin_revision() == request.revision() + 1 && info.pinned() == request.pinned()) co_return std::move(info);
    if (info.pin_revision() != request.revision())
      co_return fail(Errc::kConflict, what + " has been pinned or unpinned since it was looked at: try again");
    info.set_pinned(request.pinned());
    info.set_pin_revision(request.revision() + 1);
    Edit edit(group);
    edit.unchanged(key, step.version).put(key, step.value);
    auto done = co_await edit.apply(records_);
    if (done) {
      if (on_change_ && !request.pinned()) on_change_(bucket, run);
      co_return std::move(info);
    }
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error().with(what));
  }
}

}  // namespace cairn::server
