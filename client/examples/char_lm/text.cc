#include "client/examples/char_lm/text.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace char_lm {

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

std::size_t sample_start(std::uint64_t seed, std::uint64_t step, std::uint64_t slot, std::size_t choices) {
  std::uint64_t hash = mix(mix(mix(seed) ^ step) ^ slot);
  return static_cast<std::size_t>((static_cast<unsigned __int128>(hash) * choices) >> 64);
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  std::array<unsigned char, 32> digest{};
  EVP_Digest(bytes.data(), bytes.size(), digest.data(), nullptr, EVP_sha256(), nullptr);
  std::string hex;
  for (unsigned char byte : digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

std::expected<Text, std::string> load_text(const std::string& folder) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> paths;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    if (entry->symlink_status().type() == fs::file_type::regular) paths.push_back(entry->path());
  if (error) return std::unexpected("text folder " + folder + ": " + error.message());
  std::ranges::sort(paths);

  std::string raw;
  for (const fs::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    raw.append(std::istreambuf_iterator<char>(file), {});
    if (!file) return std::unexpected("cannot read " + path.string());
  }
  if (raw.empty()) return std::unexpected("text folder " + folder + ": no text in it");

  std::array<bool, 256> seen{};
  for (char c : raw) seen[static_cast<unsigned char>(c)] = true;
  Text text;
  std::array<std::uint8_t, 256> index{};
  for (int byte = 0; byte < 256; ++byte) {
    if (!seen[byte]) continue;
    index[byte] = static_cast<std::uint8_t>(text.alphabet.size());
    text.alphabet.push_back(static_cast<std::uint8_t>(byte));
  }
  text.tokens.reserve(raw.size());
  for (char c : raw) text.tokens.push_back(index[static_cast<unsigned char>(c)]);
  text.sha256 = sha256_hex(std::as_bytes(std::span(raw)));
  text.files = paths.size();
  return text;
}

}  // namespace char_lm
