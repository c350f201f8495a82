#pragma once

#include <cassert>
#include <cstdlib>
#include <memory>
#include <new>

#include "proto/common/units.h"
#include "proto/rt/unit_pool.h"

namespace cairn::storage {

/// Memory of its own that File takes: for the few small files outside the unit pool.
/// sizes: a multiple of 4096
inline rt::MutableBuffer aligned_memory(std::size_t size_bytes) {
  assert(size_bytes > 0 && size_bytes % kSectorBytes == 0);
  void* memory = std::aligned_alloc(kSectorBytes, size_bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return {std::shared_ptr<void>(memory, [](void* p) { std::free(p); }), {static_cast<std::byte*>(memory), size_bytes}};
}

}  // namespace cairn::storage
