#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"

namespace cairn::format {

/// All of safetensors' element types. The numbers are on disk: never renumber.
enum class DType : std::uint8_t {
  kBool = 1,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3Fnuz,
  kF8E5M2Fnuz,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

/// Bits per element: 4, 6, 8, ... 64. A shard's bytes hold its elements row-major without gaps; their bit count must be
/// a multiple of 8.
std::uint32_t bits_of(DType dtype);
std::string_view name_of(DType dtype);  // safetensors' names: "BF16"
Result<DType> dtype_of(std::string_view name);
Result<DType> dtype_of(std::uint8_t number);

inline constexpr std::size_t kDimensionsMax = 32;
using Shape = std::vector<std::uint64_t>;  // elements per dimension; empty: a 0-d tensor of one element

/// Half-open ranges per dimension: [offset, offset + shape), in elements.
struct Box {
  std::vector<std::uint64_t> offset;
  Shape shape;
  bool operator==(const Box&) const = default;
  auto operator<=>(const Box&) const = default;
};

/// Number of elements; checked. errors: kInvalid  overflow
Result<std::uint64_t> elements(const Shape& shape);
/// Bytes of `count` elements. errors: kInvalid  overflow, or not whole bytes
Result<std::uint64_t> bytes_of(DType dtype, std::uint64_t count);
/// errors: kInvalid  names the dimension: wrong rank, outside the shape, overflow
Result<void> check_box(const Box& box, const Shape& global_shape);
Box whole(const Shape& shape);
std::string text(const Box& box);  // "[0:2048, 1024:4096]"

}  // namespace cairn::format
