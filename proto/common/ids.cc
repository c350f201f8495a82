#include "proto/common/ids.h"

#include <cstring>

#include "proto/common/text.h"

namespace cairn {
namespace {

void put_be(std::uint8_t* to, std::uint64_t value, int size) {
  for (int i = size - 1; i >= 0; --i, value >>= 8) to[i] = static_cast<std::uint8_t>(value);
}

std::uint64_t get_be(const std::uint8_t* from, int size) {
  std::uint64_t value = 0;
  for (int i = 0; i < size; ++i) value = value << 8 | from[i];
  return value;
}

bool strict_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
}

Result<void> check_segment(std::string_view what, std::string_view whole, std::string_view segment) {
  const std::string where = std::string(what) + " '" + printable(whole) + "'";
  if (segment.empty()) return fail(Errc::kInvalid, where + ": empty name or path segment");
  if (segment == "." || segment == "..") return fail(Errc::kInvalid, where + ": '.' and '..' are not allowed");
  for (char c : segment)
    if (!strict_char(c)) return fail(Errc::kInvalid, where + ": only letters, digits, '.', '_' and '-' are allowed");
  return {};
}

}  // namespace

HomeGroup home_group_of(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325ULL;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  h ^= h >> 32;
  return static_cast<HomeGroup>(h % kHomeGroups);
}

HomeGroup home_group_of(std::string_view bucket, std::string_view name) {
  return home_group_of(std::string(bucket) + "/" + std::string(name));
}

OwnerId OwnerId::make(HomeGroup group, std::uint32_t loss, std::uint64_t random_a, std::uint64_t random_b) {
  OwnerId id;
  put_be(&id.bytes[0], group, 2);
  put_be(&id.bytes[2], loss, 4);
  put_be(&id.bytes[6], random_a, 8);
  put_be(&id.bytes[14], random_b, 2);
  return id;
}

std::uint32_t OwnerId::loss() const {
  return static_cast<std::uint32_t>(get_be(&bytes[2], 4));
}
std::string OwnerId::hex() const {
  return to_hex(bytes);
}

Result<OwnerId> OwnerId::from_bytes(std::string_view raw) {
  OwnerId id;
  if (raw.size() != id.bytes.size())
    return fail(Errc::kInvalid, "owner id is " + std::to_string(raw.size()) + " bytes, not 16");
  std::memcpy(id.bytes.data(), raw.data(), raw.size());
  return id;
}

std::array<char, ChunkId::kKeyBytes> ChunkId::key() const {
  std::array<char, kKeyBytes> out;
  auto* to = reinterpret_cast<std::uint8_t*>(out.data());
  std::memcpy(to, owner.bytes.data(), 16);
  put_be(to + 16, writer, 8);
  put_be(to + 24, index, 4);
  return out;
}

Result<ChunkId> ChunkId::from_key(std::string_view raw) {
  if (raw.size() != kKeyBytes)
    return fail(Errc::kInvalid, "chunk key is " + std::to_string(raw.size()) + " bytes, not 28");
  ChunkId id;
  const auto* from = reinterpret_cast<const std::uint8_t*>(raw.data());
  std::memcpy(id.owner.bytes.data(), from, 16);
  id.writer = get_be(from + 16, 8);
  id.index = static_cast<std::uint32_t>(get_be(from + 24, 4));
  return id;
}

std::string ChunkId::text() const {
  std::array<std::uint8_t, 8> w{};
  put_be(w.data(), writer, 8);
  return owner.hex() + "/" + to_hex(w) + "/" + std::to_string(index);
}

std::string Uuid::text() const {
  return to_hex(bytes);
}

Result<Uuid> Uuid::from_text(std::string_view hex) {
  Uuid id;
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
  bool good = hex.size() == 2 * id.bytes.size();
  for (std::size_t i = 0; good && i < hex.size(); ++i) {
    const auto value = digit(hex[i]);
    good = value >= 0;
    id.bytes[i / 2] = static_cast<std::uint8_t>(id.bytes[i / 2] << 4 | value);
  }
  if (!good) return fail(Errc::kInvalid, "'" + printable(hex) + "' is not an id of 32 hex digits");
  return id;
}

Result<Uuid> Uuid::from_bytes(std::string_view raw) {
  Uuid id;
  if (raw.size() != id.bytes.size())
    return fail(Errc::kInvalid, "uuid is " + std::to_string(raw.size()) + " bytes, not 16");
  std::memcpy(id.bytes.data(), raw.data(), raw.size());
  return id;
}

std::string to_hex(std::span<const std::uint8_t> bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(bytes.size() * 2);
  for (auto b : bytes) {
    out += kDigits[b >> 4];
    out += kDigits[b & 15];
  }
  return out;
}

Result<void> check_bucket_name(std::string_view name) {
  if (name.size() > 255) return fail(Errc::kInvalid, "bucket '" + printable(name) + "': longer than 255 bytes");
  return check_segment("bucket", name, name);
}

Result<void> check_run_name(std::string_view name) {
  if (name.size() > 512) return fail(Errc::kInvalid, "run '" + printable(name) + "': longer than 512 bytes");
  for (std::size_t start = 0;;) {
    const auto end = name.find('/', start);
    CHECK_OK(check_segment("run", name, name.substr(start, end == name.npos ? end : end - start)));
    if (end == name.npos) return {};
    start = end + 1;
  }
}

Result<void> check_free_name(std::string_view what, std::string_view name) {
  // The message is built only when there is one: an index holds millions of good names.
  const auto bad = [&](std::string_view why) {
    return fail(Errc::kInvalid, std::string(what) + " name '" + printable(name) + "': " + std::string(why));
  };
  if (name.empty()) return bad("empty");
  if (name.size() > 1024) return bad("longer than 1,024 bytes");
  if (name.find('\0') != name.npos) return bad("contains a NUL byte");
  if (!valid_utf8(name)) return bad("not valid UTF-8");
  return {};
}

}  // namespace cairn
