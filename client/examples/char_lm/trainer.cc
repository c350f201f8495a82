#include "client/examples/char_lm/trainer.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <utility>

#include "client/examples/char_lm/fixed_point.h"

namespace char_lm {
namespace {

constexpr float kBeta1 = 0.9F, kBeta2 = 0.99F, kEpsilon = 1e-8F;
constexpr std::size_t kAlign = 4096;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Layout of the shared block: head, gradient, bf16 weights, gathered fp32 weights, each on pages of its own.
std::size_t gradient_at() {
  return aligned(sizeof(Shared::Head));
}
std::size_t weights_at(std::size_t n) {
  return gradient_at() + aligned(n * sizeof(std::int64_t));
}
std::size_t gathered_at(std::size_t n) {
  return weights_at(n) + aligned(n * sizeof(std::uint16_t));
}

/// Initial value of one weight: uniform, from (seed, place in the flat order).
float initial(const WeightTensor& tensor, std::uint64_t seed, std::size_t index) {
  if (tensor.fan_in == 0) return tensor.start;
  double uniform = static_cast<double>(mix(mix(seed) ^ (tensor.offset + index)) >> 11) * 0x1p-53;  // 0 <= . < 1
  return static_cast<float>((2 * uniform - 1) * std::sqrt(3.0 / static_cast<double>(tensor.fan_in)));
}

double power(double base, std::int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

}  // namespace

float float_of_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t bf16_of_float(float value) {
  auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

std::expected<void, std::string> check(const TrainConfig& config, const Text& text, int ranks) {
  const ModelConfig& model = config.model;
  if (ranks < 1 || config.batch % ranks != 0)
    return std::unexpected("a batch of " + std::to_string(config.batch) + " samples cannot be divided by " +
                           std::to_string(ranks) + " ranks");
  if (model.table_rows < 1 || model.hidden < 1 || model.embed < 1 || model.context < 3 || model.positions < 1)
    return std::unexpected("the model needs a context of 3 or more, and 1 or more of everything else");
  // A table row may be used by every position of every sample: the largest number of contributions to one sum.
  if (config.batch * model.positions > kContributionsMax)
    return std::unexpected("a step of " + std::to_string(config.batch * model.positions) +
                           " characters is more than the fixed-point sum has room for (" +
                           std::to_string(kContributionsMax) + ")");
  if (model.vocab != text.alphabet.size()) return std::unexpected("the model's alphabet is not that of the text");
  if (text.tokens.size() <= model.sample_tokens())
    return std::unexpected("the text is shorter than one sample of " + std::to_string(model.sample_tokens()));
  return {};
}

std::expected<Shared, std::string> Shared::create(const TrainConfig& config, int ranks) {
  const std::size_t n = weight_count(config.model);
  auto memory = SharedMemory::create(gathered_at(n) + aligned(n * sizeof(float)));
  if (!memory) return std::unexpected(memory.error());
  Shared shared(std::move(*memory), n);
  shared.head().barrier.init(ranks);
  return shared;
}

std::span<std::int64_t> Shared::gradient() const {
  return {reinterpret_cast<std::int64_t*>(memory_.data() + gradient_at()), weights_};
}
std::span<std::uint16_t> Shared::weights() const {
  return {reinterpret_cast<std::uint16_t*>(memory_.data() + weights_at(weights_)), weights_};
}
std::span<float> Shared::gathered() const {
  return {reinterpret_cast<float*>(memory_.data() + gathered_at(weights_)), weights_};
}

Trainer::Trainer(const TrainConfig& config, const Text& text, Shared& shared, int rank, int ranks)
    : config_(config),
      text_(text),
      shared_(shared),
      rank_(rank),
      ranks_(ranks),
      model_(config_.model),
      weights_(weight_count(config_.model)),
      dense_(dense_size(config_.model)),
      dense_gradient_(dense_.size()),
      table_(config_.model.positions * config_.model.hidden),
      table_gradient_(table_.size()),
      dense_sum_(dense_.size()) {
  std::size_t local = 0;
  for (WeightTensor& tensor : weight_tensors(config_.model)) {
    Rows rows = rows_of(tensor.rows, rank, ranks);
    OwnRows own{.tensor = std::move(tensor), .rows = rows, .local = local};
    own.global = own.tensor.offset + rows.begin * own.tensor.cols;
    own.count = rows.count() * own.tensor.cols;
    local += own.count;
    own_.push_back(std::move(own));
  }
  master_.resize(local);
  m_.resize(local);
  v_.resize(local);
}

void Trainer::initialise() {
  for (const OwnRows& own : own_)
    for (std::size_t i = 0; i < own.count; ++i)
      master_[own.local + i] = initial(own.tensor, config_.seed, own.rows.begin * own.tensor.cols + i);
  std::ranges::fill(m_, 0.0F);
  std::ranges::fill(v_, 0.0F);
  adam_step_ = 0;
  exchange_weights();
}

double Trainer::step() {
  Shared::Head& head = shared_.head();
  const std::uint64_t step = steps_done();
  for (std::size_t i = 0; i < dense_.size(); ++i) dense_[i] = float_of_bf16(weights_[i]);
  std::ranges::fill(dense_sum_, 0);
  const std::size_t share = config_.batch / ranks_;
  for (std::size_t slot = share * rank_; slot < share * (rank_ + 1); ++slot) add_gradients_of(slot);
  auto gradient = shared_.gradient();
  for (std::size_t i = 0; i < dense_sum_.size(); ++i)
    std::atomic_ref(gradient[i]).fetch_add(dense_sum_[i], std::memory_order_relaxed);
  head.barrier.wait();

  const double loss = from_fixed(head.loss_sum[step % 2]) / static_cast<double>(config_.batch);
  if (rank_ == 0) head.loss_sum[(step + 1) % 2] = 0;  // nobody touches that cell between these two barriers
  ++adam_step_;
  const double warmup = static_cast<double>(adam_step_) / static_cast<double>(config_.warmup_steps);
  update_own_rows(static_cast<float>(config_.learning_rate * std::min(1.0, warmup)));
  exchange_weights();
  return loss;
}

void Trainer::add_gradients_of(std::size_t slot) {
  Shared::Head& head = shared_.head();
  const ModelConfig& model = config_.model;
  const std::size_t length = model.sample_tokens();
  const std::size_t start = sample_start(config_.seed, steps_done(), slot, text_.tokens.size() - length + 1);
  const std::span tokens(text_.tokens.data() + start, length);
  const std::size_t table = dense_.size();
  auto row_at = [&](std::size_t t) { return table + table_row(model, tokens.first(t + model.context)) * model.hidden; };

  for (std::size_t t = 0; t < model.positions; ++t) {
    const std::uint16_t* row = &weights_[row_at(t)];
    for (std::size_t j = 0; j < model.hidden; ++j) table_[t * model.hidden + j] = float_of_bf16(row[j]);
  }
  double loss = model_.loss_and_gradient(tokens, dense_, table_, dense_gradient_, table_gradient_);

  if (std::size_t outside = clip(dense_gradient_) + clip(table_gradient_); outside > 0)
    std::atomic_ref(head.clipped).fetch_add(outside, std::memory_order_relaxed);
  add_fixed(dense_sum_.data(), dense_gradient_.data(), dense_sum_.size());
  for (std::size_t t = 0; t < model.positions; ++t) {
    std::int64_t* row = &shared_.gradient()[row_at(t)];
    for (std::size_t j = 0; j < model.hidden; ++j)
      std::atomic_ref(row[j]).fetch_add(to_fixed(table_gradient_[t * model.hidden + j]), std::memory_order_relaxed);
  }
  const float bounded = loss < kContributionMax ? static_cast<float>(loss) : static_cast<float>(kContributionMax);
  std::atomic_ref(head.loss_sum[steps_done() % 2]).fetch_add(to_fixed(bounded), std::memory_order_relaxed);
}

void Trainer::update_own_rows(float rate) {
  const auto scale = static_cast<float>(1 / static_cast<double>(config_.batch));
  const auto correct1 = static_cast<float>(1 / (1 - power(kBeta1, adam_step_)));
  const auto correct2 = static_cast<float>(1 / (1 - power(kBeta2, adam_step_)));
  for (const OwnRows& own : own_) {
    std::int64_t* __restrict sum = shared_.gradient().data() + own.global;
    float* __restrict w = master_.data() + own.local;
    float* __restrict m = m_.data() + own.local;
    float* __restrict v = v_.data() + own.local;
    for (std::size_t i = 0; i < own.count; ++i) {
      const float g = static_cast<float>(from_fixed(sum[i])) * scale;
      sum[i] = 0;
      m[i] = kBeta1 * m[i] + (1 - kBeta1) * g;
      v[i] = kBeta2 * v[i] + (1 - kBeta2) * g * g;
      w[i] -= rate * (m[i] * correct1) / (std::sqrt(v[i] * correct2) + kEpsilon);
    }
  }
}

void Trainer::exchange_weights() {
  auto shared = shared_.weights();
  for (const OwnRows& own : own_)
    for (std::size_t i = 0; i < own.count; ++i) shared[own.global + i] = bf16_of_float(master_[own.local + i]);
  shared_.head().barrier.wait();
  // The next write to `shared` comes after the next step's first barrier, which waits for this copy on all ranks.
  std::ranges::copy(shared, weights_.begin());
}

std::vector<StatePiece> Trainer::state() {
  std::vector<StatePiece> pieces;
  for (OwnRows& own : own_) {
    const WeightTensor& tensor = own.tensor;
    std::vector<std::uint64_t> offset(tensor.shape.size(), 0), part = tensor.shape;
    offset[0] = own.rows.begin;
    part[0] = own.rows.count();
    auto sharded = [&](const char* prefix, std::vector<float>& values) {
      pieces.push_back({.name = prefix + tensor.name,
                        .shape = tensor.shape,
                        .offset = offset,
                        .part = part,
                        .bytes = std::as_writable_bytes(std::span(values).subspan(own.local, own.count))});
    };
    sharded("master.", master_);
    sharded("adam.m.", m_);
    sharded("adam.v.", v_);
    pieces.push_back({.name = "model." + tensor.name,
                      .type = StateType::kBfloat16,
                      .shape = tensor.shape,
                      .offset = std::vector<std::uint64_t>(tensor.shape.size(), 0),
                      .part = tensor.shape,
                      .replicated = true,
                      .bytes = std::as_writable_bytes(std::span(weights_).subspan(tensor.offset, tensor.size()))});
  }
  pieces.push_back({.name = "adam.step",
                    .type = StateType::kInt64,
                    .replicated = true,
                    .bytes = std::as_writable_bytes(std::span(&adam_step_, 1))});
  return pieces;
}

bool Trainer::weights_agree() const {
  return std::ranges::all_of(own_, [&](const OwnRows& own) {
    for (std::size_t i = 0; i < own.count; ++i)
      if (weights_[own.global + i] != bf16_of_float(master_[own.local + i])) return false;
    return true;
  });
}

void Trainer::gather() {
  for (const OwnRows& own : own_)
    std::copy_n(master_.data() + own.local, own.count, shared_.gathered().data() + own.global);
  shared_.head().barrier.wait();
}

}  // namespace char_lm
