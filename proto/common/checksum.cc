#include "proto/common/checksum.h"

#include <isa-l/crc.h>
#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "proto/common/units.h"

namespace cairn {

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t crc) {
  // ISA-L takes an int length and works on the inverted state.
  constexpr std::size_t kPieceBytesMax = 1u << 30;
  crc = ~crc;
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min(bytes.size(), kPieceBytesMax));
    // The parameter is not const in ISA-L's header; the bytes are only read.
    crc = crc32_iscsi(reinterpret_cast<unsigned char*>(const_cast<std::byte*>(piece.data())),
                      static_cast<int>(piece.size()), crc);
    bytes = bytes.subspan(piece.size());
  }
  return ~crc;
}

std::uint32_t crc32c(std::string_view bytes, std::uint32_t crc) {
  return crc32c(std::as_bytes(std::span(bytes.data(), bytes.size())), crc);
}

std::uint32_t copy_with_crc32c(std::span<std::byte> to, std::span<const std::byte> from, std::uint32_t crc) {
  // In pieces that stay in the L2 cache, so that the second pass does not read memory again.
  constexpr std::size_t kPieceBytes = 64 * kKiB;
  for (std::size_t done = 0; done < from.size(); done += kPieceBytes) {
    const auto piece = from.subspan(done, std::min(kPieceBytes, from.size() - done));
    std::memcpy(to.data() + done, piece.data(), piece.size());
    crc = crc32c(piece, crc);
  }
  return crc;
}

std::uint32_t block_seed(const ChunkId& id, std::uint32_t block) {
  const auto key = id.key();
  std::array<char, ChunkId::kKeyBytes + 4> seed{};
  std::memcpy(seed.data(), key.data(), key.size());
  for (int i = 0; i < 4; ++i)
    seed[ChunkId::kKeyBytes + static_cast<std::size_t>(i)] = static_cast<char>(block >> (8 * i));
  return crc32c(std::string_view(seed.data(), seed.size()));
}

std::string sha256(std::string_view bytes) {
  std::string out(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(out.data()));
  return out;
}

}  // namespace cairn
