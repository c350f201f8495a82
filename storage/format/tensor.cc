#include "storage/format/tensor.h"

#include <fmt/format.h>

#include <array>

#include "proto/common/units.h"

namespace cairn::format {
namespace {

struct DTypeFacts {
  std::string_view name;
  std::uint32_t bits;
};

// In the order of the enumeration, which begins at 1.
constexpr std::array<DTypeFacts, 22> kDTypes{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};
static_assert(static_cast<std::size_t>(DType::kU64) == kDTypes.size());

const DTypeFacts& facts(DType dtype) {
  return kDTypes[static_cast<std::size_t>(dtype) - 1];
}

}  // namespace

std::uint32_t bits_of(DType dtype) {
  return facts(dtype).bits;
}

std::string_view name_of(DType dtype) {
  return facts(dtype).name;
}

Result<DType> dtype_of(std::string_view name) {
  for (std::size_t i = 0; i < kDTypes.size(); ++i)
    if (kDTypes[i].name == name) return static_cast<DType>(i + 1);
  return fail(Errc::kInvalid, fmt::format("unknown dtype '{}'", name.substr(0, 32)));
}

Result<DType> dtype_of(std::uint8_t number) {
  if (number == 0 || number > kDTypes.size())
    return fail(Errc::kInvalid, fmt::format("unknown dtype number {}", number));
  return static_cast<DType>(number);
}

Result<std::uint64_t> elements(const Shape& shape) {
  std::uint64_t count = 1;
  bool zero = false, overflow = false;
  for (const auto size : shape) {
    // A zero size makes the count zero whatever the others are, so it cannot overflow.
    if (size == 0)
      zero = true;
    else
      overflow = overflow || !mul_checked(count, size, count);
  }
  if (zero) return 0;
  if (overflow) return fail(Errc::kInvalid, fmt::format("shape {}: more than 2^64 elements", text(whole(shape))));
  return count;
}

Result<std::uint64_t> bytes_of(DType dtype, std::uint64_t count) {
  const std::uint32_t bits = bits_of(dtype);
  if (bits % 8 == 0) {
    std::uint64_t bytes = 0;
    if (!mul_checked(count, bits / 8, bytes))
      return fail(Errc::kInvalid, fmt::format("{} elements of {}: more than 2^64 bytes", count, name_of(dtype)));
    return bytes;
  }
  const unsigned __int128 total = static_cast<unsigned __int128>(count) * bits;
  if (total % 8 != 0)
    return fail(Errc::kInvalid, fmt::format("{} elements of {}: not a whole number of bytes", count, name_of(dtype)));
  return static_cast<std::uint64_t>(total / 8);  // bits < 8, so this is less than count
}

Result<void> check_box(const Box& box, const Shape& global_shape) {
  if (box.offset.size() != box.shape.size() || box.shape.size() != global_shape.size())
    return fail(Errc::kInvalid, fmt::format("box {} has {} offsets and {} sizes, the tensor {} dimensions", text(box),
                                            box.offset.size(), box.shape.size(), global_shape.size()));
  if (box.shape.size() > kDimensionsMax)
    return fail(Errc::kInvalid,
                fmt::format("{} dimensions, at most {} are possible", box.shape.size(), kDimensionsMax));
  for (std::size_t d = 0; d < box.shape.size(); ++d) {
    std::uint64_t end = 0;
    if (!add_checked(box.offset[d], box.shape[d], end) || end > global_shape[d])
      return fail(Errc::kInvalid,
                  fmt::format("box {} reaches outside dimension {} of size {}", text(box), d, global_shape[d]));
  }
  CHECK_OK(elements(box.shape));
  return {};
}

Box whole(const Shape& shape) {
  return {.offset = std::vector<std::uint64_t>(shape.size(), 0), .shape = shape};
}

std::string text(const Box& box) {
  std::string out = "[";
  for (std::size_t d = 0; d < box.shape.size(); ++d) {
    const std::uint64_t begin = d < box.offset.size() ? box.offset[d] : 0;
    // Only a box that check_box refuses can overflow here; it is printed with its size instead of its end.
    std::uint64_t end = 0;
    if (d != 0) out += ", ";
    out += add_checked(begin, box.shape[d], end) ? fmt::format("{}:{}", begin, end)
                                                 : fmt::format("{}:+{}", begin, box.shape[d]);
  }
  return out + "]";
}

}  // namespace cairn::format
