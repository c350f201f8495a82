#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <map>
#include <mutex>

#include "proto/common/text.h"
#include "proto/runtime/runtime.h"

namespace cairn::rt {
namespace {

constexpr std::size_t kValueBytesMax = 1024;

std::string_view name_of(Level level) {
  switch (level) {
    case Level::kDebug:
      return "debug";
    case Level::kInfo:
      return "info";
    case Level::kWarning:
      return "warning";
    case Level::kError:
      return "error";
  }
  return "?";
}

/// The first kValueBytesMax bytes of `value`, in whole characters.
std::string_view cut(std::string_view value) {
  if (value.size() <= kValueBytesMax) return value;
  std::size_t end = 0;
  for (std::size_t next = 0; next <= kValueBytesMax; next += std::max<std::size_t>(utf8_bytes(value, next), 1))
    end = next;
  return value.substr(0, end);
}

void append_hex(std::string& line, unsigned char byte) {
  static constexpr char kDigits[] = "0123456789abcdef";
  line += kDigits[byte >> 4];
  line += kDigits[byte & 15];
}

/// Quoted where needed; what is no character, or could steer a terminal, as \xHH.
void append_text(std::string& line, std::string_view whole) {
  const auto value = cut(whole);
  bool plain = !value.empty() && value.size() == whole.size();
  for (unsigned char c : value) plain = plain && c > 0x20 && c < 0x7f && c != '"' && c != '\\' && c != '=';
  if (plain) {
    line += value;
    return;
  }
  line += '"';
  for (std::size_t at = 0; at < value.size();) {
    const auto size = utf8_bytes(value, at);
    const auto character = value.substr(at, std::max<std::size_t>(size, 1));
    at += character.size();
    if (character == "\"" || character == "\\") {
      line += '\\';
      line += character;
    } else if (character == "\n") {
      line += "\\n";
    } else if (size == 0 || steers_terminal(character)) {
      for (const char c : character) {
        line += "\\x";
        append_hex(line, static_cast<unsigned char>(c));
      }
    } else {
      line += character;
    }
  }
  if (value.size() < whole.size()) line += "...";
  line += '"';
}

/// A JSON string of any bytes: what is not UTF-8 becomes U+FFFD.
void append_json(std::string& line, std::string_view whole) {
  const auto value = cut(whole);
  line += '"';
  for (std::size_t at = 0; at < value.size();) {
    const auto size = utf8_bytes(value, at);
    const auto character = value.substr(at, std::max<std::size_t>(size, 1));
    at += character.size();
    if (size == 0) {
      line += "\\ufffd";
    } else if (character == "\"" || character == "\\") {
      line += '\\';
      line += character;
    } else if (static_cast<unsigned char>(character[0]) < 0x20 || character[0] == 0x7f) {
      line += "\\u00";
      append_hex(line, static_cast<unsigned char>(character[0]));
    } else {
      line += character;
    }
  }
  if (value.size() < whole.size()) line += "...";
  line += '"';
}

void append_pair(std::string& line, LogFormat format, std::string_view key, std::string_view value) {
  if (format == LogFormat::kText) {
    if (!line.empty()) line += ' ';
    line += key;
    line += '=';
    append_text(line, value);
    return;
  }
  line += line.empty() ? '{' : ',';
  append_json(line, key);
  line += ':';
  append_json(line, value);
}

std::string time_now() {
  using namespace std::chrono;
  const auto now = system_clock::now();
  const auto millis = duration_cast<milliseconds>(now.time_since_epoch()).count() % 1000;
  const std::time_t seconds = system_clock::to_time_t(now);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[40];
  const auto size = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text + size, sizeof text - size, ".%03dZ", static_cast<int>(millis));
  return text;
}

void append_rest(std::string& line, LogFormat format, Level level, std::string_view event,
                 std::initializer_list<Field> fields) {
  append_pair(line, format, "level", name_of(level));
  append_pair(line, format, "event", event);
  for (const auto& field : fields) append_pair(line, format, field.key, field.value);
  if (format == LogFormat::kJson) line += '}';
}

class StderrLog final : public ProcessLog {
 public:
  explicit StderrLog(LogOptions options) : options_(options) {}

  void set(LogOptions options) override {
    const std::lock_guard lock(mutex_);
    options_ = options;
  }

  void write(Level level, std::string_view event, std::initializer_list<Field> fields) override {
    const std::lock_guard lock(mutex_);
    if (level < options_.min) return;
    const auto now = std::chrono::steady_clock::now();
    tell_held_back(now);
    auto& paced = events_[std::string(event)];
    if (now - paced.since >= std::chrono::seconds(1)) paced = {.since = now};
    if (paced.lines >= options_.lines_per_second) {
      ++paced.held_back;
      ++held_back_;
      return;
    }
    ++paced.lines;
    put(level, event, fields);
  }

 private:
  struct Paced {
    std::chrono::steady_clock::time_point since = {};
    std::uint32_t lines = 0;
    std::uint64_t held_back = 0;
  };

  /// Whatever is written first after a flood tells how much of it is missing.
  void tell_held_back(std::chrono::steady_clock::time_point now) {
    if (held_back_ == 0) return;
    for (auto& [event, paced] : events_) {
      if (paced.held_back == 0 || now - paced.since < std::chrono::seconds(1)) continue;
      const auto lines = std::exchange(paced.held_back, 0);
      held_back_ -= lines;
      put(Level::kWarning, "log_held_back", {{"of", event}, {"lines", std::to_string(lines)}});
    }
  }

  void put(Level level, std::string_view event, std::initializer_list<Field> fields) {
    std::string line;
    append_pair(line, options_.format, "time", time_now());
    append_rest(line, options_.format, level, event, fields);
    line += '\n';
    // One write per line, so that lines of several threads and processes do not mix. A log that cannot be written
    // has nobody to tell.
    while (::write(STDERR_FILENO, line.data(), line.size()) < 0 && errno == EINTR) {
    }
  }

  std::mutex mutex_;
  LogOptions options_;
  std::map<std::string, Paced> events_;  // names of events are ours: few
  std::uint64_t held_back_ = 0;          // of all events, not told yet
};

}  // namespace

std::string log_line(Level level, std::string_view event, std::initializer_list<Field> fields, LogFormat format) {
  std::string line;
  append_rest(line, format, level, event, fields);
  return line;
}

std::unique_ptr<ProcessLog> make_stderr_log(LogOptions options) {
  return std::make_unique<StderrLog>(options);
}

}  // namespace cairn::rt
