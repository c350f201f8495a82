#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/buckets/buckets.h"
#include "server/readers/readers.h"
#include "server/usage/usage.h"
#include "storage/record_store/record_store.h"

namespace cairn::server {

/// Removes the steps that the policy of their bucket does not keep: of a run whenever a step of it was committed, and
/// of all runs now and then. Removed as by anybody: hidden, and kept for their readers.
///
/// What it decides on is compared in the transaction that removes: the run's record, which changes with every commit,
/// removal and launch, and each step's, which changes when it is pinned. So the newest steps are the newest, a pinned
/// step stays, and a launch finds the step from which it was told to resume: that is kept until the launch has
/// committed a later one or another has the run. The bucket's policy lies in another group; it cannot change meanwhile
/// (Buckets::Use).
///
/// Threads:  the loop.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 8, 9
class Retention {
 public:
  struct Options {
    rt::Duration interval = std::chrono::minutes(1);              // between looks at all runs
    std::size_t batch = 256;                                      // steps removed in one transaction
    bool pins_ignored = false, one_fewer = false, blind = false;  // planted bugs: see SaveBugs
  };
  Retention(rt::Runtime runtime, storage::RecordStore& records, Buckets& buckets, Readers& readers, Usage& usage,
            Options options)
      : runtime_(runtime),
        records_(records),
        buckets_(buckets),
        readers_(readers),
        usage_(usage),
        options_(options),
        wake_(runtime.loop) {}

  /// A step of this run was committed or unpinned.
  void look_at(const std::string& bucket, const std::string& run);
  /// Policies have changed: looks at all runs.
  void look_at_all();

  void set_interval(rt::Duration interval) { options_.interval = interval; }
  /// For ever.
  Task<void> run();

  struct Stats {
    std::uint64_t removed = 0;  // steps, since start
    std::uint64_t passes = 0;   // looks at all runs
  };
  const Stats& stats() const { return stats_; }

 private:
  Task<void> woken();
  Task<void> pass();
  Task<void> apply(std::string bucket, std::string run);
  /// Removes at most a batch; false: nothing is left to remove.
  Task<bool> remove_some(std::string bucket, std::string run);

  rt::Runtime runtime_;
  storage::RecordStore& records_;
  Buckets& buckets_;
  Readers& readers_;
  Usage& usage_;
  Options options_;
  std::set<std::pair<std::string, std::string>> due_;  // runs with new steps
  bool all_due_ = true;
  rt::Signal wake_;
  Stats stats_;
};

}  // namespace cairn::server
