#include "storage/target/superblock.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "storage/index/fields.h"

namespace cairn::storage {
namespace {
constexpr std::string_view kMagic = "CAIRNTGT";
constexpr std::size_t kCrcAt = Superblock::kBytes - 4;
}  // namespace

void encode_superblock(std::span<std::byte> out, const Superblock& superblock) {
  assert(out.size() == Superblock::kBytes);
  std::ranges::fill(out, std::byte{0});
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_field(out, 8, superblock.version);
  put_field(out, 12, superblock.oldest_reader);
  std::memcpy(out.subspan(16).data(), superblock.uuid.bytes.data(), superblock.uuid.bytes.size());
  put_field(out, 32, superblock.segment_bytes);
  put_field(out, 40, superblock.incarnation);
  put_field(out, kCrcAt, crc32c(out.first(kCrcAt)));
}

Result<Superblock> decode_superblock(std::span<const std::byte> bytes, std::uint32_t reader) {
  if (bytes.size() != Superblock::kBytes)
    return fail(Errc::kDataLoss, "superblock: " + std::to_string(bytes.size()) + " bytes instead of " +
                                     std::to_string(Superblock::kBytes));
  if (text_of(bytes.first(kMagic.size())) != kMagic) return fail(Errc::kDataLoss, "superblock: damaged, no magic");
  if (get_field<std::uint32_t>(bytes, kCrcAt) != crc32c(bytes.first(kCrcAt)))
    return fail(Errc::kDataLoss, "superblock: damaged, its CRC does not match");
  Superblock out;
  out.version = get_field<std::uint32_t>(bytes, 8);
  out.oldest_reader = get_field<std::uint32_t>(bytes, 12);
  if (out.oldest_reader > reader)
    return fail(Errc::kInvalid, "the directory has format version " + std::to_string(out.version) +
                                    ", which needs a program of version " + std::to_string(out.oldest_reader) +
                                    " or later; this one knows version " + std::to_string(reader));
  std::memcpy(out.uuid.bytes.data(), bytes.subspan(16).data(), out.uuid.bytes.size());
  out.segment_bytes = get_field<std::uint64_t>(bytes, 32);
  out.incarnation = get_field<std::uint64_t>(bytes, 40);
  return out;
}

}  // namespace cairn::storage
