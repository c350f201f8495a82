#include "tests/sim/job.h"

#include <algorithm>

namespace cairn::sim {

using format::Box;
using format::DType;

std::vector<std::byte> tensor_bytes(const Payload& payload, const TensorSpec& tensor, const Box& box) {
  const auto width = format::bits_of(tensor.dtype) / 8;
  std::uint64_t count = 1;
  for (auto n : box.shape) count *= n;
  std::vector<std::byte> out(count * width);
  if (count == 0) return out;
  // Rows are contiguous along the last dimension: at most two dimensions are used.
  if (box.shape.size() < 2) {
    payload.fill(box.offset.empty() ? 0 : box.offset[0] * width, out);
    return out;
  }
  const auto row = box.shape[1] * width;
  for (std::uint64_t r = 0; r < box.shape[0]; ++r)
    payload.fill(((box.offset[0] + r) * tensor.shape[1] + box.offset[1]) * width, std::span(out).subspan(r * row, row));
  return out;
}

Box part_of(const TensorSpec& tensor, std::size_t axis, std::uint32_t parts, std::uint32_t rank) {
  auto box = format::whole(tensor.shape);
  if (tensor.shape.empty()) return box;
  axis %= tensor.shape.size();
  const auto length = tensor.shape[axis];
  // Quadratic borders: no two ranks hold the same amount.
  auto border = [&](std::uint64_t i) {
    return length * i * (i + 1) / (static_cast<std::uint64_t>(parts) * (parts + 1));
  };
  box.offset[axis] = border(rank);
  box.shape[axis] = border(rank + 1) - border(rank);
  return box;
}

std::vector<TensorSpec> draw_tensors(Prng& draw, std::uint32_t bytes_max) {
  using Kind = TensorSpec::Kind;
  std::vector<TensorSpec> out;
  const auto rows = draw.between(1, 24);
  const auto columns = std::max<std::uint64_t>(1, draw.below(bytes_max) / rows / 4);
  out.push_back({"layer.weight", DType::kF32, {rows, columns}, Kind::kSplit});
  out.push_back({"bias", DType::kBF16, {draw.between(1, 2000)}, Kind::kSplit});
  if (draw.chance(0.5)) out.push_back({"norm", DType::kF16, {draw.between(1, 500)}, Kind::kHolder});
  if (draw.chance(0.5)) out.push_back({"step", DType::kI64, {}, Kind::kReplicated});
  if (draw.chance(0.3)) out.push_back({"empty", DType::kU8, {0, 5}, Kind::kReplicated});
  return out;
}

}  // namespace cairn::sim
