#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <utility>

#include "proto/common/ids.h"
#include "server/chunks/chunks.h"
#include "server/coordinator/coordinator.h"
#include "storage/record_store/record_store.h"

namespace cairn::server {

/// What an owner's home group says of it.
struct Answer {
  enum class Kind {
    kNone,       // no answer
    kAbsent,     // no record names the owner
    kOpen,       // an upload or attempt: all its chunks live
    kCommitted,  // only chunks of `writers` live, less the abandoned ones
  };
  Kind kind = Kind::kNone;
  std::uint32_t loss = 0;  // of the group, when it answered
  std::set<std::uint64_t> writers;
  std::set<std::pair<std::uint64_t, std::uint32_t>> abandoned;  // writer, index
};

/// Asks home groups about owners. A seam, so that tests can plant answers that are wrong or missing.
class Liveness {
 public:
  virtual ~Liveness() = default;
  virtual Task<Answer> ask(OwnerId owner) = 0;
};

/// From the records of this daemon, and the lists of writers that they name. Lifetime: what it is given outlives it.
std::unique_ptr<Liveness> make_liveness(storage::RecordStore& records, const Coordinator& coordinator, Chunks& chunks);

}  // namespace cairn::server
