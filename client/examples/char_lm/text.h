#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>
#include <vector>

namespace char_lm {

/// The training text, as indices into its own alphabet.
struct Text {
  std::vector<std::uint8_t> tokens;    // one per character: its place in `alphabet`
  std::vector<std::uint8_t> alphabet;  // the distinct bytes of the text, ascending
  std::string sha256;                  // hex, of the raw bytes: a resumed job checks that it reads the same text
  std::size_t files = 0;
};

/// All regular files of `folder`, sorted by name, symbolic links skipped, joined. Error: what could not be read.
std::expected<Text, std::string> load_text(const std::string& folder);

/// Where the sample of (step, slot) starts: a pure function, so that any rank of any launch can compute any sample.
/// starts: 0 .. choices - 1
std::size_t sample_start(std::uint64_t seed, std::uint64_t step, std::uint64_t slot, std::size_t choices);

/// A well-mixed 64-bit function of its input (splitmix64), the same everywhere.
std::uint64_t mix(std::uint64_t x);

std::string sha256_hex(std::span<const std::byte> bytes);

}  // namespace char_lm
