#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "proto/rt/seams.h"

namespace cairn::rt {

/// Fresh zeroed memory in a memfd that can neither shrink nor grow, mapped here; the other side maps the same when it
/// is attached to a unix socket. sizes:  a multiple of the page size, above 0 errors: kFailed  the system refuses
Result<std::shared_ptr<SharedMemory>> make_shared_memory(std::uint64_t bytes);

/// Takes memory for all of `bytes` now, which is cheaper than when they are touched one by one; in huge pages where the
/// system has some, which makes every later use of them cheaper, by the other side too. Changes no byte; may run beside
/// anything. Ends early when `stop` is set.
void fault_in(std::span<std::byte> bytes, const std::atomic<bool>& stop);

/// Maps what a peer has sent; takes `fd` over.
/// errors: kInvalid  not a memfd sealed against shrinking (touching what is gone would kill us), empty or too large
Result<std::shared_ptr<SharedMemory>> map_shared_memory(int fd);

/// The descriptor behind memory of the two functions above; -1 for any other.
int descriptor_of(const SharedMemory& memory);

}  // namespace cairn::rt
