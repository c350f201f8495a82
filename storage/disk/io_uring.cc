#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <limits>
#include <vector>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "storage/disk/io.h"

namespace cairn::storage {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kRegisteredBytesMax = kGiB;  // the kernel's limit for one registered buffer
constexpr auto kAgain = 1ms;                       // pause before asking a kernel that is short of memory again

int register_call(int ring, unsigned what, void* arg, unsigned count) {
  return static_cast<int>(::syscall(__NR_io_uring_register, ring, what, arg, count)) < 0 ? errno : 0;
}

/// Nothing but reads, writes and flushes may ever pass through the ring: operations in a ring escape the process's
/// system call filter, so whoever takes over the process must not find an open() there.
int restrict_and_enable(int ring) {
  std::array<io_uring_restriction, 9> allowed{};
  std::size_t count = 0;
  for (const unsigned op :
       {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_FSYNC}) {
    allowed[count].opcode = IORING_RESTRICTION_SQE_OP;
    allowed[count++].sqe_op = static_cast<__u8>(op);
  }
  for (const unsigned op : {IORING_REGISTER_BUFFERS, IORING_UNREGISTER_BUFFERS}) {
    allowed[count].opcode = IORING_RESTRICTION_REGISTER_OP;
    allowed[count++].register_op = static_cast<__u8>(op);
  }
  if (const int error = register_call(ring, IORING_REGISTER_RESTRICTIONS, allowed.data(), static_cast<unsigned>(count)))
    return error;
  return register_call(ring, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
}

class UringIo final : public IoQueue, public std::enable_shared_from_this<UringIo> {
 public:
  UringIo(rt::Runtime runtime, const IoOptions& options)
      : IoQueue(runtime.loop, options.queue_entries), log_(runtime.log) {}

  ~UringIo() override {
    watch_.reset();
    // The kernel writes into memory that its operations keep alive: not one may be left.
    while (in_kernel_ > 0) {
      const int rc = io_uring_submit_and_wait(&ring_, 1);
      if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY) std::abort();
      stopping_ = true;
      reap();
    }
    if (made_) io_uring_queue_exit(&ring_);
  }

  Result<void> open(rt::RealLoop& loop, const IoOptions& options) {
    const unsigned wanted[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN, IORING_SETUP_COOP_TASKRUN, 0};
    int error = 0;
    for (const unsigned flags : wanted) {
      error = make(options.queue_entries, flags);
      if (error != EINVAL) break;  // an older kernel does not know a flag
    }
    if (error != 0) return fail(Errc::kFailed, "io_uring: " + std::string(step_) + ": " + errno_text(error));
    watch_ = loop.watch_readable(event_.get(), [this] {
      std::uint64_t count = 0;  // only resets it
      if (::read(event_.get(), &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR) std::abort();
      reap();
    });
    return {};
  }

  std::string_view name() const override { return "io_uring"; }

  void register_memory(std::span<std::byte> slab) override {
    for (const auto& known : slabs_)
      if (known.data() == slab.data() && known.size() == slab.size()) return;
    if (memory_refused_ || slab.empty()) return;
    slabs_.push_back(slab);
    std::vector<iovec> pieces;
    for (auto left : slabs_)
      while (!left.empty()) {
        const auto piece = left.first(std::min(left.size(), kRegisteredBytesMax));
        pieces.push_back({piece.data(), piece.size()});
        left = left.subspan(piece.size());
      }
    // The call replaces all: operations in flight keep the old registration until they end.
    if (!registered_.empty()) register_call(ring_.ring_fd, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    registered_.clear();
    if (const int error = register_call(ring_.ring_fd, IORING_REGISTER_BUFFERS, pieces.data(),
                                        static_cast<unsigned>(pieces.size()))) {
      memory_refused_ = true;
      ++stats_.memory_not_registered;
      log_.write(rt::Level::kWarning, "io_uring_memory_not_registered",
                 {{"bytes", std::to_string(slab.size())},
                  {"error", errno_text(error)},
                  {"effect", "more CPU per byte"},
                  {"remedy", "raise the locked memory limit (LimitMEMLOCK, ulimit -l)"}});
      return;
    }
    registered_ = std::move(pieces);
  }

 private:
  /// 0 or an errno; step_ says where.
  int make(unsigned entries, unsigned flags) {
    io_uring_params params{};
    params.flags = flags | IORING_SETUP_R_DISABLED;
    step_ = "set up";
    if (const int rc = io_uring_queue_init_params(entries, &ring_, &params); rc < 0) return -rc;
    made_ = true;
    step_ = "event descriptor";
    int error = 0;
    if (!event_) event_ = UniqueFd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    if (!event_) {
      error = errno;
    } else {
      int fd = event_.get();
      error = register_call(ring_.ring_fd, IORING_REGISTER_EVENTFD, &fd, 1);
    }
    if (error == 0) {
      step_ = "restrict";
      error = restrict_and_enable(ring_.ring_fd);
    }
    if (error != 0) {
      io_uring_queue_exit(&ring_);
      made_ = false;
    }
    return error;
  }

  void start(std::unique_ptr<Op> op) override { prepare(op.release()); }

  /// Puts `op` into the ring; the kernel sees it when the loop's turn ends, together with the others of this turn.
  void prepare(Op* op) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr) {  // full of operations not yet submitted
      submit();
      sqe = io_uring_get_sqe(&ring_);
    }
    if (sqe == nullptr) return later(op);
    ++in_kernel_;
    const int fd = op->file->fd.get();
    std::byte* data = op->data + op->done;
    const auto size = static_cast<unsigned>(std::min<std::size_t>(op->size - op->done, kGiB));
    const auto offset = op->offset + op->done;
    const int fixed = op->kind == Op::Kind::kFlush ? -1 : registration_of(data, size);
    if (fixed >= 0) ++stats_.fixed;
    switch (op->kind) {
      case Op::Kind::kFlush:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
      case Op::Kind::kRead:
        if (fixed >= 0)
          io_uring_prep_read_fixed(sqe, fd, data, size, offset, fixed);
        else
          io_uring_prep_read(sqe, fd, data, size, offset);
        break;
      case Op::Kind::kWrite:
        if (fixed >= 0)
          io_uring_prep_write_fixed(sqe, fd, data, size, offset, fixed);
        else
          io_uring_prep_write(sqe, fd, data, size, offset);
        break;
    }
    io_uring_sqe_set_data(sqe, op);
    if (std::exchange(submit_posted_, true)) return;
    loop_.post([weak = weak_from_this()] {
      if (const auto self = weak.lock()) {
        self->submit_posted_ = false;
        self->submit();
      }
    });
  }

  void submit() {
    while (io_uring_sq_ready(&ring_) > 0) {
      const int rc = io_uring_submit(&ring_);
      if (rc > 0 || rc == -EINTR) continue;
      if (rc == -EAGAIN || rc == -EBUSY || rc == 0) {  // short of memory: what is in flight goes on meanwhile
        if (!std::exchange(retry_armed_, true))
          loop_.at(loop_.now() + kAgain, [weak = weak_from_this()] {
            if (const auto self = weak.lock()) {
              self->retry_armed_ = false;
              self->submit();
            }
          });
        return;
      }
      // Anything else means that the ring itself is broken, or used from a second thread: nothing in flight could ever
      // be answered.
      log_.write(rt::Level::kError, "io_uring_broken", {{"error", errno_text(-rc)}, {"effect", "the process ends"}});
      std::abort();
    }
  }

  /// Tries `op` again in a moment.
  void later(Op* op) {
    auto job = [weak = weak_from_this(), again = std::unique_ptr<Op>(op)]() mutable {
      if (const auto self = weak.lock()) self->prepare(again.release());
    };
    loop_.at(loop_.now() + kAgain, std::move(job));
  }

  void reap() {
    std::array<io_uring_cqe*, 64> batch;
    for (;;) {
      const unsigned count = io_uring_peek_batch_cqe(&ring_, batch.data(), batch.size());
      if (count == 0) return;
      for (unsigned i = 0; i < count; ++i) {
        auto* op = static_cast<Op*>(io_uring_cqe_get_data(batch[i]));
        const int result = batch[i]->res;
        io_uring_cqe_seen(&ring_, batch[i]);
        --in_kernel_;
        completed(std::unique_ptr<Op>(op), result);
      }
    }
  }

  void completed(std::unique_ptr<Op> op, int result) {
    int outcome = 0;
    if (op->kind == Op::Kind::kFlush) return finish(std::move(op), -result);  // never repeated, see io_threads.cc
    if (result >= 0) {
      if (!op->advance(static_cast<std::size_t>(result), &outcome)) return finish(std::move(op), outcome);
    } else if (result != -EINTR && result != -EAGAIN) {
      return finish(std::move(op), -result);
    }
    if (stopping_) return finish(std::move(op), ECANCELED);
    ++stats_.resumed;
    if (result == -EAGAIN)
      later(op.release());
    else
      prepare(op.release());
  }

  /// Number of the registered buffer that holds the bytes, or -1.
  int registration_of(const std::byte* data, std::size_t size) const {
    for (std::size_t i = 0; i < registered_.size(); ++i) {
      const auto* begin = static_cast<const std::byte*>(registered_[i].iov_base);
      if (data >= begin && data + size <= begin + registered_[i].iov_len) return static_cast<int>(i);
    }
    return -1;
  }

  rt::Log& log_;
  io_uring ring_{};
  bool made_ = false;
  std::string_view step_;
  UniqueFd event_;
  std::unique_ptr<rt::Watch> watch_;
  std::size_t in_kernel_ = 0;  // prepared and not reaped
  bool submit_posted_ = false;
  bool retry_armed_ = false;
  bool stopping_ = false;
  std::vector<std::span<std::byte>> slabs_;
  std::vector<iovec> registered_;
  bool memory_refused_ = false;
};

}  // namespace

Result<std::shared_ptr<IoQueue>> make_uring(rt::Runtime runtime, rt::RealLoop& loop, const IoOptions& options) {
  auto ring = std::make_shared<UringIo>(runtime, options);
  CHECK_OK(ring->open(loop, options));
  return ring;
}

}  // namespace cairn::storage
