#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "proto/common/ids.h"
#include "storage/chunk_store/layout.h"

namespace cairn::storage {

/// What a read must know of a chunk.
struct ChunkEntry {
  Location location;
  std::vector<std::uint32_t> crcs;
};

/// The entries of chunks read last: a chunk is read in up to 64 pieces, one index look-up serves them all.
/// Bounded: at most 256 entries of 4 KiB.
class LocationCache {
 public:
  static constexpr std::size_t kEntriesMax = 256;

  std::shared_ptr<const ChunkEntry> find(const ChunkId& id) {
    const auto found = entries_.find(id);
    if (found == entries_.end()) return nullptr;
    order_.splice(order_.begin(), order_, found->second);
    return found->second->second;
  }
  void insert(const ChunkId& id, std::shared_ptr<const ChunkEntry> entry) {
    erase(id);
    order_.emplace_front(id, std::move(entry));
    entries_.emplace(id, order_.begin());
    if (order_.size() > kEntriesMax) erase(ChunkId(order_.back().first));
  }
  void erase(const ChunkId& id) {
    const auto found = entries_.find(id);
    if (found == entries_.end()) return;
    order_.erase(found->second);
    entries_.erase(found);
  }

 private:
  using Order = std::list<std::pair<ChunkId, std::shared_ptr<const ChunkEntry>>>;  // last used first
  Order order_;
  std::map<ChunkId, Order::iterator> entries_;
};

}  // namespace cairn::storage
