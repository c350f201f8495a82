#include "storage/committer/mark.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <string_view>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "storage/index/fields.h"

namespace cairn::storage {
namespace {
constexpr std::string_view kMagic = "CAIRNMRK";
constexpr std::size_t kBatchAt = 8;
constexpr std::size_t kCrcAt = kMarkSlotBytes - 4;
}  // namespace

void encode_mark(std::span<std::byte> slot, std::uint64_t batch) {
  assert(slot.size() == kMarkSlotBytes);
  std::ranges::fill(slot, std::byte{0});
  std::memcpy(slot.data(), kMagic.data(), kMagic.size());
  put_field(slot, kBatchAt, batch);
  put_field(slot, kCrcAt, crc32c(slot.first(kCrcAt)));
}

std::optional<std::uint64_t> decode_mark(std::span<const std::byte> slot) {
  if (slot.size() != kMarkSlotBytes || text_of(slot.first(kMagic.size())) != kMagic) return std::nullopt;
  if (get_field<std::uint32_t>(slot, kCrcAt) != crc32c(slot.first(kCrcAt))) return std::nullopt;
  return get_field<std::uint64_t>(slot, kBatchAt);
}

}  // namespace cairn::storage
