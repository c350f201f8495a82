#include "server/cairnd/command_line.h"

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <list>
#include <optional>

#include "proto/common/text.h"
#include "server/cairnd/config_file.h"

namespace cairn::server {
namespace {

constexpr const char* kExample = R"(
Example:
  cairnd --data /var/lib/cairn/data --listen 127.0.0.1:7420 --http 127.0.0.1:7421
  cairnd --print-config > cairnd.toml; cairnd --config cairnd.toml

When it can serve it prints one line: cairnd ready listen=HOST:PORT http=HOST:PORT node=NAME
SIGTERM finishes what is in flight and exits 0; a second one exits at once. SIGHUP reads the configuration file again.)";

std::string group_of(std::string_view key) {
  const auto dot = key.find('.');
  return dot == key.npos ? "Options" : "Section [" + std::string(key.substr(0, dot)) + "]";
}

Result<std::string> read_file(const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string text(kConfigBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad() || !file.is_open() || (file.fail() && !file.eof()))
    return fail(Errc::kInvalid, "--config " + printable(path, 1024) + ": " + errno_text(errno == 0 ? EIO : errno));
  text.resize(static_cast<std::size_t>(file.gcount()));
  return text;
}

}  // namespace

CommandLine parse_command_line(int argc, char** argv) {
  CommandLine line;
  CLI::App app("The storage daemon of Cairn.");
  app.footer(kExample);
  app.set_version_flag("--version", "cairnd " CAIRN_VERSION);
  bool check = false, print = false;
  app.add_option("--config", line.config, "Configuration file; flags override it")->type_name("FILE.toml");
  app.add_flag("--check-config", check, "Check file and flags, print all that is wrong, and exit: 0, or 2");
  app.add_flag("--print-config", print, "Print the whole configuration, commented, and exit");

  struct Given {
    const Option* option;
    CLI::Option* flag = nullptr;
    std::vector<std::string> values = {};
    std::string value = {};
  };
  std::list<Given> all;  // stays where it is: CLI11 keeps pointers
  const CairndOptions defaults;
  for (const auto& option : option_table()) {
    auto& given = all.emplace_back(&option);
    const auto help = std::string(option.help);
    if (option.kind == Option::Kind::kFlag) {
      given.flag = app.add_flag(option.flag(), given.value, help);
    } else if (option.kind == Option::Kind::kTexts) {
      given.flag = app.add_option(option.flag(), given.values, help + "; may be repeated")
                       ->expected(1)
                       ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
                       ->type_name(option.key == "data" ? "DIR" : "ID");
    } else {
      const auto normal = option.get(defaults)[0];
      given.flag = app.add_option(option.flag(), given.value, help + (normal.empty() ? "" : " [" + normal + "]"))
                       ->type_name("(" + option.allowed + ")");
    }
    given.flag->group(group_of(option.key));
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    line.action = CommandLine::Action::kExit;
    line.exit_code = app.exit(asked);
    return line;
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "cairnd: %s; see cairnd --help\n", error.what());
    line.action = CommandLine::Action::kExit;
    line.exit_code = 2;
    return line;
  }
  if (check) line.action = CommandLine::Action::kCheckConfig;
  if (print) line.action = CommandLine::Action::kPrintConfig;
  for (auto& given : all) {
    if (given.flag->count() == 0) continue;
    if (given.option->kind != Option::Kind::kTexts) given.values = {given.value};
    line.flags.emplace_back(given.option, given.values);
  }
  return line;
}

Configured configure(const CommandLine& line) {
  Configured out;
  if (!line.config.empty()) {
    auto text = read_file(line.config);
    if (text)
      out.mistakes = read_config(*text, printable(line.config, 1024), out.options);
    else
      out.mistakes.push_back(std::move(text).error());
  }
  for (const auto& [option, values] : line.flags)
    if (auto set = option->set(out.options, values); !set)
      out.mistakes.push_back(std::move(set).error().with(option->flag()));
  // Contradictions of half a configuration would mislead.
  if (out.mistakes.empty()) out.mistakes = contradictions(out.options);
  return out;
}

}  // namespace cairn::server
