#include "bench/checkpoint/workload.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>

namespace cairn::bench {
namespace {

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

std::uint64_t element_bytes(DType dtype) {
  return dtype == DType::bf16 ? 2 : 4;
}

/// Numbers whose exponents are spread like those of N(0, 0.02): the leading zeros of random bits are geometric.
std::uint64_t like_weights(std::uint64_t random, DType dtype) {
  const std::uint64_t below = static_cast<std::uint64_t>(std::countl_zero(random | 1)) & 15;
  if (dtype == DType::bf16) {
    const std::uint64_t exponents = (121 - below) * 0x0080008000800080ull;
    return (random & 0x807f807f807f807full) + (exponents & 0x7f807f807f807f80ull);
  }
  const std::uint64_t exponents = (121 - below) * 0x0080000000800000ull;
  return (random & 0x807fffff807fffffull) + (exponents & 0x7f8000007f800000ull);
}

std::uint64_t product(const std::vector<std::uint64_t>& shape) {
  std::uint64_t n = 1;
  for (auto d : shape) n *= d;
  return n;
}

struct Builder {
  std::vector<RankLayout> ranks;
  std::uint32_t tensors = 0;

  void add(std::uint32_t rank, std::uint32_t tensor, const std::string& name, DType dtype,
           std::vector<std::uint64_t> shape, Box box) {
    auto& to = ranks[rank];
    const auto bytes = product(box.shape) * element_bytes(dtype);
    to.parts.push_back({tensor, name, dtype, std::move(shape), std::move(box), to.bytes, bytes});
    to.bytes = (to.bytes + bytes + 63) / 64 * 64;
  }
  /// Rows of `shape` spread over `holders`, as evenly as they go.
  void split(const std::string& name, DType dtype, std::vector<std::uint64_t> shape,
             const std::vector<std::uint32_t>& holders) {
    const auto tensor = tensors++;
    const auto rows = shape[0], n = static_cast<std::uint64_t>(holders.size());
    for (std::uint64_t i = 0; i < n; ++i) {
      const auto first = rows * i / n, last = rows * (i + 1) / n;
      Box box{std::vector<std::uint64_t>(shape.size(), 0), shape};
      box.offset[0] = first;
      box.shape[0] = last - first;
      add(holders[i], tensor, name, dtype, shape, std::move(box));
    }
  }
};

}  // namespace

std::uint64_t RankLayout::wanted() const {
  std::uint64_t n = 0;
  for (const auto& p : parts) n += p.bytes;
  return n;
}

std::uint64_t Model::parameters() const {
  const auto kv = hidden / heads * kv_heads;
  const auto layer = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * ffn + 2 * hidden;
  return layers * layer + 2 * vocabulary * hidden + hidden;
}

const Model* model_named(const std::string& name) {
  static const std::array<Model, 4> kModels{{
      {"8b", 32, 4096, 14336, 32, 8, 128256, 1, 1, 8, true},
      {"70b", 80, 8192, 28672, 128, 8, 128256, 8, 1, 8, true},
      {"405b", 126, 16384, 53248, 128, 8, 128256, 8, 32, 2, false},
      {"1t", 128, 25872, 98304, 192, 32, 128256, 8, 64, 2, false},
  }};
  for (const auto& m : kModels)
    if (m.name == name) return &m;
  return nullptr;
}

std::vector<RankLayout> lay_out(const Model& m, double scale, Parallelism p) {
  Builder b;
  b.ranks.resize(p.ranks());
  const auto scaled = [&](std::uint64_t rows) {
    return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::llround(static_cast<double>(rows) * scale)));
  };
  const auto rank = [&](std::uint32_t stage, std::uint32_t data, std::uint32_t tensor) {
    return (stage * p.data + data) * p.tensor + tensor;
  };
  const auto holders = [&](std::uint32_t stage) {
    std::vector<std::uint32_t> out;
    for (std::uint32_t d = 0; d < (m.shards_weights ? p.data : 1); ++d)
      for (std::uint32_t t = 0; t < p.tensor; ++t) out.push_back(rank(stage, d, t));
    return out;
  };
  const auto kv = m.hidden / m.heads * m.kv_heads;
  b.split("model.embed", DType::bf16, {scaled(m.vocabulary), m.hidden}, holders(0));
  for (std::uint64_t l = 0; l < m.layers; ++l) {
    const auto on = holders(static_cast<std::uint32_t>(l * p.pipeline / m.layers));
    const auto layer = "model.layers." + std::to_string(l) + ".";
    b.split(layer + "input_norm", DType::bf16, {scaled(m.hidden)}, on);
    b.split(layer + "attention.qkv", DType::bf16, {scaled(m.hidden + 2 * kv), m.hidden}, on);
    b.split(layer + "attention.out", DType::bf16, {scaled(m.hidden), m.hidden}, on);
    b.split(layer + "post_norm", DType::bf16, {scaled(m.hidden)}, on);
    b.split(layer + "mlp.gate_up", DType::bf16, {scaled(2 * m.ffn), m.hidden}, on);
    b.split(layer + "mlp.down", DType::bf16, {scaled(m.ffn), m.hidden}, on);
  }
  b.split("model.norm", DType::bf16, {scaled(m.hidden)}, holders(p.pipeline - 1));
  b.split("model.head", DType::bf16, {scaled(m.vocabulary), m.hidden}, holders(p.pipeline - 1));
  std::vector<std::uint32_t> everyone;
  for (std::uint32_t r = 0; r < p.ranks(); ++r) everyone.push_back(r);
  // Even, so that a rank's part is whole 8-byte words.
  assert(p.ranks() > 0);
  const auto flat = scaled(m.parameters()) / (2ull * p.ranks()) * (2ull * p.ranks());
  for (const char* part : {"master", "exp_avg", "exp_avg_sq"}) {
    b.split(std::string("optimizer.") + part, DType::f32, {flat}, everyone);
    b.split(std::string("optimizer.scalars.") + part, DType::f32, {p.ranks(), scaled(5 * m.hidden) * 2}, everyone);
  }
  return b.ranks;
}

