#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "proto/rt/seams.h"
#include "proto/runtime/runtime.h"
#include "storage/disk/disk.h"

// The real Disk: one directory of a file system, reached past the page cache.

namespace cairn::storage {

enum class IoBackend { kAuto, kUring, kThreads };

struct IoOptions {
  IoBackend backend = IoBackend::kAuto;  // auto: io_uring where the kernel allows it, else threads
  std::uint32_t queue_entries = 256;     // 1 .. 4096 operations in the kernel at once; more wait their turn
  int threads = 4;                       // 1 .. 64; thread backend only
};

/// Since the start, for metrics.
struct IoStats {
  std::uint64_t reads = 0, writes = 0, flushes = 0;  // completed
  std::uint64_t bytes_read = 0, bytes_written = 0;   //
  std::uint64_t errors = 0;                          // operations that failed
  std::uint64_t resumed = 0;                         // went on after a short or interrupted transfer
  std::uint64_t fixed = 0;                           // used registered memory
  std::uint64_t memory_not_registered = 0;           // register_memory() refused by the kernel: copies its page table
};

/// How bytes reach the disks of one loop: a ring of the kernel, or threads. All directories of a loop share one.
///
/// Threads:  the loop's; created and destroyed on the thread that runs the loop.
/// Lifetime: its directories and files keep it alive. Destroying it waits for what the kernel still has.
class Io {
 public:
  /// errors: kInvalid  options out of range;  kFailed  kUring was asked for and the kernel refuses
  static Result<std::shared_ptr<Io>> create(rt::Runtime runtime, rt::RealLoop& loop, IoOptions options = {});
  virtual ~Io() = default;
  virtual std::string_view name() const = 0;  // "io_uring", "threads"
  virtual const IoStats& stats() const = 0;
  /// Operations submitted and not completed.
  virtual std::size_t in_flight() const = 0;
};

struct DirectoryOptions {
  bool direct = true;  // O_DIRECT where the file system has it
  bool punch = true;   // give space back inside files where the file system can
};

/// Opens `path` for this process alone, creating the directory (mode 0700) if only it is missing.
///
/// A file system without O_DIRECT is used through the page cache; one that cannot punch holes returns space only when
/// whole files go; one that cannot preallocate may run out of space in a write. Each is logged once and stands in
/// description().
///
/// list() shows regular files only; the name "LOCK" and names that begin with '.' are its own.
///
/// errors: kBusy      another process has the directory open
///         kDenied    no right to read or write it
///         kNotFound  the parent directory is missing
///         kInvalid   not a directory
Task<std::unique_ptr<Disk>> open_directory(rt::Runtime runtime, std::shared_ptr<Io> io, std::string path,
                                           DirectoryOptions options = {});

}  // namespace cairn::storage
