#pragma once

#include <cassert>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cairn {

/// Immutable bytes with a shared owner. Copying a Buffer shares; it never copies bytes.
class Buffer {
 public:
  Buffer() = default;
  /// `bytes` stay valid and unchanged as long as `owner` lives.
  Buffer(std::shared_ptr<const void> owner, std::span<const std::byte> bytes)
      : owner_(std::move(owner)), bytes_(bytes) {}

  static Buffer copy_of(std::span<const std::byte> bytes) {
    auto owner = std::make_shared<std::vector<std::byte>>(bytes.begin(), bytes.end());
    std::span<const std::byte> view(*owner);
    return {std::move(owner), view};
  }
  static Buffer from(std::string text) {
    auto owner = std::make_shared<std::string>(std::move(text));
    auto view = std::as_bytes(std::span(owner->data(), owner->size()));
    return {std::move(owner), view};
  }

  /// `size_bytes` bytes from `offset_bytes`, which must lie inside; shares the owner.
  Buffer slice(std::size_t offset_bytes, std::size_t size_bytes) const {
    assert(offset_bytes <= bytes_.size() && size_bytes <= bytes_.size() - offset_bytes);
    return {owner_, bytes_.subspan(offset_bytes, size_bytes)};
  }
  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }
  std::size_t size() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

 private:
  std::shared_ptr<const void> owner_;  // keeps bytes_ alive
  std::span<const std::byte> bytes_;
};

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}
inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace cairn
