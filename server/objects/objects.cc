#include "server/objects/objects.h"

#include <set>
#include <utility>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/merged_scan.h"
#include "server/records/records.h"
#include "server/records/runs.h"

namespace cairn::server {
namespace {

constexpr std::uint32_t kRootBytesMax = 16 * kMiB;  // of a list of extents: a client reads it whole
constexpr int kWritersMax = 1000;
constexpr char kAboveUtf8 = '\xff';  // no key has this byte

std::string name_of(const std::string& bucket, const std::string& key) {
  return "object '" + bucket + "/" + printable(key) + "'";
}

/// What a begin or a seal says of the version that it may replace.
/// errors: kExists, kConflict
template <class Request>
Result<void> check_condition(const Request& request, const Loaded<records::Object>& present, const std::string& what) {
  if (request.if_absent() && present.exists()) return fail(Errc::kExists, what + ": exists already");
  if (request.if_owner().empty() || (present.exists() && present.value.owner() == request.if_owner())) return {};
  return fail(Errc::kConflict, what + (present.exists() ? ": another version has taken the place of the one meant"
                                                        : ": the version meant is not there any more"));
}

wire::ObjectInfo info_of(const std::string& key, const records::Object& object, bool with_runs) {
  wire::ObjectInfo info;
  info.set_key(key);
  info.set_size(object.size());
  info.set_crc32c(object.crc32c());
  info.set_owner(object.owner());
  if (with_runs) {
    *info.mutable_runs() = object.runs();
    if (object.has_pages()) *info.mutable_pages() = object.pages();
  }
  info.set_created_unix_nanos(object.created_unix_nanos());
  return info;
}

/// The version's owner goes when nobody reads it any more.
/// errors: kDataLoss  the record's owner id
Result<void> hide_owner_of(const records::Object& object, const std::string& bucket, const std::string& key,
                           Edit& edit) {
  auto owner = OwnerId::from_bytes(object.owner());
  if (!owner) return fail(Errc::kDataLoss, "object record: " + owner.error().message);
  Readers::hide(*owner, bucket, key, edit);
  return {};
}

}  // namespace

Objects::Objects(rt::Runtime runtime, storage::RecordStore& records, const Coordinator& coordinator, Buckets& buckets,
                 Owners& owners, Readers& readers, Usage& usage, Options options)
    : runtime_(runtime),
      records_(records),
      coordinator_(coordinator),
      buckets_(buckets),
      owners_(owners),
      readers_(readers),
      usage_(usage),
      options_(options) {}

Task<wire::ObjectBeginReply> Objects::begin(wire::ObjectBegin request) {
  const auto& bucket = request.bucket();
  const auto& key = request.key();
  CO_CHECK_OK(check_object_name(bucket, key));
  const auto what = "put " + name_of(bucket, key);
  CO_TRY(const auto use, co_await buckets_.use(bucket));
  const auto group = home_group(bucket, key);
  CO_TRY(const auto present, co_await load<records::Object>(records_, group, object_key(bucket, key)));
  CO_CHECK_OK(check_condition(request, present, what));
  CO_CHECK_OK(co_await usage_.look());
  const auto& map = *coordinator_.map();
  const auto owner = OwnerId::make(group, map.find(true, group)->loss, runtime_.random.next(), runtime_.random.next());
  records::Owner record;
  record.set_kind(records::Owner::UPLOAD);
  record.set_bucket(bucket);
  record.set_name(key);
  record.set_declared_bytes(request.declared_bytes());
  Edit edit(group);
  edit.absent(owner_key(owner)).put(owner_key(owner), record);
  usage_.opened(owner, bucket);
  auto begun = usage_.declare(owner, 0, request.declared_bytes(), present.value.size());
  if (begun) {
    if (auto applied = co_await edit.apply(records_); !applied) begun = fail(std::move(applied).error());
  }
  if (!begun) {
    usage_.ended(owner);
    co_return fail(std::move(begun).error().with(what));
  }
  owners_.opened(owner, Owners::Kind::kUpload);

  wire::ObjectBeginReply reply;
  reply.set_owner(std::string(owner.view()));
  for (const auto& data : data_groups(*coordinator_.map(), use.copies())) {
    auto& stamp = *reply.add_data_groups();
    stamp.set_group(data.group);
    stamp.set_generation(data.epoch.generation);
    stamp.set_epoch(data.epoch.count);
  }
  co_return std::move(reply);
}

/// The extents that a seal names, into `object`; their writers into `writers`.
/// errors: kInvalid
Result<void> Objects::take_extents(const wire::ObjectSeal& request, const OwnerId& owner, const std::string& what,
                                   records::Object& object, std::set<std::uint64_t>& writers) const {
  const auto take = [&](const auto& from, auto& to) -> Result<std::uint64_t> {
    std::uint64_t bytes = 0;
    for (const auto& run : from) {
      TRY(const auto size, check_run(run, owner, what));
      if (!add_checked(bytes, size, bytes)) return fail(Errc::kInvalid, what + ": more than 2^64 bytes");
      if (coordinator_.map()->find(false, run.group()) == nullptr)
        return fail(Errc::kInvalid, what + ": data group " + std::to_string(run.group()) + " does not exist");
      writers.insert(run.writer());
      auto& kept = *to.Add();
      kept = run;
      kept.clear_owner();  // the record's own
    }
    return bytes;
  };
  if (!request.has_pages()) {
    TRY(const auto bytes, take(request.runs(), *object.mutable_runs()));
    if (bytes != request.size())
      return fail(Errc::kInvalid, what + ": chunks of " + std::to_string(bytes) + " bytes for an object of " +
                                      std::to_string(request.size()));
    return {};
  }
  const auto& pages = request.pages();
  auto& kept = *object.mutable_pages();
  TRY(const auto bytes, take(pages.runs(), *kept.mutable_runs()));
  if (request.runs_size() > 0 || bytes != pages.bytes() || pages.root_bytes() == 0 ||
      pages.root_bytes() > std::min<std::uint64_t>(bytes, kRootBytesMax) || pages.root_digest().size() != 32 ||
      pages.writers_size() == 0 || pages.writers_size() > kWritersMax)
    return fail(Errc::kInvalid, what + ": a list of extents of " + std::to_string(pages.bytes()) +
                                    " bytes, its root of " + std::to_string(pages.root_bytes()) +
                                    ", that does not fit together");
  kept.set_bytes(pages.bytes());
  kept.set_root_bytes(pages.root_bytes());
  kept.set_root_digest(pages.root_digest());
  *kept.mutable_writers() = pages.writers();
  writers.insert(pages.writers().begin(), pages.writers().end());
  return {};
}

Task<wire::ObjectInfo> Objects::seal(wire::ObjectSeal request) {
  const auto& bucket = request.bucket();
  const auto& key = request.key();
  CO_CHECK_OK(check_object_name(bucket, key));
  const auto what = "seal " + name_of(bucket, key);
  CO_TRY(const auto owner, owner_from(request.owner()));
  const auto group = home_group(bucket, key);
  if (owner.home_group() != group) co_return fail(Errc::kInvalid, what + ": owner " + owner.hex() + " is not its own");

  records::Object object;
  std::set<std::uint64_t> writers;
  CO_CHECK_OK(take_extents(request, owner, what, object, writers));
  object.set_owner(request.owner());
  object.set_size(request.size());
  object.set_crc32c(request.crc32c());
  object.set_created_unix_nanos(runtime_.loop.wall_nanos());

  CO_TRY(const auto use, co_await buckets_.use(bucket));
  for (;;) {
    CO_TRY(const auto present, co_await load<records::Object>(records_, group, object_key(bucket, key)));
    if (present.exists() && present.value.owner() == request.owner())
      co_return info_of(key, present.value, true);  // a repeated seal
    CO_TRY(auto upload, co_await load<records::Owner>(records_, group, owner_key(owner)));
    if (!upload.exists() || upload.value.kind() != records::Owner::UPLOAD)
      co_return fail(Errc::kConflict, what + ": upload " + owner.hex() +
                                          " is not open: dropped when idle, or sealed and replaced since");
    if (upload.value.bucket() != bucket || upload.value.name() != key)
      co_return fail(Errc::kInvalid, what + ": owner " + owner.hex() + " is not its own");
    CO_CHECK_OK(check_condition(request, present, what));
    if (object.has_pages() && object.size() > usage_.arrived(owner))
      co_return fail(Errc::kInvalid, what + ": " + std::to_string(object.size()) + " bytes, but only " +
                                         std::to_string(usage_.arrived(owner)) + " have arrived");
    if (auto fits = usage_.admit(owner, object.size(), present.value.size()); !fits)
      co_return fail(std::move(fits).error().with(what));

    Edit edit(group);
    edit.unchanged(owner_key(owner), upload.version).unchanged(object_key(bucket, key), present.version);
    if (present.exists()) {
      CO_CHECK_OK(hide_owner_of(present.value, bucket, key, edit));
    }
    upload.value.set_kind(records::Owner::OBJECT);
    upload.value.mutable_writers()->Assign(writers.begin(), writers.end());
    edit.put(owner_key(owner), upload.value).put(object_key(bucket, key), object);
    auto done = co_await edit.apply(records_);
    if (done) {
      if (present.exists()) usage_.removed(bucket, Usage::Kind::kObject, present.value.size());
      usage_.added(bucket, Usage::Kind::kObject, object.size());
      break;
    }
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error().with(what));
    // Another seal or removal of this object came between: decided again from there.
  }
  owners_.ended(owner);
  usage_.ended(owner);
  readers_.hidden(group);
  co_return info_of(key, object, true);
}

