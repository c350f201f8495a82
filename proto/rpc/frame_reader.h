#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "proto/rt/seams.h"
#include "proto/wire/frame.h"

namespace cairn::rpc {

/// Takes a stream apart into frames: header(), then message(), then the payload, which goes straight to where it
/// belongs. A small buffer reads ahead, so that a small frame costs one read, and a large one two or three.
///
/// Whoever reads may be dropped at any wait: payload_left() then says exactly what the next reader finds.
class FrameReader {
 public:
  FrameReader(rt::Loop& loop, rt::Stream& stream) : loop_(loop), stream_(stream) {}
  FrameReader(const FrameReader&) = delete;

  /// errors: kUnavailable  the stream ended or broke;  kProtocol  not a frame header
  Task<wire::FrameHeader> header();
  /// The message of the frame just begun; memory is taken only here. errors: also kProtocol  its CRC does not match
  Task<std::string> message(wire::FrameHeader header);
  /// The next into.size() bytes of the payload, at most payload_left().
  Task<void> payload(std::span<std::byte> into);
  /// The rest of the payload, thrown away.
  Task<void> skip_payload();
  std::uint32_t payload_left() const { return payload_left_; }

  std::uint64_t bytes() const { return bytes_; }  // since the start
  /// While header() waits: the time of the header's first byte, or kNever when there is none yet.
  rt::TimePoint header_begun() const { return header_begun_; }

 private:
  std::size_t buffered() const { return end_ - begin_; }
  std::size_t take_buffered(std::span<std::byte> into);
  Task<void> exactly(std::span<std::byte> into);
  Task<std::size_t> read(std::span<std::byte> into);

  rt::Loop& loop_;
  rt::Stream& stream_;
  std::array<std::byte, 4096> buffer_;
  std::size_t begin_ = 0, end_ = 0;
  std::uint32_t payload_left_ = 0;
  std::uint64_t bytes_ = 0;
  rt::TimePoint header_begun_ = rt::kNever;
};

}  // namespace cairn::rpc
