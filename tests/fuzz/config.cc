#include <algorithm>

#include "proto/common/ids.h"
#include "proto/common/quantity.h"
#include "proto/common/text.h"
#include "proto/runtime/address.h"
#include "server/cairnd/config_file.h"
#include "tests/fuzz/fuzz.h"

// What people write: the configuration file, and sizes, times, ids and addresses in flags.

namespace cairn::fuzz {
namespace {

std::vector<std::vector<std::string>> values(const server::CairndOptions& options) {
  std::vector<std::vector<std::string>> out;
  for (const auto& option : server::option_table()) out.push_back(option.get(options));
  return out;
}

void file(std::string_view text) {
  server::CairndOptions options;
  const auto wrong = server::read_config(text, "cairnd.toml", options);
  for (const auto& error : wrong)
    must(!error.message.empty() && error.message.size() < 4096, "a mistake is told in a line");
  if (!wrong.empty()) return;
  (void)server::contradictions(options);
  (void)server::memory_shares(options);
  server::CairndOptions again;
  const auto printed = server::print_config(options);
  const auto mistakes = server::read_config(printed, "printed", again);
  must(mistakes.empty(), "a printed configuration can be read: " + (mistakes.empty() ? "" : mistakes.front().message));
  if (!options.data.empty()) must(values(again) == values(options), "a printed configuration says the same");
}

void word(std::string_view text) {
  if (const auto bytes = parse_bytes(text)) must(parse_bytes(bytes_text(*bytes)) == bytes, "a size survives");
  if (const auto time = parse_duration(text)) must(parse_duration(duration_text(*time)) == time, "a time survives");
  if (const auto uuid = Uuid::from_text(text)) must(uuid->text() == text, "an id survives");
  (void)rt::parse_address(text);
  const auto shown = printable(text, 128);
  // Three dots stand for what was cut.
  must(shown.size() <= 131 && valid_utf8(shown) && printable(shown, 131) == shown, "printable text is printable");
  (void)check_bucket_name(text);
  (void)check_run_name(text);
  if (check_free_name("name", text)) must(valid_utf8(text) && !text.empty(), "a free name is text");
}

void one(std::string_view input) {
  Input in(input);
  if (in.byte() % 4 == 0) return word(in.rest());
  file(in.rest());
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  server::CairndOptions options;
  options.data = {"/data/a", "/data/b"};
  // A section at a time: whole, it is longer than what mutations reach.
  std::string section = "f";
  const auto printed = server::print_config(options);
  for (std::size_t at = 0; at < printed.size();) {
    const auto end = std::min(printed.find('\n', at), printed.size() - 1) + 1;
    auto line = printed.substr(at, end - at);
    at = end;
    if (line.starts_with("[")) out.push_back(std::exchange(section, "f"));
    if (line.starts_with("#") && line.find(" = ") != line.npos) line.erase(0, line.find_first_not_of("# "));
    if (!line.starts_with("#")) section += line;
  }
  out.push_back(section);
  for (const auto* text : {"64KiB", "1TiB", "200ms", "7d", "127.0.0.1:7420", "[::1]:7420", "unix:/run/cairn.sock",
                           "00112233445566778899aabbccddeeff", "llama/7b"})
    out.push_back(std::string(1, '\0') + text);
  return out;
}

const Register registered({.name = "config", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
