#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

// Sizes and times as people write them, in flags and configuration files.

namespace cairn {

/// "4096", "64KiB", "512M", "1TiB": K, M, G and T are powers of 1024, with or without "iB"; no other units, because
/// "MB" means two things. Nothing when it is not a size, or does not fit.
std::optional<std::uint64_t> parse_bytes(std::string_view text);
/// Exactly `bytes`, in the largest unit that divides it: "64KiB". parse_bytes() reads it.
std::string bytes_text(std::uint64_t bytes);

/// "200ms", "30s", "10m", "1h", "7d": a whole number and a unit, at most 100 years. Nothing when it is not one.
std::optional<std::chrono::nanoseconds> parse_duration(std::string_view text);
/// In the largest unit that divides it; parts of a millisecond are cut. parse_duration() reads it.
std::string duration_text(std::chrono::nanoseconds duration);

}  // namespace cairn
