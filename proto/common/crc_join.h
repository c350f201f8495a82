#pragma once

#include <cstdint>

namespace cairn {

/// crc32c(B, crc32c(A, seed)) from `a` = crc32c(A, seed) and `b` = crc32c(B), without the bytes of B.
std::uint32_t crc32c_join(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b);

}  // namespace cairn
