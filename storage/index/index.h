#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/rt/task.h"

namespace cairn::storage {

/// Column families. The numbers stand in no file; the names do.
enum class Table { kMeta, kChunks, kBlockCrcs, kRecords, kLog };
inline constexpr int kTables = 5;

/// Changes applied together or not at all, in order.
class Batch {
 public:
  struct Change {
    Table table;
    std::string key;
    std::optional<std::string> value;  // nullopt: erase
  };
  void put(Table table, std::string key, std::string value) {
    changes_.push_back({table, std::move(key), std::move(value)});
  }
  void erase(Table table, std::string key) { changes_.push_back({table, std::move(key), std::nullopt}); }
  void append(Batch other) {
    for (auto& c : other.changes_) changes_.push_back(std::move(c));
  }
  const std::vector<Change>& changes() const { return changes_; }
  bool empty() const { return changes_.empty(); }

 private:
  std::vector<Change> changes_;
};

struct IndexEntry {
  std::string key;
  std::string value;
};

/// Ordered key/value tables of one target. RocksDB in the daemon, an in-memory twin with the same crash rules in tests.
///
/// commit() is called by one committer at a time; reads see every commit that has returned.
class Index {
 public:
  virtual ~Index() = default;
  /// Atomic; durable when it returns ok (unless !sync: then durable after a later synced commit).
  /// errors: kNoSpace, kFailed: the caller must treat the target as failed (the outcome is unknown)
  virtual Task<void> commit(Batch batch, bool sync = true) = 0;
  /// errors: kDataLoss  the index is damaged
  virtual Task<std::optional<std::string>> get(Table table, std::string key) = 0;
  /// Entries with from <= key < to (empty `to`: to the end), at most `limit`, in key order.
  virtual Task<std::vector<IndexEntry>> scan(Table table, std::string from, std::string to, std::size_t limit) = 0;
  /// Reads the files that it lies in and checks all of them that lie still; what is being written is checked at open.
  /// errors: kDataLoss  which file is damaged
  virtual Task<void> verify() = 0;
};

}  // namespace cairn::storage
