#include "client/core/objects.h"

#include "client/core/call.h"
#include "client/core/reader.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

std::string uri(const std::string& bucket, const std::string& key) {
  return "cairn://" + bucket + "/" + key;
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
  CO_TRY(const auto info,
         co_await call<wire::ObjectInfo>(session, wire::Method::kObjectStat, home_group_of(bucket, key),
                                         std::move(stat), uri(bucket, key), deadline));
  OpenedObject opened;
  CO_TRY(opened.summary, summary_of(info));
  opened.summary.key = std::move(key);
  if (reader != 0)
    opened.held = session->protection().hold(reader, opened.summary.owner,
                                             std::chrono::milliseconds(info.reader_ttl_millis()), asked);
  CO_TRY(opened.extents, ExtentMap::from(info));
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
  if (object->held && object->held->lost())
    co_return fail(Errc::kDeleted, uri(bucket, summary.key) +
                                       ": replaced or removed while it was being read, and the daemon had not heard of "
                                       "this reader for too long; open it again");
  auto wanted = co_await ExtentMap::find(object->extents, session, offset, out.size(), timeout);
  Error error;
  if (wanted) {
    auto read = co_await read_extents(session, *std::move(wanted), out, timeout);
    if (read) co_return {};
    error = std::move(read).error();
  } else {
    error = std::move(wanted).error();
  }
  if (error.code == Errc::kDeleted) error = std::move(error).with("replaced or removed while it was being read");
  co_return fail(std::move(error).with(uri(bucket, summary.key)));
}

Task<ObjectPage> list_objects(std::shared_ptr<Session> session, std::string bucket, ListRequest request,
                              rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  wire::ObjectList list;
  list.set_bucket(bucket);
  list.set_prefix(request.prefix);
  list.set_after(request.after);
  list.set_limit(request.limit);
  list.set_delimiter(request.delimiter);
  list.set_token(request.token);
  auto sent = co_await session->plain_call(wire::Method::kObjectList, wire::encode(list), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(uri(bucket, request.prefix)));
  wire::ObjectListReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "object list"));
  ObjectPage page;
  page.more = reply.more();
  page.next = reply.next();
  page.prefixes.assign(reply.prefixes().begin(), reply.prefixes().end());
  for (const auto& info : reply.objects()) {
    CO_TRY(auto summary, summary_of(info));
    page.objects.push_back(std::move(summary));
  }
  co_return page;
}

Task<void> remove_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                         std::optional<OwnerId> if_version, rt::TimePoint deadline) {
  CO_CHECK_OK(check_names(bucket, key));
  // Named by its owner: a copy of the request that arrives late must not remove a newer version.
  CO_TRY(const auto meant, co_await stat_object(session, bucket, key, deadline));
  const auto& owner = meant.summary.owner;
  if (if_version && *if_version != owner)
    co_return fail(Errc::kConflict,
                   uri(bucket, key) + ": another version has taken the place of the one meant: " + owner.hex());
  wire::ObjectRemove remove;
  remove.set_bucket(bucket);
  remove.set_key(key);
  remove.set_owner(std::string(owner.view()));
  auto removed = co_await call<wire::Empty>(session, wire::Method::kObjectRemove, home_group_of(bucket, key),
                                            std::move(remove), uri(bucket, key), deadline);
  if (removed || removed.error().code != Errc::kNotFound) {
    CO_CHECK_OK(std::move(removed));
    co_return {};
  }
  // Gone since it was looked up: by the first copy of this request, or by another caller.
  if (!if_version) co_return {};
  const auto now = co_await stat_object(session, bucket, key, deadline);
  if (now || now.error().code != Errc::kNotFound)
    co_return fail(Errc::kConflict, uri(bucket, key) + ": the version meant has been replaced or removed meanwhile");
  co_return {};
}

}  // namespace cairn::client