Task<wire::ObjectInfo> Objects::stat(wire::ObjectStat request, std::uint64_t connection) {
  const auto& bucket = request.bucket();
  const auto& key = request.key();
  CO_CHECK_OK(check_object_name(bucket, key));
  for (std::string gone;;) {
    CO_TRY(const auto object,
           co_await load<records::Object>(records_, home_group(bucket, key), object_key(bucket, key)));
    if (!object.exists()) {
      CO_CHECK_OK(co_await buckets_.use(bucket));  // the better message
      co_return fail(Errc::kNotFound, name_of(bucket, key) + " does not exist");
    }
    auto info = info_of(key, object.value, true);
    if (request.reader() == 0) co_return std::move(info);
    CO_TRY(const auto owner, owner_from(info.owner()));
    CO_TRY(const bool there, co_await readers_.protect(request.reader(), owner, connection));
    if (there) {
      info.set_reader_ttl_millis(readers_.ttl_millis());
      co_return std::move(info);
    }
    // Removed or replaced in between: look again. But an object that goes on naming it contradicts the records.
    if (gone == info.owner())
      co_return fail(Errc::kDataLoss, name_of(bucket, key) + ": its owner " + owner.hex() + " has no record");
    gone = info.owner();
  }
}

Task<wire::Empty> Objects::abort(wire::ObjectAbort request) {
  const auto& bucket = request.bucket();
  const auto& key = request.key();
  CO_CHECK_OK(check_object_name(bucket, key));
  const auto what = "give up " + name_of(bucket, key);
  CO_TRY(const auto owner, owner_from(request.owner()));
  const auto group = home_group(bucket, key);
  if (owner.home_group() != group) co_return fail(Errc::kInvalid, what + ": owner " + owner.hex() + " is not its own");
  CO_TRY(const auto upload, co_await load<records::Owner>(records_, group, owner_key(owner)));
  if (!upload.exists()) co_return wire::Empty();
  if (upload.value.kind() != records::Owner::UPLOAD) co_return fail(Errc::kConflict, what + ": it is sealed already");
  if (upload.value.bucket() != bucket || upload.value.name() != key)
    co_return fail(Errc::kInvalid, what + ": owner " + owner.hex() + " is not its own");
  CO_TRY(const bool dropped, co_await drop(owner, upload.version));
  if (!dropped) co_return fail(Errc::kConflict, what + ": it is being sealed");
  co_return wire::Empty();
}

