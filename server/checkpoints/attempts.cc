#include <algorithm>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/records.pb.h"
#include "server/checkpoints/found.h"
#include "server/checkpoints/launch.h"
#include "server/records/keys.h"
#include "server/records/runs.h"

// begin, seal, commit, abort, heartbeat: what ranks call while they save.

namespace cairn::server {
namespace {

constexpr std::size_t kAbandonedMax = 1024;
constexpr std::size_t kReasonBytesMax = 1000;
// Records and memory differ for the moment between a transaction and what follows it.
constexpr auto kBetween = std::chrono::milliseconds(1);
constexpr int kTries = 100;  // of what one more read makes right, unless records contradict each other

std::string name_of(const wire::Begin& begin) {
  return "begin of rank " + std::to_string(begin.rank()) + ", run '" + begin.bucket() + "/" + begin.run() + "' step " +
         std::to_string(begin.step());
}

Result<void> check_begin(const wire::Begin& begin, std::uint32_t world_size_max) {
  CHECK_OK(check_bucket_name(begin.bucket()));
  CHECK_OK(check_run_name(begin.run()));
  if (begin.world_size() == 0 || begin.world_size() > world_size_max)
    return fail(Errc::kInvalid, name_of(begin) + ": world size " + std::to_string(begin.world_size()) +
                                    " is not within 1 .. " + std::to_string(world_size_max));
  if (begin.rank() >= begin.world_size())
    return fail(Errc::kInvalid, name_of(begin) + ": no such rank in a world of " + std::to_string(begin.world_size()));
  return {};
}

/// Would this rank join that attempt under other conditions than the ranks before?
Result<void> check_joins(const wire::Begin& begin, const records::Attempt& attempt) {
  if (begin.world_size() != attempt.world_size())
    return fail(Errc::kInvalid, name_of(begin) + ": world size " + std::to_string(begin.world_size()) +
                                    ", but the attempt was begun with world size " +
                                    std::to_string(attempt.world_size()));
  if (begin.overwrite() != attempt.overwrite())
    return fail(Errc::kInvalid,
                name_of(begin) + (begin.overwrite() ? ": with overwrite, but the attempt was begun without"
                                                    : ": without overwrite, but the attempt was begun with"));
  if (begin.explicit_commit() != attempt.explicit_commit())
    return fail(Errc::kInvalid, name_of(begin) + (begin.explicit_commit()
                                                      ? ": with explicit commit, but the attempt was begun without"
                                                      : ": without explicit commit, but the attempt was begun with"));
  return {};
}

constexpr std::uint64_t kManifestBytesMax = 256 * kMiB;  // of one rank

Result<void> check_seal(const wire::Seal& seal, const OwnerId& owner, const std::string& what) {
  if (seal.digest().size() != 32)
    return fail(Errc::kInvalid, what + ": digest of " + std::to_string(seal.digest().size()) + " bytes, not 32");
  if (seal.abandoned_size() > static_cast<int>(kAbandonedMax))
    return fail(Errc::kInvalid, what + ": " + std::to_string(seal.abandoned_size()) + " abandoned chunks");
  std::uint64_t bytes = 0;
  for (const auto& run : seal.manifest()) {
    TRY(const auto size, check_run(run, owner, what + ": manifest"));
    if (run.writer() != seal.writer()) return fail(Errc::kInvalid, what + ": manifest of another writer than its own");
    if (!add_checked(bytes, size, bytes)) return fail(Errc::kInvalid, what + ": manifest of more than 2^64 bytes");
  }
  if (bytes != seal.manifest_bytes() || bytes == 0)
    return fail(Errc::kInvalid, what + ": chunks of " + std::to_string(bytes) + " bytes for a manifest of " +
                                    std::to_string(seal.manifest_bytes()));
  if (bytes > kManifestBytesMax)
    return fail(Errc::kInvalid, what + ": a manifest of " + std::to_string(bytes) + " bytes, more than " +
                                    std::to_string(kManifestBytesMax));
  return {};
}

}  // namespace

std::string Checkpoints::Live::name() const {
  return "save of run '" + bucket + "/" + run + "' step " + std::to_string(step);
}

Checkpoints::LivePtr Checkpoints::find_live(const OwnerId& owner) const {
  auto it = live_.find(owner);
  return it == live_.end() ? nullptr : it->second;
}

Checkpoints::LivePtr Checkpoints::ensure_live(const records::Attempt& attempt, std::string bucket, std::string run) {
  const auto owner = OwnerId::from_bytes(attempt.owner());
  assert(owner);  // we wrote it, and whoever read it has checked it
  auto& live = live_[*owner];
  if (live) return live;
  live = std::make_shared<Live>(runtime_.loop);
  live->bucket = std::move(bucket);
  live->run = std::move(run);
  live->owner = *owner;
  live->run_epoch = epoch_of(attempt.run_epoch());
  live->step = attempt.step();
  live->world_size = attempt.world_size();
  live->explicit_commit = attempt.explicit_commit();
  live->copies = std::max(attempt.copies(), 1U);
  live->launch = text(attempt.launch());
  live->job = attempt.launch().job();
  live->restart = attempt.launch().restart();
  live->began = runtime_.loop.now();
  owners_.opened(*owner, Owners::Kind::kAttempt);
  usage_.opened(*owner, live->bucket);
  return live;
}

Task<wire::BeginReply> Checkpoints::begin(wire::Begin request) {
  CO_CHECK_OK(check_begin(request, options_.world_size_max));
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  CO_TRY(const auto use, co_await buckets_.use(bucket));
  const auto group = home_group(bucket, run_name);

  LivePtr live;
  bool sealed = false;
  std::uint64_t replaces_bytes = 0;
  for (;;) {
    CO_TRY(const auto run, co_await load<records::Run>(records_, group, run_key(bucket, run_name)));
    if (!run.exists()) co_return fail(Errc::kNotFound, name_of(request) + ": nobody has opened the run");
    auto run_epoch = epoch_of(request.run_epoch());
    if (options_.bugs.begin_unfenced)
      run_epoch = epoch_of(run.value.run_epoch());
    else if (!same(run.value.launch(), request.launch()) || epoch_of(run.value.run_epoch()) != run_epoch)
      co_return fail(fenced(name_of(request), text(request.launch()), run_epoch, run.value));

    const auto key = attempt_key(bucket, run_name, run_epoch, request.step());
    CO_CHECK_OK(refused_before(request, key));
    CO_CHECK_OK(co_await usage_.look());
    CO_TRY(auto attempt, co_await load<records::Attempt>(records_, group, key));
    CO_TRY(const auto present,
           co_await load<records::Step>(records_, group, step_key(bucket, run_name, request.step())));
    replaces_bytes = present.value.info().data_bytes();
    const auto ends = ends_;
    Edit edit(group);
    edit.unchanged(run_key(bucket, run_name), run.version).unchanged(key, attempt.version);
    if (attempt.exists()) {
      CO_CHECK_OK(check_joins(request, attempt.value));
      CO_TRY(const auto owner, owner_from(attempt.value.owner()));
      if (on_join_) CO_CHECK_OK(co_await on_join_(owner, request.rank()));
      CO_TRY(const auto seal, co_await records_.get(group, seal_key(owner, request.rank())));
      sealed = seal.has_value();
    } else {
      if (present.exists() && !request.overwrite())
        co_return fail(Errc::kExists,
                       name_of(request) + ": the step is committed already; say overwrite to replace it");
      if (present.value.info().pinned())
        co_return fail(pinned(bucket, run_name, request.step()).with(name_of(request)));
      const auto& map = *coordinator_.map();
      const auto owner =
          OwnerId::make(group, map.find(true, group)->loss, runtime_.random.next(), runtime_.random.next());
      attempt.value.set_state(records::Attempt::OPEN);
      attempt.value.set_owner(std::string(owner.view()));
      set_epoch(run_epoch, *attempt.value.mutable_run_epoch());
      *attempt.value.mutable_launch() = run.value.launch();
      attempt.value.set_step(request.step());
      attempt.value.set_world_size(request.world_size());
      attempt.value.set_overwrite(request.overwrite());
      attempt.value.set_explicit_commit(request.explicit_commit());
      attempt.value.set_copies(use.copies());
      for (const auto loss : data_losses(map)) attempt.value.add_group_loss(loss);
      records::Owner record;
      record.set_kind(records::Owner::ATTEMPT);
      record.set_bucket(bucket);
      record.set_name(run_name);
      record.set_step(request.step());
      set_epoch(run_epoch, *record.mutable_run_epoch());
      edit.put(key, attempt.value).absent(owner_key(owner)).put(owner_key(owner), record);
      sealed = false;
    }
    auto done = co_await edit.apply(records_);
    if (!done && done.error().code == Errc::kConflict) continue;  // another rank was first, or a newer launch
    if (!done) co_return fail(std::move(done).error().with(name_of(request)));
    CO_TRY(const auto owner, owner_from(attempt.value.owner()));
    if (!find_live(owner) && ends != ends_) continue;  // it may have ended meanwhile
    live = ensure_live(attempt.value, bucket, run_name);
    if (!attempt.exists())
      runtime_.log.write(rt::Level::kInfo, "checkpoints_attempt_begun",
                         {{"bucket", bucket},
                          {"run", run_name},
                          {"step", std::to_string(request.step())},
                          {"owner", owner.hex()},
                          {"world_size", std::to_string(request.world_size())},
                          {"rank", std::to_string(request.rank())},
                          {"launch", printable(text(request.launch()))}});
    break;
  }

  if (!sealed) CO_CHECK_OK(reserve(live, request, replaces_bytes));
  live->heard[request.rank()] = runtime_.loop.now();
  wire::BeginReply reply;
  reply.set_owner(std::string(live->owner.view()));
  for (const auto& data : data_groups(*coordinator_.map(), live->copies)) set_stamp(data, *reply.add_data_groups());
  const auto beat = std::chrono::duration_cast<std::chrono::milliseconds>(options_.rank_silence_max / 6).count();
  reply.set_heartbeat_millis(static_cast<std::uint32_t>(std::max<std::int64_t>(beat, 1)));
  reply.set_sealed(sealed);
  co_return std::move(reply);
}

Result<void> Checkpoints::reserve(const LivePtr& live, const wire::Begin& begin, std::uint64_t replaces_bytes) {
  auto reserved = usage_.declare(live->owner, begin.rank(), begin.declared_bytes(), replaces_bytes);
  if (reserved) return {};
  auto why = std::move(reserved).error().with(name_of(begin));
  // Ranks that are there learn it from the attempt, those that come later from this.
  const auto key = attempt_key(live->bucket, live->run, live->run_epoch, live->step);
  Refusal refusal{.why = why, .told = {begin.rank()}, .until = runtime_.loop.now() + options_.join_max};
  for (const auto& [rank, heard] : live->heard) refusal.told.insert(rank);
  if (refusal.told.size() < live->world_size) refused_[key] = std::move(refusal);
  spawn_fail(live, why);
  return fail(std::move(why));
}

Result<void> Checkpoints::refused_before(const wire::Begin& begin, const std::string& attempt) {
  const auto found = refused_.find(attempt);
  if (found == refused_.end()) return {};
  if (!found->second.told.insert(begin.rank()).second) {
    refused_.erase(found);
    return {};
  }
  auto why = found->second.why;
  if (found->second.told.size() == begin.world_size()) refused_.erase(found);
  return fail(std::move(why));
}

Task<void> Checkpoints::why_ended(OwnerId owner) {
  CO_TRY(const auto failed, co_await load<records::Attempt>(records_, owner.home_group(), failed_key(owner)));
  if (failed.exists()) co_return fail(static_cast<Errc>(failed.value.error_code()), failed.value.error());
  co_return fail(Errc::kNotFound,
                 "save " + owner.hex() + " is not known: it failed long ago, or its step was removed or replaced");
}

Task<Checkpoints::Found> Checkpoints::find(std::string bucket, std::string run, OwnerId owner) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run));
  const auto group = home_group(bucket, run);
  if (owner.home_group() != group)
    co_return fail(Errc::kInvalid, "save " + owner.hex() + " is not of run '" + bucket + "/" + run + "'");
  for (int tries = 0; tries < kTries; ++tries) {
    CO_TRY(const auto record, co_await load<records::Owner>(records_, group, owner_key(owner)));
    const auto kind = record.value.kind();
    CO_TRY(const auto hidden, co_await records_.get(group, deleting_key(owner)));
    if (!record.exists() || hidden || (kind != records::Owner::ATTEMPT && kind != records::Owner::STEP)) {
      CO_CHECK_OK(co_await why_ended(owner));
    }
    if (record.value.bucket() != bucket || record.value.name() != run)
      co_return fail(Errc::kInvalid, "save " + owner.hex() + " is not of run '" + bucket + "/" + run + "'");
    Found found;
    found.committed = kind == records::Owner::STEP;
    found.step = record.value.step();
    if (found.committed) co_return std::move(found);
    found.key = attempt_key(bucket, run, epoch_of(record.value.run_epoch()), record.value.step());
    CO_TRY(found.attempt, co_await load<records::Attempt>(records_, group, found.key));
    // Otherwise it has ended between the two reads.
    if (found.attempt.exists() && found.attempt.value.owner() == owner.view()) co_return std::move(found);
  }
  co_return fail(Errc::kDataLoss, "save " + owner.hex() + ": its owner's record names an attempt that is not there");
}

