#include "proto/rpc/outbox.h"

#include <algorithm>

#include "proto/common/checksum.h"
#include "proto/common/units.h"

namespace cairn::rpc {
namespace {

/// Pieces up to this size are copied together: cheaper than one entry of a gathered write each.
constexpr std::size_t kCopyBytesMax = 4 * kKiB;
constexpr std::size_t kControlBytes = 256 * kKiB;  // per batch, exceeded by one frame at most
constexpr std::size_t kControlFrames = 64;

bool ends_call(wire::FrameKind kind) {
  return kind == wire::FrameKind::kReply || kind == wire::FrameKind::kError;
}

}  // namespace

OutFramePtr Outbox::push(OutFrame frame) {
  auto owned = std::make_shared<OutFrame>(std::move(frame));
  (owned->kind == wire::FrameKind::kData ? data_ : control_).push_back(owned);
  filled_.notify_all();
  return owned;
}

bool Outbox::withdraw(const OutFrame* frame) {
  if (frame->started) return false;
  return std::erase_if(frame->kind == wire::FrameKind::kData ? data_ : control_,
                       [&](const auto& f) { return f.get() == frame; }) > 0;
}

std::size_t Outbox::withdraw_call(std::uint64_t call_id) {
  std::erase_if(data_, [&](const auto& f) { return f->call_id == call_id; });
  return std::erase_if(control_, [&](const auto& f) { return f->call_id == call_id && ends_call(f->kind); });
}

void Outbox::clear() {
  control_.clear();
  data_.clear();
  batch_.clear();
}

Task<void> Outbox::run() {
  for (;;) {
    while (control_.empty() && data_.empty()) co_await filled_.wait();
    collect();
    std::vector<std::span<const std::byte>> pieces;
    pieces.reserve(ranges_.size());
    std::uint64_t size = 0;
    for (const auto& range : ranges_) {
      pieces.emplace_back(range.at != nullptr ? range.at : copied_.data() + range.offset, range.size);
      size += range.size;
    }
    writing_since_ = loop_.now();
    writing_bytes_ = size;
    auto done = co_await stream_.write_all(std::move(pieces));
    writing_since_ = rt::kNever;
    CO_CHECK_OK(std::move(done));
    bytes_ += size;
    auto batch = std::exchange(batch_, {});  // before the hooks, so that they see idle() as it is
    for (auto& frame : batch) written_(*frame);
  }
}

void Outbox::collect() {
  copied_.clear();
  ranges_.clear();
  std::size_t frames = 0, size = 0;
  while (!control_.empty() && frames < kControlFrames && size < kControlBytes) {
    auto frame = std::move(control_.front());
    control_.pop_front();
    ++frames;
    size += frame->message.size() + wire::FrameHeader::kBytes;
    add(std::move(frame));
  }
  if (data_.empty()) return;
  auto frame = data_.front();
  // Left over are more small frames than fit; the request of that data may be among them.
  if (std::ranges::any_of(control_, [&](const auto& f) { return f->call_id == frame->call_id; })) return;
  data_.pop_front();
  add(std::move(frame));
}

void Outbox::add(OutFramePtr frame) {
  frame->started = true;
  starting_(*frame);
  std::uint64_t payload_bytes = 0;
  for (const auto& piece : frame->payload) payload_bytes += piece.size();
  assert(frame->message.size() <= wire::kMessageBytesMax && payload_bytes <= wire::kPayloadBytesMax);
  const wire::FrameHeader header{.kind = frame->kind,
                                 .method = frame->method,
                                 .call_id = frame->call_id,
                                 .message_bytes = static_cast<std::uint32_t>(frame->message.size()),
                                 .payload_bytes = static_cast<std::uint32_t>(payload_bytes),
                                 .message_crc = crc32c(frame->message)};
  const auto encoded = header.encode();
  append(encoded);
  append(bytes_of(frame->message));
  for (const auto& piece : frame->payload) append(piece.bytes());
  batch_.push_back(std::move(frame));
}

void Outbox::append(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  if (bytes.size() > kCopyBytesMax) {
    ranges_.push_back({.at = bytes.data(), .size = bytes.size()});
    return;
  }
  copied_.insert(copied_.end(), bytes.begin(), bytes.end());
  if (ranges_.empty() || ranges_.back().at != nullptr)
    ranges_.push_back({.offset = copied_.size() - bytes.size(), .size = 0});
  ranges_.back().size += bytes.size();
}

}  // namespace cairn::rpc
