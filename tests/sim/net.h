#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "proto/common/units.h"
#include "proto/rt/seams.h"
#include "tests/sim/world.h"

namespace cairn::sim {

/// Of all links; probabilities are per segment sent unless said otherwise.
struct NetFaults {
  double cut = 0;         // the connection is reset, both ways
  double ghost = 0;       // per cut: the bytes on the way still arrive, the receiver learns of the reset after them
  double clog = 0;        // the direction stands still for up to clog_max
  double slow = 0;        // up to slow_max later; order is kept
  double split_read = 0;  // per read: fewer bytes than there are
  double refuse = 0;      // per dial (counted as a cut)
  rt::Duration clog_max = std::chrono::seconds(3);
  rt::Duration slow_max = std::chrono::milliseconds(200);
};

struct NetOptions {
  rt::Duration latency_min = std::chrono::microseconds(20);
  rt::Duration latency_max = std::chrono::microseconds(150);
  std::uint64_t bytes_per_second = 1 * kGiB;
  std::size_t window_bytes = 256 * kKiB;  // sent and not yet read; a writer waits for room
  std::size_t segment_bytes = 64 * kKiB;  // at most, in one piece
  bool shares_memory = false;             // as unix sockets do: memory can be attached
};

/// The network between all nodes: byte streams that keep order and never corrupt or duplicate, because TCP does not.
/// What TCP does not prevent is here: a reset at any moment, after which the sender does not know how much arrived (and
/// with `ghost` it arrives after the sender has retried elsewhere: the late duplicate), stand-stills, splits.
class SimNet {
 public:
  explicit SimNet(World& world);
  ~SimNet();

  NetFaults faults;
  NetOptions options;
  /// The next n-th of all dials is refused, read or write cut; 0 = none. For directed tests. What a write had sent
  /// arrives all the same with the probability `faults.ghost`.
  std::uint64_t refuse_dial_in = 0, cut_read_in = 0, cut_write_in = 0;

  std::unique_ptr<rt::Net> endpoint(Node& node);

  /// Resets all connections between two hosts (an empty name: any).
  void cut(const std::string& host_a, const std::string& host_b, bool ghost = false);
  /// Nothing from one host reaches the other until `until`: also dials stand still.
  void clog(const std::string& from, const std::string& to, rt::TimePoint until);
  /// Lifts all clogs.
  void unclog();
  std::size_t connections() const;

  void node_died(Node& node, bool silent);
  void node_restarted(Node& node);

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace cairn::sim
