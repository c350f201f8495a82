#pragma once

#include <cstddef>
#include <cstdint>

namespace cairn {

inline constexpr std::uint64_t kKiB = 1024;
inline constexpr std::uint64_t kMiB = 1024 * kKiB;
inline constexpr std::uint64_t kGiB = 1024 * kMiB;

/// O_DIRECT alignment of memory, file offsets and lengths.
inline constexpr std::uint64_t kSectorBytes = 4096;
/// Bytes covered by one stored CRC32C.
inline constexpr std::uint64_t kBlockBytes = 64 * kKiB;
/// One aligned buffer: what a socket receives into and O_DIRECT writes from.
inline constexpr std::uint64_t kUnitBytes = kMiB;
inline constexpr std::uint64_t kChunkBytesMax = 64 * kMiB;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t step) {
  return (value + step - 1) / step * step;
}
constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t step) {
  return value / step * step;
}

/// a + b and a * b, or false when the result does not fit: all arithmetic on lengths from a peer goes through these.
inline bool add_checked(std::uint64_t a, std::uint64_t b, std::uint64_t& out) {
  return !__builtin_add_overflow(a, b, &out);
}
inline bool mul_checked(std::uint64_t a, std::uint64_t b, std::uint64_t& out) {
  return !__builtin_mul_overflow(a, b, &out);
}

}  // namespace cairn
