#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>

#include "server/cairnd/config_file.h"
#include "server/cairnd/options.h"

using namespace cairn;
using namespace cairn::server;

namespace {

using Kind = Option::Kind;

std::vector<std::string> values_of(const CairndOptions& options) {
  std::vector<std::string> out;
  for (const auto& option : option_table())
    for (const auto& value : option.get(options)) out.push_back(std::string(option.key) + "=" + value);
  return out;
}

/// What is wrong with a file, one per line.
std::string wrong(std::string_view text) {
  CairndOptions options;
  std::string out;
  for (const auto& error : read_config(text, "f.toml", options)) out += error.message + "\n";
  return out;
}

/// A value that is allowed and not the default.
std::string other_value(const Option& option, const CairndOptions& defaults) {
  const auto normal = option.get(defaults);
  const auto allowed = [&](const std::string& value) {
    CairndOptions scratch;
    return option.set(scratch, {value}).has_value() && option.get(scratch) != normal;
  };
  if (option.kind == Kind::kTexts && option.key != "data") return std::string(32, 'a');
  for (const char* value : {"true", "/a \"quoted\"\\\tpath \xc3\xa9", "127.0.0.1:1", "none", "other", "77", "77MiB",
                            "77KiB", "7s", "77ms", "2m", "7", "debug", "json", "threads"})
    if (allowed(value)) return value;
  FAIL("no other value for " << option.key << ": add one here");
  return "";
}

}  // namespace

TEST_CASE("options: keys are unique, sections stand together, and every key says what it is", "[server]") {
  std::vector<std::string_view> keys;
  std::vector<std::string> sections;
  for (const auto& option : option_table()) {
    keys.push_back(option.key);
    const auto dot = option.key.find('.');
    const auto section = std::string(dot == option.key.npos ? "" : option.key.substr(0, dot));
    if (sections.empty() || sections.back() != section) sections.push_back(section);
    CHECK(option.help.size() > 10);
    CHECK_FALSE(option.help.ends_with("."));
    CHECK_FALSE(option.allowed.empty());
    CHECK(std::ranges::count(option.key, '.') <= 1);
    CairndOptions options;
    if (option.kind != Kind::kTexts) {
      // The default is one of the values that are allowed.
      CHECK(option.set(options, option.get(options)));
    }
  }
  std::ranges::sort(keys);
  CHECK(std::ranges::adjacent_find(keys) == keys.end());
  std::ranges::sort(sections);
  CHECK(std::ranges::adjacent_find(sections) == sections.end());
}

TEST_CASE("options: what is printed is valid and means the same, for every key", "[server]") {
  CairndOptions options;
  options.data = {"/d/1"};
  const auto same = [](const CairndOptions& written) {
    CairndOptions read;
    const auto text = print_config(written);
    INFO(text);
    for (const auto& error : read_config(text, "f", read)) FAIL_CHECK(error.message);
    CHECK(values_of(read) == values_of(written));
    CHECK(print_config(read) == text);
  };
  same(options);
  const CairndOptions defaults;
  auto all = options;
  for (const auto& option : option_table()) {
    const auto value = other_value(option, defaults);
    auto one = options;
    REQUIRE(option.set(one, {value}));
    REQUIRE(option.set(all, {value}));
    same(one);
  }
  same(all);
  all.data = {"/a", "/b c", "/\xe2\x82\xac"};
  same(all);
}

TEST_CASE("options: the printed defaults, no longer commented out, are the defaults", "[server]") {
  std::istringstream lines(print_config({}));
  std::string text;
  for (std::string line; std::getline(lines, line); text += line + "\n")
    if (line.starts_with("#") && !line.starts_with("# ")) line.erase(0, 1);
  CHECK(wrong(text).empty());
  CairndOptions read, defaults;
  (void)read_config(text, "f", read);
  defaults.data = {"/var/lib/cairn/data"};
  CHECK(values_of(read) == values_of(defaults));
  CHECK(contradictions(read).empty());
}

TEST_CASE("options: deploy/cairnd.toml is what --print-config prints", "[server]") {
  std::ifstream file(CAIRN_SOURCE_DIR "/deploy/cairnd.toml");
  std::stringstream text;
  text << file.rdbuf();
  INFO("after a change: cairnd --print-config > deploy/cairnd.toml");
  CHECK(text.str() == print_config({}));
}

