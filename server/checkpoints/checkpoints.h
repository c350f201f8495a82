#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/rt/unit_pool.h"
#include "server/buckets/buckets.h"
#include "server/checkpoints/merging.h"
#include "server/checkpoints/save_bugs.h"
#include "server/chunks/chunks.h"
#include "server/coordinator/coordinator.h"
#include "server/readers/readers.h"
#include "server/records/owners.h"
#include "server/records/records.h"
#include "server/usage/usage.h"

namespace cairn::wire {
class Abort;
class AttemptStatus;
class AttemptStatusReply;
class Begin;
class BeginReply;
class Commit;
class Heartbeat;
class OpenRun;
class OpenRunReply;
class RunActivity;
class RunActivityReply;
class RunList;
class RunListReply;
class Seal;
class StepInfo;
class StepList;
class StepListReply;
class StepOpen;
class StepPin;
class StepRemove;
class StepRemoveReply;
}  // namespace cairn::wire
namespace cairn::records {
class Attempt;
class Run;
class Step;
}  // namespace cairn::records

namespace cairn::server {

/// Runs, save attempts and steps. What decides lies in records and is compared in transactions; memory holds only what
/// may be lost with the process: who was heard when, and what was read before.
///
/// Threads:  the loop; calls overlap.
/// Lifetime: what it is given outlives it; no call may run when it is destroyed. Merges under way are cut off by the
///           destructor; start() of the next process does them again.
/// source:   protocol.md 4, 8; ARCHITECTURE.md, "A save"
class Checkpoints {
 public:
  struct Options {
    rt::Duration rank_silence_max = std::chrono::seconds(30);  // of an unsealed rank that has joined
    rt::Duration join_max = std::chrono::minutes(10);          // from the first begin to every rank's
    rt::Duration check_every = std::chrono::seconds(1);
    rt::Duration failed_kept = std::chrono::hours(1);         // status of failed attempts
    rt::Duration status_wait_max = std::chrono::seconds(30);  // of one long poll
    std::uint32_t world_size_max = 65536;
    std::uint64_t merge_memory_bytes = 256 * kMiB;  // all merges together
    std::uint32_t index_chunk_bytes = 4 * kMiB;     // a multiple of the unit size
    std::uint32_t merge_fan_in = 64;                // manifests or runs that become one, while ranks save; 2 or more
    std::uint32_t writers_in_record_max = 256;      // of a step; more are listed in a chunk
    SaveBugs bugs;
  };
  Checkpoints(rt::Runtime runtime, Chunks& chunks, storage::RecordStore& records, rt::UnitPool& units,
              const Coordinator& coordinator, Buckets& buckets, Owners& owners, Readers& readers, Usage& usage,
              Options options);
  ~Checkpoints();

  /// Finds the attempts that an earlier process left; merges those that are fully sealed. Before any call.
  Task<void> start();
  /// Fails attempts with silent ranks and forgets old failures. Runs for ever.
  Task<void> watch();

  /// Called with bucket and run when a step was committed or unpinned.
  void on_change(std::function<void(const std::string&, const std::string&)> told) { on_change_ = std::move(told); }

  /// The daemon is about to stop: status() and commit() wait no longer.
  void drain();
  /// Ends merges where they are; start() of the next process does them again.
  void stop() { scope_.cancel(); }

  // ---- Runs ----
  /// errors: kFenced   a past launch: names both;  kNotFound  no bucket, or no such step to resume from
  ///         kConflict the launch was told another step before
  Task<wire::OpenRunReply> open_run(wire::OpenRun request);
  Task<wire::RunListReply> run_list(wire::RunList request);
  Task<wire::RunActivityReply> run_activity(wire::RunActivity request);

  // ---- Attempts: named by owner after begin ----
  /// errors: kFenced   not the launch and run_epoch that has the run: names both
  ///         kInvalid  another world size, or other options, than the attempt has: names both
  ///         kExists   the step is committed, and overwrite was not said
  ///         kNoSpace what is declared fits neither quota nor disk: the attempt fails for all its ranks
  Task<wire::BeginReply> begin(wire::Begin request);
  /// May be repeated. errors: kFenced;  kConflict  sealed before with another manifest;  what the attempt failed of
  Task<wire::Empty> seal(wire::Seal request);
  /// Answers when the step is committed. May be repeated.
  /// errors: kConflict  names ranks that have not sealed;  kFenced;  what the attempt failed of
  Task<wire::Empty> commit(wire::Commit request);
  Task<wire::Empty> abort(wire::Abort request);
  /// errors: what the attempt failed of;  kNotFound
  Task<wire::Empty> heartbeat(wire::Heartbeat request);
  /// Waits for the end of the attempt, at most as long as the request says.
  Task<wire::AttemptStatusReply> status(wire::AttemptStatus request);

