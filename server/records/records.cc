#include "server/records/records.h"

#include <google/protobuf/message_lite.h>

#include "proto/common/text.h"
#include "proto/wire/codec.h"

namespace cairn::server {

Result<void> parse_record(const storage::Record& record, google::protobuf::MessageLite& out) {
  if (wire::decode(record.value, out, "record")) return {};
  return fail(Errc::kDataLoss, "record '" + printable(record.key) + "' is not a " + out.GetTypeName());
}

Task<Version> load_into(storage::RecordStore& records, HomeGroup group, std::string key,
                        google::protobuf::MessageLite& out) {
  CO_TRY(auto record, co_await records.get(group, std::move(key)));
  if (!record) co_return Version{};
  CO_CHECK_OK(parse_record(*record, out));
  co_return record->version;
}

Edit& Edit::unchanged(std::string key, Version version) {
  transaction_.compares.push_back({std::move(key), version});
  return *this;
}
Edit& Edit::put(std::string key, const google::protobuf::MessageLite& value) {
  transaction_.puts.emplace_back(std::move(key), wire::encode(value));
  return *this;
}
Edit& Edit::erase(std::string key) {
  transaction_.deletes.push_back(std::move(key));
  return *this;
}

Result<OwnerId> owner_from(std::string_view bytes) {
  return OwnerId::from_bytes(bytes);
}

Task<std::optional<storage::Record>> last_of(storage::RecordStore& records, HomeGroup group, std::string prefix) {
  // Records are listed forwards only. Bisection over the number at the end takes at most 64 single reads; a listing
  // would read every step of the run.
  const auto after = [&](std::uint64_t number) {
    std::string key = prefix;
    for (int shift = 56; shift >= 0; shift -= 8) key.push_back(static_cast<char>(number >> shift & 0xff));
    return key;
  };
  CO_TRY(auto first, co_await records.scan(group, prefix, "", 1));
  if (first.empty()) co_return std::nullopt;
  auto found = std::move(first.front());
  const auto number_of = [&](const storage::Record& record) {
    std::uint64_t value = 0;
    for (const char c : std::string_view(record.key).substr(prefix.size()))
      value = value << 8 | static_cast<unsigned char>(c);
    return value;
  };
  // Steps are usually few and far from 2^64: double the distance first, then halve it.
  std::uint64_t low = number_of(found), high = UINT64_MAX;  // the highest lies in low .. high
  for (std::uint64_t stride = 1; low < high;) {
    const auto probe = high == UINT64_MAX && stride < (UINT64_MAX - low) / 2 ? low + stride : low + (high - low) / 2;
    CO_TRY(auto next, co_await records.scan(group, prefix, after(probe), 1));
    if (next.empty()) {
      high = probe;
    } else {
      found = std::move(next.front());
      low = number_of(found);
      stride *= 2;
    }
  }
  co_return std::move(found);
}

}  // namespace cairn::server
