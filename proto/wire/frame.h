#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "proto/common/result.h"

namespace cairn::wire {

inline constexpr std::uint32_t kProtocolVersion = 1;
inline constexpr std::uint32_t kMessageBytesMax = 1 << 20;       // control message
inline constexpr std::uint32_t kDataMessageBytesMax = 64 << 10;  // message of a data frame
inline constexpr std::uint32_t kPayloadBytesMax = 8 << 20;       // data
inline constexpr std::uint32_t kHelloBytesMax = 16 << 10;        // before the peer is known

enum class FrameKind : std::uint8_t {
  kHello = 1,
  kHelloReply = 2,
  kRequest = 3,  // opens a call
  kReply = 4,    // ends it
  kError = 5,    // ends it with an ErrorReply
  kData = 6,     // bulk bytes of a call, either way; client to server under credit
  kCredit = 7,   // call_id 0; method field = units given back
  kCancel = 8,   // client gave the call up
  kPing = 9,
  kPong = 10,
};

enum class Method : std::uint16_t {
  kNone = 0,
  kMap = 1,
  kPutChunk = 10,
  kReadRanges = 11,
  kReadShared = 12,
  kBucketCreate = 20,
  kBucketShow = 21,
  kBucketList = 22,
  kBucketRemove = 23,
  kBucketSet = 24,
  kObjectBegin = 30,
  kObjectSeal = 31,
  kObjectStat = 32,
  kObjectList = 33,
  kObjectRemove = 34,
  kObjectAbort = 35,
  kOpenRun = 40,
  kBegin = 41,
  kSeal = 42,
  kCommit = 43,
  kAbort = 44,
  kHeartbeat = 45,
  kAttemptStatus = 46,
  kStepOpen = 50,
  kStepList = 51,
  kStepRemove = 52,
  kRunList = 53,
  kRunActivity = 54,
  kStepPin = 55,
  kReaderRenew = 60,
  kJobList = 70,
  kJobControl = 71,
  kScrubStart = 72,
  kDamageList = 73,
  kHandover = 80,
};

/// "put_chunk"; for messages, logs and metrics. Numbers that this version does not know: "unknown".
std::string_view name_of(Method method);

/// The fixed header of every frame, little-endian; then the message, then the payload.
///
/// offset size meaning
///      0    4 magic "CRN1"
///      4    1 kind
///      5    1 reserved, 0
///      6    2 method (requests), credit units (credit), else 0
///      8    8 call id, chosen by the client, counts up; 0: the connection itself
///     16    4 message bytes, at most 1 MiB (data frames: 64 KiB)
///     20    4 payload bytes, at most 8 MiB (data frames only)
///     24    4 CRC32C of the message
///     28    4 CRC32C of bytes 0 .. 27
struct FrameHeader {
  static constexpr std::size_t kBytes = 32;
  FrameKind kind = FrameKind::kPing;
  std::uint16_t method = 0;
  std::uint64_t call_id = 0;
  std::uint32_t message_bytes = 0;
  std::uint32_t payload_bytes = 0;
  std::uint32_t message_crc = 0;

  std::array<std::byte, kBytes> encode() const;
  /// errors: kProtocol  magic, CRC, kind, or a size over its limit
  static Result<FrameHeader> decode(std::span<const std::byte, kBytes> bytes);
};

}  // namespace cairn::wire
