#include "server/cairnd/config_file.h"

#include <toml++/toml.h>
#include <algorithm>
#include <cassert>
#include <numeric>
#include <optional>

#include "proto/common/quantity.h"
#include "proto/common/text.h"

namespace cairn::server {
namespace {

using Kind = Option::Kind;

constexpr const char* kDataOfUnit = "/var/lib/cairn/data";

std::string_view section_of(std::string_view key) {
  const auto dot = key.find('.');
  return dot == key.npos ? std::string_view() : key.substr(0, dot);
}
std::string_view name_of(std::string_view key) {
  return key.substr(key.find('.') + 1);
}

/// Edits that make one of the other.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    auto before = std::exchange(row[0], i + 1);  // row[j] of the line above
    for (std::size_t j = 0; j < b.size(); ++j) {
      const auto changed = before + (a[i] == b[j] ? 0 : 1);
      before = row[j + 1];
      row[j + 1] = std::min({changed, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

/// The keys that `key` may have been meant as, or nothing when none is like it.
std::string nearest(std::string_view key) {
  constexpr std::size_t kKeyBytesMax = 64;
  if (key.size() > kKeyBytesMax) return "";
  std::string_view best;
  std::size_t best_distance = key.size() / 3 + 2;
  for (const auto& option : option_table()) {
    // Also the right key in the wrong section.
    const auto d = name_of(option.key) == name_of(key) ? 1 : distance(key, option.key);
    if (d >= best_distance) continue;
    best_distance = d;
    best = option.key;
  }
  return best.empty() ? "" : "; the nearest is " + std::string(best);
}

std::string_view type_text(const toml::node& node) {
  if (node.is_table()) return "a table";
  if (node.is_array()) return "an array";
  if (node.is_string()) return "a string";
  if (node.is_integer()) return "a whole number";
  if (node.is_floating_point()) return "a number with a point";
  if (node.is_boolean()) return "true or false";
  return "a date or time";
}

std::string_view wanted_type(Kind kind) {
  switch (kind) {
    case Kind::kTexts:
      return "an array of strings";
    case Kind::kFlag:
      return "true or false";
    case Kind::kCount:
      return "a whole number";
    case Kind::kBytes:
      return "a string such as \"512MiB\", or a whole number of bytes";
    case Kind::kDuration:
      return "a string such as \"30s\"";
    case Kind::kText:
    case Kind::kChoice:
      return "a string";
  }
  return "";
}

/// The values of a node as Option::set() takes them; nothing when it has the wrong type.
std::optional<std::vector<std::string>> values_of(const toml::node& node, Kind kind) {
  const auto one = [](std::string value) { return std::vector<std::string>{std::move(value)}; };
  switch (kind) {
    case Kind::kTexts: {
      if (!node.is_array()) return std::nullopt;
      std::vector<std::string> out;
      for (const auto& item : *node.as_array()) {
        if (!item.is_string()) return std::nullopt;
        out.push_back(item.as_string()->get());
      }
      return out;
    }
    case Kind::kFlag:
      if (!node.is_boolean()) return std::nullopt;
      return one(node.as_boolean()->get() ? "true" : "false");
    case Kind::kCount:
      if (!node.is_integer()) return std::nullopt;
      return one(std::to_string(node.as_integer()->get()));
    case Kind::kBytes:
      if (node.is_integer()) return one(std::to_string(node.as_integer()->get()));
      [[fallthrough]];
    case Kind::kText:
    case Kind::kDuration:
    case Kind::kChoice:
      if (!node.is_string()) return std::nullopt;
      return one(node.as_string()->get());
  }
  return std::nullopt;
}

class Reader {
 public:
  Reader(std::string_view file, CairndOptions& options) : file_(file), options_(options) {}

  void read(const toml::table& table, const std::string& section) {
    for (const auto& [name, node] : table) {
      const auto line = name.source().begin.line;
      const auto key = section.empty() ? std::string(name.str()) : section + "." + std::string(name.str());
      const auto option = std::ranges::find(option_table(), key, &Option::key);
      if (option != option_table().end())
        set(*option, node, line);
      else if (section.empty() && is_section(key) && node.is_table())
        read(*node.as_table(), key);
      else if (section.empty() && is_section(key))
        wrong(line, key, "a section: write [" + key + "] on a line of its own, its keys below");
      else
        wrong(line, printable(key), "no such key" + nearest(key));
    }
  }
  void wrong(std::uint32_t line, std::string_view key, const std::string& why) {
    found_.emplace_back(line, std::string(key) + (key.empty() ? "" : ": ") + why);
  }
  std::vector<Error> found() {
    std::ranges::sort(found_);
    std::vector<Error> out;
    for (const auto& [line, why] : found_)
      out.push_back({Errc::kInvalid, std::string(file_) + ":" + std::to_string(line) + ": " + why});
    return out;
  }

 private:
  static bool is_section(std::string_view name) {
    return std::ranges::any_of(option_table(), [&](const Option& o) { return section_of(o.key) == name; });
  }
  void set(const Option& option, const toml::node& node, std::uint32_t line) {
    const auto values = values_of(node, option.kind);
    if (!values)
      return wrong(line, option.key,
                   std::string(type_text(node)) + " where " + std::string(wanted_type(option.kind)) +
                       " is wanted; allowed: " + option.allowed);
    if (auto done = option.set(options_, *values); !done) wrong(line, option.key, done.error().message);
  }

  std::string_view file_;
  CairndOptions& options_;
  std::vector<std::pair<std::uint32_t, std::string>> found_;
};

std::string quoted(std::string_view text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      out += "\\u00";
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string toml_value(const Option& option, const CairndOptions& options) {
  const auto values = option.get(options);
  switch (option.kind) {
    case Kind::kFlag:
    case Kind::kCount:
      return values[0];
    case Kind::kTexts: {
      std::string out = "[";
      for (const auto& value : values) out += (out.size() > 1 ? ", " : "") + quoted(value);
      return out + "]";
    }
    case Kind::kText:
    case Kind::kBytes:
    case Kind::kDuration:
    case Kind::kChoice:
      return quoted(values[0]);
  }
  return "";
}

}  // namespace

std::vector<Error> read_config(std::string_view text, std::string_view file, CairndOptions& options) {
  Reader reader(file, options);
  if (text.size() > kConfigBytesMax) {
    reader.wrong(1, "", "larger than " + bytes_text(kConfigBytesMax));
    return reader.found();
  }
  try {
    reader.read(toml::parse(text), "");
  } catch (const toml::parse_error& error) {
    reader.wrong(error.source().begin.line, "", "not TOML: " + printable(error.description(), 256));
  }
  return reader.found();
}

std::string print_config(const CairndOptions& given) {
  auto options = given;
  if (options.data.empty()) options.data = {kDataOfUnit};
  const CairndOptions defaults;
  const auto shares = memory_shares(options);
  std::string out =
      "# Configuration of cairnd, complete. Lines that are commented out show the default.\n"
      "# Every key is a flag, too, which overrides it: `grace` in [garbage] is --garbage-grace.\n"
      "# Keys marked \"live\" are taken from this file again at SIGHUP; the others need a restart.\n"
      "# Sizes: 64KiB, 512MiB, 1GiB, 1TiB (powers of 1024). Durations: 200ms, 30s, 10m, 1h, 7d.\n";
  std::string_view section;
  for (const auto& option : option_table()) {
    if (section_of(option.key) != section) {
      section = section_of(option.key);
      out += "\n[" + std::string(section) + "]\n";
    }
    const auto value = toml_value(option, options), fallback = toml_value(option, defaults);
    out += "\n# " + std::string(option.help) + ".\n# allowed: " + option.allowed;
    out += option.key == "data" ? "; required" : "; default: " + fallback;
    out += option.when == Option::When::kLive ? "; live\n" : "\n";
    if (option.key == "memory")
      out += "# Of " + bytes_text(options.memory_bytes) + ": " + bytes_text(shares.units * kUnitBytes) + " buffers, " +
             bytes_text(shares.merge_bytes) + " merges, " + bytes_text(shares.index_bytes) + " index, " +
             bytes_text(shares.message_bytes) + " messages, " + std::to_string(shares.connections) +
             " connections; the rest is everything else.\n";
    out += (value == fallback ? "#" : "") + std::string(name_of(option.key)) + " = " + value + "\n";
  }
  return out;
}

}  // namespace cairn::server
