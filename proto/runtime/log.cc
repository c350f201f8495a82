#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <ctime>

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

void append_value(std::string& line, std::string_view value) {
  const bool cut = value.size() > kValueBytesMax;
  if (cut) value = value.substr(0, kValueBytesMax);
  bool plain = !value.empty() && !cut;
  for (unsigned char c : value) plain = plain && c > 0x20 && c != 0x7f && c != '"' && c != '\\' && c != '=';
  if (plain) {
    line += value;
    return;
  }
  static constexpr char kDigits[] = "0123456789abcdef";
  line += '"';
  for (unsigned char c : value) {
    if (c == '"' || c == '\\') {
      line += '\\';
      line += static_cast<char>(c);
    } else if (c == '\n') {
      line += "\\n";
    } else if (c < 0x20 || c == 0x7f) {
      line += "\\x";
      line += kDigits[c >> 4];
      line += kDigits[c & 15];
    } else {
      line += static_cast<char>(c);
    }
  }
  if (cut) line += "...";
  line += '"';
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

class StderrLog final : public Log {
 public:
  explicit StderrLog(Level min) : min_(min) {}
  void write(Level level, std::string_view event, std::initializer_list<Field> fields) override {
    if (level < min_) return;
    const std::string line = "time=" + time_now() + " " + log_line(level, event, fields) + "\n";
    // One write per line, so that lines of several threads and processes do not mix. A log that cannot be written
    // has nobody to tell.
    while (::write(STDERR_FILENO, line.data(), line.size()) < 0 && errno == EINTR) {
    }
  }

 private:
  Level min_;
};

}  // namespace

std::string log_line(Level level, std::string_view event, std::initializer_list<Field> fields) {
  std::string line = "level=";
  line += name_of(level);
  line += " event=";
  append_value(line, event);
  for (const auto& field : fields) {
    line += ' ';
    line += field.key;
    line += '=';
    append_value(line, field.value);
  }
  return line;
}

std::unique_ptr<Log> make_stderr_log(Level min) {
  return std::make_unique<StderrLog>(min);
}

}  // namespace cairn::rt
