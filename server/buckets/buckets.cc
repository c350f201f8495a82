#include "server/buckets/buckets.h"

#include <cstdint>
#include <utility>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/merged_scan.h"
#include "server/records/records.h"

namespace cairn::server {

struct Buckets::State {
  explicit State(rt::Loop& loop) : changed(loop) {}
  std::uint64_t users = 0;
  bool removing = false;
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

void fill(const std::string& bucket, const records::Bucket& record, wire::BucketInfo& out) {
  out.set_bucket(bucket);
  *out.mutable_policy() = record.policy();
  out.set_created_unix_nanos(record.created_unix_nanos());
}

std::string readable(std::string_view key) {
  std::string text(key);
  for (auto& c : text)
    if (c == '\0') c = '/';
  return printable(text);
}

}  // namespace

Task<wire::Empty> Buckets::create(wire::BucketCreate request) {
  CO_CHECK_OK(check_bucket_name(request.bucket()));
  if (request.policy().copies() > 1)
    co_return fail(Errc::kInvalid, "bucket '" + request.bucket() + "' with " +
                                       std::to_string(request.policy().copies()) +
                                       " copies: this daemon has one target, so at most 1");
  if (request.policy().quota_bytes() != 0)
    co_return fail(Errc::kInvalid, "bucket '" + request.bucket() + "': quotas are not supported");
  records::Bucket record;
  record.mutable_policy()->set_copies(1);
  record.set_created_unix_nanos(runtime_.loop.wall_nanos());
  Edit edit(bucket_group(request.bucket()));
  edit.absent(bucket_key(request.bucket())).put(bucket_key(request.bucket()), record);
  if (auto done = co_await edit.apply(records_); !done) {
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error());
    co_return fail(Errc::kExists, "bucket '" + request.bucket() + "' exists already");
  }
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
  while (state->removing) co_await state->changed.wait();
  Use use(std::move(state));
  CO_TRY(const auto record, co_await load<records::Bucket>(records_, bucket_group(bucket), bucket_key(bucket)));
  if (!record.exists()) co_return fail(no_bucket(bucket));
  co_return std::move(use);
}

Task<wire::Empty> Buckets::remove(wire::BucketRemove request) {
  const auto& bucket = request.bucket();
  CO_TRY(auto use, co_await this->use(bucket));
  auto state = use.state_;
  if (state->removing) co_return fail(Errc::kConflict, "bucket '" + bucket + "' is being removed by another call");
  state->removing = true;
  struct End {
    std::shared_ptr<State> state;
    ~End() {
      state->removing = false;
      state->changed.notify_all();
    }
  } end{state};
  while (state->users > 1) co_await state->changed.wait();  // one is ours

  CO_CHECK_OK(co_await check_empty(bucket));
  CO_CHECK_OK(co_await forget_runs(bucket));
  Edit edit(bucket_group(bucket));
  edit.erase(bucket_key(bucket));
  CO_CHECK_OK(co_await edit.apply(records_));
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
