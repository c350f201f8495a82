#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/core/session.h"

namespace cairn::client {

struct BucketSummary {
  std::string name;
  std::uint32_t copies = 1;
  std::uint64_t quota_bytes = 0;
  std::int64_t created_unix_nanos = 0;
  std::uint32_t keep_last = 0;
  std::uint64_t keep_every = 0;
  std::uint32_t keep_days = 0;
  // What it holds, as show_bucket() found it.
  std::uint64_t used_bytes = 0, objects = 0, steps = 0;
  std::uint64_t reserved_bytes = 0;  // by open uploads and saves
};
/// What of a bucket's policy is to change; absent: stays.
struct BucketChange {
  std::optional<std::uint64_t> quota_bytes{};
  std::optional<std::uint32_t> keep_last{};
  std::optional<std::uint64_t> keep_every{};
  std::optional<std::uint32_t> keep_days{};
};
Task<void> create_bucket(std::shared_ptr<Session> session, BucketSummary bucket, rt::TimePoint deadline);
Task<BucketSummary> show_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline);
Task<std::vector<BucketSummary>> list_buckets(std::shared_ptr<Session> session, rt::TimePoint deadline);
/// errors: kNotFound;  kConflict  somebody else changed it at the same time
Task<BucketSummary> set_bucket(std::shared_ptr<Session> session, std::string bucket, BucketChange change,
                               rt::TimePoint deadline);
/// errors: kConflict  not empty;  kNotFound
Task<void> remove_bucket(std::shared_ptr<Session> session, std::string bucket, rt::TimePoint deadline);

}  // namespace cairn::client
