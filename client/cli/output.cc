#include "client/cli/output.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "proto/common/text.h"

namespace cairn::cli {
namespace {

std::string time_as(const char* format, std::int64_t unix_nanos) {
  const std::time_t seconds = static_cast<std::time_t>(unix_nanos / 1'000'000'000);
  std::tm parts{};
  if (gmtime_r(&seconds, &parts) == nullptr) return "?";
  char out[64];
  return {out, std::strftime(out, sizeof out, format, &parts)};
}

/// Columns a terminal needs for UTF-8 text: its code points, near enough.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

}  // namespace

void print_line(std::string_view text) {
  const auto line = printable(text, text.size()) + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
}

void print_json(const nlohmann::ordered_json& json) {
  // Names are UTF-8 where the store checks them; anything else is replaced, not a reason to end.
  const auto line = json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
}

void print_error(std::string_view text) {
  const auto line = printable(text, text.size()) + "\n";
  std::fflush(stdout);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

Result<void> flush_output() {
  errno = 0;
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return {};
  return fail(errno == ENOSPC ? Errc::kNoSpace : Errc::kFailed, fmt::format("write stdout: {}", std::strerror(errno)));
}

std::string size_text(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  for (; value >= 1000 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : value < 100 ? 1 : 0, kUnits[unit]);
}

std::string time_text(std::int64_t unix_nanos) {
  return time_as("%Y-%m-%d %H:%M:%SZ", unix_nanos);
}
std::string time_iso(std::int64_t unix_nanos) {
  return time_as("%Y-%m-%dT%H:%M:%SZ", unix_nanos);
}

void Table::print() const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_)
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (widths.size() <= i) widths.push_back(0);
      widths[i] = std::max(widths[i], width_of(row[i]));
    }
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size()) line.append(widths[i] - width_of(row[i]) + 2, ' ');
    }
    print_line(line);
  }
}

Progress::Progress(std::string label, std::uint64_t total, Unit unit)
    : label_(printable(label)),
      total_(total),
      unit_(unit),
      start_(std::chrono::steady_clock::now()),
      drawn_(start_),
      terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
  if (shown_) fmt::print(stderr, "\r\x1b[K");
}

void Progress::set(std::uint64_t done) {
  using namespace std::chrono_literals;
  done_ = done;
  if (!terminal_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - start_ < 1s || (shown_ && now - drawn_ < 100ms)) return;
  drawn_ = now;
  shown_ = true;
  constexpr std::size_t kWidth = 30;
  const double share = total_ == 0 ? 1 : std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
  const auto full = static_cast<std::size_t>(share * kWidth);
  const auto text = [&](std::uint64_t count) {
    return unit_ == Unit::kBytes ? size_text(count) : std::to_string(count);
  };
  fmt::print(stderr, "\r\x1b[K{} [{}{}] {:3.0f} %  {} of {}  {}/s", label_, std::string(full, '#'),
             std::string(kWidth - full, '-'), share * 100, text(done_), text(total_),
             text(static_cast<std::uint64_t>(static_cast<double>(done_) / elapsed().count())));
  std::fflush(stderr);
}

}  // namespace cairn::cli
