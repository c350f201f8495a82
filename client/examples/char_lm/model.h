#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace char_lm {

/// A neural language model after Bengio et al. (2003), with a hashed table of the last three characters beside it:
///
///   x      = embeddings of the last `context` characters, joined
///   h      = tanh(x W1 + b1 + table[hash of the last three characters])
///   logits = gain * (h W2) + b2
///
/// The table makes the state as large as wanted at little computation. The default sizes divide by neither 3 nor 4 on
/// purpose: uneven shards are the usual case in practice.
struct ModelConfig {
  std::size_t vocab = 0;          // characters of the text's alphabet
  std::size_t context = 13;       // characters seen before each predicted one
  std::size_t embed = 19;         // numbers per character
  std::size_t hidden = 158;       // width of h
  std::size_t table_rows = 2039;  // rows of the table, 1 and more
  std::size_t positions = 64;     // predicted characters per sample

  std::size_t sample_tokens() const { return context + positions; }
};

/// One weight tensor, and where it lies in the flat order of all of them.
struct WeightTensor {
  std::string name;
  std::vector<std::uint64_t> shape;  // 1 or 2 dimensions
  std::size_t rows = 0, cols = 0;    // dimension 0, and the elements of one row
  std::size_t offset = 0;            // elements before it
  std::size_t fan_in = 1;            // initial values are uniform with variance 1 / fan_in; 0: all equal `start`
  float start = 0;
  std::size_t size() const { return rows * cols; }
};

/// Fixed order: embed, hidden.weight, hidden.bias, out.weight, out.bias, out.gain (the dense ones), then table.
std::vector<WeightTensor> weight_tensors(const ModelConfig& config);
/// Elements before the table, and of all tensors.
std::size_t dense_size(const ModelConfig& config);
std::size_t weight_count(const ModelConfig& config);

/// The table row of the character after `before` (its last three count).
std::size_t table_row(const ModelConfig& config, std::span<const std::uint8_t> before);

/// Loss and gradient of one sample. Sums run in a fixed order (no reassociation, no contraction, own exp for float), so
/// equal input gives equal bits, whichever rank computes it.
template <class Real>
class Model {
 public:
  explicit Model(const ModelConfig& config);

  /// Mean cross-entropy of the sample in nats; gradients of it into `dense_gradient` and `table_gradient`
  /// (overwritten). shapes: tokens [context + positions]; dense, dense_gradient [dense_size]; table, table_gradient
  ///         [positions, hidden]: the row of each position, and the gradient of that use of it
  double loss_and_gradient(std::span<const std::uint8_t> tokens, std::span<const Real> dense,
                           std::span<const Real> table, std::span<Real> dense_gradient, std::span<Real> table_gradient);

 private:
  ModelConfig config_;
  std::vector<WeightTensor> tensors_;
  std::vector<Real> x_, h_, z_, dz_, dx_;  // one row per position: input, hidden, h W2, gradient of h W2, of x
};

}  // namespace char_lm
