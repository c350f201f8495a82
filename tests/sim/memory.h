#pragma once

#include <memory>
#include <vector>

#include "proto/common/units.h"
#include "proto/rt/seams.h"

namespace cairn::sim {

/// What stands for a memfd: client and daemon hold the same bytes.
class SimMemory final : public rt::SharedMemory {
 public:
  explicit SimMemory(std::size_t size) : room_(size + kSectorBytes), size_(size) {}
  std::span<std::byte> bytes() const override {
    auto at = reinterpret_cast<std::uintptr_t>(room_.data());
    return {room_.data() + (round_up(at, kSectorBytes) - at), size_};
  }

 private:
  mutable std::vector<std::byte> room_;
  std::size_t size_;
};

}  // namespace cairn::sim
