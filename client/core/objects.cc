#include "client/core/objects.h"

#include <algorithm>

#include "client/core/reader.h"
#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

HomeGroup home_of(const std::string& bucket, const std::string& key) {
  return home_group_of(bucket + "/" + key);
}

std::string uri(const std::string& bucket, const std::string& key) {
  return "cairn://" + bucket + "/" + key;
}

BucketSummary summary_of(const wire::BucketInfo& info) {
  const auto& policy = info.policy();
  return {info.bucket(),      policy.copies(),     policy.quota_bytes(), info.created_unix_nanos(),
          policy.keep_last(), policy.keep_every(), policy.keep_days()};
}

Result<ObjectSummary> summary_of(const wire::ObjectInfo& info) {
  TRY(auto owner, OwnerId::from_bytes(info.owner()));
  return ObjectSummary{info.key(), info.size(), info.crc32c(), owner, info.created_unix_nanos()};
}

Result<void> check_names(const std::string& bucket, const std::string& key) {
  CHECK_OK(check_bucket_name(bucket));
  return check_free_name("object", key);
}

}  // namespace

Task<void> create_bucket(std::shared_ptr<Session> session, BucketSummary bucket, rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket.name));
  wire::BucketCreate create;
  create.set_bucket(bucket.name);
  create.mutable_policy()->set_copies(bucket.copies);
  create.mutable_policy()->set_quota_bytes(bucket.quota_bytes);
  create.mutable_policy()->set_keep_last(bucket.keep_last);
  create.mutable_policy()->set_keep_every(bucket.keep_every);
  create.mutable_policy()->set_keep_days(bucket.keep_days);
  auto sent = co_await session->record_call(wire::Method::kBucketCreate, home_group_of(bucket.name),
                                            wire::encode(create), deadline);
  if (!sent) co_return fail(std::move(sent).error().with("bucket '" + bucket.name + "'"));
  co_return {};
}

namespace {

Task<wire::BucketInfo> look_at(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  wire::BucketShow show;
  show.set_bucket(bucket);
  auto sent =
      co_await session->record_call(wire::Method::kBucketShow, home_group_of(bucket), wire::encode(show), deadline);
  if (!sent) co_return fail(std::move(sent).error().with("bucket '" + bucket + "'"));
  wire::BucketInfo info;
  CO_CHECK_OK(wire::decode(sent->message, info, "bucket info"));
  co_return std::move(info);
}

}  // namespace

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
  if (change.keep_last) set.mutable_change()->set_keep_last(*change.keep_last);
  if (change.keep_every) set.mutable_change()->set_keep_every(*change.keep_every);
  if (change.keep_days) set.mutable_change()->set_keep_days(*change.keep_days);
  auto sent =
      co_await session->record_call(wire::Method::kBucketSet, home_group_of(bucket), wire::encode(set), deadline);
  if (!sent) co_return fail(std::move(sent).error().with("bucket '" + bucket + "'"));
  wire::BucketInfo info;
  CO_CHECK_OK(wire::decode(sent->message, info, "bucket info"));
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
  auto sent =
      co_await session->record_call(wire::Method::kBucketRemove, home_group_of(bucket), wire::encode(remove), deadline);
  // Gone since it was looked up: by the first copy of this request, or by another caller.
  if (!sent && sent.error().code != Errc::kNotFound)
    co_return fail(std::move(sent).error().with("bucket '" + bucket + "'"));
  co_return {};
}

Task<std::shared_ptr<ObjectWriter>> ObjectWriter::begin(std::shared_ptr<Session> session, Arena& arena,
                                                        std::string bucket, std::string key, bool if_absent,
                                                        ChunkWriter::Options options) {
  CO_CHECK_OK(check_names(bucket, key));
  wire::ObjectBegin begin;
  begin.set_bucket(bucket);
  begin.set_key(key);
  begin.set_if_absent(if_absent);
  auto sent = co_await session->record_call(wire::Method::kObjectBegin, home_of(bucket, key), wire::encode(begin),
                                            session->runtime().loop.now() + options.timeout);
  if (!sent) co_return fail(std::move(sent).error().with("put " + uri(bucket, key)));
  wire::ObjectBeginReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "begin object reply"));
  CO_TRY(auto owner, OwnerId::from_bytes(reply.owner()));
  auto self = std::shared_ptr<ObjectWriter>(new ObjectWriter(session, arena, owner, options));
  self->bucket_ = std::move(bucket);
  self->key_ = std::move(key);
  self->if_absent_ = if_absent;
  co_return self;
}

Task<void> ObjectWriter::write(std::span<const std::byte> bytes) {
  auto appended = co_await writer_.append(bytes, ChunkWriter::Align::kNone, crc_);
  if (!appended) co_return fail(std::move(appended).error().with("put " + uri(bucket_, key_)));
  for (const auto& e : appended->extents) {
    if (!chunks_.empty() && chunks_.back().chunk == e.chunk && chunks_.back().length == e.offset)
      chunks_.back().length += e.length;  // the chunk goes on
    else
      chunks_.push_back(e);
  }
  crc_ = appended->crc;
  size_ += bytes.size();
  co_return {};
}

