#include "storage/index/log_check.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "proto/common/checksum.h"
#include "proto/common/text.h"

namespace cairn::storage {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kBlock = 32768, kHeader = 7;
constexpr std::uint8_t kFull = 1, kFirst = 2, kMiddle = 3, kLast = 4;
// Behind a torn record there is nothing: how far a later record is looked for.
constexpr std::size_t kSearched = 2 * kBlock;

std::uint32_t masked(std::uint32_t crc) {
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

Result<std::string> content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::string bytes(file ? static_cast<std::size_t>(file.tellg()) : 0, '\0');
  file.seekg(0);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    return fail(Errc::kFailed, "read " + path + ": " + errno_text(errno));
  return bytes;
}

/// A record's place in the bytes of a log.
struct Header {
  std::uint32_t crc = 0;
  std::size_t length = 0;
  std::uint8_t kind = 0;
};
Header header_at(std::string_view log, std::size_t at) {
  Header out;
  std::memcpy(&out.crc, log.data() + at, sizeof out.crc);
  out.length = static_cast<std::uint8_t>(log[at + 4]) | std::size_t{static_cast<std::uint8_t>(log[at + 5])} << 8;
  out.kind = static_cast<std::uint8_t>(log[at + 6]);
  return out;
}
/// Bytes from `at` to the end of its block or of the log.
std::size_t room_at(std::string_view log, std::size_t at) {
  return std::min(log.size() - at, kBlock - at % kBlock);
}
bool matches(std::string_view log, std::size_t at, const Header& header) {
  return header.kind >= kFull && header.kind <= kLast && header.length + kHeader <= room_at(log, at) &&
         masked(crc32c(log.substr(at + 6, header.length + 1))) == header.crc;
}

struct Stop {
  std::size_t at;
  std::string why;
};
/// The first place that is no record; nothing when the records end exactly with the log.
std::optional<Stop> first_stop(std::string_view log) {
  bool open = false;  // a record has begun in an earlier fragment
  std::size_t at = 0;
  while (at < log.size()) {
    const auto room = room_at(log, at);
    if (room < kHeader) {
      // Too small for a header: zero at the end of a block, not there at the end of the log.
      const auto rest = log.substr(at, room);
      if ((at + room) % kBlock != 0 || rest.find_first_not_of('\0') != rest.npos)
        return Stop{at, "a piece of a record"};
      at += room;
      continue;
    }
    const auto header = header_at(log, at);
    if (header.kind < kFull || header.kind > kLast) return Stop{at, "a record of kind " + std::to_string(header.kind)};
    if (header.length + kHeader > room) return Stop{at, "a record that reaches beyond its block or the end"};
    if (!matches(log, at, header)) return Stop{at, "a record that does not match its CRC"};
    if ((header.kind == kFull || header.kind == kFirst) == open) return Stop{at, "a record's fragments out of order"};
    open = header.kind == kFirst || header.kind == kMiddle;
    at += kHeader + header.length;
  }
  if (open) return Stop{at, "a record without an end"};
  return std::nullopt;
}

/// Whether bytes at `at` were a record before its length or kind was damaged, or a record follows: then this is not
/// where a crash ended the log.
bool was_written_on(std::string_view log, std::size_t at) {
  if (room_at(log, at) >= kHeader) {
    const auto header = header_at(log, at);
    for (auto kind = kFull; kind <= kLast; ++kind) {
      auto crc = crc32c(std::string_view(reinterpret_cast<const char*>(&kind), 1));
      for (std::size_t length = 0; length + kHeader <= room_at(log, at); ++length) {
        if (masked(crc) == header.crc) return true;
        if (length + kHeader < room_at(log, at)) crc = crc32c(log.substr(at + kHeader + length, 1), crc);
      }
    }
  }
  for (std::size_t later = at + 1; later + kHeader <= log.size() && later < at + kSearched; ++later)
    if (room_at(log, later) >= kHeader && matches(log, later, header_at(log, later))) return true;
  return false;
}

Failure damaged(const std::string& path, const Stop& stop) {
  return fail(Errc::kDataLoss, path + ": " + stop.why + " at byte " + std::to_string(stop.at));
}

}  // namespace

Result<void> check_finished_logs(const std::string& folder, std::uint64_t first) {
  struct Log {
    std::uint64_t number;
    std::string path;
  };
  std::vector<Log> logs;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(folder, failed)) {
    const auto name = entry.path().filename().string();
    std::uint64_t number = 0;
    const auto [end, bad] = std::from_chars(name.data(), name.data() + name.size(), number);
    if (bad != std::errc() || std::string_view(end, name.data() + name.size()) != ".log" || number < first) continue;
    const auto size = entry.file_size(failed);
    if (failed) break;
    if (size > 0) logs.push_back({number, entry.path().string()});
  }
  if (failed) return fail(Errc::kFailed, "list index " + folder + ": " + failed.message());
  std::ranges::sort(logs, {}, &Log::number);
  if (!logs.empty()) logs.pop_back();
  for (const auto& log : logs) {
    TRY(const auto bytes, content_of(log.path));
    if (const auto stop = first_stop(bytes)) return damaged(log.path, *stop);
  }
  return {};
}

Result<void> check_manifest(const std::string& folder) {
  auto current = content_of(folder + "/CURRENT");
  if (!current) return {};  // a new index, or one whose damage RocksDB names
  const auto name = current->substr(0, current->find('\n'));
  if (!name.starts_with("MANIFEST-") || name.find('/') != name.npos) return {};
  const auto path = folder + "/" + name;
  auto manifest = content_of(path);
  if (!manifest) return {};
  const auto stop = first_stop(*manifest);
  if (stop && stop->at < manifest->size() && was_written_on(*manifest, stop->at)) return damaged(path, *stop);
  return {};
}

}  // namespace cairn::storage
