#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>
#include <vector>

#include "client/examples/char_lm/model.h"
#include "client/examples/char_lm/ranks.h"
#include "client/examples/char_lm/text.h"

namespace char_lm {

struct TrainConfig {
  ModelConfig model;
  std::size_t batch = 48;  // samples per step over all ranks; a multiple of the number of ranks
  std::uint64_t seed = 1;
  float learning_rate = 0.006F;
  std::uint64_t warmup_steps = 10;
};

/// What is wrong with running `config` on `ranks` ranks, if anything.
std::expected<void, std::string> check(const TrainConfig& config, const Text& text, int ranks);

/// The memory all ranks of one launch share. Made by the launcher before the fork.
class Shared {
 public:
  static std::expected<Shared, std::string> create(const TrainConfig& config, int ranks);

  struct Head {
    Barrier barrier;
    std::int64_t loss_sum[2];  // fixed point; the cell of an even and of an odd step
    std::uint64_t clipped;     // gradient contributions that were outside the fixed-point range
  };
  Head& head() const { return *reinterpret_cast<Head*>(memory_.data()); }
  std::span<std::int64_t> gradient() const;  // fixed point, summed over the batch; zero between steps
  std::span<std::uint16_t> weights() const;  // bf16, on their way from the owners to all ranks
  std::span<float> gathered() const;         // fp32 weights, filled by gather() when a training is over

 private:
  explicit Shared(SharedMemory memory, std::size_t weights) : memory_(std::move(memory)), weights_(weights) {}
  SharedMemory memory_;
  std::size_t weights_;
};

enum class StateType { kFloat32, kBfloat16, kInt64 };

/// One piece of training state: what a checkpoint must hold of it, and the memory it lives in.
struct StatePiece {
  std::string name;
  StateType type = StateType::kFloat32;
  std::vector<std::uint64_t> shape{};   // of the whole tensor
  std::vector<std::uint64_t> offset{};  // of this rank's part, in elements
  std::vector<std::uint64_t> part{};    // its shape; a dimension may be 0
  bool replicated = false;              // every rank has the same whole tensor
  std::span<std::byte> bytes;           // of the part, row-major
};

/// One rank of a sharded data-parallel training (as ZeRO and FSDP): fp32 weights and Adam's two moments are divided
/// over the ranks by rows, each rank keeps a whole bf16 copy of the weights to compute with.
///
/// A step: gradients of this rank's samples, added to the shared sum; barrier; Adam on the rows this rank owns, and
/// their bf16 copy to shared memory; barrier; every rank takes over the new bf16 weights.
class Trainer {
 public:
  /// Rank `rank` of `ranks`. `text` and `shared` must outlive it.
  Trainer(const TrainConfig& config, const Text& text, Shared& shared, int rank, int ranks);

  /// Start of a training, a pure function of the seed. All ranks call it; waits for them.
  void initialise();
  /// One step over the whole batch; returns the mean loss in nats per character, the same on all ranks. All ranks call
  /// it; waits for them.
  double step();
  /// Steps since initialise(), also over restarts.
  std::uint64_t steps_done() const { return static_cast<std::uint64_t>(adam_step_); }

  /// All of the state this rank holds, to be saved, or to be filled by a restore. Changes with the next step().
  std::vector<StatePiece> state();
  /// After a restore: whether the bf16 weights are this rank's fp32 weights rounded, as they were when saved.
  bool weights_agree() const;
  /// Puts the fp32 weights of all ranks into shared.gathered(). All ranks call it; waits for them.
  void gather();

 private:
  void add_gradients_of(std::size_t slot);
  void update_own_rows(float rate);
  void exchange_weights();  // own fp32 rows -> shared bf16 -> everyone's bf16 copy

  const TrainConfig config_;
  const Text& text_;
  Shared& shared_;
  const int rank_, ranks_;
  Model<float> model_;

  struct OwnRows {
    WeightTensor tensor;
    Rows rows;
    std::size_t global = 0, local = 0, count = 0;  // elements: start in the flat order, start in the shard, number
  };
  std::vector<OwnRows> own_;
  std::vector<float> master_, m_, v_;   // the shard: own rows of every tensor, one after the other
  std::vector<std::uint16_t> weights_;  // bf16, whole
  std::int64_t adam_step_ = 0;

  std::vector<float> dense_, dense_gradient_, table_, table_gradient_;
  std::vector<std::int64_t> dense_sum_;
};

float float_of_bf16(std::uint16_t bits);
std::uint16_t bf16_of_float(float value);  // nearest, ties to even

}  // namespace char_lm
