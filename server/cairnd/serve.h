#pragma once

#include <functional>

#include "proto/runtime/runtime.h"
#include "server/cairnd/command_line.h"
#include "server/cairnd/options.h"

namespace cairn::server {

/// The wish, by SIGHUP, that the configuration be read again. configure() reads it.
struct Hangup {
  rt::Signal arrived;
  std::function<Configured()> configure;
  bool pending = false;
};

/// The daemon from its first listen to its end. Ends when `stop` is set: finishes what is in flight.
/// Nothing is changed on disk unless it can listen and the directory is a target of this version, or empty.
Task<void> serve(rt::RealRuntime& real, CairndOptions options, rt::OneShot<bool>& stop, Hangup& hangup);

/// What options say about the log.
rt::LogOptions log_options(const CairndOptions& options);

}  // namespace cairn::server
