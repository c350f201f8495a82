#include "storage/disk/io.h"

#include <cassert>
#include <cerrno>
#include <csignal>

#include "proto/common/units.h"

namespace cairn::storage {

bool Op::advance(std::size_t bytes, int* outcome) {
  assert(bytes <= size - done);
  if (bytes == size - done) {
    done = size;
    *outcome = 0;
    return false;
  }
  if (file->direct) bytes = round_down(bytes, kSectorBytes);
  done += bytes;
  if (bytes > 0) return true;
  // Nothing more comes. A write that takes no byte and gives no reason has failed all the same.
  *outcome = kind == Kind::kRead ? kEndOfFile : EIO;
  return false;
}

Task<int> IoQueue::perform(Op::Kind kind, std::shared_ptr<OpenFile> file, std::uint64_t offset, std::byte* data,
                           std::size_t size, std::shared_ptr<const void> memory) {
  assert(!file->direct || kind == Op::Kind::kFlush ||
         ((reinterpret_cast<std::uintptr_t>(data) | offset | size) % kSectorBytes == 0 && "O_DIRECT alignment"));
  if (size == 0 && kind != Op::Kind::kFlush) co_return 0;
  rt::Semaphore::Lease slot;
  if (auto free = slots_.try_acquire(1)) {
    slot = std::move(*free);
  } else {
    CO_TRY(slot, co_await slots_.acquire(1));
  }
  rt::OneShot<int> finished(loop_);
  auto op = std::make_unique<Op>(kind, std::move(file), offset, data, size, std::move(memory), std::move(slot),
                                 finished.setter());
  start(std::move(op));
  co_return co_await finished;
}

void IoQueue::finish(std::unique_ptr<Op> op, int outcome) {
  if (outcome != 0) {
    ++stats_.errors;
  } else if (op->kind == Op::Kind::kRead) {
    ++stats_.reads;
    stats_.bytes_read += op->size;
  } else if (op->kind == Op::Kind::kWrite) {
    ++stats_.writes;
    stats_.bytes_written += op->size;
  } else {
    ++stats_.flushes;
  }
  const auto finished = op->finished;
  op.reset();
  finished.set(outcome);
}

Result<std::shared_ptr<Io>> Io::create(rt::Runtime runtime, rt::RealLoop& loop, IoOptions options) {
  if (options.queue_entries < 1 || options.queue_entries > 4096)
    return fail(Errc::kInvalid, "queue_entries=" + std::to_string(options.queue_entries) + " is not in 1 .. 4096");
  if (options.threads < 1 || options.threads > 64)
    return fail(Errc::kInvalid, "threads=" + std::to_string(options.threads) + " is not in 1 .. 64");
  // A write past RLIMIT_FSIZE must come back as an error, not end the process.
  struct sigaction now{};
  if (sigaction(SIGXFSZ, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) std::signal(SIGXFSZ, SIG_IGN);
  if (options.backend != IoBackend::kThreads) {
    auto ring = make_uring(runtime, loop, options);
    if (ring) return *std::move(ring);
    if (options.backend == IoBackend::kUring) return fail(std::move(ring).error());
    runtime.log.write(rt::Level::kWarning, "io_uring_unavailable",
                      {{"error", ring.error().message}, {"instead", "threads"}});
  }
  return make_threads(runtime, options);
}

}  // namespace cairn::storage
