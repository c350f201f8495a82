#include <cerrno>

#include "storage/disk/io.h"

namespace cairn::storage {
namespace {

/// The whole operation, on a worker thread. Gives the outcome; counts goings-on in `resumed`.
int perform_blocking(Op& op, std::uint64_t& resumed) {
  const int fd = op.file->fd.get();
  for (;;) {
    ssize_t rc = 0;
    switch (op.kind) {
      case Op::Kind::kFlush:
        rc = ::fdatasync(fd);
        break;
      case Op::Kind::kRead:
        rc = ::pread(fd, op.data + op.done, op.size - op.done, static_cast<off_t>(op.offset + op.done));
        break;
      case Op::Kind::kWrite:
        rc = ::pwrite(fd, op.data + op.done, op.size - op.done, static_cast<off_t>(op.offset + op.done));
        break;
    }
    if (rc < 0) {
      // A flush is never repeated: the kernel reports a lost write once, and the second call would say all is well.
      if (errno != EINTR || op.kind == Op::Kind::kFlush) return errno;
    } else if (op.kind == Op::Kind::kFlush) {
      return 0;
    } else {
      int outcome = 0;
      if (!op.advance(static_cast<std::size_t>(rc), &outcome)) return outcome;
    }
    ++resumed;
  }
}

class ThreadIo final : public IoQueue, public std::enable_shared_from_this<ThreadIo> {
 public:
  ThreadIo(rt::Loop& loop, const IoOptions& options)
      : IoQueue(loop, options.queue_entries), threads_(rt::make_thread_offload(loop, options.threads)) {}

  std::string_view name() const override { return "threads"; }
  void register_memory(std::span<std::byte>) override {}  // nothing to prepare

 private:
  struct Running {
    std::unique_ptr<Op> op;
    int outcome = 0;
    std::uint64_t resumed = 0;
  };
  void start(std::unique_ptr<Op> op) override {
    auto running = std::make_shared<Running>(std::move(op));
    threads_->submit([running] { running->outcome = perform_blocking(*running->op, running->resumed); },
                     [running, weak = weak_from_this()] {
                       const auto self = weak.lock();
                       if (!self) return;  // and so is whoever waited
                       self->stats_.resumed += running->resumed;
                       self->finish(std::move(running->op), running->outcome);
                     });
  }

  std::unique_ptr<rt::ThreadOffload> threads_;
};

}  // namespace

std::shared_ptr<IoQueue> make_threads(rt::Runtime runtime, const IoOptions& options) {
  return std::make_shared<ThreadIo>(runtime.loop, options);
}

}  // namespace cairn::storage
