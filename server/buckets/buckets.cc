#include "server/buckets/buckets.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/merged_scan.h"
#include "server/records/records.h"

namespace cairn::server {

struct Buckets::State {
  explicit State(rt::Loop& loop) : changed(loop) {}
  std::uint64_t users = 0;
  bool alone = false;
  rt::Signal changed;
};

Buckets::Use::Use(std::shared_ptr<State> state) : state_(std::move(state)) {
  ++state_->users;
}
Buckets::Use::~Use() {
  if (!state_) return;
  --state_->users;
  state_->changed.notify_all();
}

namespace {

Error no_bucket(std::string_view bucket) {
  return {Errc::kNotFound, "bucket '" + printable(bucket) + "' does not exist"};
}

Result<void> check_policy(const ClusterMap& map, const std::string& bucket, const wire::BucketPolicy& policy) {
  const auto bad = [&](std::string why) { return fail(Errc::kInvalid, "bucket '" + bucket + "'" + std::move(why)); };
  if (const auto most = copies_max(map); policy.copies() > most)
    return bad(" with " + std::to_string(policy.copies()) + " copies: this daemon has " +
               std::to_string(map.targets.size()) + " data directories, so at most " + std::to_string(most) +
               "; give it more with --data");
  constexpr std::uint32_t kDaysMax = 36'500;
  if (policy.keep_days() > kDaysMax)
    return bad(": keep-days " + std::to_string(policy.keep_days()) + " is above " + std::to_string(kDaysMax));
  return {};
}

/// The policy after the change.
wire::BucketPolicy changed(wire::BucketPolicy policy, const wire::BucketChange& change) {
  if (change.has_copies()) policy.set_copies(change.copies());
  if (change.has_quota_bytes()) policy.set_quota_bytes(change.quota_bytes());
  if (change.has_keep_last()) policy.set_keep_last(change.keep_last());
  if (change.has_keep_every()) policy.set_keep_every(change.keep_every());
  if (change.has_keep_days()) policy.set_keep_days(change.keep_days());
  return policy;
}

/// errors: kNotFound  another bucket has this name by now
Result<void> check_meant(const std::string& bucket, std::uint64_t id, const records::Bucket& record) {
  if (id == 0 || id == record.id()) return {};
  return fail(Errc::kNotFound, "bucket '" + bucket + "' has been removed, and made again since");
}

std::string readable(std::string_view key) {
  std::string text(key);
  for (auto& c : text)
    if (c == '\0') c = '/';
  return printable(text);
}

}  // namespace

void Buckets::fill(const std::string& bucket, const records::Bucket& record, wire::BucketInfo& out) const {
  out.set_bucket(bucket);
  out.set_id(record.id());
  out.set_revision(record.revision());
  *out.mutable_policy() = record.policy();
  out.set_created_unix_nanos(record.created_unix_nanos());
  const auto usage = usage_.of(bucket);
  out.set_used_bytes(usage.used_bytes);
  out.set_objects(usage.objects);
  out.set_steps(usage.steps);
  out.set_reserved_bytes(usage.reserved_bytes);
}

Task<wire::Empty> Buckets::create(wire::BucketCreate request) {
  CO_CHECK_OK(check_bucket_name(request.bucket()));
  CO_CHECK_OK(check_policy(*coordinator_.map(), request.bucket(), request.policy()));
  records::Bucket record;
  *record.mutable_policy() = request.policy();
  record.mutable_policy()->set_copies(std::max(request.policy().copies(), 1U));
  record.set_created_unix_nanos(runtime_.loop.wall_nanos());
  record.set_id(request.id() != 0 ? request.id() : runtime_.random.next() | 1);  // 0 means any
  Edit edit(bucket_group(request.bucket()));
  edit.absent(bucket_key(request.bucket())).put(bucket_key(request.bucket()), record);
  if (auto done = co_await edit.apply(records_); !done) {
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error());
    CO_TRY(const auto there,
           co_await load<records::Bucket>(records_, bucket_group(request.bucket()), bucket_key(request.bucket())));
    if (there.exists() && there.value.id() == record.id()) co_return wire::Empty();  // the answer was lost
    co_return fail(Errc::kExists, "bucket '" + request.bucket() + "' exists already");
  }
  usage_.policy_is(request.bucket(), record.policy().quota_bytes(), record.policy().copies());
  co_return wire::Empty();
}

Task<wire::BucketInfo> Buckets::show(wire::BucketShow request) {
  CO_CHECK_OK(check_bucket_name(request.bucket()));
  CO_TRY(const auto record,
         co_await load<records::Bucket>(records_, bucket_group(request.bucket()), bucket_key(request.bucket())));
  if (!record.exists()) co_return fail(no_bucket(request.bucket()));
  wire::BucketInfo reply;
  fill(request.bucket(), record.value, reply);
  co_return std::move(reply);
}

Task<wire::BucketListReply> Buckets::list(wire::BucketList request) {
  constexpr std::size_t kReplyBytesMax = 512 * kKiB;  // half of what a message may have
  wire::BucketListReply reply;
  MergedScan scan(records_, std::string(kBucketPrefix), "");
  for (std::size_t bytes = 0;;) {
    CO_TRY(auto record, co_await scan.next());
    if (!record) break;
    records::Bucket bucket;
    CO_CHECK_OK(parse_record(*record, bucket));
    auto& info = *reply.add_buckets();
    fill(record->key.substr(kBucketPrefix.size()), bucket, info);
    if (bytes += info.ByteSizeLong(); bytes > kReplyBytesMax)
      co_return fail(Errc::kInvalid, "more buckets than one answer holds");
  }
  co_return std::move(reply);
}

