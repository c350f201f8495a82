#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/extent_list.h"
#include "client/core/session.h"

namespace cairn::client {

struct ObjectSummary {
  std::string key;
  std::uint64_t size = 0;
  std::uint32_t crc = 0;
  OwnerId owner;
  std::int64_t created_unix_nanos = 0;
};

/// One version of an object, opened for reading: a later overwrite does not mix in. As long as this lives and the
/// daemon hears of it, the version can be read, also when it is removed or replaced meanwhile.
struct OpenedObject {
  ObjectSummary summary;
  std::shared_ptr<ExtentMap> extents;
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

struct ListRequest {
  std::string prefix, after, delimiter;
  std::string token;  // of the page before; instead of `after`
  std::uint32_t limit = 0;
};
struct ObjectPage {
  std::vector<ObjectSummary> objects;
  std::vector<std::string> prefixes;  // with a delimiter
  bool more = false;
  std::string next;  // token of the next page
};
Task<ObjectPage> list_objects(std::shared_ptr<Session> session, std::string bucket, ListRequest request,
                              rt::TimePoint deadline);
/// `if_version`: only this one. errors: kNotFound;  kConflict  another version is there
Task<void> remove_object(std::shared_ptr<Session> session, std::string bucket, std::string key,
                         std::optional<OwnerId> if_version, rt::TimePoint deadline);

}  // namespace cairn::client
