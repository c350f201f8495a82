#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"

// Fuzz targets, one file each. With the preset `fuzz` the program that holds them all, cairn-fuzz, is libFuzzer's; in
// every other build it only replays inputs, so that the corpus is a test wherever the tests run.

namespace cairn::fuzz {

/// One decoder, or several small ones. `one` promises what must() states, for every input; it never fails otherwise.
struct Target {
  std::string_view name;
  std::size_t bytes_max;  // of an input
  void (*one)(std::string_view input);
  /// Inputs to begin with, from the tests' own encoders: they follow a format when it changes.
  std::vector<std::string> (*seeds)();
};

/// Puts it into targets(); one at namespace scope in each file.
struct Register {
  explicit Register(const Target& target);
};
std::map<std::string_view, Target>& targets();

/// A property of the code under test; says what broke and ends the process.
void must(bool holds, std::string_view what);
template <class T>
void must(const Result<T>& result, std::string_view what) {
  if (!result) must(false, std::string(what) + ": " + result.error().message);
}

/// An input taken apart from the front; beyond its end everything is zero.
class Input {
 public:
  explicit Input(std::string_view bytes) : rest_(bytes) {}
  std::uint8_t byte() {
    const auto bytes = take(1);
    return bytes.empty() ? 0 : static_cast<std::uint8_t>(bytes.front());
  }
  std::uint32_t number(std::size_t size) {
    std::uint32_t out = 0;
    for (const auto c : take(size)) out = out << 8 | static_cast<std::uint8_t>(c);
    return out;
  }
  std::string_view take(std::size_t size) {
    const auto out = rest_.substr(0, size);
    rest_.remove_prefix(out.size());
    return out;
  }
  /// Two bytes of length, then as many.
  std::string_view piece() { return take(number(2)); }
  std::string_view rest() { return take(rest_.size()); }
  bool empty() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

/// What piece() reads.
inline std::string piece_of(std::string_view bytes) {
  std::string out;
  out += static_cast<char>(bytes.size() >> 8);
  out += static_cast<char>(bytes.size());
  return out += bytes;
}

}  // namespace cairn::fuzz
