#pragma once

#include <string>
#include <string_view>

#include "proto/common/ids.h"

namespace cairn::storage {

/// Table kRecords. Key: group 2 big-endian, then the record's key. Value:
///
/// offset size meaning
///      0    4 version: loss           (all little-endian)
///      4    8 version: epoch
///     12    8 version: seq
///     20      the record's bytes
inline constexpr std::size_t kVersionBytes = 20;

std::string record_key(HomeGroup group, std::string_view key);

/// Table kMeta. Key: "group." then group 2 big-endian. Value: the version (20 bytes, as above) of the group's last
/// change, written in the same batch as the change. Its seq only grows: no version is used twice.
std::string group_key(HomeGroup group);

void put_version(std::string& out, const Version& version);
/// The version that `value` begins with. errors: kDataLoss
Result<Version> get_version(std::string_view value);

/// The first key after all that start with `prefix`; empty: there is none.
std::string after_prefix(std::string prefix);

}  // namespace cairn::storage