Task<bool> Objects::drop(OwnerId owner, Version version) {
  Edit edit(owner.home_group());
  edit.unchanged(owner_key(owner), version).erase(owner_key(owner));
  auto done = co_await edit.apply(records_);
  if (!done && done.error().code == Errc::kConflict) co_return false;
  if (!done) co_return fail(std::move(done).error());
  owners_.ended(owner);
  usage_.ended(owner);
  co_return true;
}

Task<wire::ObjectListReply> Objects::list(wire::ObjectList request) {
  const auto& bucket = request.bucket();
  CO_CHECK_OK(co_await buckets_.use(bucket));
  const auto limit = static_cast<int>(request.limit() == 0 ? kListMax : std::min(request.limit(), kListMax));
  const auto prefix = object_prefix(bucket);
  const auto& delimiter = request.delimiter();
  auto last = request.token().empty() ? request.after() : request.token();
  MergedScan scan(records_, prefix + request.prefix(), last.empty() ? "" : prefix + last);
  wire::ObjectListReply reply;
  for (std::size_t bytes = 0;;) {
    CO_TRY(auto record, co_await scan.next());
    if (!record) break;
    if (reply.objects_size() + reply.prefixes_size() == limit || bytes > kListBytesMax) {
      reply.set_more(true);
      reply.set_next(last);
      break;
    }
    auto key = record->key.substr(prefix.size());
    const auto end = delimiter.empty() ? key.npos : key.find(delimiter, request.prefix().size());
    if (end != key.npos) {
      key.resize(end + delimiter.size());
      last = key + kAboveUtf8;
      bytes += key.size();
      *reply.add_prefixes() = std::move(key);
      CO_CHECK_OK(co_await scan.skip(prefix + last));
      continue;
    }
    records::Object object;
    CO_CHECK_OK(parse_record(*record, object));
    auto& info = *reply.add_objects() = info_of(key, object, false);
    bytes += info.ByteSizeLong();
    last = std::move(key);
  }
  co_return std::move(reply);
}

