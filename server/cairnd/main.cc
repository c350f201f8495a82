#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "proto/runtime/runtime.h"
#include "server/cairnd/command_line.h"
#include "server/cairnd/config_file.h"
#include "server/cairnd/serve.h"

namespace {

using namespace cairn;

void raise_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);  // the limit that stays decides how many connections are taken
}

void tell(const Error& error) {
  std::fprintf(stderr, "cairnd: %s\n", error.message.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  using Action = server::CommandLine::Action;
  umask(077);
  const auto line = server::parse_command_line(argc, argv);
  if (line.action == Action::kExit) return line.exit_code;
  auto configured = server::configure(line);
  if (line.action == Action::kPrintConfig && configured.options.data.empty())
    std::erase_if(configured.mistakes, [](const Error& e) { return e.message.starts_with("data: no data"); });
  for (const auto& mistake : configured.mistakes) tell(mistake);
  if (!configured.mistakes.empty())
    return line.action == Action::kServe ? exit_code(configured.mistakes.front().code) : 2;
  if (line.action == Action::kCheckConfig) return std::puts("ok") < 0 ? 1 : 0;
  if (line.action == Action::kPrintConfig)
    return std::fputs(server::print_config(configured.options).c_str(), stdout) < 0 ? 1 : 0;

  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is an error of the write, which fails the target
  raise_file_limit();

  auto real = rt::RealRuntime::create();
  if (!real) {
    tell(real.error());
    return exit_code(real.error().code);
  }
  (*real)->set_log(server::log_options(configured.options));
  auto& loop = (*real)->loop();
  server::Hangup hangup{.arrived = rt::Signal(loop), .configure = [&line] { return server::configure(line); }};
  rt::OneShot<bool> stop(loop);
  bool stopping = false;
  const auto watch = loop.watch_signals({SIGTERM, SIGINT, SIGHUP}, [&](int number) {
    if (number == SIGHUP) {
      hangup.pending = true;
      return hangup.arrived.notify_all();
    }
    if (std::exchange(stopping, true)) std::_Exit(1);
    stop.setter().set(true);
  });
  if (auto served = rt::run(loop, server::serve(**real, configured.options, stop, hangup)); !served) {
    tell(served.error());
    return exit_code(served.error().code);
  }
  return 0;
}
