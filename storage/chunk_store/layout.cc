#include "storage/chunk_store/layout.h"

#include <charconv>

#include "proto/common/checksum.h"
#include "storage/chunk_store/chunk_store.h"
#include "storage/index/fields.h"

namespace cairn::storage {
namespace {

constexpr std::size_t kIncarnationDigits = 16;
constexpr std::size_t kNumberDigits = 8;

void append_hex(std::string& out, std::uint64_t value, std::size_t digits) {
  for (std::size_t i = digits; i-- > 0;) out.push_back("0123456789abcdef"[value >> (4 * i) & 0xf]);
}

template <class T>
bool parse_hex(std::string_view text, T& out) {
  for (char c : text)
    if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f')) return false;
  const auto end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, out, 16);
  return parsed.ec == std::errc() && parsed.ptr == end;
}

}  // namespace

std::string segment_name(SegmentId id) {
  std::string out(kSegmentPrefix);
  append_hex(out, id.incarnation, kIncarnationDigits);
  out.push_back('-');
  append_hex(out, id.number, kNumberDigits);
  return out;
}

std::optional<SegmentId> parse_segment_name(std::string_view name) {
  constexpr auto kDashAt = kSegmentPrefix.size() + kIncarnationDigits;
  if (name.size() != kDashAt + 1 + kNumberDigits || !name.starts_with(kSegmentPrefix) || name[kDashAt] != '-')
    return std::nullopt;
  SegmentId id;
  if (!parse_hex(name.substr(kSegmentPrefix.size(), kIncarnationDigits), id.incarnation)) return std::nullopt;
  if (!parse_hex(name.substr(kDashAt + 1), id.number)) return std::nullopt;
  return id;
}

std::string encode_location(const Location& location) {
  std::string out;
  out.reserve(kLocationBytes);
  put_field(out, location.segment.incarnation);
  put_field(out, location.segment.number);
  put_field(out, location.sector);
  put_field(out, location.length);
  put_field(out, location.digest);
  put_field(out, location.group);
  return out;
}

Result<Location> decode_location(std::string_view value) {
  if (value.size() != kLocationBytes)
    return fail(Errc::kDataLoss, "index entry of " + std::to_string(value.size()) + " bytes instead of " +
                                     std::to_string(kLocationBytes));
  Location location{.segment = {get_field<std::uint64_t>(value, 0), get_field<std::uint32_t>(value, 8)},
                    .sector = get_field<std::uint32_t>(value, 12),
                    .length = get_field<std::uint32_t>(value, 16),
                    .digest = get_field<std::uint32_t>(value, 20),
                    .group = get_field<std::uint32_t>(value, 24)};
  if (location.length == 0 || location.length > kChunkBytesMax)
    return fail(Errc::kDataLoss, "index entry with length " + std::to_string(location.length));
  return location;
}

std::string encode_block_crcs(const std::vector<std::uint32_t>& crcs) {
  std::string out;
  out.reserve(4 * crcs.size());
  for (auto crc : crcs) put_field(out, crc);
  return out;
}

Result<std::vector<std::uint32_t>> decode_block_crcs(std::string_view value, const Location& location) {
  if (value.size() != 4 * std::size_t{blocks_of(location.length)} || crc32c(value) != location.digest)
    return fail(Errc::kDataLoss, "block CRCs in the index do not match the digest");
  std::vector<std::uint32_t> crcs(value.size() / 4);
  for (std::size_t i = 0; i < crcs.size(); ++i) crcs[i] = get_field<std::uint32_t>(value, 4 * i);
  return crcs;
}

std::uint32_t chunk_digest(const std::vector<std::uint32_t>& block_crcs) {
  return crc32c(encode_block_crcs(block_crcs));
}

}  // namespace cairn::storage
