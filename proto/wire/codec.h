#pragma once

#include <string>

#include "proto/common/ids.h"
#include "proto/common/result.h"

namespace google::protobuf {
class MessageLite;
}

namespace cairn::wire {

class ChunkKey;

/// Serialized form of any message.
std::string encode(const google::protobuf::MessageLite& message);
/// errors: kProtocol  not such a message; `what` names it
Result<void> decode(std::string_view bytes, google::protobuf::MessageLite& message, std::string_view what);

void to_wire(const ChunkId& id, ChunkKey& out);
Result<ChunkId> from_wire(const ChunkKey& key);

}  // namespace cairn::wire
