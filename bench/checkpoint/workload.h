#pragma once

#include <cairn/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace cairn::bench {

/// One rank's part of a tensor. Its bytes stand at `offset` of the rank's memory, row-major.
struct Part {
  std::uint32_t tensor = 0;  // number, for the content
  std::string name;
  DType dtype = DType::bf16;
  std::vector<std::uint64_t> global_shape;
  Box box;
  std::uint64_t offset = 0, bytes = 0;
};
struct RankLayout {
  std::vector<Part> parts;
  std::uint64_t bytes = 0;  // each part begins at a multiple of 64, so this may exceed their sum
  std::uint64_t wanted() const;
};

/// The MLPerf Storage checkpoint of a Llama-3 model: bf16 weights and fp32 optimizer state (14 bytes a parameter), its
/// layers and tensors over its ranks, every element count times `scale`.
/// source: MLPerf Storage v2 checkpointing rules; shapes of Llama 3 (8B, 70B, 405B) and of the rules' 1T model
struct Model {
  std::string name;
  std::uint64_t layers, hidden, ffn, heads, kv_heads, vocabulary;
  std::uint32_t tensor_parallel, pipeline_parallel, data_parallel;
  bool shards_weights;  // ZeRO-3: weights are split over data-parallel ranks too; else only the first group saves them
  std::uint64_t parameters() const;
};
const Model* model_named(const std::string& name);  // nullptr: none

struct Parallelism {
  std::uint32_t tensor = 1, pipeline = 1, data = 1;
  std::uint32_t ranks() const { return tensor * pipeline * data; }
};
std::vector<RankLayout> lay_out(const Model& model, double scale, Parallelism parallelism);
/// The same tensors over another number of ranks, every tensor cut by its columns (the last dimension): the hardest
/// case for a restore, each wanted row a strided piece.
std::vector<RankLayout> by_columns(const std::vector<RankLayout>& saved, std::uint32_t ranks);

enum class Content { kWeights, kRandom };
/// Bytes [offset, offset + out.size()) of a tensor: a function of (seed, tensor, offset) alone, never constant.
/// kWeights: random signs and mantissas, exponents as of normally distributed weights. Offsets are multiples of 8.
void fill(std::span<std::byte> out, std::uint64_t seed, std::uint32_t tensor, DType dtype, std::uint64_t offset,
          Content content);
/// Fills (or with `check` compares) a rank's memory; returns the number of wrong bytes. `every`: one row block in so
/// many.
std::uint64_t generate(const RankLayout& layout, std::span<std::byte> memory, std::uint64_t seed, Content content,
                       bool check, std::uint64_t every = 1);

}  // namespace cairn::bench
