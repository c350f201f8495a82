#pragma once

// Only for the sources of this folder, after proto/wire/records.pb.h: what its parts share of messages.

#include <cassert>
#include <string>

#include "server/checkpoints/checkpoints.h"

namespace cairn::server {

/// An attempt as its owner's records tell: open, or committed.
struct Checkpoints::Found {
  bool committed = false;
  std::uint64_t step = 0;
  std::string key;  // of the attempt
  Loaded<records::Attempt> attempt;
};

inline RunEpoch epoch_of(const wire::Epoch& epoch) {
  return {.loss = epoch.loss(), .count = epoch.count()};
}
inline void set_epoch(RunEpoch epoch, wire::Epoch& out) {
  out.set_loss(epoch.loss);
  out.set_count(epoch.count);
}
inline void set_stamp(const DataGroupEntry& data, wire::Stamp& out) {
  out.set_group(data.group);
  out.set_generation(data.epoch.generation);
  out.set_epoch(data.epoch.count);
}

/// kConflict: the step is kept from removal and replacement.
inline Error pinned(const std::string& bucket, const std::string& run, std::uint64_t step) {
  return {Errc::kConflict,
          "step " + std::to_string(step) + " of run '" + bucket + "/" + run + "' is pinned: unpin it first"};
}

/// kFenced: names the launch that asked and the one that has the run.
Error fenced(const std::string& what, const std::string& launch, RunEpoch run_epoch, const records::Run& current);

}  // namespace cairn::server
