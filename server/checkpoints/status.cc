#include <algorithm>
#include <utility>

#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/launch.h"
#include "server/records/keys.h"

// How attempts are watched, end in failure, and are remembered; and what a restart finds.

namespace cairn::server {
namespace {

constexpr std::size_t kStatusPage = 256;
constexpr std::uint64_t kLookUps = 64;

/// The names in "a/<bucket>\0<run>\0<20 bytes>".
Result<std::pair<std::string, std::string>> names_of_attempt(const std::string& key) {
  auto rest = std::string_view(key).substr(kAttemptPrefix.size());
  const auto first = rest.find('\0');
  const auto second = first == rest.npos ? rest.npos : rest.find('\0', first + 1);
  if (second == rest.npos || rest.size() - second != 1 + 20)
    return fail(Errc::kDataLoss, "key of an attempt record is malformed");
  return std::pair(std::string(rest.substr(0, first)), std::string(rest.substr(first + 1, second - first - 1)));
}

}  // namespace

Checkpoints::Checkpoints(rt::Runtime runtime, Chunks& chunks, storage::RecordStore& records, rt::UnitPool& units,
                         const Coordinator& coordinator, Buckets& buckets, Owners& owners, Readers& readers,
                         Usage& usage, Options options)
    : runtime_(runtime),
      chunks_(chunks),
      records_(records),
      units_(units),
      coordinator_(coordinator),
      buckets_(buckets),
      owners_(owners),
      readers_(readers),
      usage_(usage),
      options_(options),
      merge_memory_(runtime.loop, options.merge_memory_bytes),
      look_ups_(runtime.loop, kLookUps),
      large_pages_(runtime.loop, 1),
      scope_(runtime.loop) {}

Checkpoints::~Checkpoints() {
  scope_.cancel();
}

Checkpoints::Stats Checkpoints::stats() const {
  auto out = stats_;
  for (const auto& [owner, live] : live_) ++(live->phase == Phase::kMerging ? out.merging : out.open);
  return out;
}

Task<void> Checkpoints::start() {
  CO_CHECK_OK(co_await remember_failed());
  CO_CHECK_OK(co_await resume_attempts());
  co_return co_await erase_old_seals();
}

void Checkpoints::drain() {
  draining_ = true;
  for (auto& [owner, live] : live_) live->changed.notify_all();
}

Task<void> Checkpoints::resume_attempts() {
  for (HomeGroup group = 0; group < kHomeGroups; ++group) {
    for (std::string after;;) {
      CO_TRY(const auto page, co_await records_.scan(group, std::string(kAttemptPrefix), after, kStatusPage));
      for (const auto& record : page) {
        CO_TRY(auto names, names_of_attempt(record.key));
        Loaded<records::Attempt> attempt{.value = {}, .version = record.version};
        CO_CHECK_OK(parse_record(record, attempt.value));
        CO_CHECK_OK(co_await resume_attempt(std::move(names.first), std::move(names.second), std::move(attempt)));
      }
      if (page.size() < kStatusPage) break;
      after = page.back().key;
    }
  }
  co_return {};
}

Task<void> Checkpoints::resume_attempt(std::string bucket, std::string run, Loaded<records::Attempt> attempt) {
  if (auto owner = OwnerId::from_bytes(attempt.value.owner()); !owner)
    co_return fail(Errc::kDataLoss, "attempt record: " + owner.error().message);
  const auto live = ensure_live(attempt.value, bucket, run);
  CO_TRY(const auto record, co_await load<records::Run>(records_, home_group(bucket, run), run_key(bucket, run)));
  if (epoch_of(record.value.run_epoch()) != live->run_epoch) {
    spawn_fail(live, fenced(live->name(), live->launch, live->run_epoch, record.value));
    co_return {};
  }
  for (std::string after;;) {
    CO_TRY(const auto page,
           co_await records_.scan(live->owner.home_group(), seal_prefix(live->owner), after, kStatusPage));
    for (const auto& seal : page) {
      const auto rank = static_cast<std::uint32_t>(number_at_end(seal.key, 4));
      if (live->sealed.insert(rank).second) live->unmerged.push_back(rank);
    }
    if (page.size() < kStatusPage) break;
    after = page.back().key;
  }
  CO_TRY(const auto joined,
         co_await load<records::Joined>(records_, live->owner.home_group(), joined_key(live->owner)));
  const auto& bits = joined.value.ranks();
  for (std::uint32_t rank = 0; rank < live->world_size && rank / 8 < bits.size(); ++rank)
    if ((static_cast<unsigned char>(bits[rank / 8]) >> rank % 8 & 1) != 0) live->heard[rank] = runtime_.loop.now();
  live->joined_kept = live->heard.size();
  if (live->all_sealed() && !live->explicit_commit) start_merge(live);
  level_up(live);
  co_return {};
}

Task<void> Checkpoints::keep_joined() {
  std::vector<LivePtr> due;  // live_ may change meanwhile
  for (const auto& [owner, live] : live_)
    if (live->phase == Phase::kOpen && live->heard.size() > live->joined_kept) due.push_back(live);
  for (const auto& live : due) CO_CHECK_OK(co_await keep_joined(live));
  co_return {};
}

Task<void> Checkpoints::keep_joined(LivePtr live) {
  const auto group = live->owner.home_group();
  const auto key = attempt_key(live->bucket, live->run, live->run_epoch, live->step);
  CO_TRY(const auto attempt, co_await load<records::Attempt>(records_, group, key));
  if (!attempt.exists() || attempt.value.owner() != live->owner.view()) co_return {};  // it has ended
  std::string bits((live->world_size + 7) / 8, '\0');
  for (const auto& [rank, heard] : live->heard) bits[rank / 8] = static_cast<char>(bits[rank / 8] | 1 << rank % 8);
  const auto count = live->heard.size();
  records::Joined joined;
  joined.set_ranks(std::move(bits));
  Edit edit(group);
  edit.unchanged(key, attempt.version).put(joined_key(live->owner), joined);
  auto done = co_await edit.apply(records_);
  if (done) live->joined_kept = count;
  if (!done && done.error().code != Errc::kConflict) co_return fail(std::move(done).error());
  co_return {};
}

Task<void> Checkpoints::remember_failed() {
  const auto until = runtime_.loop.now() + options_.failed_kept;
  for (HomeGroup group = 0; group < kHomeGroups; ++group) {
    for (std::string after;;) {
      CO_TRY(const auto page, co_await records_.scan(group, std::string(kFailedPrefix), after, kStatusPage));
      for (const auto& record : page) {
        CO_TRY(const auto owner, OwnerId::from_bytes(std::string_view(record.key).substr(kFailedPrefix.size())));
        failed_[owner] = until;
      }
      if (page.size() < kStatusPage) break;
      after = page.back().key;
    }
  }
  co_return {};
}

Task<void> Checkpoints::forget_failed() {
  std::vector<OwnerId> due;
  for (const auto& [owner, until] : failed_)
    if (runtime_.loop.now() >= until) due.push_back(owner);
  for (const auto& owner : due) {
    CO_CHECK_OK(co_await erase_seals(owner));  // those that a crash left
    Edit edit(owner.home_group());
    edit.erase(failed_key(owner));
    CO_CHECK_OK(co_await edit.apply(records_));
    failed_.erase(owner);
  }
  co_return {};
}

Task<void> Checkpoints::watch() {
  // Until now nobody could be heard, however long the start took.
  for (auto& [owner, live] : live_) {
    live->began = runtime_.loop.now();
    for (auto& [rank, heard] : live->heard) heard = runtime_.loop.now();
  }
  for (;;) {
    const auto due = runtime_.loop.now() + options_.check_every;
    co_await runtime_.loop.sleep_until(due);
    // When this process was stopped, signs of life wait in the sockets: the ranks are not to blame for the gap.
    if (const auto late = runtime_.loop.now() - due; late > options_.check_every) {
      for (auto& [owner, live] : live_) {
        live->began += late;
        for (auto& [rank, heard] : live->heard) heard += late;
      }
    }
    if (!records_.usable()) continue;  // nothing can be written any more, and one log line said so
    fail_those([this](const Live& live) { return overdue(live); });
    std::erase_if(refused_, [this](const auto& entry) { return runtime_.loop.now() >= entry.second.until; });
    if (auto kept = co_await keep_joined(); !kept)
      runtime_.log.write(rt::Level::kWarning, "checkpoints_keep_joined", {{"error", kept.error().message}});
    if (auto forgotten = co_await forget_failed(); !forgotten)
      runtime_.log.write(rt::Level::kWarning, "checkpoints_forget_failed", {{"error", forgotten.error().message}});
  }
}

std::optional<Error> Checkpoints::overdue(const Live& live) const {
  if (live.phase != Phase::kOpen) return std::nullopt;
  const auto now = runtime_.loop.now();
  const auto seconds = [](rt::Duration d) {
    const auto millis = std::chrono::duration_cast<std::chrono::milliseconds>(d).count();
    return millis % 1000 == 0 ? std::to_string(millis / 1000) + " s" : std::to_string(millis) + " ms";
  };
  if (live.all_sealed()) {
    auto last = live.began;
    for (const auto& [rank, heard] : live.heard) last = std::max(last, heard);
    if (now - last < options_.join_max) return std::nullopt;
    return Error{Errc::kAttemptFailed,
                 live.name() + ": nobody committed it within " + seconds(options_.join_max) + " of the last seal"};
  }
  std::string silent, absent;
  std::size_t silent_count = 0, absent_count = 0;
  for (std::uint32_t rank = 0; rank < live.world_size; ++rank) {
    if (live.sealed.contains(rank)) continue;
    const auto heard = live.heard.find(rank);
    if (heard != live.heard.end() && now - heard->second >= options_.rank_silence_max) {
      if (++silent_count <= 8) silent += (silent.empty() ? "" : ", ") + std::to_string(rank);
    } else if (heard == live.heard.end() && now - live.began >= options_.join_max) {
      if (++absent_count <= 8) absent += (absent.empty() ? "" : ", ") + std::to_string(rank);
    }
  }
  if (silent.empty() && absent.empty()) return std::nullopt;
  std::string why = live.name() + " of launch " + live.launch + ": ";
  if (!silent.empty())
    why += (silent_count == 1 ? "rank " : std::to_string(silent_count) + " ranks (") + silent +
           (silent_count == 1 ? "" : ")") + " silent for " + seconds(options_.rank_silence_max);
  if (!absent.empty())
    why += (silent.empty() ? "" : "; ") +
           std::string(absent_count == 1 ? "rank " : std::to_string(absent_count) + " ranks (") + absent +
           (absent_count == 1 ? "" : ")") + " never joined within " + seconds(options_.join_max);
  return Error{Errc::kAttemptFailed, std::move(why)};
}

void Checkpoints::end(const LivePtr& live) {
  if (live->phase == Phase::kEnded) return;
  live->phase = Phase::kEnded;
  ++ends_;
  live_.erase(live->owner);
  owners_.ended(live->owner);
  if (!options_.bugs.reservation_kept || !failed_.contains(live->owner)) usage_.ended(live->owner);
  live->changed.notify_all();
}

void Checkpoints::fail_those(const std::function<std::optional<Error>(const Live&)>& why_of) {
  std::vector<std::pair<LivePtr, Error>> due;  // what is spawned may change live_ at once
  for (const auto& [owner, live] : live_)
    if (auto why = why_of(*live)) due.emplace_back(live, *std::move(why));
  for (auto& [live, why] : due) spawn_fail(live, std::move(why));
}

void Checkpoints::spawn_fail(const LivePtr& live, Error why) {
  if (std::exchange(live->failing, true)) return;
  scope_.spawn(fail_attempt(live, std::move(why)), [this, live](Result<void> done) {
    live->failing = false;  // after an error the next look tries again
    if (!done)
      runtime_.log.write(rt::Level::kWarning, "checkpoints_fail_attempt",
                         {{"attempt", live->name()}, {"error", done.error().message}});
  });
}

Task<void> Checkpoints::fail_attempt(LivePtr live, Error why) {
  const auto group = live->owner.home_group();
  const auto key = attempt_key(live->bucket, live->run, live->run_epoch, live->step);
  why.message.resize(std::min<std::size_t>(why.message.size(), 4000));
  for (;;) {
    CO_TRY(auto attempt, co_await load<records::Attempt>(records_, group, key));
    if (!attempt.exists() || attempt.value.owner() != live->owner.view()) break;  // it has ended already
    attempt.value.set_state(records::Attempt::FAILED);
    attempt.value.set_error_code(static_cast<int>(why.code));
    attempt.value.set_error(why.message);
    attempt.value.set_ended_unix_nanos(runtime_.loop.wall_nanos());
    Edit edit(group);
    edit.unchanged(key, attempt.version).erase(key).erase(owner_key(live->owner)).erase(joined_key(live->owner));
    edit.put(failed_key(live->owner), attempt.value);
    auto done = co_await edit.apply(records_);
    if (!done && done.error().code == Errc::kConflict) continue;
    if (!done) co_return fail(std::move(done).error());
    ++stats_.failed;
    failed_[live->owner] = runtime_.loop.now() + options_.failed_kept;
    runtime_.log.write(rt::Level::kWarning, "checkpoints_attempt_failed",
                       {{"bucket", live->bucket},
                        {"run", live->run},
                        {"step", std::to_string(live->step)},
                        {"owner", live->owner.hex()},
                        {"code", std::string(name_of(why.code))},
                        {"error", why.message}});
    break;
  }
  end(live);
  // No seal can come any more: its transaction compares the attempt's record.
  CO_CHECK_OK(co_await erase_seals(live->owner));
  co_return {};
}

Task<void> Checkpoints::erase_seals(OwnerId owner) {
  for (;;) {
    CO_TRY(const auto page, co_await records_.scan(owner.home_group(), seal_prefix(owner), "", kStatusPage));
    if (page.empty()) co_return {};
    Edit edit(owner.home_group());
    for (const auto& seal : page) edit.erase(seal.key);
    CO_CHECK_OK(co_await edit.apply(records_));
  }
}

Task<void> Checkpoints::erase_old_seals() {
  for (HomeGroup group = 0; group < kHomeGroups; ++group) {
    for (std::string after;;) {
      CO_TRY(const auto first, co_await records_.scan(group, std::string(kSealPrefix), after, 1));
      if (first.empty()) break;
      CO_TRY(const auto owner, OwnerId::from_bytes(std::string_view(first.front().key).substr(kSealPrefix.size(), 16)));
      // Those of failed ones go when they are forgotten.
      if (!find_live(owner) && !failed_.contains(owner)) CO_CHECK_OK(co_await erase_seals(owner));
      after = seal_key(owner, UINT32_MAX);
    }
  }
  co_return {};
}

// The ranks of a save all wait here: this frame is small, what is told at the end has its own.
Task<wire::AttemptStatusReply> Checkpoints::status(wire::AttemptStatus request) {
  CO_TRY(const auto owner, owner_from(request.owner()));
  const auto until = runtime_.loop.now() +
                     std::min<rt::Duration>(std::chrono::milliseconds(request.wait_millis()), options_.status_wait_max);
  for (;;) {
    while (auto live = find_live(owner)) {
      if (live->bucket != request.bucket() || live->run != request.run())
        co_return fail(Errc::kInvalid, "status: save " + owner.hex() + " is not of this run");
      if (runtime_.loop.now() >= until) co_return status_of(*live);
      auto waited = co_await rt::with_deadline(runtime_.loop, until, ended(live), "status");
      if (!waited && waited.error().code != Errc::kDeadline) co_return fail(std::move(waited).error());
    }
    CO_TRY(auto reply, co_await status_at_end(owner, request.bucket(), request.run()));
    if (reply) co_return *std::move(reply);
    // Open, but not in memory: the moment between a transaction and what follows it.
    co_await runtime_.loop.sleep(std::chrono::milliseconds(1));
  }
}

wire::AttemptStatusReply Checkpoints::status_of(const Live& live) {
  wire::AttemptStatusReply reply;
  reply.set_state(live.phase == Phase::kMerging ? wire::AttemptStatusReply::MERGING : wire::AttemptStatusReply::OPEN);
  reply.set_step(live.step);
  reply.set_world_size(live.world_size);
  reply.set_sealed(static_cast<std::uint32_t>(live.sealed.size()));
  return reply;
}

Task<std::optional<wire::AttemptStatusReply>> Checkpoints::status_at_end(OwnerId owner, std::string bucket,
                                                                         std::string run) {
  // All who waited for the end ask at the same moment: so many have their frames and records in memory.
  CO_TRY(const auto turn, co_await look_ups_.acquire(1));
  wire::AttemptStatusReply reply;
  auto found = co_await find(bucket, run, owner);
  if (!found) {
    CO_TRY(const auto failed,
           co_await load<records::Attempt>(records_, owner.home_group() % kHomeGroups, failed_key(owner)));
    if (failed.exists()) {
      reply.set_state(wire::AttemptStatusReply::FAILED);
      reply.set_step(failed.value.step());
      reply.set_world_size(failed.value.world_size());
      reply.set_error_code(failed.value.error_code());
      reply.set_error(failed.value.error());
      co_return std::move(reply);
    }
    if (found.error().code != Errc::kNotFound) co_return fail(std::move(found).error());
    reply.set_state(wire::AttemptStatusReply::UNKNOWN);
    co_return std::move(reply);
  }
  if (!found->committed) co_return std::nullopt;
  CO_TRY(const auto step,
         co_await load<records::Step>(records_, owner.home_group(), step_key(bucket, run, found->step)));
  reply.set_state(wire::AttemptStatusReply::COMMITTED);
  reply.set_step(found->step);
  reply.set_world_size(step.value.info().world_size());
  reply.set_sealed(step.value.info().world_size());
  co_return std::move(reply);
}

}  // namespace cairn::server
