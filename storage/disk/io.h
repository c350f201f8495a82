#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "proto/rt/sync.h"
#include "storage/disk/directory.h"

// Between the directory and the two ways to the kernel. Only for the sources of this folder.

namespace cairn::storage {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// An open descriptor, shared by its File and the operations in flight. Closing the last descriptor of an unlinked
/// file frees its space, which takes a while: that happens away from the loop.
struct OpenFile {
  OpenFile(rt::Offload& o, UniqueFd f, std::string n, bool d)
      : offload(o), fd(std::move(f)), name(std::move(n)), direct(d) {}
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() {
    offload.submit([fd = std::move(fd)]() mutable { fd = UniqueFd(); }, [] {});
  }
  rt::Offload& offload;
  UniqueFd fd;
  std::string name;  // for messages
  bool direct;       // opened with O_DIRECT
};

/// One read, write or flush on its way. It owns what the kernel uses; the Task that waits may be gone.
struct Op {
  static constexpr int kEndOfFile = -1;

  enum class Kind { kRead, kWrite, kFlush };
  Kind kind;
  std::shared_ptr<OpenFile> file;
  std::uint64_t offset;
  std::byte* data;  // written to by reads only
  std::size_t size;
  std::shared_ptr<const void> memory;
  rt::Semaphore::Lease slot;
  rt::OneShot<int>::Setter finished;  // 0, errno or kEndOfFile
  std::size_t done = 0;

  /// Counts a transfer of `bytes`. Returns whether the rest must be asked for; else *outcome is what to tell.
  /// O_DIRECT goes on from a sector's start only, so a part of a sector is asked for again.
  bool advance(std::size_t bytes, int* outcome);
};

class IoQueue : public Io {
 public:
  IoQueue(rt::Loop& loop, std::uint32_t entries) : loop_(loop), slots_(loop, entries) {}

  /// Yields 0, an errno or Op::kEndOfFile. `data` is kept valid by `memory`, which is let go before the caller resumes.
  Task<int> perform(Op::Kind kind, std::shared_ptr<OpenFile> file, std::uint64_t offset, std::byte* data,
                    std::size_t size, std::shared_ptr<const void> memory);
  virtual void register_memory(std::span<std::byte> slab) = 0;

  const IoStats& stats() const override { return stats_; }
  std::size_t in_flight() const override { return slots_.capacity() - slots_.available(); }

 protected:
  virtual void start(std::unique_ptr<Op> op) = 0;
  /// Ends `op`: releases its memory, then tells whoever waits.
  void finish(std::unique_ptr<Op> op, int outcome);

  rt::Loop& loop_;
  IoStats stats_;

 private:
  rt::Semaphore slots_;
};

/// errors: kFailed  the kernel refuses; the message says why
Result<std::shared_ptr<IoQueue>> make_uring(rt::Runtime runtime, rt::RealLoop& loop, const IoOptions& options);
std::shared_ptr<IoQueue> make_threads(rt::Runtime runtime, const IoOptions& options);

}  // namespace cairn::storage
