#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "storage/target/target.h"

namespace cairn::server {

/// The targets that this daemon has open, in the order of the command line. One that fails stays here, fail-stop: it
/// answers reads as far as it can, and acknowledges nothing.
///
/// Threads: the loop.
class TargetSet {
 public:
  struct Entry {
    std::string directory;
    std::unique_ptr<storage::Target> target;
  };
  void add(std::string directory, std::unique_ptr<storage::Target> target) {
    entries_.push_back({std::move(directory), std::move(target)});
  }
  const std::vector<Entry>& all() const { return entries_; }

  /// nullptr: not open here.
  storage::Target* find(const Uuid& uuid) const;
  /// Those that have failed.
  std::set<Uuid> failed() const;

  /// Closes all. Targets that have failed may refuse; the first error is returned when all are closed.
  Task<void> close();

 private:
  std::vector<Entry> entries_;
};

}  // namespace cairn::server
