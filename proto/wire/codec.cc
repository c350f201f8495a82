#include "proto/wire/codec.h"

#include <google/protobuf/message_lite.h>
#include <google/protobuf/stubs/logging.h>

#include "proto/wire/wire.pb.h"

namespace cairn::wire {

std::string encode(const google::protobuf::MessageLite& message) {
  return message.SerializeAsString();
}

Result<void> decode(std::string_view bytes, google::protobuf::MessageLite& message, std::string_view what) {
  // The library writes to stderr what it dislikes in a peer's bytes; our error says it, and once.
  [[maybe_unused]] static auto* const previous = google::protobuf::SetLogHandler(nullptr);
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size())))
    return fail(Errc::kProtocol,
                std::string(what) + ": malformed message of " + std::to_string(bytes.size()) + " bytes");
  return {};
}

void to_wire(const ChunkId& id, ChunkKey& out) {
  out.set_owner(std::string(id.owner.view()));
  out.set_writer(id.writer);
  out.set_index(id.index);
}

Result<ChunkId> from_wire(const ChunkKey& key) {
  TRY(auto owner, OwnerId::from_bytes(key.owner()));
  return ChunkId{.owner = owner, .writer = key.writer(), .index = key.index()};
}

}  // namespace cairn::wire
