#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/chunks/copier.h"
#include "server/garbage/liveness.h"
#include "server/membership/membership.h"
#include "server/scrub/damage_list.h"

namespace cairn::server {

/// Looks after the copies. A pass over a target reads every chunk that it has, past all caches, looks for those that it
/// lacks though it serves them, and verifies its index and superblock. What is damaged is noted, durably, and repaired
/// at once where good bytes are to be had; what is left is tried again from time to time, and when members change. A
/// copy that a read finds bad is looked at in the same way.
///
/// A pass is paced, goes on after a restart where it was (a few seconds before), and takes no notice of chunks that no
/// record names, or that are removed meanwhile.
///
/// Threads:  the loop; one pass of each target at a time.
/// Lifetime: what it is given outlives it.
/// source:   ARCHITECTURE.md, "Scrub"; protocol.md 3, 6
class Scrub {
 public:
  struct Options {
    std::uint64_t pace = 0;   // bytes a second that are read of each target; 0: as fast as it goes
    rt::Duration interval{};  // from pass to pass; 0: none that nobody asks for
    rt::Duration save_every = std::chrono::seconds(5);    // the position of a pass
    rt::Duration retry_every = std::chrono::minutes(10);  // what could not be repaired
  };
  /// `repair_pace`: of what is repaired, and of copies that reads found bad.
  Scrub(rt::Runtime runtime, Membership& members, Copier& copier, Pace& repair_pace, Liveness& liveness,
        Options options);

  enum class State { kNone, kRunning, kPaused, kDone, kCancelled };
  /// The pass under way, or the last one.
  struct Pass {
    State state = State::kNone;
    std::optional<ChunkId> after;  // up to it everything has been looked at
    std::uint64_t chunks = 0, bytes = 0;
    std::uint64_t damaged = 0, repaired = 0;
    std::int64_t started_unix_nanos = 0, ended_unix_nanos = 0;
    std::int64_t full_pass_unix_nanos = 0;  // when the last one ended that looked at everything
    bool asked = false;                     // for by somebody
    std::optional<std::uint64_t> pace;      // as it was asked for
    std::vector<std::string> errors;        // what is wrong other than with chunks
  };
  /// One target that is here.
  struct Look {
    Look(rt::Loop& loop, storage::Target& t, std::string d)
        : target(t), directory(std::move(d)), damage(loop, t), pace(loop, 0), turn(loop, 1), changed(loop) {}
    storage::Target& target;
    std::string directory;
    Pass pass;
    DamageList damage;
    bool repair_paused = false;
    std::uint64_t bytes = 0, repaired = 0;  // since start

   private:
    friend class Scrub;
    Pace pace;
    rt::Semaphore turn;  // to judge and repair one copy
    rt::Signal changed;
    std::uint64_t number = 0;  // of the pass in this process
  };

  /// Reads what is known. Before the first call of the others.
  Task<void> load();
  /// For ever.
  Task<void> run();
  /// Passes under way go on from here after the next start.
  Task<void> close();
  void set(std::uint64_t pace, rt::Duration interval);

  /// A copy that somebody found bad: it is looked at soon.
  void suspect(storage::Target& target, const ChunkId& id);

  const std::vector<std::unique_ptr<Look>>& looks() const { return looks_; }
  /// A pass from the first chunk on; one that was asked for and still runs is that one.
  /// errors: kFailed  the target has failed
  Task<void> start(Look& look, std::optional<std::uint64_t> pace);
  /// Once more does nothing. errors: kConflict  it has ended
  Task<void> pause(Look& look);
  Task<void> resume(Look& look);
  Task<void> cancel(Look& look);
  void pause_repair(Look& look, bool paused);

 private:
  struct Looked {
    bool here = false;
    std::uint32_t bytes = 0;
    bool damaged = false, repaired = false;
  };
  Task<void> watch(Look& look);
  Task<void> pass(Look& look);
  Task<void> begin(Look& look, bool asked, std::optional<std::uint64_t> pace);
  struct Page {
    std::vector<ChunkId> ids;    // to look at
    std::optional<ChunkId> end;  // the next page begins behind it; nothing: this is the last
  };
  Task<Page> list(Look& look);
  Task<void> look_at_page(Look& look, std::vector<ChunkId> ids, std::uint64_t number, rt::TimePoint& saved);
  Task<void> save(Look& look);
  Task<void> set_state(Look& look, State state);
  std::optional<rt::TimePoint> due(const Look& look) const;

  bool serves(const Look& look, DataGroup group) const;
  Task<Looked> examine(Look& look, ChunkId id, Pace& pace);
  struct Found {
    storage::ChunkStore::Entry entry;
    std::vector<storage::ChunkStore::BadBlock> bad;
  };
  Task<std::optional<Found>> read(Look& look, ChunkId id, Pace& pace);
  Task<bool> judge(Look& look, ChunkId id, Found found, Looked& out);
  Task<void> absent(Look& look, ChunkId id, Looked& out);
  Task<void> mend(Look& look, Damage damage, std::optional<std::string> place, Looked& out);
  Task<std::optional<storage::ChunkInfo>> elsewhere(const Look& look, ChunkId id);

  Task<void> repair_queue();
  /// Looks again at what is left of a target; `gone`: only at chunks that are not there any more.
  Task<void> repair_left(Look& look, bool gone, Pace& pace);
  Task<void> watch_members();

  rt::Runtime runtime_;
  Membership& members_;
  Copier& copier_;
  Pace& repair_pace_;
  Liveness& liveness_;
  Options options_;
  std::vector<std::unique_ptr<Look>> looks_;
  std::set<std::pair<Uuid, ChunkId>> suspects_;
  bool retry_ = true;  // what is left, now
  rt::Signal wake_;
};

}  // namespace cairn::server
