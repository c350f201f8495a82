#include "proto/common/quantity.h"

#include <array>
#include <charconv>
#include <utility>

#include "proto/common/units.h"

namespace cairn {
namespace {

using std::chrono::nanoseconds;

constexpr std::array<std::pair<char, std::uint64_t>, 4> kSizes = {{
    {'T', 1024 * kGiB},
    {'G', kGiB},
    {'M', kMiB},
    {'K', kKiB},
}};
constexpr std::array<std::pair<std::string_view, nanoseconds>, 5> kDurations = {{
    {"d", std::chrono::hours(24)},
    {"h", std::chrono::hours(1)},
    {"m", std::chrono::minutes(1)},
    {"s", std::chrono::seconds(1)},
    {"ms", std::chrono::milliseconds(1)},
}};
constexpr nanoseconds kDurationMax = std::chrono::hours(24 * 365 * 100);

/// The number at the start of `text`, which is taken off it.
std::optional<std::uint64_t> take_number(std::string_view& text) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return number;
}

}  // namespace

std::optional<std::uint64_t> parse_bytes(std::string_view text) {
  const auto number = take_number(text);
  if (!number) return std::nullopt;
  if (text.empty() || text == "B") return number;
  for (const auto& [letter, size] : kSizes) {
    if ((text.front() & ~0x20) != letter) continue;
    std::uint64_t bytes = 0;
    const auto rest = text.substr(1);
    if (!(rest.empty() || rest == "iB" || rest == "ib") || !mul_checked(*number, size, bytes)) return std::nullopt;
    return bytes;
  }
  return std::nullopt;
}

std::string bytes_text(std::uint64_t bytes) {
  for (const auto& [letter, size] : kSizes)
    if (bytes >= size && bytes % size == 0) return std::to_string(bytes / size) + letter + "iB";
  return std::to_string(bytes);
}

std::optional<nanoseconds> parse_duration(std::string_view text) {
  const auto number = take_number(text);
  if (!number) return std::nullopt;
  for (const auto& [unit, length] : kDurations)
    if (text == unit && *number <= static_cast<std::uint64_t>(kDurationMax / length))
      return length * static_cast<std::int64_t>(*number);
  return std::nullopt;
}

std::string duration_text(nanoseconds duration) {
  for (const auto& [unit, length] : kDurations)
    if (duration >= length && duration % length == nanoseconds(0))
      return std::to_string(duration / length) + std::string(unit);
  return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(duration).count()) + "ms";
}

}  // namespace cairn
