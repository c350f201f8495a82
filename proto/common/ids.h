#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "proto/common/result.h"

namespace cairn {

inline constexpr std::uint32_t kHomeGroups = 256;

using HomeGroup = std::uint16_t;  // 0 .. kHomeGroups - 1
using DataGroup = std::uint32_t;

/// Home group of a bucket, run, object or dataset: our own specified hash (FNV-1a 64, folded), the same for ever.
HomeGroup home_group_of(std::string_view name);
/// Of a run, object or dataset in a bucket.
HomeGroup home_group_of(std::string_view bucket, std::string_view name);

/// Id of an upload: whatever chunks belong to. 16 bytes, big-endian fields so that bytes sort as values.
///
/// offset size meaning
///      0    2 home group that keeps the record naming this owner
///      2    4 `loss` count of that group when the owner was made
///      6   10 random
struct OwnerId {
  std::array<std::uint8_t, 16> bytes{};

  static OwnerId make(HomeGroup group, std::uint32_t loss, std::uint64_t random_a, std::uint64_t random_b);
  HomeGroup home_group() const { return static_cast<HomeGroup>(bytes[0] << 8 | bytes[1]); }
  std::uint32_t loss() const;
  std::string hex() const;
  static Result<OwnerId> from_bytes(std::string_view raw);
  std::string_view view() const { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
  auto operator<=>(const OwnerId&) const = default;
};

/// One write-once chunk. Key form (28 bytes, sorts by owner): owner 16, writer nonce 8 big-endian, index 4 big-endian.
struct ChunkId {
  static constexpr std::size_t kKeyBytes = 28;
  OwnerId owner;
  std::uint64_t writer = 0;  // nonce of the process that wrote it
  std::uint32_t index = 0;   // counts up within the writer

  std::array<char, kKeyBytes> key() const;
  static Result<ChunkId> from_key(std::string_view raw);
  std::string text() const;  // owner-hex/writer-hex/index, for messages
  auto operator<=>(const ChunkId&) const = default;
};

/// (loss, epoch, seq) of the log entry that wrote a record; never used again. All zero: the record does not exist.
struct Version {
  std::uint32_t loss = 0;
  std::uint64_t epoch = 0;
  std::uint64_t seq = 0;
  bool exists() const { return seq != 0; }
  auto operator<=>(const Version&) const = default;
};

/// (map generation, count): compared whole, raised by every change of one group.
struct GroupEpoch {
  std::uint32_t generation = 0;
  std::uint64_t count = 0;
  auto operator<=>(const GroupEpoch&) const = default;
};

/// Fences older launches of a run: (`loss` of the home group, count), compared whole.
struct RunEpoch {
  std::uint32_t loss = 0;
  std::uint64_t count = 0;
  auto operator<=>(const RunEpoch&) const = default;
};

struct Uuid {
  std::array<std::uint8_t, 16> bytes{};
  std::string text() const;  // hex
  static Result<Uuid> from_bytes(std::string_view raw);
  /// As text() writes it. errors: kInvalid
  static Result<Uuid> from_text(std::string_view hex);
  std::string_view view() const { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
  auto operator<=>(const Uuid&) const = default;
};

std::string to_hex(std::span<const std::uint8_t> bytes);

/// Bucket names: `[A-Za-z0-9._-]`, 1 to 255 bytes, not "." or "..". Run names: such segments joined by '/', up to 512.
Result<void> check_bucket_name(std::string_view name);
Result<void> check_run_name(std::string_view name);
/// Tensor, blob and file names, object keys: UTF-8, 1 to 1,024 bytes, no NUL.
Result<void> check_free_name(std::string_view what, std::string_view name);

}  // namespace cairn
