#include <algorithm>
#include <set>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/merge.h"
#include "server/checkpoints/merging.h"
#include "server/records/keys.h"
#include "server/records/writer_list.h"

// From the last seal to the committed step: read the manifests, prove that they cover everything, write the merged
// index, and let the step appear in one transaction.

namespace cairn::server {
namespace {

constexpr std::size_t kSealsPage = 256;
constexpr std::size_t kAbandonedInRecordMax = 256;

}  // namespace

/// What the seals together say, and the index of all.
struct Checkpoints::Merged {
  std::uint32_t seals = 0;
  WriterList writers;
  std::set<DataGroup> groups;
  StoredRun index;  // the index, and behind it the list of writers when the record does not hold it
  std::string writer_list;
  format::IndexWriter::Written written;
};

void Checkpoints::start_merge(const LivePtr& live) {
  if (live->phase != Phase::kOpen) return;
  live->phase = Phase::kMerging;
  scope_.spawn(merge_and_commit(live), [this, live](Result<void> done) {
    if (!done)
      runtime_.log.write(rt::Level::kError, "checkpoints_commit_failed",
                         {{"attempt", live->name()}, {"error", done.error().message}});
  });
}

Task<void> Checkpoints::merge_and_commit(LivePtr live) {
  auto merged = std::make_shared<Merged>();
  auto outcome = co_await merge(live, merged);
  if (outcome) outcome = co_await commit_step(live, merged);
  if (outcome) {
    ++stats_.committed;
    runtime_.log.write(rt::Level::kInfo, "checkpoints_committed",
                       {{"bucket", live->bucket},
                        {"run", live->run},
                        {"step", std::to_string(live->step)},
                        {"owner", live->owner.hex()}});
    end(live);
    if (on_change_) on_change_(live->bucket, live->run);
    // Not in the transaction, which must stay small however many ranks there are. What is left the next start erases.
    co_return co_await erase_seals(live->owner);
  }
  co_return co_await fail_attempt(live, std::move(outcome).error().with(live->name()));
}

Task<void> Checkpoints::look_at_seals(LivePtr live, std::shared_ptr<Merged> out) {
  for (std::string after;;) {
    CO_TRY(const auto page,
           co_await records_.scan(live->owner.home_group(), seal_prefix(live->owner), after, kSealsPage));
    for (const auto& record : page) {
      records::SealRecord seal;
      CO_CHECK_OK(parse_record(record, seal));
      ++out->seals;
      out->writers.writers.insert(seal.writer());
      for (const auto index : seal.abandoned()) out->writers.abandoned.emplace(seal.writer(), index);
      out->groups.insert(seal.groups().begin(), seal.groups().end());
      for (const auto& run : seal.manifest()) out->groups.insert(run.group());
    }
    if (page.size() < kSealsPage) break;
    after = page.back().key;
  }
  if (out->seals != live->world_size && !options_.bugs.commit_early)
    co_return fail(Errc::kFailed, std::to_string(out->seals) + " seals of " + std::to_string(live->world_size));
  co_return {};
}

Task<void> Checkpoints::merge(LivePtr live, std::shared_ptr<Merged> out) {
  while (live->levelling) co_await live->changed.wait();
  CO_CHECK_OK(co_await look_at_seals(live, out));
  while (live->unmerged.size() + live->runs.size() > parts_max()) CO_CHECK_OK(co_await merge_level(live));
  std::vector<StoredPart> parts;
  std::uint32_t ranks = 0;
  for (const auto& run : live->runs) {
    ranks += run.ranks;
    parts.push_back(run.stored);
  }
  ranks += static_cast<std::uint32_t>(live->unmerged.size());
  CO_CHECK_OK(co_await add_manifests(live, {live->unmerged.begin(), live->unmerged.end()}, parts));
  if (ranks != out->seals)
    co_return fail(Errc::kFailed,
                   "manifests of " + std::to_string(ranks) + " ranks for " + std::to_string(out->seals) + " seals");

  const auto group = index_group(*live);
  if (group == 0)
    co_return fail(Errc::kUnavailable, "no data group of " + std::to_string(live->copies) + " copies serves");
  // A writer of its own for every try: what a try that was cut off left behind is named by no record.
  const auto writer = runtime_.random.next();
  ChunkStream index(chunks_, units_, live->owner, group, writer, merge_chunk_bytes());
  CO_CHECK_OK(co_await merge_parts(live, std::move(parts), !options_.bugs.coverage_off, index, out->written));
  out->groups.insert(group);
  out->writers.writers.insert(writer);
  if (out->writers.writers.size() > options_.writers_in_record_max ||
      out->writers.abandoned.size() > kAbandonedInRecordMax) {
    CO_TRY(out->writer_list, encode_writers(out->writers));
    index.append(out->writer_list);
  }
  CO_CHECK_OK(co_await index.flush(true));
  out->index = index.stored();
  co_return {};
}

Task<void> Checkpoints::commit_step(LivePtr live, std::shared_ptr<Merged> merged) {
  const auto group = live->owner.home_group();
  const auto run_at = run_key(live->bucket, live->run);
  const auto attempt_at = attempt_key(live->bucket, live->run, live->run_epoch, live->step);
  const auto step_at = step_key(live->bucket, live->run, live->step);
  const auto owner_at = owner_key(live->owner);
  const auto& written = merged->written;
  const bool unfenced = options_.bugs.commit_unfenced || live->unfenced;
  for (;;) {
    CO_TRY(const auto run, co_await load<records::Run>(records_, group, run_at));
    CO_TRY(const auto attempt, co_await load<records::Attempt>(records_, group, attempt_at));
    CO_TRY(auto owner, co_await load<records::Owner>(records_, group, owner_at));
    CO_TRY(const auto before, co_await load<records::Step>(records_, group, step_at));
    if (!attempt.exists() || attempt.value.owner() != live->owner.view())
      co_return fail(Errc::kAttemptFailed, "it was given up while its manifests were merged");
    if (epoch_of(run.value.run_epoch()) != live->run_epoch && !unfenced)
      co_return fail(fenced("commit", live->launch, live->run_epoch, run.value));
    if (before.exists() && !attempt.value.overwrite())
      co_return fail(Errc::kExists, "the step was committed meanwhile; say overwrite to replace it");
    if (before.value.info().pinned()) co_return fail(pinned(live->bucket, live->run, live->step));
    const auto losses = data_losses(*coordinator_.map());
    for (const auto group : merged->groups) {
      const auto i = group - kFirstDataGroup;
      if (i >= losses.size() || i >= static_cast<std::size_t>(attempt.value.group_loss_size())) continue;
      if (losses[i] != attempt.value.group_loss(static_cast<int>(i)))
        co_return fail(Errc::kDataLoss, "data group " + std::to_string(group) + " lost chunks since it began");
    }
    CO_CHECK_OK(usage_.admit(live->owner, written.totals.bytes, before.value.info().data_bytes()));

    records::Step step;
    auto& info = *step.mutable_info();
    info.set_step(live->step);
    info.set_owner(std::string(live->owner.view()));
    info.set_world_size(live->world_size);
    info.set_data_bytes(written.totals.bytes);
    info.set_tensors(static_cast<std::uint32_t>(written.totals.tensors));
    info.set_blobs(static_cast<std::uint32_t>(written.totals.blobs));
    const auto add_run = [&](wire::ExtentRun& run) {
      run.set_group(merged->index.group);
      run.set_writer(merged->index.writer);
      run.set_first_index(merged->index.first_index);
      run.set_count(merged->index.count);
      run.set_chunk_bytes(merged->index.chunk_bytes);
      run.set_last_bytes(merged->index.last_bytes);
    };
    add_run(*info.add_index());
    info.set_index_bytes(written.index_bytes);
    info.set_root_bytes(written.root_bytes);
    info.set_root_digest(written.root_digest);
    info.set_committed_unix_nanos(runtime_.loop.wall_nanos());
    *info.mutable_launch() = attempt.value.launch();
    *info.mutable_run_epoch() = attempt.value.run_epoch();
    info.set_copies(live->copies);
    Edit edit(group);
    owner.value.set_kind(records::Owner::STEP);
    if (merged->writer_list.empty()) {
      for (const auto writer : merged->writers.writers) owner.value.add_writers(writer);
      for (const auto& [writer, index] : merged->writers.abandoned)
        wire::to_wire({.owner = live->owner, .writer = writer, .index = index}, *owner.value.add_abandoned());
    } else {
      auto& list = *owner.value.mutable_stored_writers();
      add_run(*list.add_runs());
      list.set_offset(written.index_bytes);
      list.set_bytes(merged->writer_list.size());
      list.set_digest(sha256(merged->writer_list));
    }
    if (before.exists()) {
      CO_TRY(const auto old, owner_from(before.value.info().owner()));
      Readers::hide(old, live->bucket, live->run, edit);
    }
    if (!unfenced) edit.unchanged(run_at, run.version).put(run_at, run.value);
    edit.unchanged(attempt_at, attempt.version).unchanged(owner_at, owner.version).unchanged(step_at, before.version);
    edit.put(step_at, step).put(owner_at, owner.value).erase(attempt_at).erase(joined_key(live->owner));
    auto done = co_await edit.apply(records_);
    if (done) {
      if (before.exists()) usage_.removed(live->bucket, Usage::Kind::kStep, before.value.info().data_bytes());
      usage_.added(live->bucket, Usage::Kind::kStep, written.totals.bytes);
      readers_.hidden(group);
      co_return {};
    }
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error());
  }
}

}  // namespace cairn::server
