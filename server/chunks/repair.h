#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/chunks/copier.h"
#include "server/membership/membership.h"

namespace cairn::server {

/// Brings syncing members of data groups up to date: every chunk that a serving member has is copied, from any that has
/// good bytes; new ones come by themselves. Then the member serves. One chunk at a time, so that saves come first;
/// never deletes. A chunk without a good copy anywhere is reported and left out: it is damage, which no repair can
/// heal.
///
/// Threads:  the loop.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 5
class Repair {
 public:
  Repair(rt::Runtime runtime, Membership& members, Copier& copier, Pace& pace)
      : runtime_(runtime), members_(members), copier_(copier), pace_(pace), changed_(runtime.loop) {}

  /// For ever.
  Task<void> run();

  struct Stats {
    std::uint64_t groups = 0;  // with syncing members, now
    std::uint64_t chunks = 0, bytes = 0;
    std::uint64_t damaged = 0;  // chunks without a good copy
  };
  Stats stats() const;

  /// What is done for one target.
  struct Job {
    bool paused = false;
    std::uint64_t chunks = 0, bytes = 0;
    std::uint64_t damaged = 0;
    std::int64_t started_unix_nanos = 0;
  };
  /// Of the targets that are being brought up now.
  std::map<Uuid, Job> jobs() const;
  /// Until it is told otherwise, or the daemon starts anew.
  void pause(const Uuid& target, bool paused);

 private:
  Task<void> bring_up(DataGroup group, Member newcomer);
  Task<void> copy(storage::ChunkInfo chunk, storage::Target& to);

  rt::Runtime runtime_;
  Membership& members_;
  Copier& copier_;
  Pace& pace_;
  std::map<Uuid, Job> jobs_;
  rt::Signal changed_;  // a job was paused or resumed
  Stats stats_;
};

}  // namespace cairn::server
