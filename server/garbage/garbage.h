#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

#include "proto/rt/seams.h"
#include "server/chunks/chunks.h"
#include "server/garbage/liveness.h"

namespace cairn::server {

/// Frees chunks that no record names. A pass walks the owners of the chunk table and asks for each; what was dead in
/// every pass for the grace time, the last one included, is removed. No answer, or one from a group that has lost
/// records since the owner was made, means alive.
///
/// Threads:  the loop; one pass at a time.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 7
class Garbage {
 public:
  struct Options {
    rt::Duration grace = std::chrono::minutes(10);
    rt::Duration interval = std::chrono::minutes(1);  // between passes
    std::size_t page = 1000;                          // chunks read or removed at once
    // After so many owners asked about, or chunks removed: others use the index and the disk, too.
    rt::Duration pause = std::chrono::milliseconds(5);
    bool absence_is_death = false;  // planted bug: no answer, or one after a loss, counts as dead
    bool ask_once = false;          // planted bug: not asked again after the grace time
  };
  Garbage(rt::Runtime runtime, Chunks& chunks, Liveness& liveness, Options options)
      : runtime_(runtime), chunks_(chunks), liveness_(liveness), options_(options) {}

  void set(rt::Duration grace, rt::Duration interval) {
    options_.grace = grace;
    options_.interval = interval;
  }
  /// Pass after pass, for ever.
  Task<void> run();
  Task<void> pass();

  struct Stats {
    std::uint64_t orphaned_bytes = 0;  // dead at the last pass and not freed
    std::uint64_t freed_bytes = 0;     // since start
    std::uint64_t freed_chunks = 0;
    std::uint64_t passes = 0;
    std::uint64_t owners = 0;          // asked about in the last pass
    rt::Duration pass_time{};          // of the last pass
    std::int64_t pass_unix_nanos = 0;  // when it ended, for people
  };
  const Stats& stats() const { return stats_; }

 private:
  /// Chunks that share a verdict: of an owner, of one writer, or a single one.
  struct Range {
    OwnerId owner;
    std::optional<std::uint64_t> writer;
    std::optional<std::uint32_t> index;
    auto operator<=>(const Range&) const = default;
    bool holds(const ChunkId& id) const;
    /// The greatest id before the range; nothing when there is none.
    std::optional<ChunkId> before() const;
  };
  /// Names of what is suspected since when, and what the pass under way has found.
  using Suspects = std::map<Range, rt::TimePoint>;

  bool dead(const Answer& answer, const OwnerId& owner) const;
  Task<void> walk_writers(OwnerId owner, Answer answer, Suspects& found);
  Task<void> examine(Range range, Suspects& found);
  Task<void> remove(Range range);
  Task<std::optional<ChunkId>> next(std::optional<ChunkId> after);

  rt::Runtime runtime_;
  Chunks& chunks_;
  Liveness& liveness_;
  Options options_;
  Suspects suspects_;
  Stats stats_;
  std::uint64_t orphaned_ = 0;  // of the pass under way
};

}  // namespace cairn::server
