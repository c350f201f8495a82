#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "storage/record_store/record_store.h"

namespace cairn::server {

/// Which owners are open, that is, may get new chunks: uploads not sealed and save attempts not ended. The records say
/// so; this remembers what they said, because it is asked for every chunk.
///
/// Threads: the loop.
class Owners {
 public:
  enum class Kind { kUpload, kAttempt };

  Owners(rt::Loop& loop, storage::RecordStore& records) : loop_(loop), records_(records) {}

  struct Found {
    OwnerId id;
    std::string bucket;
    std::uint64_t declared_bytes = 0;  // of an upload
  };
  /// Finds the owners that are open in all home groups. Their idle clocks start now.
  Task<std::vector<Found>> load();

  /// An owner's record must precede its first chunk, and its end must follow the last. Counts as activity.
  /// errors: kFenced   the upload or attempt has ended: its record is gone, or says so
  ///         kInvalid  not an owner id that a daemon gave out
  Task<void> check_open(OwnerId owner);

  /// Whether a record names the owner, open or committed.
  Task<bool> named(OwnerId owner);

  /// A sign of life of an owner that is known to be open.
  void touch(const OwnerId& owner);

  /// After the transaction that opened or ended an owner.
  void opened(const OwnerId& owner, Kind kind);
  void ended(const OwnerId& owner);

  /// Uploads (not attempts) without activity for `duration`.
  std::vector<OwnerId> idle_uploads(rt::Duration duration) const;

 private:
  struct Open {
    Kind kind = Kind::kUpload;
    rt::TimePoint last_used;
  };
  rt::Loop& loop_;
  storage::RecordStore& records_;
  std::map<OwnerId, Open> open_;
  std::uint64_t ends_ = 0;  // so that an answer read before an end is not remembered after it
};

}  // namespace cairn::server
