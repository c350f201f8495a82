#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "proto/rt/seams.h"

namespace cairn::sim {

/// xoshiro256** seeded by splitmix64: specified, so that a seed means the same run on every machine and library.
class Prng final : public rt::Random {
 public:
  explicit Prng(std::uint64_t seed) {
    for (auto& word : state_) word = split_mix(seed);
  }
  /// A stream of its own for one purpose: draws in one do not shift the others.
  Prng(std::uint64_t seed, std::string_view purpose, std::uint64_t number = 0) : Prng(mixed(seed, purpose, number)) {}

  std::uint64_t next() override {
    const auto result = rotl(state_[1] * 5, 7) * 9;
    const auto t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = rotl(state_[3], 45);
    return result;
  }
  /// 0 .. bound - 1; bound >= 1. The bias of the multiplication is below 2^-32 for bounds that tests use.
  std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }
  /// low .. high, both included.
  std::uint64_t between(std::uint64_t low, std::uint64_t high) { return low + below(high - low + 1); }
  rt::Duration between(rt::Duration low, rt::Duration high) {
    return low + rt::Duration(static_cast<std::int64_t>(below(static_cast<std::uint64_t>((high - low).count()) + 1)));
  }
  /// Evenly on a logarithmic scale: moments that matter lie close together at the start.
  rt::Duration log_between(rt::Duration low, rt::Duration high) {
    const auto steps = 64 - static_cast<unsigned>(__builtin_clzll(static_cast<std::uint64_t>(high / low)));
    return between(low, std::min(high, low * (std::int64_t{1} << below(steps + 1))));
  }
  bool chance(double probability) {
    if (probability <= 0) return false;  // no draw: a fault that is off costs nothing
    return static_cast<double>(next() >> 11) * 0x1p-53 < probability;
  }

  static std::uint64_t split_mix(std::uint64_t& state) {
    auto z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  static std::uint64_t rotl(std::uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }
  static std::uint64_t mixed(std::uint64_t seed, std::string_view purpose, std::uint64_t number) {
    std::uint64_t h = 0xcbf29ce484222325;
    for (unsigned char c : purpose) h = (h ^ c) * 0x100000001b3;
    std::uint64_t state = seed ^ h;
    state = split_mix(state) + number;
    return split_mix(state);
  }
  std::uint64_t state_[4];
};

}  // namespace cairn::sim
