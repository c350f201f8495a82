#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "proto/runtime/runtime.h"
#include "server/cairnd/options.h"
#include "server/cairnd/serve.h"

namespace {

using namespace cairn;

void raise_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);  // the limit that stays decides how many connections are taken
}

}  // namespace

int main(int argc, char** argv) {
  umask(077);
  auto parsed = server::parse_options(argc, argv);
  if (parsed.exit_code) return *parsed.exit_code;
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is an error of the write, which fails the target
  raise_file_limit();

  const auto said = [](const Error& error) {
    std::fprintf(stderr, "cairnd: %s\n", error.message.c_str());
    return exit_code(error.code);
  };
  auto real = rt::RealRuntime::create({.log_min = parsed.options.log_level});
  if (!real) return said(real.error());
  auto& loop = (*real)->loop();
  rt::OneShot<bool> stop(loop);
  bool stopping = false;
  const auto watch = loop.watch_signals({SIGTERM, SIGINT}, [&](int) {
    if (std::exchange(stopping, true)) std::_Exit(1);
    stop.setter().set(true);
  });
  if (auto served = rt::run(loop, server::serve(**real, parsed.options, stop)); !served) return said(served.error());
  return 0;
}
