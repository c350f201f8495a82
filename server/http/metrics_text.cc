#include "server/http/metrics_text.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <charconv>
#include <cmath>

namespace cairn::server {
namespace {

[[maybe_unused]] bool is_name(std::string_view name, bool colons) {
  const auto letter = [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (colons && c == ':');
  };
  return !name.empty() && letter(name.front()) &&
         std::ranges::all_of(name, [&](char c) { return letter(c) || (c >= '0' && c <= '9'); });
}

void append_escaped(std::string& out, std::string_view text, bool quoted) {
  for (const char c : text) {
    if (c == '\\' || (quoted && c == '"'))
      (out += '\\') += c;
    else if (c == '\n')
      out += "\\n";
    else
      out += c;
  }
}

}  // namespace

void MetricsText::family(std::string_view name, std::string_view help, Type type) {
  assert(is_name(name, true));
  name_ = name;
  text_ += "# HELP " + name_ + ' ';
  append_escaped(text_, help, false);
  text_ += "\n# TYPE " + name_ + (type == Type::kCounter ? " counter\n" : " gauge\n");
}

void MetricsText::sample(Labels labels, double value) {
  if (std::isnan(value)) return line(labels, "NaN");
  if (std::isinf(value)) return line(labels, value > 0 ? "+Inf" : "-Inf");
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;  // shortest that reads back
  line(labels, {digits.data(), end});
}

void MetricsText::line(Labels labels, std::string_view value) {
  assert(!name_.empty() && "family() first");
  text_ += name_;
  char before = '{';
  for (const auto& [name, text] : labels) {
    assert(is_name(name, false));
    ((text_ += before) += name) += "=\"";
    append_escaped(text_, text, true);
    text_ += '"';
    before = ',';
  }
  if (before == ',') text_ += '}';
  ((text_ += ' ') += value) += '\n';
}

}  // namespace cairn::server
