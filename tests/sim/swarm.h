#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/common/result.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/net.h"

namespace cairn::sim {

/// What one seed is made of: each class of faults is on or off with probability 1/2, so that some runs combine many and
/// others test one alone; rates and sizes are drawn. A function of the seed only.
struct Swarm {
  // Shape of the load.
  std::uint32_t runs = 1;
  std::uint32_t launches = 2;
  std::uint32_t ranks_max = 3;
  std::uint32_t saves_max = 3;
  std::uint32_t tensor_bytes_max = 40'000;
  std::uint32_t segment_bytes = 4 << 20;
  bool bad_saves = false;    // some ranks leave a gap or overlap
  bool objects = false;      // somebody puts, gets and removes objects meanwhile
  bool removals = false;     // an administrator removes steps meanwhile
  double duplicates = 0;     // of requests that arrive again, late
  double liveness_lies = 0;  // wrong or missing answers to the garbage collector, which it must survive
  rt::Duration garbage_grace = std::chrono::seconds(20), garbage_interval = std::chrono::seconds(5);
  bool hostile = false;        // a peer sends what looks right, at random, also after the healing
  bool shared_memory = false;  // clients hand their arena to the daemon
  bool zombies = false;        // older launches go on while newer ones open the run

  // Faults.
  std::uint32_t daemon_kills = 0;
  bool power_loss = false;  // else the daemon's process is killed
  bool silent_death = false;
  bool rank_kills = false;
  bool pauses = false;  // a rank's host stands still for a while
  NetFaults net;
  DiskFaults disk;
  IndexFaults index;
  bool small_disk = false;
  std::uint32_t rot = 0;     // bits flipped
  bool index_older = false;  // once, at a restart of the daemon

  /// Bytes may be damaged on the only disk: then a read may end in DATA_LOSS, and the target may refuse to open.
  bool damages() const { return rot > 0 || disk.lost_write > 0 || disk.misdirected_write > 0 || index_older; }
  /// A read that ended in DATA_LOSS breaks no promise: bytes are damaged, or the disk did not read them, and it says
  /// so.
  bool excuses(const Error& loss) const {
    return damages() || (disk.read_error > 0 && loss.message.find("Input/output error") != loss.message.npos);
  }
  std::string text() const;
};

Swarm draw_swarm(std::uint64_t seed);
/// What the swarm enables, so that a run that injected none of it is reported.
void enable_storage(const Swarm& swarm, FaultCounts& faults);  // of disk and index alone
void enable(const Swarm& swarm, FaultCounts& faults);

}  // namespace cairn::sim