Task<wire::Empty> Objects::remove(wire::ObjectRemove request) {
  const auto& bucket = request.bucket();
  const auto& key = request.key();
  CO_CHECK_OK(check_object_name(bucket, key));
  const auto group = home_group(bucket, key);
  for (;;) {
    CO_TRY(const auto object, co_await load<records::Object>(records_, group, object_key(bucket, key)));
    if (!object.exists()) {
      CO_CHECK_OK(co_await buckets_.use(bucket));
      co_return fail(Errc::kNotFound, name_of(bucket, key) + " does not exist");
    }
    if (!request.owner().empty() && request.owner() != object.value.owner())
      co_return fail(Errc::kNotFound, name_of(bucket, key) + " has been removed or replaced since");
    Edit edit(group);
    edit.unchanged(object_key(bucket, key), object.version).erase(object_key(bucket, key));
    CO_CHECK_OK(hide_owner_of(object.value, bucket, key, edit));
    auto done = co_await edit.apply(records_);
    if (done) {
      usage_.removed(bucket, Usage::Kind::kObject, object.value.size());
      break;
    }
    if (done.error().code != Errc::kConflict) co_return fail(std::move(done).error());
  }
  readers_.hidden(group);
  co_return wire::Empty();
}

Task<void> Objects::sweep() {
  for (;;) {
    co_await runtime_.loop.sleep(options_.sweep_every);
    if (auto dropped = co_await drop_idle(); !dropped)
      runtime_.log.write(rt::Level::kWarning, "objects_sweep_failed", {{"error", dropped.error().message}});
  }
}

Task<void> Objects::drop_idle() {
  for (const auto& owner : owners_.idle_uploads(options_.upload_idle_max)) {
    CO_TRY(const auto upload, co_await load<records::Owner>(records_, owner.home_group(), owner_key(owner)));
    if (upload.exists() && upload.value.kind() == records::Owner::UPLOAD) {
      CO_TRY(const bool dropped, co_await drop(owner, upload.version));
      if (!dropped) continue;  // sealed at this moment
      runtime_.log.write(rt::Level::kInfo, "objects_upload_dropped",
                         {{"owner", owner.hex()}, {"bucket", upload.value.bucket()}, {"key", upload.value.name()}});
    }
    owners_.ended(owner);
    usage_.ended(owner);
  }
  co_return {};
}

}  // namespace cairn::server
