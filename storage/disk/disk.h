#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"

namespace cairn::storage {

/// One open file of a target. Several operations may be in flight; they complete in any order.
///
/// The kernel owns a buffer from submission to completion: operations keep it alive also when their Task is dropped.
/// A dropped write may still reach the disk.
class File {
 public:
  virtual ~File() = default;
  /// Writes all of `bytes` at `offset` (O_DIRECT: memory, offset and size multiples of 4096). Durable only after a
  /// flush() that was *submitted after* this completed.
  /// errors: kNoSpace  disk full;  kFailed  I/O error
  virtual Task<void> write(std::uint64_t offset, Buffer bytes) = 0;
  /// Fills `into.bytes` from `offset` (same alignment rule) and gives the memory back.
  /// errors: kDataLoss  the file ends before;  kFailed  I/O error
  virtual Task<rt::MutableBuffer> read(std::uint64_t offset, rt::MutableBuffer into) = 0;
  /// fdatasync: covers writes whose completion was seen before this call.
  virtual Task<void> flush() = 0;
  /// Gives the space of [offset, offset + size) back; it reads as zeros.
  virtual Task<void> punch(std::uint64_t offset, std::uint64_t size) = 0;
  virtual std::uint64_t size() const = 0;
  /// Bytes of the disk that it took when it was opened; what the file system keeps of a file with many holes may be
  /// counted in.
  virtual std::uint64_t allocated() const = 0;
};

struct Space {
  std::uint64_t total_bytes = 0;
  std::uint64_t free_bytes = 0;
};

/// The files of one data directory: a flat name space (no '/' in names).
class Disk {
 public:
  virtual ~Disk() = default;
  /// A new file of `size` bytes with its space allocated (0: empty, grows by writes).
  /// errors: kExists;  kNoSpace
  virtual Task<std::shared_ptr<File>> create(std::string name, std::uint64_t size) = 0;
  /// errors: kNotFound
  virtual Task<std::shared_ptr<File>> open(std::string name) = 0;
  virtual Task<void> rename(std::string from, std::string to) = 0;  // replaces `to`
  virtual Task<void> unlink(std::string name) = 0;
  /// fsync of the directory: created, renamed and unlinked names are durable after it.
  virtual Task<void> sync_directory() = 0;
  virtual Task<std::vector<std::string>> list() = 0;  // sorted
  virtual Task<Space> space() = 0;
  /// Memory that reads and writes will use often; a hint.
  virtual void register_memory(std::span<std::byte> slab) = 0;
  /// For messages and `/metrics`: "io_uring /d0", "threads /d0", "simulated".
  virtual std::string description() const = 0;
};

}  // namespace cairn::storage