Task<ObjectSummary> ObjectWriter::seal() {
  auto drained = co_await writer_.drain();
  if (!drained) co_return fail(std::move(drained).error().with("put " + uri(bucket_, key_)));
  wire::ObjectSeal seal;
  seal.set_bucket(bucket_);
  seal.set_key(key_);
  seal.set_owner(std::string(owner_.view()));
  seal.set_if_absent(if_absent_);
  seal.set_size(size_);
  std::vector<wire::ExtentRun> runs;
  to_runs(chunks_, owner_, runs);
  for (auto& run : runs) *seal.add_runs() = std::move(run);
  seal.set_crc32c(crc_);
  auto sent = co_await session_->record_call(wire::Method::kObjectSeal, home_of(bucket_, key_), wire::encode(seal),
                                             session_->runtime().loop.now() + timeout_);
  if (!sent) co_return fail(std::move(sent).error().with("put " + uri(bucket_, key_)));
  wire::ObjectInfo info;
  CO_CHECK_OK(wire::decode(sent->message, info, "object info"));
  co_return ObjectSummary{key_, size_, crc_, owner_, info.created_unix_nanos()};
}

namespace {

/// `reader`: 0: without protection.
Task<OpenedObject> ask_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                              std::uint64_t reader, rt::TimePoint deadline) {
  CO_CHECK_OK(check_names(bucket, key));
  wire::ObjectStat stat;
  stat.set_bucket(bucket);
  stat.set_key(key);
  stat.set_reader(reader);
  const auto asked = session->runtime().loop.now();
  auto sent =
      co_await session->record_call(wire::Method::kObjectStat, home_of(bucket, key), wire::encode(stat), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(uri(bucket, key)));
  wire::ObjectInfo info;
  CO_CHECK_OK(wire::decode(sent->message, info, "object info"));
  OpenedObject opened;
  CO_TRY(opened.summary, summary_of(info));
  opened.summary.key = std::move(key);
  if (reader != 0)
    opened.held = session->protection().hold(reader, opened.summary.owner,
                                             std::chrono::milliseconds(info.reader_ttl_millis()), asked);
  const std::vector<wire::ExtentRun> runs(info.runs().begin(), info.runs().end());
  CO_TRY(opened.extents, extents_in(runs, opened.summary.owner, 0, info.size()));
  co_return opened;
}

}  // namespace

Task<OpenedObject> open_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                               rt::TimePoint deadline) {
  const auto reader = session->protection().draw();
  return ask_object(std::move(session), std::move(bucket), std::move(key), reader, deadline);
}

Task<OpenedObject> stat_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                               rt::TimePoint deadline) {
  return ask_object(std::move(session), std::move(bucket), std::move(key), 0, deadline);
}

Task<void> read_object(std::shared_ptr<Session> session, std::string bucket, std::shared_ptr<const OpenedObject> object,
                       std::uint64_t offset, std::span<std::byte> out, rt::Duration timeout) {
  const auto& summary = object->summary;
  if (offset > summary.size || out.size() > summary.size - offset)
    co_return fail(Errc::kInvalid, uri(bucket, summary.key) + ": bytes " + std::to_string(offset) + "-" +
                                       std::to_string(offset + out.size()) + " are outside its " +
                                       std::to_string(summary.size));
  std::vector<format::Extent> wanted;
  std::uint64_t start = 0;
  for (const auto& e : object->extents) {
    const auto from = std::max(start, offset), to = std::min<std::uint64_t>(start + e.length, offset + out.size());
    if (from < to)
      wanted.push_back({e.group, e.chunk, e.offset + static_cast<std::uint32_t>(from - start),
                        static_cast<std::uint32_t>(to - from)});
    start += e.length;
  }
  if (object->held && object->held->lost())
    co_return fail(Errc::kDeleted, uri(bucket, summary.key) +
                                       ": replaced or removed while it was being read, and the daemon had not heard of "
                                       "this reader for too long; open it again");
  auto read = co_await read_extents(session, std::move(wanted), out, timeout);
  if (read) co_return {};
  auto error = std::move(read).error();
  if (error.code == Errc::kDeleted) error = std::move(error).with("replaced or removed while it was being read");
  co_return fail(std::move(error).with(uri(bucket, summary.key)));
}

Task<ObjectPage> list_objects(std::shared_ptr<Session> session, std::string bucket, std::string prefix,
                              std::string after, std::uint32_t limit, rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  wire::ObjectList list;
  list.set_bucket(bucket);
  list.set_prefix(prefix);
  list.set_after(after);
  list.set_limit(limit);
  auto sent = co_await session->plain_call(wire::Method::kObjectList, wire::encode(list), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(uri(bucket, prefix)));
  wire::ObjectListReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "object list"));
  ObjectPage page{{}, reply.more()};
  for (const auto& info : reply.objects()) {
    CO_TRY(auto summary, summary_of(info));
    page.objects.push_back(std::move(summary));
  }
  co_return page;
}

Task<void> remove_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                         rt::TimePoint deadline) {
  CO_CHECK_OK(check_names(bucket, key));
  // Named by its owner: a copy of the request that arrives late must not remove a newer version.
  CO_TRY(const auto meant, co_await stat_object(session, bucket, key, deadline));
  wire::ObjectRemove remove;
  remove.set_bucket(bucket);
  remove.set_key(key);
  remove.set_owner(std::string(meant.summary.owner.view()));
  auto sent =
      co_await session->record_call(wire::Method::kObjectRemove, home_of(bucket, key), wire::encode(remove), deadline);
  // Gone since it was looked up: by the first copy of this request, or by another caller.
  if (!sent && sent.error().code == Errc::kNotFound) co_return {};
  if (!sent) co_return fail(std::move(sent).error().with(uri(bucket, key)));
  co_return {};
}

}  // namespace cairn::client
