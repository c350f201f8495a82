#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/arena.h"
#include "client/core/chunk_writer.h"
#include "client/core/session.h"
#include "storage/format/manifest.h"

namespace cairn::client {

struct BucketSummary {
  std::string name;
  std::uint32_t copies = 1;
  std::uint64_t quota_bytes = 0;
  std::int64_t created_unix_nanos = 0;
  std::uint32_t keep_last = 0;
  std::uint64_t keep_every = 0;
  std::uint32_t keep_days = 0;
};
/// What of a bucket's policy is to change; absent: stays.
struct BucketChange {
  std::optional<std::uint32_t> keep_last;
  std::optional<std::uint64_t> keep_every;
  std::optional<std::uint32_t> keep_days;
};
Task<void> create_bucket(std::shared_ptr<Session> session, BucketSummary bucket, rt::TimePoint deadline);
Task<BucketSummary> show_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline);
Task<std::vector<BucketSummary>> list_buckets(std::shared_ptr<Session> session, rt::TimePoint deadline);
/// errors: kNotFound;  kConflict  somebody else changed it at the same time
Task<BucketSummary> set_bucket(std::shared_ptr<Session> session, std::string bucket, BucketChange change,
                               rt::TimePoint deadline);
/// errors: kConflict  not empty;  kNotFound
Task<void> remove_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline);

struct ObjectSummary {
  std::string key;
  std::uint64_t size = 0;
  std::uint32_t crc = 0;
  OwnerId owner;
  std::int64_t created_unix_nanos = 0;
};

/// One object on its way in: any number of write()s, then seal().
class ObjectWriter {
 public:
  static Task<std::shared_ptr<ObjectWriter>> begin(std::shared_ptr<Session> session, Arena& arena, std::string bucket,
                                                   std::string key, bool if_absent, ChunkWriter::Options options);
  void expect(std::uint64_t bytes) { writer_.expect(bytes); }
  /// `bytes` stay valid until the Task ends.
  Task<void> write(std::span<const std::byte> bytes);
  Task<ObjectSummary> seal();

 private:
  ObjectWriter(std::shared_ptr<Session> session, Arena& arena, OwnerId owner, ChunkWriter::Options options)
      : session_(session), writer_(session, arena, owner, options), owner_(owner), timeout_(options.timeout) {}
  std::shared_ptr<Session> session_;
  ChunkWriter writer_;
  std::string bucket_, key_;
  bool if_absent_ = false;
  OwnerId owner_;
  rt::Duration timeout_;
  std::vector<format::Extent> chunks_;  // whole chunks so far
  std::uint64_t size_ = 0;
  std::uint32_t crc_ = 0;
};

/// One version of an object, opened for reading: a later overwrite does not mix in. As long as this lives and the
/// daemon hears of it, the version can be read, also when it is removed or replaced meanwhile.
struct OpenedObject {
  ObjectSummary summary;
  std::vector<format::Extent> extents;
  std::shared_ptr<const Protection::Held> held;  // drop it on the loop; none: see stat_object()
};
/// errors: kNotFound;  kBusy  too much is open for reading
Task<OpenedObject> open_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                               rt::TimePoint deadline);
/// The same without protection: to look at, not to read.
Task<OpenedObject> stat_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                               rt::TimePoint deadline);
/// Reads [offset, offset + out.size()) of it.
/// errors: kInvalid  outside
///         kDeleted  replaced or removed meanwhile, and the daemon had not heard of this reader for too long
Task<void> read_object(std::shared_ptr<Session> session, std::string bucket, std::shared_ptr<const OpenedObject> object,
                       std::uint64_t offset, std::span<std::byte> out, rt::Duration timeout);

struct ObjectPage {
  std::vector<ObjectSummary> objects;
  bool more = false;
};
Task<ObjectPage> list_objects(std::shared_ptr<Session> session, std::string bucket, std::string prefix,
                              std::string after, std::uint32_t limit, rt::TimePoint deadline);
Task<void> remove_object(std::shared_ptr<Session> session, std::string bucket, std::string key, rt::TimePoint deadline);

}  // namespace cairn::client
