#include <algorithm>
#include <utility>

#include "proto/rt/offload.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/merge.h"
#include "server/checkpoints/merging.h"
#include "server/records/keys.h"

// Merging while ranks still save. Manifests are merged fan-in at a time, in the order in which ranks seal, into runs;
// runs of one level are merged in turn, so the last merge has few parts, however many ranks there are. Runs lie in
// chunks of the attempt under writers of their own and are written down nowhere: a daemon that starts makes them again
// from the manifests, and what nobody names is garbage once the attempt has ended.

namespace cairn::server {
namespace {

constexpr std::size_t kReadsAtOnce = 8;
constexpr std::uint64_t kPieceBytesMin = kBlockBytes;  // read of a part at once: whole blocks
constexpr std::uint64_t kPieceBytesMax = 2 * kBlockBytes;
constexpr std::uint64_t kPiecesOfPart = 3;  // one read ahead, up to two not merged yet

}  // namespace

/// Bytes of one part on their way into a merge.
struct Checkpoints::Feed {
  std::uint64_t next = 0;  // offset of the first byte not read
  std::string ahead;       // read, and not supplied yet
};

Task<void> Checkpoints::load_some(const LivePtr& live, const std::vector<StoredPart>& parts, std::vector<Feed>& feeds,
                                  const std::vector<std::pair<std::size_t, std::uint64_t>>& loads,
                                  std::size_t& next_load) {
  while (next_load < loads.size()) {
    const auto [part, size] = loads[next_load++];
    auto& feed = feeds[part];
    auto read = co_await read_stored(chunks_, live->owner, parts[part].runs, feed.next, size, feed.ahead);
    if (!read) {
      const auto& speaker = parts[part].part.speaker;
      co_return fail(std::move(read).error().with(speaker ? "manifest of rank " + std::to_string(speaker->rank)
                                                          : "merged part " + std::to_string(part)));
    }
    feed.next += size;
  }
  co_return {};
}

std::uint64_t Checkpoints::merge_share() const {
  return merge_memory_.capacity() / 2;
}

std::uint32_t Checkpoints::merge_chunk_bytes() const {
  const std::uint64_t unit = chunks_.unit_bytes();
  const auto fits = std::max(round_down(merge_share() / 8, unit), unit);
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(fits, options_.index_chunk_bytes));
}

std::size_t Checkpoints::parts_max() const {
  return std::clamp<std::size_t>(merge_share() / 2 / (kPiecesOfPart * kPieceBytesMin), 2, 256);
}

