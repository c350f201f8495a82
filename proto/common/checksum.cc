#include "proto/common/checksum.h"

#include <isa-l/crc.h>
#include <openssl/evp.h>
#include <openssl/sha.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>

#include "proto/common/crc_join.h"
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

namespace {

// The CRC of a message is its polynomial times x^32 modulo P, bits reversed: bit 31 is x^0. What follows calculates
// with such remainders. source: zlib, crc32_combine_gen(); Gueron, "CRC32 computation"

constexpr std::uint32_t kPolynomial = 0x82f63b78u;

constexpr std::uint32_t times(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b & 1) != 0 ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

/// x^(8 * bytes): what a remainder is multiplied by when so many zero bytes follow.
constexpr std::uint32_t power_of(std::uint64_t bytes) {
  std::uint32_t power = 1u << 31, square = 1u << 23;  // x^0, x^8
  for (; bytes != 0; bytes >>= 1) {
    if ((bytes & 1) != 0) power = times(power, square);
    square = times(square, square);
  }
  return power;
}

/// Multiplies by one power, a byte at a time.
class Shift {
 public:
  explicit constexpr Shift(std::uint64_t bytes) {
    const auto power = power_of(bytes);
    for (std::uint32_t byte = 0; byte < 4; ++byte)
      for (std::uint32_t value = 0; value < 256; ++value) table_[byte][value] = times(power, value << (8 * byte));
  }
  std::uint32_t operator()(std::uint32_t crc) const {
    return table_[0][crc & 0xff] ^ table_[1][(crc >> 8) & 0xff] ^ table_[2][(crc >> 16) & 0xff] ^ table_[3][crc >> 24];
  }

 private:
  std::array<std::array<std::uint32_t, 256>, 4> table_{};
};

constexpr Shift kOverBlock(kBlockBytes);

#if defined(__x86_64__)
/// One block in one pass, `to` aligned to 16: each word is loaded once, hashed and stored past the cache. Four
/// remainders of 128 bits are folded over the lines, each multiplied by x^512, because the instruction for CRC32C takes
/// three cycles a word when the words come in order; and to hash several parts of the block side by side scatters the
/// stores, which some processors bear badly.
///
/// source: Gopal and others, "Fast CRC Computation for Generic Polynomials
/// Using PCLMULQDQ Instruction"
__attribute__((target("pclmul,sse4.2"))) std::uint32_t copy_block(std::byte* to, const std::byte* from) {
  constexpr std::size_t kWordBytes = sizeof(__m128i), kWords = 4, kLineBytes = kWords * kWordBytes;
  constexpr std::size_t kAheadBytes = 2048;
  // The halves of a word are x^64 apart, and a product of reversed numbers is one bit short.
  constexpr auto kFoldLow = static_cast<std::uint64_t>(power_of(kLineBytes + 4)) << 1;
  constexpr auto kFoldHigh = static_cast<std::uint64_t>(power_of(kLineBytes - 4)) << 1;
  const auto fold = _mm_set_epi64x(static_cast<long long>(kFoldHigh), static_cast<long long>(kFoldLow));
  std::array<__m128i, kWords> rests;
  for (std::size_t at = 0; at < kBlockBytes; at += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(from) + at + kAheadBytes, _MM_HINT_T0);
    for (std::size_t i = 0; i < kWords; ++i) {
      const auto word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + i * kWordBytes));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + i * kWordBytes), word);
      if (at == 0) {
        rests[i] = i == 0 ? _mm_xor_si128(word, _mm_cvtsi32_si128(-1)) : word;
        continue;
      }
      const auto low = _mm_clmulepi64_si128(rests[i], fold, 0x00), high = _mm_clmulepi64_si128(rests[i], fold, 0x11);
      rests[i] = _mm_xor_si128(_mm_xor_si128(low, high), word);
    }
  }
  _mm_sfence();
  std::uint64_t crc = 0;
  for (const auto rest : rests) {
    crc = _mm_crc32_u64(crc, static_cast<unsigned long long>(_mm_cvtsi128_si64(rest)));
    crc = _mm_crc32_u64(crc, static_cast<unsigned long long>(_mm_extract_epi64(rest, 1)));
  }
  return ~static_cast<std::uint32_t>(crc);
}
constexpr std::size_t kCopyBlockAlign = alignof(__m128i);
bool has_copy_block() {
  static const bool has = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
  return has;
}
#else
constexpr std::size_t kCopyBlockAlign = 1;
std::uint32_t copy_block(std::byte*, const std::byte*) {
  return 0;
}
bool has_copy_block() {
  return false;
}
#endif

}  // namespace

std::uint32_t crc32c_join(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b) {
  return (bytes_of_b == kBlockBytes ? kOverBlock(a) : times(power_of(bytes_of_b), a)) ^ b;
}

// Of exactly what was copied, also when somebody writes to `from` meanwhile. Long copies go past the cache: their bytes
// are not looked at again soon.
std::uint32_t copy_with_crc32c(std::span<std::byte> to, std::span<const std::byte> from, std::uint32_t crc) {
  for (std::size_t done = 0; done < from.size();) {
    const auto size = std::min<std::size_t>(kBlockBytes, from.size() - done);
    auto* out = to.data() + done;
    if (size == kBlockBytes && has_copy_block() && reinterpret_cast<std::uintptr_t>(out) % kCopyBlockAlign == 0) {
      crc = kOverBlock(crc) ^ copy_block(out, from.data() + done);
    } else {
      std::memcpy(out, from.data() + done, size);
      crc = crc32c(std::span<const std::byte>(out, size), crc);
    }
    done += size;
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

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  State() {
    // Fails only for want of memory, which ends the process like any other allocation.
    if (context == nullptr || EVP_DigestInit_ex(context, EVP_sha256(), nullptr) != 1) std::terminate();
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {}
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;
Sha256::~Sha256() = default;

void Sha256::add(std::string_view bytes) {
  EVP_DigestUpdate(state_->context, bytes.data(), bytes.size());
}

std::string Sha256::finish() {
  std::string out(SHA256_DIGEST_LENGTH, '\0');
  EVP_DigestFinal_ex(state_->context, reinterpret_cast<unsigned char*>(out.data()), nullptr);
  return out;
}

}  // namespace cairn
