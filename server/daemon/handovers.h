#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "proto/rpc/rpc.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/checkpoints/checkpoints.h"
#include "server/daemon/chunk_service.h"

namespace cairn::wire {
class Empty;
class Handover;
}  // namespace cairn::wire

namespace cairn::server {

/// Parts of saves that their ranks have handed over: what is left to write, and the seal. As long as the rank lives it
/// does all that itself, and its plan only waits; when its connection ends, or it falls silent, the plan is carried out
/// here, by the same calls as the rank's own, so that who is first does not matter. What a plan was taken for happens
/// unless the daemon dies, or the bytes do not match their CRCs: then the attempt fails, as with any error.
///
/// A plan keeps the client's memory, although its process may be gone. All that plans keep is bounded when they are
/// taken: one that would not fit is refused, so that none has to be dropped later.
///
/// Threads:  the loop; calls overlap.
/// Lifetime: what it is given outlives it.
/// source:   ARCHITECTURE.md, "A save, from end to end"
class Handovers {
 public:
  struct Options {
    std::uint64_t memory_bytes_max = 64 * kGiB;                // of clients' memory that plans keep
    std::uint64_t plan_bytes_max = 16 * kMiB;                  // of the plans themselves, as messages
    std::size_t chunks_at_once = 4;                            // of one plan
    rt::Duration look_every = std::chrono::milliseconds(100);  // at the connections
    rt::Duration retry_every = std::chrono::seconds(1);        // of what is unavailable
    bool unwritten = false;                                    // planted bug: the seal comes before the chunks
  };
  Handovers(rt::Runtime runtime, ChunkService& chunks, Checkpoints& checkpoints, Options options)
      : runtime_(runtime),
        chunks_(chunks),
        checkpoints_(checkpoints),
        options_(options),
        changed_(runtime.loop),
        work_(runtime.loop) {}

  /// Keeps a part of a plan; with the last one it is taken. The same again changes nothing.
  /// errors: kInvalid  no shared memory; what does not fit together, or into the memory
  ///         kBusy     no room for more: the save goes on as without it
  ///         and as Checkpoints::seal()
  Task<wire::Empty> take(std::shared_ptr<rpc::ServerCall> call, wire::Handover request);
  /// The rank itself has stored a chunk: its memory may be used again.
  void stored(const ChunkId& id);
  /// When nothing is being done on the rank's behalf.
  Task<void> settled(OwnerId owner, std::uint32_t rank);
  /// Looks after the plans. Runs for ever.
  Task<void> watch();
  void set_memory_bytes_max(std::uint64_t bytes) { options_.memory_bytes_max = bytes; }

  /// No plan is begun any more.
  void drain() { draining_ = true; }
  /// Those under way end, or are cut off at `deadline`. After drain().
  Task<void> close(rt::TimePoint deadline);

  struct Stats {
    std::uint64_t plans = 0, running = 0, memory_bytes = 0;          // now
    std::uint64_t taken = 0, refused = 0, finished = 0, failed = 0;  // since start
  };
  Stats stats() const;

 private:
  struct Plan;
  using PlanPtr = std::shared_ptr<Plan>;
  using Key = std::pair<OwnerId, std::uint32_t>;  // rank

  Result<void> admit(const std::shared_ptr<rt::SharedMemory>& memory, std::uint64_t plan_bytes) const;
  Result<void> add(Plan& plan, wire::Handover request) const;
  bool wanted(const Plan& plan) const;
  void look();
  void begin(const PlanPtr& plan, const char* why);
  Task<void> carry_out(PlanPtr plan);
  Task<void> store_all(PlanPtr plan);
  Task<void> store(PlanPtr plan, std::uint32_t index, rt::Semaphore::Lease turn);
  Task<void> seal(PlanPtr plan);
  void forget(const PlanPtr& plan);

  rt::Runtime runtime_;
  ChunkService& chunks_;
  Checkpoints& checkpoints_;
  Options options_;
  std::map<Key, PlanPtr> plans_;
  bool draining_ = false;
  Stats stats_;
  rt::Signal changed_;  // plans_, or one of them was begun
  rt::Scope work_;      // last: its tasks use the rest
};

}  // namespace cairn::server
