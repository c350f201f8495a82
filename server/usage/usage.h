#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "server/chunks/chunks.h"
#include "storage/record_store/record_store.h"

namespace cairn::server {

/// What buckets hold, and what open uploads and saves may still take: of their bucket's quota and of the disk.
///
/// Nothing of this is stored. A bucket's record lies in another home group than those of its objects and steps, and no
/// transaction spans two; a stored count would drift with every crash between them. So the counts are derived: load()
/// adds up the records, and whoever changes records in a transaction tells here, in the same turn of the loop in which
/// the transaction is answered, what it replaced and what it put. A daemon that dies in between adds up again.
///
/// Threads: the loop.
/// source:  ARCHITECTURE.md, "Space and quota"
class Usage {
 public:
  struct Options {
    rt::Duration watch_every = std::chrono::seconds(1);
    std::uint32_t low_percent = 5;  // of the disk: below it one line is logged
    std::uint32_t full_percent = 1;
  };
  struct Bucket {
    std::uint64_t quota_bytes = 0;  // 0: none
    std::uint32_t copies = 1;       // of every byte on the disks; quotas count one
    std::uint64_t used_bytes = 0;   // of sealed objects and committed steps
    std::uint64_t objects = 0, steps = 0;
    std::uint64_t reserved_bytes = 0;  // of open uploads and saves
    bool operator==(const Bucket&) const = default;
  };
  enum class Kind { kObject, kStep };

  Usage(rt::Runtime runtime, storage::RecordStore& records, Chunks& chunks, Options options)
      : runtime_(runtime), records_(records), chunks_(chunks), options_(options) {}

  /// Adds up the records. Before any change.
  Task<void> load();
  /// An owner that load() finds open: what has arrived of it is in the chunk table.
  Task<void> resume(OwnerId owner, std::string bucket, std::uint64_t declared_bytes);
  /// What load() would find now, without reservations: equals of() when nothing changes meanwhile.
  Task<std::map<std::string, Bucket>> recount();

  // ---- Buckets
  Bucket of(const std::string& bucket) const;
  /// After the transaction that wrote the bucket's record.
  void policy_is(const std::string& bucket, std::uint64_t quota_bytes, std::uint32_t copies) {
    buckets_[bucket].quota_bytes = quota_bytes;
    buckets_[bucket].copies = copies;
  }
  /// After the transaction that removed it. Uploads to it may still be open.
  void forget(const std::string& bucket);
  void added(const std::string& bucket, Kind kind, std::uint64_t bytes);
  void removed(const std::string& bucket, Kind kind, std::uint64_t bytes);

  // ---- Open uploads and saves
  /// From now on chunks of the owner are counted. Again: no change.
  void opened(const OwnerId& owner, const std::string& bucket) {
    auto& open = open_[owner];
    open.bucket = bucket;
    if (open.reserved() == 0) open.copies = of(bucket).copies;
  }
  /// Looks at the disk, unless that was done within a second: before declare() and charge().
  Task<void> look();
  /// `part` (a rank; 0 for an upload) of an opened owner will bring `bytes` in all. What it replaces is given back when
  /// it is sealed, so it does not count twice against the quota.
  /// errors: kNoSpace  the quota or the disk; the numbers are in the message, and nothing is changed
  Result<void> declare(const OwnerId& owner, std::uint32_t part, std::uint64_t bytes, std::uint64_t replaces_bytes);
  /// The same of an owner that was let in before: a part says again what it declared to an earlier process.
  void declared_before(const OwnerId& owner, std::uint32_t part, std::uint64_t bytes);

  /// Bytes of one chunk on its way; given back unless kept.
  class Charge {
   public:
    Charge() = default;
    Charge(Charge&& other) noexcept
        : usage_(std::exchange(other.usage_, nullptr)), owner_(other.owner_), bytes_(other.bytes_) {}
    Charge& operator=(Charge&&) = delete;
    ~Charge() {
      if (usage_ != nullptr) usage_->give_back(owner_, bytes_);
    }
    void keep() { usage_ = nullptr; }

   private:
    friend class Usage;
    Charge(Usage& usage, const OwnerId& owner, std::uint64_t bytes) : usage_(&usage), owner_(owner), bytes_(bytes) {}
    Usage* usage_ = nullptr;
    OwnerId owner_;
    std::uint64_t bytes_ = 0;
  };
  /// errors: kNoSpace  more than was declared, and that has no room in the quota or beside what others have reserved
  Result<Charge> charge(const OwnerId& owner, std::uint64_t bytes);
  /// Bytes of chunks that have arrived for an open owner.
  std::uint64_t arrived(const OwnerId& owner) const;

  /// May what is sealed or committed now, of `bytes`, replace `replaced_bytes`? Holds that much until ended().
  /// errors: kNoSpace  quota
  Result<void> admit(const OwnerId& owner, std::uint64_t bytes, std::uint64_t replaced_bytes);
  /// Sealed, committed, given up: nothing is reserved any more.
  void ended(const OwnerId& owner);

  // ---- The disk
  struct Disk {
    storage::ChunkStore::Room room;
    std::uint64_t reserved_bytes = 0;   // still to come of what was declared
    std::uint64_t available_bytes = 0;  // for what nobody has declared yet
  };
  Disk disk() const;
  /// Logs once when space becomes short, and once when it is there again. Runs for ever.
  Task<void> watch();

 private:
  struct Open {
    std::string bucket;
    std::uint32_t copies = 1;
    std::map<std::uint32_t, std::uint64_t> parts;  // declared, by part
    std::uint64_t declared = 0;                    // their sum
    std::uint64_t arrived = 0;
    std::uint64_t admitted = 0;
    std::uint64_t replaces = 0;
    std::uint64_t reserved() const { return std::max({declared, arrived, admitted}); }
    /// On all disks together.
    std::uint64_t to_come() const { return declared > arrived ? copied(declared - arrived) : 0; }
    std::uint64_t copied(std::uint64_t bytes) const {
      return bytes > UINT64_MAX / copies ? UINT64_MAX : bytes * copies;
    }
  };
  enum class Level { kPlenty, kLow, kFull };
  void give_back(const OwnerId& owner, std::uint64_t bytes);
  template <class F>
  void change(Open& open, F change);
  Result<void> check_quota(const Open& open, std::uint64_t own_bytes, std::uint64_t replaces,
                           std::uint64_t slack) const;
  Level level_of(const storage::ChunkStore::Room& room) const;

  rt::Runtime runtime_;
  storage::RecordStore& records_;
  Chunks& chunks_;
  Options options_;
  std::map<std::string, Bucket> buckets_;
  std::map<OwnerId, Open> open_;
  std::uint64_t to_come_ = 0;  // of all open
  Level level_ = Level::kPlenty;
};

}  // namespace cairn::server