std::vector<RankLayout> by_columns(const std::vector<RankLayout>& saved, std::uint32_t ranks) {
  std::vector<const Part*> tensors;
  for (const auto& rank : saved)
    for (const auto& part : rank.parts) {
      if (part.tensor >= tensors.size()) tensors.resize(part.tensor + 1);
      tensors[part.tensor] = &part;
    }
  Builder b;
  b.ranks.resize(ranks);
  for (const auto* t : tensors) {
    const auto columns = t->global_shape.back();
    for (std::uint64_t r = 0; r < ranks; ++r) {
      const auto first = columns * r / ranks, last = columns * (r + 1) / ranks;
      Box box{std::vector<std::uint64_t>(t->global_shape.size(), 0), t->global_shape};
      box.offset.back() = first;
      box.shape.back() = last - first;
      b.add(static_cast<std::uint32_t>(r), t->tensor, t->name, t->dtype, t->global_shape, std::move(box));
    }
  }
  return b.ranks;
}

void fill(std::span<std::byte> out, std::uint64_t seed, std::uint32_t tensor, DType dtype, std::uint64_t offset,
          Content content) {
  const auto base = mix(seed ^ (static_cast<std::uint64_t>(tensor) << 40));
  const auto word = [&](std::uint64_t n) {
    const auto random = mix(base + n);
    return content == Content::kRandom ? random : like_weights(random, dtype);
  };
  std::size_t at = 0;
  while (at < out.size()) {
    const auto value = word((offset + at) / 8);
    const auto skip = (offset + at) % 8;  // a column cut may begin inside a word
    const auto size = std::min<std::size_t>(8 - skip, out.size() - at);
    std::memcpy(out.data() + at, reinterpret_cast<const char*>(&value) + skip, size);
    at += size;
  }
}

std::uint64_t generate(const RankLayout& layout, std::span<std::byte> memory, std::uint64_t seed, Content content,
                       bool check, std::uint64_t every) {
  std::uint64_t wrong = 0, block = 0;
  std::vector<std::byte> expected;
  for (const auto& part : layout.parts) {
    if (part.bytes == 0) continue;
    const auto element = element_bytes(part.dtype);
    // Rows of the box that are contiguous in the tensor: all of it when only the first dimension is cut.
    const auto columns = part.global_shape.back();
    const bool whole_rows = part.global_shape.size() == 1 || part.box.shape.back() == columns;
    const auto row = whole_rows ? part.bytes : part.box.shape.back() * element;
    for (std::uint64_t at = 0; at < part.bytes; at += row) {
      const auto first_row = part.box.offset[0] + (whole_rows ? 0 : at / row);
      const auto start = part.global_shape.size() == 1 ? part.box.offset[0] * element
                                                       : (first_row * columns + part.box.offset.back()) * element;
      constexpr std::uint64_t kPieceBytes = 64 * 1024;
      for (std::uint64_t in_row = 0; in_row < row; in_row += kPieceBytes) {
        if (block++ % every != 0) continue;
        const auto size = std::min(kPieceBytes, row - in_row);
        const auto to = memory.subspan(part.offset + at + in_row, size);
        if (!check) {
          fill(to, seed, part.tensor, part.dtype, start + in_row, content);
          continue;
        }
        expected.resize(size);
        fill(expected, seed, part.tensor, part.dtype, start + in_row, content);
        if (std::memcmp(expected.data(), to.data(), size) != 0)
          for (std::size_t i = 0; i < size; ++i) wrong += expected[i] != to[i];
      }
    }
  }
  return wrong;
}

}  // namespace cairn::bench