Task<Loaded<records::Run>> Checkpoints::run_of(const Found& found, std::string bucket, std::string run) {
  // `found` lives in the caller's frame, which outlives this call.
  CO_TRY(auto record, co_await load<records::Run>(records_, home_group(bucket, run), run_key(bucket, run)));
  const auto& attempt = found.attempt.value;
  if (!record.exists() || epoch_of(record.value.run_epoch()) != epoch_of(attempt.run_epoch()))
    co_return fail(fenced("save of run '" + bucket + "/" + run + "' step " + std::to_string(attempt.step()),
                          text(attempt.launch()), epoch_of(attempt.run_epoch()), record.value));
  co_return std::move(record);
}

Task<wire::Empty> Checkpoints::seal(wire::Seal request) {
  return seal_part(std::move(request), false);
}
Task<wire::Empty> Checkpoints::seal_for(wire::Seal request) {
  return seal_part(std::move(request), options_.bugs.handover_unfenced);
}

Task<wire::Empty> Checkpoints::seal_part(wire::Seal request, bool unfenced) {
  const auto& bucket = request.bucket();
  const auto& run_name = request.run();
  const auto what = "seal of rank " + std::to_string(request.rank());
  CO_TRY(const auto owner, owner_from(request.owner()));
  CO_CHECK_OK(check_seal(request, owner, what));
  records::SealRecord record;
  record.set_writer(request.writer());
  *record.mutable_manifest() = request.manifest();
  for (auto& run : *record.mutable_manifest()) run.clear_owner();  // its own
  record.set_manifest_bytes(request.manifest_bytes());
  record.set_digest(request.digest());
  record.set_data_bytes(request.data_bytes());
  *record.mutable_groups() = request.groups();
  *record.mutable_abandoned() = request.abandoned();

  for (;;) {
    CO_TRY(const auto found, co_await find(bucket, run_name, owner));
    // Committed means that this rank's seal was counted; the records that would tell its digest are gone.
    if (found.committed) co_return wire::Empty();
    const auto& attempt = found.attempt.value;
    if (request.rank() >= attempt.world_size())
      co_return fail(Errc::kInvalid, what + ": no such rank in a world of " + std::to_string(attempt.world_size()));
    Loaded<records::Run> run;
    if (!unfenced) {
      CO_TRY(run, co_await run_of(found, bucket, run_name));
    }
    const auto group = home_group(bucket, run_name);
    const auto key = seal_key(owner, request.rank());
    CO_TRY(const auto before, co_await load<records::SealRecord>(records_, group, key));
    if (before.exists() && (before.value.digest() != request.digest() || before.value.writer() != request.writer()))
      co_return fail(Errc::kConflict, what + ": it has sealed another manifest before");
    const auto ends = ends_;
    Edit edit(group);
    if (!unfenced) edit.unchanged(run_key(bucket, run_name), run.version);
    edit.unchanged(found.key, found.attempt.version).unchanged(key, before.version);
    if (!before.exists()) edit.put(key, record);
    auto done = co_await edit.apply(records_);
    if (!done && done.error().code == Errc::kConflict) continue;  // the attempt has ended, or the run changed hands
    if (!done) co_return fail(std::move(done).error().with(what));
    if (!find_live(owner) && ends != ends_) continue;
    const auto live = ensure_live(attempt, bucket, run_name);
    live->unfenced |= unfenced;
    rank_sealed(live, request.rank());
    co_return wire::Empty();
  }
}

