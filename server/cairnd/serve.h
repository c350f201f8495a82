#pragma once

#include "proto/runtime/runtime.h"
#include "server/cairnd/options.h"

namespace cairn::server {

/// The daemon from its first listen to its end. Ends when `stop` is set: finishes what is in flight.
/// Nothing is changed on disk unless it can listen and the directory is a target of this version, or empty.
Task<void> serve(rt::RealRuntime& real, CairndOptions options, rt::OneShot<bool>& stop);

}  // namespace cairn::server
