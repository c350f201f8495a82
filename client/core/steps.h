#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "client/core/session.h"

namespace cairn::client {

/// Removes one step. errors: kNotFound;  kConflict  it is pinned
Task<void> remove_step(std::shared_ptr<Session> session, std::string bucket, std::string run, std::uint64_t step,
                       rt::TimePoint deadline);

/// Removes the steps after one, from the highest down, a page in one transaction each: whenever it is interrupted, what
/// is left is a beginning of the run, and it can be called again. Steps that are committed meanwhile stay. Returns how
/// many were removed. `progress` is told done and in all.
/// errors: kConflict  some are pinned: nothing is removed, unless they were pinned meanwhile
Task<std::uint64_t> remove_steps_after(std::shared_ptr<Session> session, std::string bucket, std::string run,
                                       std::uint64_t after, rt::Duration timeout,
                                       std::function<void(std::uint64_t, std::uint64_t)> progress = {});

/// Keeps a step from removal and replacement, or no longer. Also when it is so already: an opposite request that is
/// still on its way does nothing any more.
/// errors: kNotFound;  kConflict  somebody else changed it at the same time
Task<void> pin_step(std::shared_ptr<Session> session, std::string bucket, std::string run, std::uint64_t step,
                    bool pinned, rt::TimePoint deadline);

}  // namespace cairn::client