Task<Buckets::Use> Buckets::use(std::string bucket) {
  CO_CHECK_OK(check_bucket_name(bucket));
  auto state = in_use_[bucket].lock();
  if (!state) {
    std::erase_if(in_use_, [](const auto& entry) { return entry.second.expired(); });
    state = std::make_shared<State>(runtime_.loop);
    in_use_[bucket] = state;
  }
  while (state->alone) co_await state->changed.wait();
  Use use(std::move(state));
  CO_TRY(const auto record, co_await load<records::Bucket>(records_, bucket_group(bucket), bucket_key(bucket)));
  if (!record.exists()) co_return fail(no_bucket(bucket));
  use.copies_ = std::max(record.value.policy().copies(), 1U);
  co_return std::move(use);
}

class Buckets::Alone {
 public:
  explicit Alone(Use use) : use_(std::move(use)) { use_.state_->alone = true; }
  Alone(const Alone&) = delete;
  ~Alone() {
    use_.state_->alone = false;
    use_.state_->changed.notify_all();
  }

 private:
  Use use_;
};

Task<std::unique_ptr<Buckets::Alone>> Buckets::alone(std::string bucket) {
  CO_TRY(auto use, co_await this->use(bucket));
  auto state = use.state_;
  if (state->alone) co_return fail(Errc::kConflict, "bucket '" + bucket + "' is being changed by another call");
  auto alone = std::make_unique<Alone>(std::move(use));
  while (state->users > 1) co_await state->changed.wait();  // one is ours
  co_return std::move(alone);
}

Task<wire::BucketInfo> Buckets::set(wire::BucketSet request) {
  const auto& bucket = request.bucket();
  CO_TRY(const auto alone, co_await this->alone(bucket));
  CO_TRY(auto record, co_await load<records::Bucket>(records_, bucket_group(bucket), bucket_key(bucket)));
  if (!record.exists()) co_return fail(no_bucket(bucket));
  CO_CHECK_OK(check_meant(bucket, request.id(), record.value));
  const auto policy = changed(record.value.policy(), request.change());
  CO_CHECK_OK(check_policy(*coordinator_.map(), bucket, policy));
  wire::BucketInfo reply;
  // The change before was this very one: the request was sent again.
  const bool done =
      record.value.revision() == request.revision() + 1 && wire::encode(policy) == wire::encode(record.value.policy());
  if (!done) {
    if (record.value.revision() != request.revision())
      co_return fail(Errc::kConflict, "bucket '" + bucket + "' has been changed since it was looked at: try again");
    *record.value.mutable_policy() = policy;
    record.value.set_revision(request.revision() + 1);
    Edit edit(bucket_group(bucket));
    edit.unchanged(bucket_key(bucket), record.version).put(bucket_key(bucket), record.value);
    CO_CHECK_OK(co_await edit.apply(records_));
    usage_.policy_is(bucket, policy.quota_bytes(), std::max(policy.copies(), 1U));
  }
  fill(bucket, record.value, reply);
  co_return std::move(reply);
}

Task<wire::Empty> Buckets::remove(wire::BucketRemove request) {
  const auto& bucket = request.bucket();
  CO_TRY(const auto alone, co_await this->alone(bucket));
  CO_TRY(const auto record, co_await load<records::Bucket>(records_, bucket_group(bucket), bucket_key(bucket)));
  if (!record.exists()) co_return fail(no_bucket(bucket));
  CO_CHECK_OK(check_meant(bucket, request.id(), record.value));
  CO_CHECK_OK(co_await check_empty(bucket));
  CO_CHECK_OK(co_await forget_runs(bucket));
  Edit edit(bucket_group(bucket));
  edit.erase(bucket_key(bucket));
  CO_CHECK_OK(co_await edit.apply(records_));
  usage_.forget(bucket);
  co_return wire::Empty();
}

Task<void> Buckets::check_empty(std::string bucket) {
  // Attempts before steps: an attempt that commits in between is seen as the one or as the other.
  for (const auto& prefix : {object_prefix(bucket), attempt_prefix(bucket), step_prefix(bucket)}) {
    for (HomeGroup group = 0; group < kHomeGroups; ++group) {
      CO_TRY(const auto found, co_await records_.scan(group, prefix, "", 1));
      if (found.empty()) continue;
      auto name = std::string_view(found.front().key).substr(2);
      const char* what = prefix.starts_with("o/")   ? "object"
                         : prefix.starts_with("s/") ? "a step of run"
                                                    : "an open save of run";
      if (!prefix.starts_with("o/")) name = name.substr(0, name.find('\0', bucket.size() + 1));
      co_return fail(Errc::kConflict,
                     "bucket '" + bucket + "' is not empty: it has " + what + " '" + readable(name) + "'");
    }
  }
  co_return {};
}

Task<void> Buckets::forget_runs(std::string bucket) {
  constexpr std::size_t kPage = 256;
  for (HomeGroup group = 0; group < kHomeGroups; ++group) {
    for (;;) {
      CO_TRY(const auto runs, co_await records_.scan(group, run_prefix(bucket), "", kPage));
      if (runs.empty()) break;
      Edit edit(group);
      for (const auto& run : runs) edit.erase(run.key);
      CO_CHECK_OK(co_await edit.apply(records_));
    }
  }
  co_return {};
}

}  // namespace cairn::server