  // ---- For ranks that have handed over what is left of their part ----
  /// `seal`: as seal() gets it; `complete`: not only whose it is. False: the rank has sealed, nothing is left.
  /// errors: as seal()
  Task<bool> expects(wire::Seal seal, bool complete);
  /// The attempt is open and waits for the rank's seal.
  bool unsealed(const OwnerId& owner, std::uint32_t rank) const;
  /// It does, and the rank has said nothing for so long.
  bool silent(const OwnerId& owner, std::uint32_t rank, rt::Duration duration) const;
  /// A sign of life on its behalf.
  void heard(const OwnerId& owner, std::uint32_t rank);
  /// seal(), on its behalf.
  Task<wire::Empty> seal_for(wire::Seal request);
  /// Its part cannot be finished: the attempt fails for all, with the code of `why`.
  Task<void> give_up(OwnerId owner, std::uint32_t rank, Error why);
  /// A rank that joins an attempt again waits for this first: it may be sealed by then.
  void on_join(std::function<Task<void>(OwnerId, std::uint32_t)> wait) { on_join_ = std::move(wait); }
  rt::Duration rank_silence_max() const { return options_.rank_silence_max; }

  // ---- Steps ----
  /// Protects the step for the reader, if the request names one; `connection` is its.
  /// errors: kNotFound;  kBusy  too many readers
  Task<wire::StepInfo> step_open(wire::StepOpen request, std::uint64_t connection);
  Task<wire::StepListReply> step_list(wire::StepList request);
  /// errors: kNotFound;  kConflict  a step meant is pinned: nothing is removed
  Task<wire::StepRemoveReply> step_remove(wire::StepRemove request);
  /// errors: kNotFound  also when the step meant has been replaced;  kConflict  changed since it was shown
  Task<wire::StepInfo> step_pin(wire::StepPin request);

  struct Stats {
    std::uint64_t open = 0, merging = 0;      // attempts, now
    std::uint64_t committed = 0, failed = 0;  // since start
    std::uint64_t merges = 0;                 // of manifests or runs into one, before the last
  };
  Stats stats() const;

 private:
  enum class Phase { kOpen, kMerging, kEnded };
  /// An open attempt, and what is known of its ranks since this process knows it.
  struct Live {
    explicit Live(rt::Loop& loop) : changed(loop) {}
    std::string bucket, run;
    OwnerId owner;
    RunEpoch run_epoch;
    std::string launch;  // text
    std::string job;
    std::uint64_t restart = 0;
    std::uint64_t step = 0;
    std::uint32_t world_size = 0;
    std::uint32_t copies = 1;  // as the bucket asked for when it began
    bool explicit_commit = false;
    rt::TimePoint began;
    std::map<std::uint32_t, rt::TimePoint> heard;  // ranks that have joined
    std::size_t joined_kept = 0;                   // how many of them the record names
    std::set<std::uint32_t> sealed;
    // What the seals so far come to: manifests in the order of their seals, and what was merged of others.
    std::deque<std::uint32_t> unmerged;
    std::vector<MergedRun> runs;  // by level
    bool levelling = false;       // a merge of some of them is under way
    Phase phase = Phase::kOpen;
    bool failing = false;
    bool unfenced = false;  // planted bug
    rt::Signal changed;     // the phase

    std::string name() const;
    bool all_sealed() const { return sealed.size() == world_size; }
  };
  using LivePtr = std::shared_ptr<Live>;

  struct Found;
  Task<Found> find(std::string bucket, std::string run, OwnerId owner);
  /// Always an error: what the attempt failed of, or kNotFound.
  Task<void> why_ended(OwnerId owner);
  /// errors: kFenced  another launch has the run by now
  Task<Loaded<records::Run>> run_of(const Found& found, std::string bucket, std::string run);
  /// `unfenced`: planted bug: the run_epoch is not compared, now or at the commit.
  Task<wire::Empty> seal_part(wire::Seal request, bool unfenced);
  LivePtr find_live(const OwnerId& owner) const;
  LivePtr ensure_live(const records::Attempt& attempt, std::string bucket, std::string run);
  /// errors: kUnavailable  drain() was called
  Task<void> ended(LivePtr live);
  static wire::AttemptStatusReply status_of(const Live& live);
  /// Of an attempt that is not in memory. nullopt: it is open.
  Task<std::optional<wire::AttemptStatusReply>> status_at_end(OwnerId owner, std::string bucket, std::string run);