Task<bool> Checkpoints::expects(wire::Seal seal, bool complete) {
  const auto what = "seal of rank " + std::to_string(seal.rank());
  CO_TRY(const auto owner, owner_from(seal.owner()));
  if (complete) CO_CHECK_OK(check_seal(seal, owner, what));
  // Mostly memory knows. Records are read behind a change of them that is under way, and its flush takes long while
  // everybody writes, but the rank's trainer waits; whether it has been fenced meanwhile the seal itself asks them.
  if (const auto live = find_live(owner); live && live->bucket == seal.bucket() && live->run == seal.run() &&
                                          seal.rank() < live->world_size && unsealed(owner, seal.rank()))
    co_return true;
  CO_TRY(const auto found, co_await find(seal.bucket(), seal.run(), owner));
  if (found.committed) co_return false;
  const auto world_size = found.attempt.value.world_size();
  if (seal.rank() >= world_size)
    co_return fail(Errc::kInvalid, what + ": no such rank in a world of " + std::to_string(world_size));
  CO_CHECK_OK(co_await run_of(found, seal.bucket(), seal.run()));
  CO_TRY(const auto before, co_await records_.get(owner.home_group(), seal_key(owner, seal.rank())));
  co_return !before.has_value();
}

bool Checkpoints::unsealed(const OwnerId& owner, std::uint32_t rank) const {
  const auto live = find_live(owner);
  return live && live->phase == Phase::kOpen && !live->failing && !live->sealed.contains(rank);
}

