#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/wire/frame.h"

namespace cairn::rpc {

/// A frame on its way out; keeps its bytes until they are written.
struct OutFrame {
  wire::FrameKind kind = wire::FrameKind::kPing;
  std::uint16_t method = 0;
  std::uint64_t call_id = 0;
  std::string message = {};
  std::vector<Buffer> payload = {};
  bool started = false;                          // in the batch being written, or written: cannot be withdrawn
  rt::Semaphore::Lease turn = {};                // given back when the frame is gone
  rt::Semaphore::Lease share = {}, memory = {};  // of the message; likewise
};
using OutFramePtr = std::shared_ptr<OutFrame>;

/// What one end of a connection has to send. One task writes it, in gathered batches: the small frames that wait, then
/// one data frame. So a small frame waits for one data frame at most, and data for a bounded number of small ones.
/// Frames keep their order among small ones and among data frames; a data frame never overtakes a small one pushed
/// before it. Who pushes keeps the queue bounded.
class Outbox {
 public:
  using Hook = std::function<void(OutFrame&)>;
  /// `starting`: about to be encoded, may still change the frame. `written`: the stream has taken it.
  /// Both run inside the writing task: they must not destroy the outbox.
  Outbox(rt::Loop& loop, rt::Stream& stream, Hook starting, Hook written)
      : loop_(loop), stream_(stream), starting_(std::move(starting)), written_(std::move(written)), filled_(loop) {}
  Outbox(const Outbox&) = delete;

  OutFramePtr push(OutFrame frame);
  /// Takes back what has not started. False: too late.
  bool withdraw(const OutFrame* frame);
  /// All frames of a call that have not started. Returns how many of them would have ended it.
  std::size_t withdraw_call(std::uint64_t call_id);
  void clear();

  /// Writes for ever. errors: the stream's
  Task<void> run();

  bool idle() const { return control_.empty() && data_.empty() && batch_.empty(); }
  std::size_t queued() const { return control_.size() + data_.size(); }
  std::uint64_t bytes() const { return bytes_; }
  /// When the write that now waits began; kNever: none waits.
  rt::TimePoint writing_since() const { return writing_since_; }
  std::uint64_t writing_bytes() const { return writing_bytes_; }  // of that write

 private:
  struct Range {
    const std::byte* at = nullptr;  // null: `offset` in copied_
    std::size_t offset = 0, size = 0;
  };
  void collect();
  void add(OutFramePtr frame);
  void append(std::span<const std::byte> bytes);

  rt::Loop& loop_;
  rt::Stream& stream_;
  Hook starting_, written_;
  rt::Signal filled_;
  std::deque<OutFramePtr> control_, data_;
  std::vector<OutFramePtr> batch_;
  std::vector<std::byte> copied_;  // headers and short pieces of the batch
  std::vector<Range> ranges_;
  std::uint64_t bytes_ = 0;
  rt::TimePoint writing_since_ = rt::kNever;
  std::uint64_t writing_bytes_ = 0;
};

}  // namespace cairn::rpc
