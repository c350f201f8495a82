#pragma once

#include <string>

#include "server/chunks/repair.h"
#include "server/scrub/scrub.h"
#include "storage/record_store/record_store.h"

namespace cairn::wire {
class Damage;
class DamageList;
class DamageListReply;
class Job;
class JobControl;
class JobList;
class JobListReply;
class ScrubStart;
}  // namespace cairn::wire

namespace cairn::server {

/// What goes on in the background, as clients see and steer it: scrubs, the repair of what they find, and the bringing
/// up of targets that lack something. A job is named by what it does and the target that it does it to.
///
/// Threads:  the loop.
/// Lifetime: what it is given outlives it.
class Jobs {
 public:
  Jobs(Scrub& scrub, Repair& repair, storage::RecordStore& records)
      : scrub_(scrub), repair_(repair), records_(records) {}

  Task<wire::JobListReply> list(wire::JobList request);
  /// errors: kNotFound;  kConflict  not in a state for that;  kInvalid  a job that cannot be cancelled
  Task<wire::Job> control(wire::JobControl request);
  /// errors: kNotFound  no such target here;  kFailed  it has failed
  Task<wire::JobListReply> scrub(wire::ScrubStart request);
  Task<wire::DamageListReply> damage(wire::DamageList request);

 private:
  std::vector<wire::Job> all() const;
  Result<Scrub::Look*> find(const std::string& uuid) const;
  Task<void> name(wire::Damage& damage);

  Scrub& scrub_;
  Repair& repair_;
  storage::RecordStore& records_;
};

}  // namespace cairn::server
