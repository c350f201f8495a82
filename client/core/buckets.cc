#include "client/core/buckets.h"

#include "client/core/call.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

BucketSummary summary_of(const wire::BucketInfo& info) {
  const auto& policy = info.policy();
  return {info.bucket(),      policy.copies(),     policy.quota_bytes(), info.created_unix_nanos(),
          policy.keep_last(), policy.keep_every(), policy.keep_days(),   info.used_bytes(),
          info.objects(),     info.steps(),        info.reserved_bytes()};
}

template <class Reply, class Request>
Task<Reply> call_bucket(std::shared_ptr<Session> session, wire::Method method, Request request,
                        rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(request.bucket()));
  const auto group = home_group_of(request.bucket());
  auto what = "bucket '" + request.bucket() + "'";
  co_return co_await call<Reply>(std::move(session), method, group, std::move(request), std::move(what), deadline);
}

Task<wire::BucketInfo> look_at(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline) {
  wire::BucketShow show;
  show.set_bucket(bucket);
  return call_bucket<wire::BucketInfo>(std::move(session), wire::Method::kBucketShow, std::move(show), deadline);
}

}  // namespace

Task<void> create_bucket(std::shared_ptr<Session> session, BucketSummary bucket, rt::TimePoint deadline) {
  wire::BucketCreate create;
  create.set_bucket(bucket.name);
  create.mutable_policy()->set_copies(bucket.copies);
  create.mutable_policy()->set_quota_bytes(bucket.quota_bytes);
  create.mutable_policy()->set_keep_last(bucket.keep_last);
  create.mutable_policy()->set_keep_every(bucket.keep_every);
  create.mutable_policy()->set_keep_days(bucket.keep_days);
  create.set_id(session->runtime().random.next() | 1);  // by which the daemon knows a request that is sent again
  CO_CHECK_OK(co_await call_bucket<wire::Empty>(session, wire::Method::kBucketCreate, std::move(create), deadline));
  co_return {};
}

Task<BucketSummary> show_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline) {
  CO_TRY(const auto info, co_await look_at(std::move(session), std::move(bucket), deadline));
  co_return summary_of(info);
}

Task<BucketSummary> set_bucket(std::shared_ptr<Session> session, std::string bucket, BucketChange change,
                               rt::TimePoint deadline) {
  CO_TRY(const auto before, co_await look_at(session, bucket, deadline));
  wire::BucketSet set;
  set.set_bucket(bucket);
  set.set_id(before.id());
  set.set_revision(before.revision());
  if (change.quota_bytes) set.mutable_change()->set_quota_bytes(*change.quota_bytes);
  if (change.keep_last) set.mutable_change()->set_keep_last(*change.keep_last);
  if (change.keep_every) set.mutable_change()->set_keep_every(*change.keep_every);
  if (change.keep_days) set.mutable_change()->set_keep_days(*change.keep_days);
  CO_TRY(const auto info,
         co_await call_bucket<wire::BucketInfo>(session, wire::Method::kBucketSet, std::move(set), deadline));
  co_return summary_of(info);
}

Task<std::vector<BucketSummary>> list_buckets(std::shared_ptr<Session> session, rt::TimePoint deadline) {
  CO_TRY(auto sent, co_await session->plain_call(wire::Method::kBucketList, {}, deadline));
  wire::BucketListReply reply;
  CO_CHECK_OK(wire::decode(sent.message, reply, "bucket list"));
  std::vector<BucketSummary> out;
  for (const auto& info : reply.buckets()) out.push_back(summary_of(info));
  co_return out;
}

Task<void> remove_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline) {
  // Named by its id: a copy of the request that arrives late must not remove a bucket that was made since.
  CO_TRY(const auto meant, co_await look_at(session, bucket, deadline));
  wire::BucketRemove remove;
  remove.set_bucket(bucket);
  remove.set_id(meant.id());
  auto removed = co_await call_bucket<wire::Empty>(session, wire::Method::kBucketRemove, std::move(remove), deadline);
  // Gone since it was looked up: by the first copy of this request, or by another caller.
  if (!removed && removed.error().code != Errc::kNotFound) co_return fail(std::move(removed).error());
  co_return {};
}

}  // namespace cairn::client
