#pragma once

#include <string>
#include <string_view>

#include "proto/common/ids.h"

// Keys of records, as drawn in proto/wire/records.proto. Numbers are big-endian, so that keys sort as values.
// Names hold no NUL, so a NUL ends them without ambiguity.

namespace cairn::server {

HomeGroup bucket_group(std::string_view bucket);
/// Of an object or a run: `name` is the object's key or the run's name.
HomeGroup home_group(std::string_view bucket, std::string_view name);

std::string bucket_key(std::string_view bucket);
inline constexpr std::string_view kBucketPrefix = "b/";

std::string owner_key(const OwnerId& owner);
inline constexpr std::string_view kOwnerPrefix = "w/";

/// Beside the owner's record, while its chunks are kept for readers only.
std::string deleting_key(const OwnerId& owner);
inline constexpr std::string_view kDeletingPrefix = "d/";

std::string object_prefix(std::string_view bucket);
std::string object_key(std::string_view bucket, std::string_view key);

std::string run_prefix(std::string_view bucket);
std::string run_key(std::string_view bucket, std::string_view run);

inline constexpr std::string_view kAttemptPrefix = "a/";
std::string attempt_prefix(std::string_view bucket);  // of all runs of the bucket
std::string attempt_prefix(std::string_view bucket, std::string_view run);
std::string attempt_key(std::string_view bucket, std::string_view run, RunEpoch run_epoch, std::uint64_t step);
/// What a failed attempt left for status().
std::string failed_key(const OwnerId& owner);
inline constexpr std::string_view kFailedPrefix = "f/";

/// Who has joined an open attempt.
std::string joined_key(const OwnerId& owner);

inline constexpr std::string_view kSealPrefix = "l/";
std::string seal_prefix(const OwnerId& owner);
std::string seal_key(const OwnerId& owner, std::uint32_t rank);

std::string step_prefix(std::string_view bucket);  // of all runs of the bucket
std::string step_prefix(std::string_view bucket, std::string_view run);
std::string step_key(std::string_view bucket, std::string_view run, std::uint64_t step);

/// Names as requests bring them.
/// errors: kInvalid
Result<void> check_object_name(std::string_view bucket, std::string_view key);
Result<void> check_run_of(std::string_view bucket, std::string_view run);

/// What one page of a listing holds at most: entries, and bytes (half of what a message may have).
inline constexpr std::uint32_t kListMax = 1000;
inline constexpr std::size_t kListBytesMax = 512 * 1024;

/// The big-endian number in the last `size` bytes of a key; the key must be that long.
std::uint64_t number_at_end(std::string_view key, std::size_t size);

}  // namespace cairn::server
