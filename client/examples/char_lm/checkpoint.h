#pragma once

#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "cairn/client.h"
#include "client/examples/char_lm/trainer.h"

namespace char_lm {

/// Times of one save at one rank, in seconds of the steady clock, which all processes of a host share. 0: not yet.
struct SaveTimes {
  double called = 0;        // training stops ...
  double started = 0;       // ... the save before is done ...
  double staged = 0;        // ... training goes on
  double committed = 0;     // durable, and committed by all ranks
  std::uint64_t bytes = 0;  // this rank's share
};

/// How one rank of a training keeps its state in Cairn. One save at a time is on its way.
class Checkpoints {
 public:
  struct Options {
    std::vector<std::string> servers;
    std::string run;         // BUCKET/RUN
    cairn::LaunchId launch;  // equal on all ranks of this start of the job
    int rank = 0, ranks = 1;
    std::string job;  // what the training is, as text: a resumed one must be the same
  };
  /// Opens the run: older launches of it can no longer save.
  static cairn::Result<Checkpoints> open(Options options);

  /// The step to go on from, the same on all ranks; nullopt: none was committed.
  std::optional<std::uint64_t> resume_step() const { return run_.resume_step(); }

  /// Fills the trainer's state from `resume_step()`: this rank's rows of the sharded tensors, whole replicated ones.
  /// errors: kInvalid  the checkpoint is of another training;  kDataLoss  its parts do not belong together
  cairn::Result<cairn::RestoreResult> restore(Trainer& trainer);

  /// Begins to save the state after the current step and returns once its bytes are copied: the training may go on.
  /// Waits first for the save before it. `times`, in memory that outlives the process's saves, is filled meanwhile.
  cairn::Result<void> start_save(Trainer& trainer, SaveTimes& times);
  /// Stages like start_save(), but leaves one tensor out on the last rank, so that nothing can commit the step.
  cairn::Result<void> start_save_and_hold(Trainer& trainer, SaveTimes& times);
  /// Waits until the last save is durable and committed by all ranks.
  cairn::Result<void> finish_save();

 private:
  Checkpoints(Options options, cairn::Client client, cairn::Run run)
      : options_(std::move(options)), client_(std::move(client)), run_(std::move(run)) {}
  cairn::Result<cairn::Save> begin(Trainer& trainer, bool hold);

  Options options_;
  cairn::Client client_;
  cairn::Run run_;
  std::string position_;  // saved bytes stay in place until they are staged
  std::future<cairn::Result<cairn::SaveResult>> saving_;
  std::optional<cairn::Save> held_;
};

double seconds_now();

}  // namespace char_lm
