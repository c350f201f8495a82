#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "storage/committer/committer.h"
#include "storage/index/index.h"

namespace cairn::storage {

struct Record {
  std::string key;
  std::string value;
  Version version;
};

/// Compares, puts and deletes of keys of one home group; all or nothing.
struct Transaction {
  HomeGroup group = 0;
  struct Compare {
    std::string key;
    Version version;  // !exists(): the key must be absent
  };
  std::vector<Compare> compares;
  std::vector<std::pair<std::string, std::string>> puts;  // value up to 64 KiB
  std::vector<std::string> deletes;
};

/// What one commit of a home group changes. One group's rounds come one after the other.
struct RecordRound {
  HomeGroup group = 0;
  Version before, after;  // of the group's last change
  Batch changes;          // in the tables kRecords and kMeta
};

/// Where records lie: an index, or several that are kept equal.
class RecordMedium {
 public:
  virtual ~RecordMedium() = default;
  virtual Task<std::optional<std::string>> get(Table table, std::string key) = 0;
  virtual Task<std::vector<IndexEntry>> scan(Table table, std::string from, std::string to, std::size_t limit) = 0;
  /// Durable, wherever the records lie, when it returns ok. Else the outcome is unknown.
  virtual Task<void> commit(RecordRound round) = 0;
  /// An error: nothing can be committed any more.
  virtual Result<void> usable() const = 0;
};

/// Records of the home groups: versions, transactions, and the group's sequence. A transaction is evaluated on applied
/// state plus those before it, gets the next (epoch, seq) of its group, and is answered when durable; transactions of
/// one group are ordered, those of different groups share commits.
class RecordStore {
 public:
  static constexpr std::size_t kKeyBytesMax = 4 * 1024;
  static constexpr std::size_t kValueBytesMax = 64 * 1024;
  static constexpr std::size_t kTransactionBytesMax = 16 * 1024 * 1024;  // keys and values together

  /// One at a time for the same records: it remembers their sequences. Lifetime: `medium` outlives it.
  static std::unique_ptr<RecordStore> open(rt::Runtime runtime, RecordMedium& medium);
  virtual ~RecordStore() = default;

  /// The epoch under which versions of all groups are written from now on (set from the map).
  virtual void set_epoch(std::uint32_t loss, std::uint64_t epoch_count) = 0;

  /// Returns the version written to every put.
  /// Without puts and deletes it only compares, and returns the version of the group's last change.
  /// errors: kConflict  names the key whose version differs;  kInvalid  sizes, or a key changed twice
  ///         kFailed, kNoSpace  target fail-stop: whether it was applied shows after the next open
  virtual Task<Version> apply(Transaction transaction) = 0;
  /// Sees every transaction that has been answered, and none that has not: reads wait for a commit under way.
  /// errors: kFailed, kNoSpace  a change of this group failed, so what is durable is not known until the next open
  virtual Task<std::optional<Record>> get(HomeGroup group, std::string key) = 0;
  /// Records with prefix, key > after (empty: all), at most `limit`, in key order.
  virtual Task<std::vector<Record>> scan(HomeGroup group, std::string prefix, std::string after, std::size_t limit) = 0;
  /// While the lease is held no change of the group is committed, and none is half done. errors: as get()
  virtual Task<rt::Semaphore::Lease> hold(HomeGroup group) = 0;
  /// An error: no change can be made any more.
  virtual Result<void> usable() const = 0;
  /// Waits for transactions under way; later calls fail.
  virtual Task<void> close() = 0;
};

/// One index, with its committer. Lifetime: both outlive it.
std::unique_ptr<RecordMedium> make_record_medium(Index& index, Committer& committer);

}  // namespace cairn::storage
