#pragma once

#include "client/core/reader.h"

namespace cairn::client {

/// Whether a request is read into shared memory: there is some, and its ranges are long, so that the blocks around them
/// bring little that nobody wants.
bool fits_shared(const Session& session, const format::ReadRequest& request);

/// Reads a request's blocks into the session's window, verifies them and copies what is wanted to where it belongs. The
/// daemon copies no byte.
///
/// Threads:  the loop; verifying and copying run on the offload threads.
/// errors:   any: the caller reads by ranges then, which tells what is wrong. Destinations may be partly written.
Task<ReadStats> read_shared(std::shared_ptr<Session> session, const format::ReadRequest* request,
                            const std::vector<std::span<std::byte>>* destinations, rt::TimePoint deadline);

}  // namespace cairn::client
