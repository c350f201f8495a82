#include <array>
#include <cstring>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "proto/wire/frame.h"
#include "tests/fuzz/fuzz.h"

// The 32 bytes before every frame.

namespace cairn::fuzz {
namespace {

using wire::FrameHeader;

void check(std::span<const std::byte, FrameHeader::kBytes> bytes) {
  const auto header = FrameHeader::decode(bytes);
  if (!header) return;
  must(header->message_bytes <= wire::kMessageBytesMax, "the message is within its limit");
  must(header->payload_bytes <= wire::kPayloadBytesMax, "the payload is within its limit");
  must(header->kind == wire::FrameKind::kData || header->payload_bytes == 0, "only data frames have a payload");
  must(std::memcmp(header->encode().data(), bytes.data(), bytes.size()) == 0, "encoding gives the same bytes");
}

void one(std::string_view input) {
  std::array<std::byte, FrameHeader::kBytes> bytes{};
  if (!input.empty()) std::memcpy(bytes.data(), input.data(), std::min(input.size(), bytes.size()));
  check(bytes);
  // Past the CRC, which no mutation finds.
  const auto crc = crc32c(std::span(bytes).first(28));
  std::memcpy(bytes.data() + 28, &crc, sizeof crc);
  check(bytes);
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  for (auto kind = wire::FrameKind::kHello; kind <= wire::FrameKind::kPong;
       kind = static_cast<wire::FrameKind>(static_cast<int>(kind) + 1)) {
    const FrameHeader header{.kind = kind,
                             .method = 10,
                             .call_id = 1,
                             .message_bytes = 100,
                             .payload_bytes = kind == wire::FrameKind::kData ? 1u << 20 : 0,
                             .message_crc = 5};
    out.emplace_back(text_of(header.encode()));
  }
  return out;
}

const Register registered({.name = "frame", .bytes_max = FrameHeader::kBytes, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
