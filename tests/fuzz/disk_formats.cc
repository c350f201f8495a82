#include <array>
#include <cstring>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "storage/chunk_store/layout.h"
#include "storage/committer/mark.h"
#include "storage/record_store/layout.h"
#include "storage/target/superblock.h"
#include "storage/target/target.h"
#include "tests/fuzz/fuzz.h"

// What lies in a data directory beside index and chunks, and in the index' own values.

namespace cairn::fuzz {
namespace {

using namespace storage;

/// A sector of zeros that begins with `bytes` and ends with their CRC.
std::vector<std::byte> sector_of(std::string_view bytes) {
  std::vector<std::byte> out(kSectorBytes);
  if (!bytes.empty()) std::memcpy(out.data(), bytes.data(), std::min(bytes.size(), out.size() - 4));
  const auto crc = crc32c(std::span(out).first(out.size() - 4));
  std::memcpy(out.data() + out.size() - 4, &crc, sizeof crc);
  return out;
}

void superblock(std::string_view bytes) {
  (void)decode_superblock({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()},
                          storage::Target::kFormatVersion);
  const auto sector = sector_of(bytes);
  const auto decoded = decode_superblock(sector, storage::Target::kFormatVersion);
  if (!decoded || decoded->version > storage::Target::kFormatVersion) return;
  std::vector<std::byte> again(sector.size());
  encode_superblock(again, *decoded);
  const auto twice = decode_superblock(again, storage::Target::kFormatVersion);
  must(twice && *twice == *decoded, "a superblock survives");
}

void mark(std::string_view bytes) {
  (void)decode_mark({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()});
  const auto batch = decode_mark(sector_of(bytes));
  if (!batch) return;
  std::vector<std::byte> again(kMarkSlotBytes);
  encode_mark(again, *batch);
  must(decode_mark(again) == batch, "a mark survives");
}

void location(std::string_view value, std::string_view crcs) {
  const auto decoded = decode_location(value);
  if (!decoded) return;
  must(encode_location(*decoded) == value, "a location survives");
  must(decoded->length >= 1 && decoded->length <= 64 * kMiB, "its length is a chunk's");
  const auto list = decode_block_crcs(crcs, *decoded);
  if (!list) return;
  must(list->size() == blocks_of(decoded->length) && encode_block_crcs(*list) == crcs, "block CRCs survive");
}

void segment(std::string_view name) {
  const auto id = parse_segment_name(name);
  if (id) must(segment_name(*id) == name, "a segment's name survives");
}

void one(std::string_view input) {
  Input in(input);
  switch (in.byte() % 5) {
    case 0:
      return superblock(in.rest());
    case 1:
      return mark(in.rest());
    case 2: {
      const auto value = in.take(kLocationBytes);
      return location(value, in.rest());
    }
    case 3:
      return segment(in.rest());
    default: {
      const auto value = in.rest();
      const auto version = get_version(value);
      if (!version) return;
      std::string again;
      put_version(again, *version);
      must(value.starts_with(again), "a version survives");
    }
  }
}

std::vector<std::string> seeds() {
  std::vector<std::byte> sector(kSectorBytes);
  encode_superblock(sector,
                    {.version = 1, .oldest_reader = 1, .uuid = {}, .segment_bytes = 64 * kMiB, .incarnation = 3});
  std::vector<std::string> out = {std::string(1, '\0') + std::string(text_of(sector).substr(0, 48)),
                                  std::string(1, '\0') + std::string(text_of(sector))};
  encode_mark(sector, 77);
  out.push_back("\x01" + std::string(text_of(sector).substr(0, 16)));
  const std::vector<std::uint32_t> crcs = {1, 2};
  std::uint32_t raw[] = {1, 2};
  const Location location{.segment = {.incarnation = 1, .number = 2},
                          .sector = 16,
                          .length = 100'000,
                          .digest = crc32c(std::as_bytes(std::span(raw))),
                          .group = 1};
  out.push_back("\x02" + encode_location(location) + encode_block_crcs(crcs));
  out.push_back("\x03" + segment_name({.incarnation = 1, .number = 2}));
  std::string version = "\x04";
  put_version(version, {.loss = 1, .epoch = 2, .seq = 3});
  out.push_back(version + "record");
  return out;
}

const Register registered({.name = "disk_formats", .bytes_max = kSectorBytes + 1, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
