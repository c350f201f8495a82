#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "proto/common/ids.h"
#include "storage/record_store/record_store.h"

namespace google::protobuf {
class MessageLite;
}

namespace cairn::server {

/// A record's message and version; `exists()` is false, and the message empty, when there is none.
template <class M>
struct Loaded {
  M value;
  Version version;
  bool exists() const { return version.exists(); }
};

/// Decodes the record under `key` into `out`, which must outlive the call.
/// errors: kDataLoss  the value is not such a message
Task<Version> load_into(storage::RecordStore& records, HomeGroup group, std::string key,
                        google::protobuf::MessageLite& out);
Result<void> parse_record(const storage::Record& record, google::protobuf::MessageLite& out);

template <class M>
Task<Loaded<M>> load(storage::RecordStore& records, HomeGroup group, std::string key) {
  Loaded<M> loaded;
  CO_TRY(loaded.version, co_await load_into(records, group, std::move(key), loaded.value));
  co_return loaded;
}

/// One transaction being put together. Every compare is of a version that was read before; kConflict from apply() means
/// that another transaction came between: read again and decide again.
class Edit {
 public:
  explicit Edit(HomeGroup group) { transaction_.group = group; }

  Edit& unchanged(std::string key, Version version);
  Edit& absent(std::string key) { return unchanged(std::move(key), {}); }
  Edit& put(std::string key, const google::protobuf::MessageLite& value);
  Edit& erase(std::string key);
  Task<Version> apply(storage::RecordStore& records) { return records.apply(std::move(transaction_)); }

 private:
  storage::Transaction transaction_;
};

/// Owner ids as they stand in messages. errors: kInvalid
Result<OwnerId> owner_from(std::string_view bytes);

/// The highest key with `prefix` followed by 8 bytes; nothing when there is none. Not a snapshot: changes meanwhile may
/// show partly, so compare a version that they change.
Task<std::optional<storage::Record>> last_of(storage::RecordStore& records, HomeGroup group, std::string prefix);

}  // namespace cairn::server
