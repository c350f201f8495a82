#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "storage/record_store/record_store.h"

namespace cairn::server {

/// Records of all home groups with one prefix, in key order, a page of each group in memory at a time.
///
/// Not a snapshot: a record that is there all the time is seen, one that comes or goes meanwhile may be or not.
class MergedScan {
 public:
  /// Keys greater than `after` (empty: all).
  MergedScan(storage::RecordStore& records, std::string prefix, std::string after, std::size_t page = 16);
  /// Nothing at the end.
  Task<std::optional<storage::Record>> next();
  /// Goes on behind `after`, which is greater than what next() yielded last.
  Task<void> skip(std::string after);

 private:
  struct Group {
    std::vector<storage::Record> page;
    std::size_t at = 0;
    bool ended = false;
  };
  Task<void> refill(HomeGroup group);

  storage::RecordStore& records_;
  std::string prefix_;
  std::string after_;
  std::size_t page_;
  bool started_ = false;
  std::vector<Group> groups_;
  std::map<std::string, HomeGroup> heads_;  // least key of each group; no two groups have the same key
};

}  // namespace cairn::server
