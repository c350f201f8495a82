#include "proto/rpc/frame_reader.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"

namespace cairn::rpc {

using wire::FrameHeader;

Task<FrameHeader> FrameReader::header() {
  assert(payload_left_ == 0);
  header_begun_ = buffered() > 0 ? loop_.now() : rt::kNever;
  while (buffered() < FrameHeader::kBytes) {
    if (begin_ > 0) {
      std::memmove(buffer_.data(), buffer_.data() + begin_, buffered());
      end_ -= begin_;
      begin_ = 0;
    }
    const bool between_frames = buffered() == 0;
    auto got = co_await read(std::span(buffer_).subspan(end_));
    if (!got) {
      if (between_frames) co_return fail(std::move(got).error());
      co_return fail(std::move(got).error().with("in a frame header"));
    }
    end_ += *got;
    if (header_begun_ == rt::kNever) header_begun_ = loop_.now();
  }
  const auto header = FrameHeader::decode(
      std::span<const std::byte, FrameHeader::kBytes>(buffer_.data() + begin_, FrameHeader::kBytes));
  begin_ += FrameHeader::kBytes;
  if (header) payload_left_ = header->payload_bytes;
  co_return header;
}

Task<std::string> FrameReader::message(FrameHeader header) {
  std::string message(header.message_bytes, '\0');
  CO_CHECK_OK(co_await exactly(std::as_writable_bytes(std::span(message))));
  if (crc32c(message) != header.message_crc) co_return fail(Errc::kProtocol, "message: CRC does not match");
  co_return message;
}

Task<void> FrameReader::payload(std::span<std::byte> into) {
  assert(into.size() <= payload_left_);
  while (!into.empty()) {
    std::size_t got = 0;
    if (buffered() > 0) {
      got = take_buffered(into);
    } else if (into.size() >= buffer_.size()) {
      CO_TRY(got, co_await read(into));
    } else {  // a short rest: what follows it comes along
      CO_TRY(const auto read_ahead, co_await read(buffer_));
      begin_ = 0;
      end_ = read_ahead;
      continue;
    }
    payload_left_ -= static_cast<std::uint32_t>(got);
    into = into.subspan(got);
  }
  co_return {};
}

Task<void> FrameReader::skip_payload() {
  while (payload_left_ > 0) {
    if (buffered() > 0) {
      const auto n = std::min<std::size_t>(buffered(), payload_left_);
      begin_ += n;
      payload_left_ -= static_cast<std::uint32_t>(n);
      continue;
    }
    CO_TRY(const auto got, co_await read(buffer_));
    begin_ = 0;
    end_ = got;
  }
  co_return {};
}

std::size_t FrameReader::take_buffered(std::span<std::byte> into) {
  const auto n = std::min(buffered(), into.size());
  std::memcpy(into.data(), buffer_.data() + begin_, n);
  begin_ += n;
  return n;
}

Task<void> FrameReader::exactly(std::span<std::byte> into) {
  into = into.subspan(take_buffered(into));
  while (!into.empty()) {
    CO_TRY(const auto got, co_await read(into));
    into = into.subspan(got);
  }
  co_return {};
}

Task<std::size_t> FrameReader::read(std::span<std::byte> into) {
  CO_TRY(const auto got, co_await stream_.read_some(into));
  if (got == 0) co_return fail(Errc::kUnavailable, "closed by the peer");
  bytes_ += got;
  co_return got;
}

}  // namespace cairn::rpc
