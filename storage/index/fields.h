#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

// Fixed fields of index values and small files. Little-endian, but big-endian in keys, so that they sort by number.

namespace cairn::storage {

static_assert(std::endian::native == std::endian::little, "the formats on disk are little-endian");

template <std::unsigned_integral T>
void put_field(std::string& out, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  out.append(raw, sizeof(T));
}
template <std::unsigned_integral T>
void put_field(std::span<std::byte> out, std::size_t offset, T value) {
  std::memcpy(out.subspan(offset, sizeof(T)).data(), &value, sizeof(T));
}
/// The field must lie inside: callers check sizes first.
template <std::unsigned_integral T>
T get_field(std::string_view from, std::size_t offset) {
  T value;
  std::memcpy(&value, from.substr(offset, sizeof(T)).data(), sizeof(T));
  return value;
}
template <std::unsigned_integral T>
T get_field(std::span<const std::byte> from, std::size_t offset) {
  T value;
  std::memcpy(&value, from.subspan(offset, sizeof(T)).data(), sizeof(T));
  return value;
}
template <std::unsigned_integral T>
void put_key_field(std::string& out, T value) {
  for (int shift = 8 * static_cast<int>(sizeof(T)) - 8; shift >= 0; shift -= 8)
    out.push_back(static_cast<char>(value >> shift & 0xff));
}

}  // namespace cairn::storage
