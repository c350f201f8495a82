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

/// As the documentation of the programs lists them.
int exit_code(Errc code) {
  switch (code) {
    case Errc::kInvalid:
      return 2;
    case Errc::kNotFound:
      return 3;
    case Errc::kExists:
    case Errc::kConflict:
    case Errc::kFenced:
      return 4;
    case Errc::kDenied:
      return 5;
    case Errc::kDataLoss:
      return 6;
    case Errc::kUnavailable:
    case Errc::kDeadline:
    case Errc::kBusy:
      return 7;
    case Errc::kNoSpace:
      return 8;
    default:
      return 1;
  }
}

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
