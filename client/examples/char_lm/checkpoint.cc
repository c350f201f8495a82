#include "client/examples/char_lm/checkpoint.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

namespace char_lm {
namespace {

constexpr const char* kPosition = "text";  // the data stream whose position is saved with the weights
constexpr const char* kJob = "job.txt";

cairn::DType dtype_of(StateType type) {
  switch (type) {
    case StateType::kBfloat16:
      return cairn::DType::bf16;
    case StateType::kInt64:
      return cairn::DType::i64;
    case StateType::kFloat32:
      break;
  }
  return cairn::DType::f32;
}

std::optional<cairn::Box> box_of(const StatePiece& piece) {
  if (piece.replicated) return std::nullopt;  // the whole tensor
  return cairn::Box{.offset = piece.offset, .shape = piece.part};
}

std::string position_of(const Trainer& trainer) {
  return "next step=" + std::to_string(trainer.steps_done());
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

cairn::Result<Checkpoints> Checkpoints::open(Options options) {
  auto client = cairn::Client::connect({.servers = options.servers, .arena_bytes = 64ULL << 20});
  if (!client) return cairn::fail(std::move(client).error());
  auto run = client->open_run({.name = options.run, .launch = options.launch});
  if (!run) return cairn::fail(std::move(run).error());
  return Checkpoints(std::move(options), std::move(*client), std::move(*run));
}

cairn::Result<cairn::RestoreResult> Checkpoints::restore(Trainer& trainer) {
  auto step = run_.open_step(run_.resume_step());
  if (!step) return cairn::fail(std::move(step).error());

  auto job = step->blob(kJob);
  if (!job) return cairn::fail(std::move(job).error());
  if (text_of(*job) != options_.job)
    return cairn::fail(cairn::Errc::kInvalid, options_.run + " holds another training. It was saved with: " +
                                                  text_of(*job) + ". This one has: " + options_.job);

  cairn::Restore restore = step->restore();
  for (StatePiece& piece : trainer.state()) restore.want({.name = piece.name, .box = box_of(piece)}, piece.bytes);
  auto result = restore.run();
  if (!result) return result;

  auto position = step->token(kPosition);
  if (!position) return cairn::fail(std::move(position).error());
  if (text_of(*position) != position_of(trainer) || trainer.steps_done() != step->info().step)
    return cairn::fail(cairn::Errc::kDataLoss, "weights and data position of a step disagree: " + text_of(*position) +
                                                   ", but " + position_of(trainer));
  if (!trainer.weights_agree())
    return cairn::fail(cairn::Errc::kDataLoss, "the bf16 weights are not the fp32 weights rounded");
  return result;
}

cairn::Result<cairn::Save> Checkpoints::begin(Trainer& trainer, bool hold) {
  const auto rank = static_cast<std::uint32_t>(options_.rank), ranks = static_cast<std::uint32_t>(options_.ranks);
  std::vector<StatePiece> pieces = trainer.state();
  if (hold && rank + 1 == ranks) pieces.pop_back();

  auto save = run_.begin_save({.step = trainer.steps_done(), .rank = rank, .world_size = ranks});
  if (!save) return save;
  for (const StatePiece& piece : pieces) {
    cairn::TensorShard shard{
        .name = piece.name, .dtype = dtype_of(piece.type), .global_shape = piece.shape, .box = box_of(piece)};
    if (piece.replicated) shard.holder = cairn::Holder{.index = rank, .count = ranks};
    if (auto added = save->add_tensor(std::move(shard), piece.bytes); !added)
      return cairn::fail(std::move(added).error());
  }
  // Every rank names the position: the store refuses the step if they differ. The job's description is needed once.
  position_ = position_of(trainer);
  if (auto added = save->add_token(kPosition, bytes_of(position_)); !added)
    return cairn::fail(std::move(added).error());
  if (rank == 0)
    if (auto added = save->add_blob(kJob, bytes_of(options_.job)); !added) return cairn::fail(std::move(added).error());
  return save;
}

cairn::Result<void> Checkpoints::start_save(Trainer& trainer, SaveTimes& times) {
  times.called = seconds_now();
  if (auto done = finish_save(); !done) return done;
  times.started = seconds_now();
  auto save = begin(trainer, false);
  if (!save) return cairn::fail(std::move(save).error());
  auto ticket = save->stage();
  if (!ticket) return cairn::fail(std::move(ticket).error());
  times.staged = seconds_now();

  // The library's thread notes the moment; the training learns of the outcome in finish_save().
  auto outcome = std::make_shared<std::promise<cairn::Result<cairn::SaveResult>>>();
  saving_ = outcome->get_future();
  ticket->wait_async().then([outcome, &times](cairn::Result<cairn::SaveResult> result) {
    if (result) {
      times.bytes = result->bytes;
      std::atomic_ref(times.committed).store(seconds_now(), std::memory_order_release);
    }
    outcome->set_value(std::move(result));
  });
  return {};
}

cairn::Result<void> Checkpoints::start_save_and_hold(Trainer& trainer, SaveTimes& times) {
  if (options_.rank + 1 < options_.ranks) return start_save(trainer, times);
  if (auto done = finish_save(); !done) return done;
  auto save = begin(trainer, true);
  if (!save) return cairn::fail(std::move(save).error());
  held_ = std::move(*save);
  return held_->stage_part();
}

cairn::Result<void> Checkpoints::finish_save() {
  if (!saving_.valid()) return {};
  auto result = saving_.get();
  if (!result) return cairn::fail(std::move(result).error());
  return {};
}

}  // namespace char_lm
