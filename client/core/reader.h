#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "client/core/session.h"
#include "storage/format/manifest.h"
#include "storage/format/restore_plan.h"

namespace cairn::client {

struct ReadStats {
  std::uint64_t bytes_wanted = 0;
  std::uint64_t bytes_moved = 0;      // of requests and answers, frames included, and of blocks read into shared memory
  std::uint64_t bytes_from_disk = 0;  // that the daemon read for these requests
  ReadStats& operator+=(const ReadStats& other) {
    bytes_wanted += other.bytes_wanted;
    bytes_moved += other.bytes_moved;
    bytes_from_disk += other.bytes_from_disk;
    return *this;
  }
};

/// Sends the requests, several at once, and puts their bytes where they belong: request.scatter names offsets in
/// destinations[want]. Every byte is verified. `progress` is told the bytes of each request when it is done.
/// errors: kDataLoss, kNotFound (a chunk is gone), kUnavailable, kUnknown -> kUnavailable
Task<ReadStats> read_all(std::shared_ptr<Session> session, std::vector<format::ReadRequest> requests,
                         std::vector<std::span<std::byte>> destinations, std::uint32_t in_flight, rt::Duration timeout,
                         std::function<void(std::uint64_t)> progress = {}, bool fresh = false);

/// Reads `extents`, in order, into `out`, which has their size. `fresh`: from the disk, whatever the daemon holds.
Task<ReadStats> read_extents(std::shared_ptr<Session> session, std::vector<format::Extent> extents,
                             std::span<std::byte> out, rt::Duration timeout, bool fresh = false);

}  // namespace cairn::client