bool Checkpoints::silent(const OwnerId& owner, std::uint32_t rank, rt::Duration duration) const {
  if (!unsealed(owner, rank)) return false;
  const auto live = find_live(owner);
  const auto last = live->heard.find(rank);
  return last != live->heard.end() && runtime_.loop.now() - last->second >= duration;
}

void Checkpoints::heard(const OwnerId& owner, std::uint32_t rank) {
  if (unsealed(owner, rank)) find_live(owner)->heard[rank] = runtime_.loop.now();
}

Task<void> Checkpoints::give_up(OwnerId owner, std::uint32_t rank, Error why) {
  const auto live = find_live(owner);
  if (!live || live->phase != Phase::kOpen) co_return {};
  const auto code = why.code;
  co_return co_await fail_attempt(
      live, {code, live->name() + ": rank " + std::to_string(rank) + " had handed over its part: " + why.message});
}

void Checkpoints::rank_sealed(const LivePtr& live, std::uint32_t rank) {
  if (live->sealed.insert(rank).second) live->unmerged.push_back(rank);
  live->heard[rank] = runtime_.loop.now();
  const bool early = options_.bugs.commit_early && live->sealed.size() + 1 >= live->world_size;
  if ((live->all_sealed() || early) && !live->explicit_commit) start_merge(live);
  level_up(live);
}

