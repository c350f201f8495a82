#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/buckets/buckets.h"
#include "server/coordinator/coordinator.h"
#include "server/readers/readers.h"
#include "server/records/owners.h"
#include "server/usage/usage.h"
#include "storage/record_store/record_store.h"

namespace cairn::wire {
class ObjectAbort;
class ObjectBegin;
class ObjectBeginReply;
class ObjectInfo;
class ObjectList;
class ObjectListReply;
class ObjectRemove;
class ObjectSeal;
class ObjectStat;
}  // namespace cairn::wire
namespace cairn::records {
class Object;
}

namespace cairn::server {

/// Objects in their simple form: a sealed list of extents under a name. An upload begins by writing its owner's record,
/// puts chunks, and ends by a seal, which makes the object visible whole, replacing what was there.
///
/// Threads:  the loop; calls overlap.
/// Lifetime: what it is given outlives it; no call may run when it is destroyed.
/// source:   protocol.md 2, 7; keys in proto/wire/records.proto
class Objects {
 public:
  struct Options {
    rt::Duration upload_idle_max = std::chrono::minutes(10);  // steady; starts anew with the daemon
    rt::Duration sweep_every = std::chrono::seconds(30);
  };
  Objects(rt::Runtime runtime, storage::RecordStore& records, const Coordinator& coordinator, Buckets& buckets,
          Owners& owners, Readers& readers, Usage& usage, Options options);

  /// errors: kNotFound  no such bucket;  kInvalid  name
  ///         kExists    if_absent and it is there;  kConflict  if_owner and another version is there, or none
  ///         kNoSpace   what is declared fits neither quota nor disk
  Task<wire::ObjectBeginReply> begin(wire::ObjectBegin request);
  /// May be repeated with the same owner.
  /// errors: kExists    if_absent and another was sealed first
  ///         kConflict  if_owner and another version is there; the upload was dropped, or sealed and replaced since
  ///         kNoSpace   quota
  ///         kInvalid   runs that do not add up to the size, or of another owner
  Task<wire::ObjectInfo> seal(wire::ObjectSeal request);
  /// Protects the version found for the reader, if the request names one; `connection` is its.
  /// errors: kNotFound;  kBusy  too many readers
  Task<wire::ObjectInfo> stat(wire::ObjectStat request, std::uint64_t connection);
  /// Ends an upload: its chunks become garbage. May be repeated. errors: kConflict  it is sealed
  Task<wire::Empty> abort(wire::ObjectAbort request);
  /// Sorted by key. Every object that is there throughout is listed, an unsealed one never.
  Task<wire::ObjectListReply> list(wire::ObjectList request);
  /// errors: kNotFound
  Task<wire::Empty> remove(wire::ObjectRemove request);

  /// Drops uploads that nobody has touched for upload_idle_max: their chunks become garbage. Runs for ever.
  Task<void> sweep();
  Task<void> drop_idle();

 private:
  Result<void> take_extents(const wire::ObjectSeal& request, const OwnerId& owner, const std::string& what,
                            records::Object& object, std::set<std::uint64_t>& writers) const;
  /// Erases the record of an open upload. False: it has changed meanwhile.
  Task<bool> drop(OwnerId owner, Version version);

  rt::Runtime runtime_;
  storage::RecordStore& records_;
  const Coordinator& coordinator_;
  Buckets& buckets_;
  Owners& owners_;
  Readers& readers_;
  Usage& usage_;
  Options options_;
};

}  // namespace cairn::server