Task<void> Checkpoints::merge_parts(LivePtr live, std::vector<StoredPart> parts, bool prove, ChunkStream& out,
                                    format::IndexWriter::Written& written) {
  const auto chunk_bytes = merge_chunk_bytes();
  const auto piece_bytes = std::clamp<std::uint64_t>(
      round_down((merge_share() - std::min<std::uint64_t>(3 * chunk_bytes, merge_share() / 2)) /
                     (kPiecesOfPart * std::max<std::size_t>(parts.size(), 1)),
                 kBlockBytes),
      kPieceBytesMin, kPieceBytesMax);
  std::uint64_t memory = 3 * chunk_bytes;
  std::vector<MergePart> said;
  for (const auto& part : parts) {
    memory += std::min(part.part.bytes, kPiecesOfPart * piece_bytes);
    said.push_back(part.part);
  }
  CO_TRY(const auto lease, co_await merge_memory_.acquire(std::min(memory, merge_share())));
  rt::Semaphore::Lease large;  // pages longer than a piece; one merge at a time has such

  std::set<DataGroup> groups;
  for (const auto& range : coordinator_.map()->groups)
    for (std::uint32_t i = 0; !range.home && i < range.count; ++i) groups.insert(range.first + i);
  const auto work = std::make_shared<Merge>(std::move(said), live->owner, std::move(groups), prove);
  std::vector<Feed> feeds(parts.size());
  for (bool done = false; !done;) {
    if (live->phase == Phase::kEnded) co_return fail(Errc::kCancelled, "the attempt has ended");
    std::vector<std::pair<std::size_t, std::uint64_t>> loads;
    std::uint64_t large_bytes = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      auto& feed = feeds[i];
      const auto wanted = work->wanted(i);
      if (!feed.ahead.empty() && work->buffered(i) < std::max(piece_bytes, wanted))
        work->supply(i, std::exchange(feed.ahead, {}));
      if (!feed.ahead.empty()) continue;
      auto size = piece_bytes;
      if (wanted > piece_bytes) {
        if (const auto buffered = work->buffered(i); wanted > buffered)
          size = std::max(size, round_up(wanted - buffered, kBlockBytes));
        large_bytes += wanted;
        if (large_bytes > merge_share())
          co_return fail(Errc::kInvalid, "entries of " + std::to_string(large_bytes) +
                                             " bytes (metadata) are longer than what this daemon merges, " +
                                             std::to_string(merge_share()) + " bytes: give it more memory");
        if (large.count() == 0) {
          CO_TRY(large, co_await large_pages_.acquire(1));
        }
      }
      size = std::min(size, parts[i].part.bytes - feed.next);
      if (size > 0) loads.emplace_back(i, size);
    }
    // The merge goes on away from the loop while the next bytes are read and what came out before is written.
    std::vector<Task<void>> tasks;
    std::size_t next_load = 0;
    for (std::size_t i = 0; i < std::min(loads.size(), kReadsAtOnce); ++i)
      tasks.push_back(load_some(live, parts, feeds, loads, next_load));
    Merge::Piece piece;
    tasks.push_back(run_merge(work, chunk_bytes, piece));
    tasks.push_back(out.flush(false));
    CO_CHECK_OK(co_await rt::all(runtime_.loop, std::move(tasks)));
    out.append(piece.bytes);
    done = piece.done;
  }
  written = work->written();
  co_return {};
}

Task<void> Checkpoints::run_merge(std::shared_ptr<Merge> work, std::size_t bytes, Merge::Piece& out) {
  CO_TRY(out, co_await rt::away(runtime_.loop, runtime_.offload, [work, bytes] { return work->run(bytes); }));
  co_return {};
}

StoredPart stored_part(std::uint32_t rank, const records::SealRecord& seal) {
  StoredPart out;
  out.part.bytes = seal.manifest_bytes();
  out.part.speaker.emplace();
  auto& speaker = *out.part.speaker;
  speaker.rank = rank;
  speaker.digest = seal.digest();
  speaker.writer = seal.writer();
  speaker.abandoned.insert(seal.abandoned().begin(), seal.abandoned().end());
  for (const auto& run : seal.manifest()) out.runs.push_back(stored_run(run));
  return out;
}

StoredRun stored_run(const wire::ExtentRun& run) {
  return {.group = run.group(),
          .writer = run.writer(),
          .first_index = run.first_index(),
          .count = run.count(),
          .chunk_bytes = run.chunk_bytes(),
          .last_bytes = run.last_bytes()};
}

Task<void> Checkpoints::find_manifest(LivePtr live, std::uint32_t rank, StoredPart& part) {
  CO_TRY(const auto seal,
         co_await load<records::SealRecord>(records_, live->owner.home_group(), seal_key(live->owner, rank)));
  if (!seal.exists())
    co_return fail(Errc::kAttemptFailed, "the seal of rank " + std::to_string(rank) + " is gone: it was given up");
  part = stored_part(rank, seal.value);
  co_return {};
}

Task<void> Checkpoints::add_manifests(LivePtr live, std::vector<std::uint32_t> ranks, std::vector<StoredPart>& parts) {
  const auto first = parts.size();
  parts.resize(first + ranks.size());
  std::vector<Task<void>> tasks;
  for (std::size_t i = 0; i < ranks.size(); ++i) tasks.push_back(find_manifest(live, ranks[i], parts[first + i]));
  co_return co_await rt::all(runtime_.loop, std::move(tasks));
}

