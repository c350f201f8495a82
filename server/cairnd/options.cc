#include "server/cairnd/options.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>
#include <map>
#include <vector>

namespace cairn::server {
namespace {

constexpr std::size_t kDirectoriesMax = 64;

constexpr const char* kExample = R"(
Example:
  cairnd --data /var/lib/cairn/data --listen 127.0.0.1:7420 --http 127.0.0.1:7421

When it can serve it prints one line: cairnd ready listen=HOST:PORT http=HOST:PORT node=NAME
SIGTERM finishes what is in flight and exits 0; a second one exits at once.)";

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 && name[0] != '\0' ? name : "localhost";
}

/// "200ms", "30s", "10m", "1h".
bool parse_duration(const std::string& text, rt::Duration& out) {
  static const std::map<std::string, rt::Duration> kUnits = {{"ms", std::chrono::milliseconds(1)},
                                                             {"s", std::chrono::seconds(1)},
                                                             {"m", std::chrono::minutes(1)},
                                                             {"h", std::chrono::hours(1)}};
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const auto unit = kUnits.find(std::string(end, text.data() + text.size()));
  if (error != std::errc() || unit == kUnits.end() || number < 0 || number > 1'000'000'000) return false;
  out = unit->second * number;
  return out <= std::chrono::hours(24 * 365);
}

void add_duration(CLI::App& app, const std::string& name, rt::Duration& out, const std::string& help) {
  app.add_option_function<std::string>(
         name,
         [&out, name](const std::string& text) {
           if (!parse_duration(text, out))
             throw CLI::ValidationError(name, "'" + text + "' is not a duration such as 200ms, 30s, 10m or 1h");
         },
         help)
      ->type_name("DURATION");
}

}  // namespace

Parsed parse_options(int argc, char** argv) {
  Parsed parsed;
  auto& options = parsed.options;
  options.node = host_name();
  std::vector<std::string> lost;
  std::string unix_socket;

  CLI::App app("The storage daemon of Cairn.");
  app.footer(kExample);
  app.set_version_flag("--version", "cairnd " CAIRN_VERSION);
  app.add_option("--data", options.data, "Data directory, made when missing (its parent must exist)")
      ->required()
      ->type_name("DIR");
  app.add_option(
         "--lost-target", lost,
         "The data directory with this id is lost for good: go on without it, and put an empty one in its place")
      ->type_name("UUID");
  app.add_option("--listen", options.listen, "Address for clients; port 0: a free one")
      ->capture_default_str()
      ->type_name("HOST:PORT");
  app.add_option("--http", options.http, "Address of /healthz, /readyz and /metrics; port 0: a free one")
      ->capture_default_str()
      ->type_name("HOST:PORT");
  app.add_flag("--insecure-listen", options.insecure_listen,
               "Allow other addresses than loopback: anybody who reaches them can read and delete everything");
  app.add_option("--node", options.node, "Name of this node")->capture_default_str()->type_name("NAME");
  app.add_option("--unix-socket", unix_socket,
                 "For clients on this host, or none; default: cairn.sock in the first DIR")
      ->type_name("PATH|none");
  app.add_option("--memory", options.memory_bytes, "Budget of buffers, index and messages together")
      ->transform(CLI::AsSizeValue(false))
      ->default_str("512MiB")
      ->type_name("SIZE");
  app.add_option("--io", options.io, "How bytes reach the disk")
      ->transform(
          CLI::CheckedTransformer(std::map<std::string, storage::IoBackend>{{"auto", storage::IoBackend::kAuto},
                                                                            {"uring", storage::IoBackend::kUring},
                                                                            {"threads", storage::IoBackend::kThreads}},
                                  CLI::ignore_case))
      ->default_str("auto")
      ->type_name("auto|uring|threads");
  add_duration(app, "--garbage-grace", options.garbage_grace,
               "How long chunks must be dead before they are freed [10m]");
  add_duration(app, "--garbage-interval", options.garbage_interval, "Between looks for dead chunks [1m]");
  add_duration(app, "--reader-ttl", options.reader_ttl,
               "How long what a reader has open is kept for it without a sign of life [60s]");
  add_duration(app, "--retention-interval", options.retention_interval,
               "Between looks for steps that no rule of their bucket keeps [1m]");
  add_duration(app, "--rank-silence", options.rank_silence, "After which a silent rank fails its save [30s]");
  app.add_option("--log-level", options.log_level, "Least level of log lines on stderr")
      ->transform(CLI::CheckedTransformer(std::map<std::string, rt::Level>{{"debug", rt::Level::kDebug},
                                                                           {"info", rt::Level::kInfo},
                                                                           {"warning", rt::Level::kWarning},
                                                                           {"error", rt::Level::kError}},
                                          CLI::ignore_case))
      ->default_str("info")
      ->type_name("debug|info|warning|error");

  const auto wrong = [&](const std::string& why) {
    std::fprintf(stderr, "cairnd: %s; see cairnd --help\n", why.c_str());
    parsed.exit_code = 2;
    return parsed;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    parsed.exit_code = app.exit(asked);
    return parsed;
  } catch (const CLI::ParseError& error) {
    return wrong(error.what());
  }
  // Until records and chunks go to all members of their groups.
  if (options.data.size() > 1) return wrong("--data is given several times: one directory is supported");
  if (options.data.size() > kDirectoriesMax)
    return wrong("--data is given " + std::to_string(options.data.size()) + " times, at most " +
                 std::to_string(kDirectoriesMax) + " are allowed");
  for (const auto& text : lost) {
    auto uuid = Uuid::from_text(text);
    if (!uuid) return wrong("--lost-target: " + uuid.error().message);
    options.lost_targets.insert(*uuid);
  }
  if (options.memory_bytes < 64 * kMiB || options.memory_bytes > 1024 * kGiB)
    return wrong("--memory must be 64MiB to 1024GiB");
  if (options.node.empty() || options.node.size() > 255 ||
      options.node.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") !=
          std::string::npos)
    return wrong("--node must be 1 to 255 letters, digits, '.', '_' or '-'");
  if (options.rank_silence < std::chrono::milliseconds(100)) return wrong("--rank-silence must be at least 100ms");
  if (options.reader_ttl < std::chrono::seconds(1)) return wrong("--reader-ttl must be at least 1s");
  if (options.retention_interval < std::chrono::seconds(1)) return wrong("--retention-interval must be at least 1s");
  if (options.garbage_interval < std::chrono::milliseconds(1)) return wrong("--garbage-interval must be at least 1ms");
  if (app.count("--unix-socket") > 0) options.unix_socket = unix_socket;
  return parsed;
}

}  // namespace cairn::server
