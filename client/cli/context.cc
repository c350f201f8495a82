#include "client/cli/context.h"

#include <fmt/format.h>
#include <signal.h>

#include <charconv>
#include <cmath>

#include "client/cli/output.h"
#include "proto/common/ids.h"

namespace cairn::cli {

std::atomic<bool> stop_requested = false;

void stop_on_signals() {
  struct sigaction action{};
  action.sa_handler = [](int) { stop_requested = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // the second one ends the program at once
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);  // a closed pipe is a failed write, told like any other
}

Error stopped() {
  return {Errc::kCancelled, "stopped by a signal; nothing was left behind"};
}

Result<Client> Context::client() {
  if (!client_) {
    ClientOptions options;
    options.arena_prefault = false;  // one command seldom fills it
    options.servers = servers;
    options.unix_socket = transport != "tcp";
    options.shared_memory = transport == "auto";
    TRY(client_, Client::connect(std::move(options)));
  }
  return *client_;
}

namespace {

std::string_view advice(Errc code) {
  switch (code) {
    case Errc::kInvalid:
      return "see --help";
    case Errc::kUnavailable:
    case Errc::kDeadline:
      return "check that cairnd runs there (--server, CAIRN_SERVER) and try again";
    case Errc::kUnknown:
      return "it may have happened: look before trying again";
    case Errc::kStale:
    case Errc::kBusy:
      return "try again";
    case Errc::kNoSpace:
      return "remove something, add space or raise the quota";
    case Errc::kDataLoss:
      return "'cairn verify' shows what is damaged and repairs what has a good copy; use another step or copy of the "
             "rest";
    default:
      return {};
  }
}

}  // namespace

int report(std::string_view what, const Error& error) {
  std::string line = fmt::format("cairn {}: {} ({})", what, error.message, name_of(error.code));
  // An error that says itself, behind a ';', what to do needs no other advice.
  const bool advised = error.message.find("; ") != error.message.npos;
  if (const auto hint = advice(error.code); !advised && !hint.empty()) line += fmt::format("; {}", hint);
  print_error(line);
  return exit_code(error.code);
}

Result<ObjectName> object_name(std::string_view url) {
  constexpr std::string_view kScheme = "cairn://";
  if (!url.starts_with(kScheme))
    return fail(Errc::kInvalid, fmt::format("'{}' is not of the form cairn://BUCKET/KEY", url));
  const auto rest = url.substr(kScheme.size());
  const auto slash = rest.find('/');
  ObjectName out{std::string(rest.substr(0, slash)), slash == rest.npos ? "" : std::string(rest.substr(slash + 1))};
  CHECK_OK(check_bucket_name(out.bucket));
  return out;
}

Result<void> check_run(std::string_view name) {
  const auto slash = name.find('/');
  if (slash == name.npos) return fail(Errc::kInvalid, fmt::format("'{}' is not of the form BUCKET/RUN", name));
  CHECK_OK(check_bucket_name(name.substr(0, slash)));
  return check_run_name(name.substr(slash + 1));
}

Result<std::uint64_t> size_of(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string_view unit(end, static_cast<std::size_t>(text.data() + text.size() - end));
  static constexpr std::string_view kUnits[] = {"", "K", "M", "G", "T", "P"};
  for (std::size_t i = 0; error == std::errc() && i < std::size(kUnits); ++i)
    for (const std::string_view end_of : {"", "B", "iB"}) {
      const double base = end_of == "B" && i > 0 ? 1000 : 1024;
      if (unit != std::string(kUnits[i]) + std::string(end_of) || (i == 0 && end_of == "iB")) continue;
      const double bytes = value * std::pow(base, static_cast<double>(i));
      if (value >= 0 && bytes < 0x1p63) return static_cast<std::uint64_t>(bytes);
    }
  return fail(Errc::kInvalid, fmt::format("'{}' is not a size such as 512, 64KiB, 10MB or 1.5TiB", text));
}

Result<ByteRange> range_of(std::string_view text) {
  ByteRange out;
  const auto dash = text.find('-');
  const auto number = [](std::string_view part, std::uint64_t& to) {
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), to);
    return error == std::errc() && end == part.data() + part.size();
  };
  if (dash == 0 && number(text.substr(1), out.first)) {
    out.from_end = true;
    return out;
  }
  if (dash == text.npos || !number(text.substr(0, dash), out.first) ||
      (dash + 1 != text.size() && !number(text.substr(dash + 1), out.last)) || out.last < out.first)
    return fail(Errc::kInvalid, fmt::format("'{}' is not a range of bytes: FIRST-LAST (LAST not included), FIRST- for "
                                            "all that follow, or -N for the last N",
                                            text));
  return out;
}

}  // namespace cairn::cli