DataGroup Checkpoints::index_group(const Live& live) const {
  const auto places = data_groups(*coordinator_.map(), live.copies);
  return places.empty() ? 0 : places.front().group;
}

bool Checkpoints::level_due(const Live& live, std::size_t parts) const {
  if (live.unmerged.size() >= parts) return true;
  for (const auto& run : live.runs)
    if (run.level > 0 && static_cast<std::size_t>(std::ranges::count(live.runs, run.level, &MergedRun::level)) >= parts)
      return true;
  return false;
}

void Checkpoints::level_up(const LivePtr& live) {
  if (live->levelling || live->phase != Phase::kOpen || !level_due(*live, fan_in())) return;
  live->levelling = true;
  scope_.spawn(merge_levels(live), [this, live](Result<void> done) {
    live->levelling = false;
    live->changed.notify_all();
    if (!done && live->phase == Phase::kOpen) spawn_fail(live, std::move(done).error().with(live->name()));
  });
}

Task<void> Checkpoints::merge_levels(LivePtr live) {
  while (live->phase == Phase::kOpen && level_due(*live, fan_in())) CO_CHECK_OK(co_await merge_level(live));
  co_return {};
}

std::size_t Checkpoints::fan_in() const {
  return std::min<std::size_t>(options_.merge_fan_in, parts_max());
}

Task<void> Checkpoints::merge_level(LivePtr live) {
  // Manifests first: they are most. Else the runs of the lowest level that has enough, or of the lowest.
  std::vector<StoredPart> parts;
  MergedRun made;
  for (auto& run : live->runs) run.taken = false;  // by a try that failed
  const bool of_ranks = live->unmerged.size() >= fan_in() || (live->runs.size() < 2 && live->unmerged.size() >= 2);
  if (of_ranks) {
    made.level = 1;
    const auto count = std::min(live->unmerged.size(), fan_in());
    std::vector<std::uint32_t> ranks(live->unmerged.begin(),
                                     live->unmerged.begin() + static_cast<std::ptrdiff_t>(count));
    CO_CHECK_OK(co_await add_manifests(live, std::move(ranks), parts));
    made.ranks = static_cast<std::uint32_t>(count);
  } else {
    auto first = live->runs.begin();
    while (static_cast<std::size_t>(std::ranges::count(live->runs, first->level, &MergedRun::level)) < fan_in()) {
      const auto above = std::ranges::upper_bound(live->runs, first->level, {}, &MergedRun::level);
      if (above == live->runs.end()) {
        first = live->runs.begin();
        break;
      }
      first = above;
    }
    const auto count = std::min<std::size_t>(static_cast<std::size_t>(live->runs.end() - first), fan_in());
    for (auto run = first; run != first + static_cast<std::ptrdiff_t>(count); ++run) {
      parts.push_back(run->stored);
      made.ranks += run->ranks;
      made.level = std::max(made.level, run->level + 1);
      run->taken = true;
    }
  }
  const auto group = index_group(*live);
  if (group == 0)
    co_return fail(Errc::kUnavailable, "no data group of " + std::to_string(live->copies) + " copies serves");
  ChunkStream out(chunks_, units_, live->owner, group, runtime_.random.next(), merge_chunk_bytes());
  format::IndexWriter::Written written;
  CO_CHECK_OK(co_await merge_parts(live, std::move(parts), false, out, written));
  CO_CHECK_OK(co_await out.flush(true));
  made.stored.part.bytes = written.index_bytes;
  made.stored.runs = {out.stored()};
  // Ranks that have sealed meanwhile stand behind.
  if (of_ranks) live->unmerged.erase(live->unmerged.begin(), live->unmerged.begin() + made.ranks);
  std::erase_if(live->runs, &MergedRun::taken);
  live->runs.insert(std::ranges::upper_bound(live->runs, made.level, {}, &MergedRun::level), made);
  ++stats_.merges;
  co_return {};
}

}  // namespace cairn::server
