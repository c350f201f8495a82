#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "tests/sim/prng.h"

namespace cairn::sim {

/// Which save a byte belongs to: equal on all ranks, different for every (launch, operation).
struct Tag {
  std::uint32_t launch = 0;  // restart count of the launch
  std::uint32_t operation = 0;
  auto operator<=>(const Tag&) const = default;
};

/// Bytes as a function of their address (run, step, tag, tensor, offset): the right bytes in the wrong place, of
/// another step or of another launch are wrong bytes, which a checksum alone would not notice.
class Payload {
 public:
  Payload(std::string_view run, std::uint64_t step, Tag tag, std::string_view item) {
    std::uint64_t h = 0xcbf29ce484222325;
    auto add = [&](std::string_view text) {
      for (unsigned char c : text) h = (h ^ c) * 0x100000001b3;
      h = (h ^ 0xff) * 0x100000001b3;
    };
    add(run);
    add(item);
    std::uint64_t state =
        h ^ (step * 0x9e3779b97f4a7c15) ^ (static_cast<std::uint64_t>(tag.launch) << 32) ^ tag.operation;
    key_ = Prng::split_mix(state);
  }
  std::byte at(std::uint64_t offset) const {
    const auto word = word_at(offset / 8);
    return static_cast<std::byte>(word >> (offset % 8 * 8));
  }
  void fill(std::uint64_t offset, std::span<std::byte> out) const {
    std::size_t i = 0;
    while (i < out.size()) {
      const auto in_word = static_cast<std::size_t>((offset + i) % 8);
      const auto word = word_at((offset + i) / 8);
      const auto n = std::min<std::size_t>(8 - in_word, out.size() - i);
      std::memcpy(out.data() + i, reinterpret_cast<const char*>(&word) + in_word, n);
      i += n;
    }
  }

 private:
  std::uint64_t word_at(std::uint64_t index) const {
    std::uint64_t state = key_ + index * 0xd1342543de82ef95;
    return Prng::split_mix(state);
  }
  std::uint64_t key_;
};

}  // namespace cairn::sim
