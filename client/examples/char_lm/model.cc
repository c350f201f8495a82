#include "client/examples/char_lm/model.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <type_traits>

#include "client/examples/char_lm/text.h"

namespace char_lm {
namespace {

enum : std::size_t { kEmbed, kHiddenWeight, kHiddenBias, kOutWeight, kOutBias, kOutGain, kTable };

/// e^x. For float our own polynomial: the C library picks its variant by the processor, and this one vectorises.
float exp_of(float x) {
  x = std::clamp(x, -87.0F, 87.0F);
  float shifted = x * 1.44269504F + 12582912.0F;  // adds 1.5 * 2^23: rounds to the nearest integer
  float n = shifted - 12582912.0F;
  float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln 2 in two parts (Cody and Waite)
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  std::int32_t exponent = static_cast<std::int32_t>(n) + 127;
  return p * std::bit_cast<float>(exponent << 23);
}
double exp_of(double x) {
  return std::exp(x);
}

template <class Real>
Real tanh_of(Real x) {
  return 1 - 2 / (exp_of(2 * x) + 1);
}

/// to += factor * from
template <class Real>
void add_scaled(Real* __restrict to, Real factor, const Real* __restrict from, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

/// Eight partial sums in an order of our own: fast, and the same with every compiler setting.
template <class Real>
Real dot(const Real* __restrict a, const Real* __restrict b, std::size_t n) {
  Real part[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (std::size_t lane = 0; lane < 8; ++lane) part[lane] += a[i + lane] * b[i + lane];
  for (std::size_t lane = 0; i < n; ++i, ++lane) part[lane] += a[i] * b[i];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

}  // namespace

std::vector<WeightTensor> weight_tensors(const ModelConfig& config) {
  const std::size_t in = config.context * config.embed;
  std::vector<WeightTensor> all(7);
  auto two = [](const char* name, std::size_t rows, std::size_t cols, std::size_t fan_in) {
    return WeightTensor{.name = name, .shape = {rows, cols}, .rows = rows, .cols = cols, .fan_in = fan_in};
  };
  auto one = [](const char* name, std::size_t rows, float start) {
    return WeightTensor{.name = name, .shape = {rows}, .rows = rows, .cols = 1, .fan_in = 0, .start = start};
  };
  all[kEmbed] = two("embed", config.vocab, config.embed, 1);
  all[kHiddenWeight] = two("hidden.weight", in, config.hidden, in);
  all[kHiddenBias] = one("hidden.bias", config.hidden, 0);
  all[kOutWeight] = two("out.weight", config.hidden, config.vocab, config.hidden);
  all[kOutBias] = one("out.bias", config.vocab, 0);
  all[kOutGain] = one("out.gain", 1, 1);
  all[kTable] = two("table", config.table_rows, config.hidden, 16);
  for (std::size_t i = 1; i < all.size(); ++i) all[i].offset = all[i - 1].offset + all[i - 1].size();
  return all;
}

std::size_t dense_size(const ModelConfig& config) {
  return weight_tensors(config)[kTable].offset;
}

std::size_t weight_count(const ModelConfig& config) {
  return dense_size(config) + config.table_rows * config.hidden;
}

std::size_t table_row(const ModelConfig& config, std::span<const std::uint8_t> before) {
  assert(before.size() >= 3);
  std::uint64_t last = 0;
  for (std::uint8_t token : before.last(3)) last = last << 8 | token;
  return mix(last) % config.table_rows;
}

template <class Real>
Model<Real>::Model(const ModelConfig& config)
    : config_(config),
      tensors_(weight_tensors(config)),
      x_(config.positions * config.context * config.embed),
      h_(config.positions * config.hidden),
      z_(config.positions * config.vocab),
      dz_(config.positions * config.vocab),
      dx_(config.context * config.embed) {}

template <class Real>
double Model<Real>::loss_and_gradient(std::span<const std::uint8_t> tokens, std::span<const Real> dense,
                                      std::span<const Real> table, std::span<Real> dense_gradient,
                                      std::span<Real> table_gradient) {
  const auto [vocab, context, embed, hidden, table_rows, positions] = config_;
  const std::size_t in = context * embed;
  assert(tokens.size() == config_.sample_tokens() && dense.size() == tensors_[kTable].offset);
  auto weights = [&](std::size_t tensor) { return dense.data() + tensors_[tensor].offset; };
  auto gradient = [&](std::size_t tensor) { return dense_gradient.data() + tensors_[tensor].offset; };
  const Real gain = *weights(kOutGain);
  const Real scale = Real(1) / Real(positions);

  double loss = 0;
  for (std::size_t t = 0; t < positions; ++t) {
    Real* x = &x_[t * in];
    for (std::size_t c = 0; c < context; ++c)
      std::copy_n(weights(kEmbed) + tokens[t + c] * embed, embed, x + c * embed);

    Real* h = &h_[t * hidden];
    for (std::size_t j = 0; j < hidden; ++j) h[j] = weights(kHiddenBias)[j] + table[t * hidden + j];
    for (std::size_t k = 0; k < in; ++k) add_scaled(h, x[k], weights(kHiddenWeight) + k * hidden, hidden);
    for (std::size_t j = 0; j < hidden; ++j) h[j] = tanh_of(h[j]);

    Real* z = &z_[t * vocab];
    std::fill_n(z, vocab, Real(0));
    for (std::size_t j = 0; j < hidden; ++j) add_scaled(z, h[j], weights(kOutWeight) + j * vocab, vocab);

    // Softmax; dlogits = scale * (probability - is_target) lands in dz, the gain is applied below.
    Real* d = &dz_[t * vocab];
    Real most = gain * z[0] + weights(kOutBias)[0];
    for (std::size_t v = 0; v < vocab; ++v) {
      d[v] = gain * z[v] + weights(kOutBias)[v];
      most = std::max(most, d[v]);
    }
    const std::uint8_t target = tokens[t + context];
    const Real target_logit = d[target] - most;
    Real sum = 0;
    for (std::size_t v = 0; v < vocab; ++v) d[v] = exp_of(d[v] - most);
    for (std::size_t v = 0; v < vocab; ++v) sum += d[v];
    loss += std::log(static_cast<double>(sum)) - static_cast<double>(target_logit);
    const Real factor = scale / sum;
    for (std::size_t v = 0; v < vocab; ++v) d[v] *= factor;
    d[target] -= scale;
  }

  std::ranges::fill(dense_gradient, Real(0));
  for (std::size_t t = 0; t < positions; ++t) {
    const Real* x = &x_[t * in];
    const Real* h = &h_[t * hidden];
    Real* d = &dz_[t * vocab];
    for (std::size_t v = 0; v < vocab; ++v) gradient(kOutBias)[v] += d[v];
    *gradient(kOutGain) += dot(d, &z_[t * vocab], vocab);
    for (std::size_t v = 0; v < vocab; ++v) d[v] *= gain;

    Real* dh = &table_gradient[t * hidden];  // the table row is added inside the tanh: its gradient is that of the sum
    for (std::size_t j = 0; j < hidden; ++j) {
      add_scaled(gradient(kOutWeight) + j * vocab, h[j], d, vocab);
      dh[j] = dot(d, weights(kOutWeight) + j * vocab, vocab) * (1 - h[j] * h[j]);
    }
    for (std::size_t j = 0; j < hidden; ++j) gradient(kHiddenBias)[j] += dh[j];
    for (std::size_t k = 0; k < in; ++k) {
      add_scaled(gradient(kHiddenWeight) + k * hidden, x[k], dh, hidden);
      dx_[k] = dot(dh, weights(kHiddenWeight) + k * hidden, hidden);
    }
    for (std::size_t c = 0; c < context; ++c)
      add_scaled(gradient(kEmbed) + tokens[t + c] * embed, Real(1), &dx_[c * embed], embed);
  }
  return loss / static_cast<double>(positions);
}

template class Model<float>;
template class Model<double>;

}  // namespace char_lm
