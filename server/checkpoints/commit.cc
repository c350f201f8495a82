#include <algorithm>
#include <set>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/rt/offload.h"
#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/merge.h"
#include "server/records/keys.h"
#include "server/records/runs.h"

// From the last seal to the committed step: read the manifests, prove that they cover everything, write the merged
// index, and let the step appear in one transaction.

namespace cairn::server {
namespace {

constexpr std::size_t kReadsAtOnce = 8;
constexpr std::size_t kPage = 256;

Task<void> read_manifest(Chunks& chunks, records::SealRecord seal, OwnerId owner, std::string& out) {
  out.reserve(seal.manifest_bytes());
  for (const auto& run : seal.manifest()) {
    CO_CHECK_OK(check_run(run, owner, "sealed manifest"));
    for (std::uint32_t i = 0; i < run.count(); ++i) {
      const ChunkId id{.owner = owner, .writer = run.writer(), .index = run.first_index() + i};
      const auto length = i + 1 == run.count() ? run.last_bytes() : run.chunk_bytes();
      for (std::uint32_t at = 0; at < length;) {
        const auto unit = static_cast<std::uint32_t>(chunks.unit_bytes());
        const auto size = std::min(length - at, unit - at % unit);
        CO_TRY(const auto bytes, co_await chunks.read(run.group(), id, at, size));
        out += bytes.text();
        at += size;
      }
    }
  }
  co_return {};
}

/// Chunk CRCs and pieces of bytes that are already in memory.
Task<void> store_chunk(Chunks& chunks, rt::UnitPool& units, DataGroup group, ChunkId id, std::string_view bytes) {
  const auto length = static_cast<std::uint32_t>(bytes.size());
  std::vector<std::uint32_t> crcs;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    crcs.push_back(crc32c(bytes.substr(at, kBlockBytes), block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  CO_TRY(auto upload, co_await chunks.start(group, id, length, std::move(crcs)));
  if (!upload) co_return {};
  for (std::uint32_t at = 0; at < length;) {
    CO_TRY(auto memory, co_await units.acquire());
    const auto size = std::min(length - at, static_cast<std::uint32_t>(memory.bytes.size()));
    std::memcpy(memory.bytes.data(), bytes.data() + at, size);
    CO_CHECK_OK(co_await upload->write(at, std::move(memory), size));
    at += size;
  }
  co_return co_await upload->finish();
}

}  // namespace

struct Checkpoints::Merged {
  std::vector<records::SealRecord> seals;  // by rank
  std::vector<std::uint32_t> ranks;
  MergedIndex index;
  std::uint64_t index_writer = 0;
  DataGroup index_group = 0;
};

std::set<DataGroup> Checkpoints::groups_used(const Merged& merged) {
  std::set<DataGroup> out = {merged.index_group};
  for (const auto& seal : merged.seals) {
    out.insert(seal.groups().begin(), seal.groups().end());
    for (const auto& run : seal.manifest()) out.insert(run.group());
  }
  return out;
}

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
    co_return {};
  }
  co_return co_await fail_attempt(live, std::move(outcome).error().with(live->name()));
}

Task<void> Checkpoints::merge(LivePtr live, std::shared_ptr<Merged> out) {
  std::uint64_t manifest_bytes = 0;
  for (std::string after;;) {
    CO_TRY(const auto page, co_await records_.scan(live->owner.home_group(), seal_prefix(live->owner), after, kPage));
    for (const auto& record : page) {
      CO_CHECK_OK(parse_record(record, out->seals.emplace_back()));
      out->ranks.push_back(static_cast<std::uint32_t>(number_at_end(record.key, 4)));
      if (!add_checked(manifest_bytes, out->seals.back().manifest_bytes(), manifest_bytes))
        co_return fail(Errc::kDataLoss, "sealed manifests of more than 2^64 bytes");
    }
    if (page.size() < kPage) break;
    after = page.back().key;
  }
  if (out->seals.size() != live->world_size && !options_.bugs.commit_early)
    co_return fail(Errc::kFailed, std::to_string(out->seals.size()) + " seals of " + std::to_string(live->world_size));

  // The manifests and an index about as long.
  if (manifest_bytes > merge_memory_.capacity() / 2)
    co_return fail(Errc::kInvalid, "the manifests of its ranks have " + std::to_string(manifest_bytes) +
                                       " bytes; this daemon merges at most " +
                                       std::to_string(merge_memory_.capacity() / 2));
  CO_TRY(const auto lease, co_await merge_memory_.acquire(2 * manifest_bytes));

  auto ranks = std::make_shared<std::vector<RankManifest>>(out->seals.size());
  for (std::size_t first = 0; first < ranks->size(); first += kReadsAtOnce) {
    std::vector<Task<void>> reads;
    for (std::size_t i = first; i < std::min(first + kReadsAtOnce, ranks->size()); ++i) {
      const auto& seal = out->seals[i];
      auto& rank = (*ranks)[i];
      rank.rank = out->ranks[i];
      rank.digest = seal.digest();
      rank.writer = seal.writer();
      rank.abandoned.insert(seal.abandoned().begin(), seal.abandoned().end());
      reads.push_back(read_manifest(chunks_, seal, live->owner, rank.bytes));
    }
    if (auto read = co_await rt::all(runtime_.loop, std::move(reads)); !read)
      co_return fail(std::move(read).error().with("manifests of ranks " + std::to_string(out->ranks[first]) + " ff."));
  }

  const auto& map = *coordinator_.map();
  std::set<DataGroup> groups;
  for (const auto& range : map.groups)
    for (std::uint32_t i = 0; !range.home && i < range.count; ++i) groups.insert(range.first + i);
  const auto places = data_groups(map, live->copies);
  if (places.empty())
    co_return fail(Errc::kUnavailable, "no data group of " + std::to_string(live->copies) + " copies serves");
  out->index_group = places.front().group;
  CO_TRY(out->index, co_await rt::away(runtime_.loop, runtime_.offload,
                                       [ranks, groups, owner = live->owner, prove = !options_.bugs.coverage_off] {
                                         return merge_manifests(*ranks, owner, groups, prove);
                                       }));
  ranks.reset();
  co_return co_await store_index(live, out);
}

Task<void> Checkpoints::store_index(LivePtr live, std::shared_ptr<Merged> merged) {
  // A writer of its own for every try: what a try that was cut off left behind is named by no record.
  merged->index_writer = runtime_.random.next();
  const std::string_view bytes = merged->index.bytes;
  std::uint32_t index = 0;
  for (std::size_t at = 0; at < bytes.size(); at += options_.index_chunk_bytes) {
    const ChunkId id{.owner = live->owner, .writer = merged->index_writer, .index = index++};
    CO_CHECK_OK(
        co_await store_chunk(chunks_, units_, merged->index_group, id, bytes.substr(at, options_.index_chunk_bytes)));
  }
  co_return {};
}

Task<void> Checkpoints::commit_step(LivePtr live, std::shared_ptr<Merged> merged) {
  const auto group = live->owner.home_group();
  const auto run_at = run_key(live->bucket, live->run);
  const auto attempt_at = attempt_key(live->bucket, live->run, live->run_epoch, live->step);
  const auto step_at = step_key(live->bucket, live->run, live->step);
  const auto owner_at = owner_key(live->owner);
  const auto size = static_cast<std::uint32_t>(merged->index.bytes.size());
  const auto& written = merged->index.written;
  for (;;) {
    CO_TRY(const auto run, co_await load<records::Run>(records_, group, run_at));
    CO_TRY(const auto attempt, co_await load<records::Attempt>(records_, group, attempt_at));
    CO_TRY(auto owner, co_await load<records::Owner>(records_, group, owner_at));
    CO_TRY(const auto before, co_await load<records::Step>(records_, group, step_at));
    if (!attempt.exists() || attempt.value.owner() != live->owner.view())
      co_return fail(Errc::kAttemptFailed, "it was given up while its manifests were merged");
    if (epoch_of(run.value.run_epoch()) != live->run_epoch && !options_.bugs.commit_unfenced)
      co_return fail(fenced("commit", live->launch, live->run_epoch, run.value));
    if (before.exists() && !attempt.value.overwrite())
      co_return fail(Errc::kExists, "the step was committed meanwhile; say overwrite to replace it");
    if (before.value.info().pinned()) co_return fail(pinned(live->bucket, live->run, live->step));
    const auto losses = data_losses(*coordinator_.map());
    for (const auto group : groups_used(*merged)) {
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
    auto& index = *info.add_index();
    index.set_group(merged->index_group);
    index.set_writer(merged->index_writer);
    index.set_count((size + options_.index_chunk_bytes - 1) / options_.index_chunk_bytes);
    index.set_chunk_bytes(std::min(size, options_.index_chunk_bytes));
    index.set_last_bytes(size - (index.count() - 1) * options_.index_chunk_bytes);
    info.set_index_bytes(written.index_bytes);
    info.set_root_bytes(written.root_bytes);
    info.set_root_digest(written.root_digest);
    info.set_committed_unix_nanos(runtime_.loop.wall_nanos());
    *info.mutable_launch() = attempt.value.launch();
    *info.mutable_run_epoch() = attempt.value.run_epoch();
    info.set_copies(live->copies);
    Edit edit(group);
    for (std::size_t i = 0; i < merged->seals.size(); ++i) {
      const auto& seal = merged->seals[i];
      step.add_writers(seal.writer());
      for (const auto index_given_up : seal.abandoned())
        wire::to_wire({.owner = live->owner, .writer = seal.writer(), .index = index_given_up}, *step.add_abandoned());
      edit.erase(seal_key(live->owner, merged->ranks[i]));
    }
    step.add_writers(merged->index_writer);
    owner.value.set_kind(records::Owner::STEP);
    *owner.value.mutable_writers() = step.writers();
    *owner.value.mutable_abandoned() = step.abandoned();
    if (before.exists()) {
      CO_TRY(const auto old, owner_from(before.value.info().owner()));
      Readers::hide(old, live->bucket, live->run, edit);
    }
    if (!options_.bugs.commit_unfenced) edit.unchanged(run_at, run.version).put(run_at, run.value);
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