  /// Writes down who has joined, for the next process.
  Task<void> keep_joined();
  Task<void> keep_joined(LivePtr live);
  Task<void> resume_attempts();
  Task<void> resume_attempt(std::string bucket, std::string run, Loaded<records::Attempt> attempt);
  Task<void> remember_failed();
  Task<void> forget_failed();
  std::optional<Error> overdue(const Live& live) const;
  void fail_those(const std::function<std::optional<Error>(const Live&)>& why_of);
  void spawn_fail(const LivePtr& live, Error why);
  Task<void> fail_attempt(LivePtr live, Error why);
  Task<void> erase_seals(OwnerId owner);
  /// Those of attempts that have ended: a crash left them.
  Task<void> erase_old_seals();
  void end(const LivePtr& live);
  /// Reserves what the rank has declared. errors: kNoSpace  and the attempt fails
  Result<void> reserve(const LivePtr& live, const wire::Begin& begin, std::uint64_t replaces_bytes);
  Result<void> refused_before(const wire::Begin& begin, const std::string& attempt);

  /// `owners`: of the steps that are meant; empty: all.
  /// `removed`: the bytes of each step that goes, for steps_removed() once the transaction is done.
  Task<void> add_discards(std::string bucket, std::string run, std::uint64_t after, std::set<std::string> owners,
                          Edit& edit, std::vector<std::uint64_t>& removed);
  void steps_removed(const std::string& bucket, const std::vector<std::uint64_t>& removed);
  Task<std::optional<storage::Record>> highest_step(std::string bucket, std::string run);

  void rank_sealed(const LivePtr& live, std::uint32_t rank);
  void start_merge(const LivePtr& live);
  struct Merged;
  Task<void> merge_and_commit(LivePtr live);
  Task<void> merge(LivePtr live, std::shared_ptr<Merged> out);
  /// Of all seals: who wrote, and where.
  Task<void> look_at_seals(LivePtr live, std::shared_ptr<Merged> out);
  Task<void> commit_step(LivePtr live, std::shared_ptr<Merged> merged);

  // Merging in levels.
  struct Feed;
  /// Merges what is due, as long as ranks save.
  void level_up(const LivePtr& live);
  bool level_due(const Live& live, std::size_t parts) const;
  Task<void> merge_levels(LivePtr live);
  /// Manifests, or runs, become one run.
  Task<void> merge_level(LivePtr live);
  /// `part` and `parts` outlive the call.
  Task<void> find_manifest(LivePtr live, std::uint32_t rank, StoredPart& part);
  Task<void> add_manifests(LivePtr live, std::vector<std::uint32_t> ranks, std::vector<StoredPart>& parts);
  /// Appends the merged index to `out`; with `prove` it is that of all ranks. `out` and `written` outlive the call.
  Task<void> merge_parts(LivePtr live, std::vector<StoredPart> parts, bool prove, ChunkStream& out,
                         format::IndexWriter::Written& written);
  Task<void> run_merge(std::shared_ptr<Merge> work, std::size_t bytes, Merge::Piece& out);
  /// Reads what `loads` names (part, bytes) that nobody has begun; its arguments outlive it, and several run at once.
  Task<void> load_some(const LivePtr& live, const std::vector<StoredPart>& parts, std::vector<Feed>& feeds,
                       const std::vector<std::pair<std::size_t, std::uint64_t>>& loads, std::size_t& next_load);
  std::uint64_t merge_share() const;  // memory of one merge at most
  std::uint32_t merge_chunk_bytes() const;
  std::size_t parts_max() const;  // that fit in it
  std::size_t fan_in() const;
  DataGroup index_group(const Live& live) const;  // 0: none serves

  rt::Runtime runtime_;
  Chunks& chunks_;
  storage::RecordStore& records_;
  rt::UnitPool& units_;
  const Coordinator& coordinator_;
  Buckets& buckets_;
  Owners& owners_;
  Readers& readers_;
  Usage& usage_;
  Options options_;
  std::map<OwnerId, LivePtr> live_;
  std::map<OwnerId, rt::TimePoint> failed_;  // when they are forgotten
  /// A rank found no room before the others came: they are told, instead of waiting for it. By the attempt's key.
  struct Refusal {
    Error why;
    std::set<std::uint32_t> told;  // ranks; when one of them comes again, it is a new try
    rt::TimePoint until;
  };
  std::map<std::string, Refusal> refused_;
  std::uint64_t ends_ = 0;  // so that what was read before an end is not taken for open after it
  Stats stats_;
  std::function<void(const std::string&, const std::string&)> on_change_;
  std::function<Task<void>(OwnerId, std::uint32_t)> on_join_;
  bool draining_ = false;
  rt::Semaphore merge_memory_;
  rt::Semaphore look_ups_;     // of saves that have ended, at once
  rt::Semaphore large_pages_;  // one merge at a time may hold pages that are longer than its pieces
  rt::Scope scope_;
};

}  // namespace cairn::server