Task<wire::Empty> Checkpoints::commit(wire::Commit request) {
  CO_TRY(const auto owner, owner_from(request.owner()));
  for (;;) {
    CO_TRY(const auto found, co_await find(request.bucket(), request.run(), owner));
    if (found.committed) co_return wire::Empty();
    CO_CHECK_OK(co_await run_of(found, request.bucket(), request.run()));
    auto live = find_live(owner);
    if (!live) {
      co_await runtime_.loop.sleep(kBetween);
      continue;
    }
    if (live->phase == Phase::kOpen) {
      if (!live->all_sealed() && !options_.bugs.commit_early) {
        std::string missing;
        std::uint32_t named = 0;
        for (std::uint32_t rank = 0; rank < live->world_size && named < 8; ++rank) {
          if (live->sealed.contains(rank)) continue;
          if (named++ > 0) missing += ", ";
          missing += std::to_string(rank);
        }
        co_return fail(Errc::kConflict, "commit of " + live->name() + ": " +
                                            std::to_string(live->world_size - live->sealed.size()) + " of " +
                                            std::to_string(live->world_size) + " ranks have not sealed: " + missing);
      }
      start_merge(live);
    }
    CO_CHECK_OK(co_await ended(live));
  }
}

Task<void> Checkpoints::ended(LivePtr live) {
  while (live->phase != Phase::kEnded) {
    if (draining_) co_return fail(Errc::kUnavailable, "the daemon is stopping; the save goes on when it is back");
    co_await live->changed.wait();
  }
  co_return {};
}

