#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/rt/loop.h"
#include "tests/sim/payload.h"

namespace cairn::sim {

/// What clients of one run were told, and the promises that it must keep (reliability.md 1.3). It knows intervals, not
/// instants: a call takes effect at some moment between its invocation and its answer, or, without a clear answer, at
/// any moment after its invocation as long as it still may. A violation is certain: no choice of moments explains it.
///
/// Launches of a run are ordered by their restart count.
class History {
 public:
  using Time = rt::TimePoint;
  struct Violation {
    std::string promise;  // "P1" ...
    std::string what;
  };
  explicit History(std::string run) : run_(std::move(run)) {}
  const std::string& run() const { return run_; }
  const std::vector<Violation>& violations() const { return violations_; }
  void violation(std::string promise, std::string what);

  // ---- Launches
  struct Opening {
    std::optional<std::uint64_t> resume;  // asked for; nullopt: the highest
    bool discard_after = false;
  };
  void open_called(std::uint32_t launch, Opening how, Time now);
  /// One rank's answer; every rank of a launch must hear the same.
  void open_answered(std::uint32_t launch, std::optional<std::uint64_t> resume, Time called, Time now);
  /// No rank of the launch got an answer that it opened the run, and none will.
  bool opened(std::uint32_t launch) const;
  std::uint32_t newest_opened() const;

  // ---- Saves
  struct SaveKind {
    bool overwrite = false;
    bool bad = false;  // its boxes do not tile the tensors: it must never commit
  };
  void begin_called(std::uint64_t step, Tag tag, SaveKind kind, Time now);
  void begin_answered(std::uint64_t step, Tag tag, std::string attempt, Time called, Time now);
  /// A rank, or status(), was told that the attempt is committed.
  void committed(std::uint64_t step, Tag tag, const std::string& attempt, Time now);
  /// A rank, or status(), was told that the attempt has failed for good.
  void failed(std::uint64_t step, Tag tag, const std::string& attempt, Time now);
  /// Nobody of this save tries any more, and every attempt of it has failed: it can not commit after now.
  void gave_up(std::uint64_t step, Tag tag, Time now);

  // ---- Deletions
  /// Returns the number that delete_ended() wants. `after`: all steps above `step`, else `step` alone.
  std::size_t delete_called(std::uint64_t step, bool after, Time now);
  enum class Deleted { kYes, kNo, kMaybe };
  void delete_ended(std::size_t number, Deleted outcome, Time now);

  // ---- Observations, each with the time it was asked and the time it was answered
  void saw(std::uint64_t step, Tag tag, Time asked, Time answered);
  void saw_absent(std::uint64_t step, Time asked, Time answered);
  /// `step` is the highest (nullopt: there is none); its tag is told by saw().
  void saw_highest(std::optional<std::uint64_t> step, Time asked, Time answered);
  /// Exactly these steps exist above `after`.
  void saw_steps(const std::vector<std::uint64_t>& steps, std::optional<std::uint64_t> after, Time asked,
                 Time answered);

  /// What was seen as `tag` at or after `asked` may have been removed or replaced by `answered`.
  bool may_be_gone(std::uint64_t step, Time asked, Time answered) const;
  std::size_t commits() const;
  /// Steps that may or must exist, for reading back.
  std::set<std::uint64_t> steps() const;
  bool may_exist(std::uint64_t step) const;
  /// All that the history knows, for a failing run.
  std::string text() const;

 private:
  struct Launch {
    Opening how;
    Time called{};
    std::optional<Time> opened;  // first ok
    std::optional<std::uint64_t> resume;
  };
  struct Save {
    std::uint64_t step = 0;
    Tag tag;
    SaveKind kind;
    Time begin{};               // it can not have committed before
    std::optional<Time> acked;  // it had committed by then
    std::optional<Time> ended;  // it can not commit after, if it had not
  };
  struct Delete {
    std::uint64_t step = 0;
    bool after = false;
    Time begin{};
    std::optional<Time> acked;
    std::optional<Time> ended;  // without effect after this
    bool covers(std::uint64_t s) const { return after ? s > step : s == step; }
  };
  Time fenced_at(std::uint32_t launch) const;  // when a newer launch had opened; kNever
  Time last_moment(const Save& save) const;
  static Time last_moment(const Delete& d);
  bool delete_possible(std::uint64_t step, Time after, Time before) const;
  void check_one_commit(const Save& save, Time now);
  void check_fence(const Save& save, Time now);
  Save* find(std::uint64_t step, Tag tag);
  std::string name(const Save& save) const;
  void highest_is(std::optional<std::uint64_t> step, Time asked, Time answered);

  std::string run_;
  std::map<std::uint32_t, Launch> launches_;
  std::vector<Save> saves_;
  std::vector<Delete> deletes_;
  struct Attempt {
    std::uint64_t step = 0;
    Tag tag;
    bool committed = false, failed = false;
  };
  std::map<std::string, Attempt> attempts_;
  struct Seen {
    Time asked, answered;
    Tag tag;
  };
  std::map<std::uint64_t, std::vector<Seen>> seen_;  // by step, in order of answers
  struct Existed {
    Time asked, answered;
  };
  std::map<std::uint64_t, std::vector<Existed>> existed_;  // by step: seen in any way
  std::vector<Violation> violations_;
};

}  // namespace cairn::sim