TEST_CASE("options: mistakes in the file are all told, with line, key, what is allowed and the nearest key",
          "[server]") {
  CHECK(wrong("").empty());
  CHECK(wrong("garbage.grace = '1s'").empty());  // a dotted key is the same as a section
  CHECK(wrong("memory = 134217728").empty());    // bytes as a number
  CHECK(wrong("\nlisten_on = 'x'") == "f.toml:2: listen_on: no such key; the nearest is listen\n");
  CHECK(wrong("[garbage]\ngrase = '1s'") == "f.toml:2: garbage.grase: no such key; the nearest is garbage.grace\n");
  CHECK(wrong("grace = '1s'") == "f.toml:1: grace: no such key; the nearest is garbage.grace\n");
  CHECK(wrong("qqqqqqqqqqqqqqqqqqqqqqqqqqqq = 1") == "f.toml:1: qqqqqqqqqqqqqqqqqqqqqqqqqqqq: no such key\n");
  CHECK(wrong("memory = '1MiB'") == "f.toml:1: memory: 1MiB is out of range; allowed: 64MiB to 1TiB\n");
  CHECK(wrong("memory = -1") ==
        "f.toml:1: memory: '-1' is not a size such as 64KiB, 512MiB or 1GiB; allowed: 64MiB to 1TiB\n");
  CHECK(wrong("memory = 1.5").find("a number with a point where a string") != std::string::npos);
  CHECK(wrong("data = 'x'").find("f.toml:1: data: a string where an array of strings is wanted") == 0);
  CHECK(wrong("data = ['x', 1]").find("f.toml:1: data: an array where") == 0);
  CHECK(wrong("insecure_listen = 'true'").find("a string where true or false is wanted") != std::string::npos);
  CHECK(wrong("garbage = 1").find("f.toml:1: garbage: a section") == 0);
  CHECK(wrong("[listen]\nx = 1").find("f.toml:1: listen: a table where a string") == 0);
  CHECK(wrong("[log]\nlevel = 'loud'").find("log.level: 'loud' is not one of them; allowed: debug, info") !=
        std::string::npos);
  CHECK(wrong("memory = '1MiB'\n[garbage]\ngrace = 1\nintervall = '1s'\n[what]\nx=1\n") ==
        "f.toml:1: memory: 1MiB is out of range; allowed: 64MiB to 1TiB\n"
        "f.toml:3: garbage.grace: a whole number where a string such as \"30s\" is wanted; allowed: 0ms to 365d\n"
        "f.toml:4: garbage.intervall: no such key; the nearest is garbage.interval\n"
        "f.toml:5: what: no such key\n");
  CHECK(wrong("a = 1\nb = = 2").find("f.toml:2: not TOML: ") == 0);
  CHECK(wrong("node = 'x'\nnode = 'y'").find("f.toml:2: not TOML: ") == 0);
}

TEST_CASE("options: a file of any bytes is refused, not a crash", "[server]") {
  CHECK(wrong(std::string(kConfigBytesMax + 1, '#')) == "f.toml:1: larger than 1MiB\n");
  CHECK_FALSE(wrong(std::string("node = '\0'", 10)).empty());
  CHECK_FALSE(wrong("node = '\xff'").empty());
  CHECK_FALSE(wrong("data = " + std::string(100'000, '[')).empty());
  CHECK_FALSE(wrong("data = ['" + std::string(2000, 'x') + "']").empty());
  std::string deep = "a";
  for (int i = 0; i < 20'000; ++i) deep += ".a";
  CHECK_FALSE(wrong(deep + " = 1").empty());
  CHECK_FALSE(wrong("[" + deep + "]").empty());
  // Whatever comes out is printable and short, whatever came in.
  for (const auto& text : {"\"a\\u001b[2J\" = 1", "\"a\\nb\" = 1", "node = \"\\u202e\""}) {
    const auto told = wrong(text);
    CHECK(std::ranges::count(told, '\n') == 1);
    CHECK(told.find('\x1b') == told.npos);
  }
}

TEST_CASE("options: contradictions between keys", "[server]") {
  CairndOptions options;
  REQUIRE(contradictions(options).size() == 1);
  options.data = {"/d"};
  CHECK(contradictions(options).empty());
  options.data = {"/d", "/e", "/d"};
  options.http = "0.0.0.0:80";
  options.listen = "nowhere";
  const auto found = contradictions(options);
  REQUIRE(found.size() == 3);
  CHECK(found[0].message.find("'/d' is given twice") != std::string::npos);
  CHECK(found[1].code == Errc::kInvalid);
  CHECK(found[2].code == Errc::kDenied);
  options.data.resize(1);
  options.listen = "[::]:80";
  options.insecure_listen = true;
  CHECK(contradictions(options).empty());
}
