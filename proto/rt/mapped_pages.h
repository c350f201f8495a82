#pragma once

namespace cairn::rt {

/// What a SharedMemory is too where it is another process's memory, mapped: pages that were touched count in this
/// process's resident size.
class MappedPages {
 public:
  virtual ~MappedPages() = default;
  /// Lets go of the pages, not of the bytes: they come back when they are touched again. At any time.
  virtual void unmap_pages() = 0;
};

}  // namespace cairn::rt
