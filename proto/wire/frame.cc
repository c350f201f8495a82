#include "proto/wire/frame.h"

#include <bit>
#include <cstring>
#include <string>

#include "proto/common/checksum.h"

namespace cairn::wire {
namespace {

constexpr std::uint32_t kMagic = 0x314e5243;  // "CRN1"

template <class T>
void put(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
template <class T>
T get(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
static_assert(std::endian::native == std::endian::little, "the codecs copy little-endian fields as they are");

}  // namespace

std::string_view name_of(Method method) {
  switch (method) {
    case Method::kNone:
      return "none";
    case Method::kMap:
      return "map";
    case Method::kPutChunk:
      return "put_chunk";
    case Method::kReadRanges:
      return "read_ranges";
    case Method::kReadShared:
      return "read_shared";
    case Method::kBucketCreate:
      return "bucket_create";
    case Method::kBucketShow:
      return "bucket_show";
    case Method::kBucketList:
      return "bucket_list";
    case Method::kBucketRemove:
      return "bucket_remove";
    case Method::kBucketSet:
      return "bucket_set";
    case Method::kObjectBegin:
      return "object_begin";
    case Method::kObjectSeal:
      return "object_seal";
    case Method::kObjectStat:
      return "object_stat";
    case Method::kObjectList:
      return "object_list";
    case Method::kObjectRemove:
      return "object_remove";
    case Method::kObjectAbort:
      return "object_abort";
    case Method::kOpenRun:
      return "open_run";
    case Method::kBegin:
      return "begin";
    case Method::kSeal:
      return "seal";
    case Method::kCommit:
      return "commit";
    case Method::kAbort:
      return "abort";
    case Method::kHeartbeat:
      return "heartbeat";
    case Method::kAttemptStatus:
      return "attempt_status";
    case Method::kHandover:
      return "handover";
    case Method::kStepOpen:
      return "step_open";
    case Method::kStepList:
      return "step_list";
    case Method::kStepRemove:
      return "step_remove";
    case Method::kRunList:
      return "run_list";
    case Method::kRunActivity:
      return "run_activity";
    case Method::kStepPin:
      return "step_pin";
    case Method::kReaderRenew:
      return "reader_renew";
    case Method::kJobList:
      return "job_list";
    case Method::kJobControl:
      return "job_control";
    case Method::kScrubStart:
      return "scrub_start";
    case Method::kDamageList:
      return "damage_list";
  }
  return "unknown";
}

std::array<std::byte, FrameHeader::kBytes> FrameHeader::encode() const {
  std::array<std::byte, kBytes> out{};
  put(&out[0], kMagic);
  put(&out[4], static_cast<std::uint8_t>(kind));
  put(&out[6], method);
  put(&out[8], call_id);
  put(&out[16], message_bytes);
  put(&out[20], payload_bytes);
  put(&out[24], message_crc);
  put(&out[28], crc32c(std::span<const std::byte>(out).first(28)));
  return out;
}

Result<FrameHeader> FrameHeader::decode(std::span<const std::byte, kBytes> bytes) {
  if (get<std::uint32_t>(&bytes[0]) != kMagic)
    return fail(Errc::kProtocol, "frame header: not a Cairn frame (wrong magic)");
  if (get<std::uint32_t>(&bytes[28]) != crc32c(bytes.first(28)))
    return fail(Errc::kProtocol, "frame header: CRC does not match");
  FrameHeader h;
  const auto kind = get<std::uint8_t>(&bytes[4]);
  if (kind < static_cast<std::uint8_t>(FrameKind::kHello) || kind > static_cast<std::uint8_t>(FrameKind::kPong))
    return fail(Errc::kProtocol, "frame header: unknown kind " + std::to_string(kind));
  h.kind = static_cast<FrameKind>(kind);
  if (get<std::uint8_t>(&bytes[5]) != 0) return fail(Errc::kProtocol, "frame header: its reserved byte is not 0");
  h.method = get<std::uint16_t>(&bytes[6]);
  h.call_id = get<std::uint64_t>(&bytes[8]);
  h.message_bytes = get<std::uint32_t>(&bytes[16]);
  h.payload_bytes = get<std::uint32_t>(&bytes[20]);
  h.message_crc = get<std::uint32_t>(&bytes[24]);
  if (h.message_bytes > (h.kind == FrameKind::kData ? kDataMessageBytesMax : kMessageBytesMax))
    return fail(Errc::kProtocol,
                "frame header: message of " + std::to_string(h.message_bytes) + " bytes is over the limit");
  if (h.payload_bytes > kPayloadBytesMax || (h.payload_bytes > 0 && h.kind != FrameKind::kData))
    return fail(Errc::kProtocol,
                "frame header: payload of " + std::to_string(h.payload_bytes) + " bytes is not allowed here");
  return h;
}

}  // namespace cairn::wire
