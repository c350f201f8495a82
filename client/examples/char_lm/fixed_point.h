#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace char_lm {

/// Gradients as 64-bit fixed point. Integer sums do not depend on their order, so the sum over a batch has the same
/// bits however the samples are spread over ranks: that is why a job may resume on another number of ranks and still
/// compute the same numbers.
///
/// Range: each contribution is rounded to a multiple of 2^-40 and clipped to +-2^7; up to 2^15 of them are summed.
inline constexpr int kFractionBits = 40;
inline constexpr double kContributionMax = 128;
inline constexpr std::int64_t kContributionsMax = std::int64_t{1} << 15;
inline constexpr double kOne = static_cast<double>(std::int64_t{1} << kFractionBits);
static_assert(kContributionMax * kOne * kContributionsMax <= 0x1p62, "a sum of all contributions cannot overflow");
static_assert(kContributionMax * kOne < 0x1p51, "the rounding trick of to_fixed() is exact only below this");

/// `value` to the nearest multiple (ties to even). |value| <= kContributionMax.
inline std::int64_t to_fixed(float value) {
  // Adding 1.5 * 2^52 puts the integer into the low bits of the double; unlike llrint, this vectorises.
  constexpr double kShift = 0x1.8p52;
  return std::bit_cast<std::int64_t>(static_cast<double>(value) * kOne + kShift) - std::bit_cast<std::int64_t>(kShift);
}

inline double from_fixed(std::int64_t value) {
  return static_cast<double>(value) / kOne;
}

/// Clips `values` to +-kContributionMax and counts how many were outside; NaN becomes 0 and is counted too.
inline std::size_t clip(std::span<float> values) {
  constexpr auto kMax = static_cast<float>(kContributionMax);
  std::size_t outside = 0;
  for (float& value : values) {
    outside += !(std::abs(value) <= kMax);
    value = value > kMax ? kMax : value < -kMax ? -kMax : value == value ? value : 0;
  }
  return outside;
}

/// sum[i] += fixed point of values[i]. The values are clipped before.
inline void add_fixed(std::int64_t* __restrict sum, const float* __restrict values, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) sum[i] += to_fixed(values[i]);
}

}  // namespace char_lm
