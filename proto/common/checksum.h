#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "proto/common/ids.h"

namespace cairn {

/// Standard CRC32C (Castagnoli; "123456789" -> e3069283) of `bytes`, continued from `crc` (0 to start).
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t crc = 0);
std::uint32_t crc32c(std::string_view bytes, std::uint32_t crc = 0);

/// Copies `from` to `to` (same size, no overlap) and returns the CRC32C of the bytes, continued from `crc`.
std::uint32_t copy_with_crc32c(std::span<std::byte> to, std::span<const std::byte> from, std::uint32_t crc = 0);

/// Seed of the stored CRC of one 64 KiB block: the right bytes under another id or number fail too.
/// A block's CRC is crc32c(block bytes, block_seed(id, block)).
std::uint32_t block_seed(const ChunkId& id, std::uint32_t block);

/// SHA-256, 32 bytes; used where a parent names a child (index pages up to the step record).
std::string sha256(std::string_view bytes);

/// The same of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  ~Sha256();
  void add(std::string_view bytes);
  /// Of all that was added; once.
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cairn