Task<wire::Empty> Checkpoints::abort(wire::Abort request) {
  CO_TRY(const auto owner, owner_from(request.owner()));
  for (int tries = 0;; ++tries) {
    auto found = co_await find(request.bucket(), request.run(), owner);
    if (!found) {
      CO_TRY(const auto failed, co_await records_.get(owner.home_group() % kHomeGroups, failed_key(owner)));
      if (failed) co_return wire::Empty();  // there is nothing left to abort
      co_return fail(std::move(found).error());
    }
    if (found->committed)
      co_return fail(Errc::kConflict, "abort: step " + std::to_string(found->step) + " is committed already");
    auto live = find_live(owner);
    if (!live && tries == kTries) live = ensure_live(found->attempt.value, request.bucket(), request.run());
    if (live) {
      CO_CHECK_OK(co_await fail_attempt(
          live, {request.code() == static_cast<int>(Errc::kNoSpace) ? Errc::kNoSpace : Errc::kAttemptFailed,
                 live->name() + ": rank " + std::to_string(request.rank()) +
                     " gave up: " + printable(request.reason(), kReasonBytesMax)}));
      co_return wire::Empty();
    }
    co_await runtime_.loop.sleep(kBetween);
  }
}

Task<wire::Empty> Checkpoints::heartbeat(wire::Heartbeat request) {
  CO_TRY(const auto owner, owner_from(request.owner()));
  if (auto live = find_live(owner)) {
    if (request.rank() >= live->world_size)
      co_return fail(Errc::kInvalid, "heartbeat of rank " + std::to_string(request.rank()) + ": no such rank");
    live->heard[request.rank()] = runtime_.loop.now();
    usage_.declared_before(owner, request.rank(), request.declared_bytes());
    co_return wire::Empty();
  }
  CO_CHECK_OK(co_await find(request.bucket(), request.run(), owner));
  co_return wire::Empty();
}

}  // namespace cairn::server
