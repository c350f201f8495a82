#pragma once

namespace cairn::server {

/// Faults that tests plant to prove that the checkers see them. All off in a daemon.
/// source: protocol.md 10, "Save"
struct SaveBugs {
  bool begin_unfenced = false;       // begin compares neither run_epoch nor launch: a stale rank joins the newer launch
  bool commit_unfenced = false;      // no run_epoch in the commit transaction
  bool coverage_off = false;         // boxes, holders and tokens are not proved
  bool commit_early = false;         // commit when one rank has not sealed yet
  bool existing_unseen = false;      // a chunk id that came before is accepted without looking at what is stored
  bool handover_unfenced = false;    // what was handed over is sealed and committed without comparing the run_epoch
  bool handover_unwritten = false;   // ... and sealed before its chunks are written
  bool absence_is_death = false;     // garbage: no answer, or one after a loss, counts as dead
  bool ask_once = false;             // garbage: the question is not asked again after the grace time
  bool reservation_kept = false;     // what a failed attempt had reserved is not given back
  bool readers_unasked = false;      // what was removed is let go though readers are registered
  bool takeover_unwaited = false;    // ... or before readers of the process before could register again
  bool retention_unpinned = false;   // retention removes pinned steps
  bool retention_one_fewer = false;  // ... the last of the newest steps that it is to keep
  bool retention_blind = false;      // ... without comparing the run's record: races with launches and commits
};

}  // namespace cairn::server
