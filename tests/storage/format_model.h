#pragma once

#include <catch2/catch.hpp>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "storage/format/box.h"
#include "storage/format/manifest.h"

/// A small language for the tests of storage/format: random layouts, and models that go element by element.
namespace cairn::format::model {

/// The seed of a property test: fixed, or from CAIRN_TEST_SEED. A failing check prints it.
inline std::uint64_t seed() {
  const char* given = std::getenv("CAIRN_TEST_SEED");
  return given ? std::strtoull(given, nullptr, 10) : 20240229;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  /// In [low, high].
  std::uint64_t in(std::uint64_t low, std::uint64_t high) { return low + engine_() % (high - low + 1); }
  bool chance(unsigned percent) { return in(0, 99) < percent; }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

inline Box box(std::vector<std::uint64_t> offset, Shape shape) {
  return {.offset = std::move(offset), .shape = std::move(shape)};
}

/// Row-major number of an element given by its coordinates in the tensor.
inline std::uint64_t linear(const std::vector<std::uint64_t>& at, const Box& in) {
  std::uint64_t out = 0;
  for (std::size_t d = 0; d < at.size(); ++d) out = out * in.shape[d] + (at[d] - in.offset[d]);
  return out;
}

/// Calls `visit(coordinates)` for every element of a box, row-major.
template <class Visit>
void each_element(const Box& box, Visit visit) {
  if (empty(box)) return;
  auto at = box.offset;
  for (;;) {
    visit(std::as_const(at));
    std::size_t d = at.size();
    while (d > 0 && ++at[d - 1] == box.offset[d - 1] + box.shape[d - 1]) --d, at[d] = box.offset[d];
    if (d == 0) return;
  }
}

inline bool holds(const Box& box, const std::vector<std::uint64_t>& at) {
  for (std::size_t d = 0; d < at.size(); ++d)
    if (at[d] < box.offset[d] || at[d] >= box.offset[d] + box.shape[d]) return false;
  return true;
}

inline Shape random_shape(Random& random, std::size_t dimensions_max, std::uint64_t size_max) {
  Shape shape(random.in(0, dimensions_max));
  for (auto& size : shape) size = random.in(1, size_max);
  return shape;
}

inline Box random_box(Random& random, const Shape& shape) {
  Box out = whole(shape);
  for (std::size_t d = 0; d < shape.size(); ++d) {
    out.offset[d] = random.in(0, shape[d]);
    out.shape[d] = random.in(0, shape[d] - out.offset[d]);
  }
  return out;
}

/// A tiling made by cutting boxes again and again.
inline std::vector<Box> random_tiling(Random& random, const Shape& shape, std::size_t cuts) {
  std::vector<Box> boxes{whole(shape)};
  for (std::size_t i = 0; i < cuts && !shape.empty(); ++i) {
    auto& one = boxes[random.in(0, boxes.size() - 1)];
    const auto d = random.in(0, shape.size() - 1);
    if (one.shape[d] < 2) continue;
    Box second = one;
    const auto keep = random.in(1, one.shape[d] - 1);
    one.shape[d] = keep;
    second.offset[d] += keep;
    second.shape[d] -= keep;
    boxes.push_back(std::move(second));
  }
  return boxes;
}

/// Five boxes that no straight cut separates, scaled into a square of 3 k elements a side.
inline std::vector<Box> pinwheel(std::uint64_t k) {
  return {box({0, 0}, {k, 2 * k}), box({0, 2 * k}, {2 * k, k}), box({k, 0}, {2 * k, k}), box({2 * k, k}, {k, 2 * k}),
          box({k, k}, {k, k})};
}

}  // namespace cairn::format::model
