#pragma once

#include <cstdint>
#include <string_view>

#include "proto/common/ids.h"

namespace cairn::wire {
class ExtentRun;
}

namespace cairn::server {

/// Bytes of a run of chunks that a client names; its owner must be `owner` or not said.
/// errors: kInvalid  with `what` in front: sizes, overflow, another owner
Result<std::uint64_t> check_run(const wire::ExtentRun& run, const OwnerId& owner, std::string_view what);

}  // namespace cairn::server
