#include "server/usage/usage.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/records.h"

namespace cairn::server {
namespace {

constexpr std::size_t kPage = 256;

/// What comes beside the declared bytes: manifests, lists of extents. A declaration that fits to the byte must not fail
/// of them.
std::uint64_t slack_of(std::uint64_t declared) {
  return kMiB + declared / 64;
}

/// The bucket in "o/<bucket>\0..." and its like.
Result<std::string> bucket_in(std::string_view key) {
  const auto end = key.find('\0');
  if (end == key.npos || end < 2) return fail(Errc::kDataLoss, "a record's key names no bucket");
  return std::string(key.substr(2, end - 2));
}

std::string number(std::uint64_t value) {
  return std::to_string(value);
}

}  // namespace

Task<std::map<std::string, Usage::Bucket>> Usage::recount() {
  std::map<std::string, Bucket> out;
  for (HomeGroup group = 0; group < kHomeGroups; ++group)
    for (const std::string prefix : {"b/", "o/", "s/"})
      for (std::string after;;) {
        CO_TRY(const auto page, co_await records_.scan(group, prefix, after, kPage));
        for (const auto& record : page) {
          if (prefix == kBucketPrefix) {
            records::Bucket bucket;
            CO_CHECK_OK(parse_record(record, bucket));
            auto& entry = out[record.key.substr(kBucketPrefix.size())];
            entry.quota_bytes = bucket.policy().quota_bytes();
            entry.copies = std::max(bucket.policy().copies(), 1U);
            continue;
          }
          CO_TRY(const auto name, bucket_in(record.key));
          auto& bucket = out[name];
          if (prefix == "o/") {
            records::Object object;
            CO_CHECK_OK(parse_record(record, object));
            bucket.used_bytes += object.size();
            ++bucket.objects;
          } else {
            records::Step step;
            CO_CHECK_OK(parse_record(record, step));
            bucket.used_bytes += step.info().data_bytes();
            ++bucket.steps;
          }
        }
        if (page.size() < kPage) break;
        after = page.back().key;
      }
  co_return out;
}

Task<void> Usage::load() {
  CO_TRY(buckets_, co_await recount());
  co_return {};
}

Task<void> Usage::resume(OwnerId owner, std::string bucket, std::uint64_t declared_bytes) {
  std::uint64_t arrived = 0;
  // Every id of an owner is greater than its first one; that one has index 0 of writer 0, which nobody draws.
  for (ChunkId after{.owner = owner, .writer = 0, .index = 0};;) {
    CO_TRY(const auto page, co_await chunks_.list(after, kPage));
    for (const auto& chunk : page) arrived += chunk.id.owner == owner ? chunk.length : 0;
    if (page.size() < kPage || page.back().id.owner != owner) break;
    after = page.back().id;
  }
  opened(owner, bucket);
  change(open_[owner], [&](Open& open) {
    open.arrived = arrived;
    if (declared_bytes > 0) open.parts[0] = open.declared = declared_bytes;
  });
  co_return {};
}

Usage::Bucket Usage::of(const std::string& bucket) const {
  const auto found = buckets_.find(bucket);
  return found == buckets_.end() ? Bucket() : found->second;
}

void Usage::forget(const std::string& bucket) {
  const auto found = buckets_.find(bucket);
  if (found == buckets_.end()) return;
  const auto reserved = found->second.reserved_bytes;
  found->second = {.reserved_bytes = reserved};
  if (reserved == 0) buckets_.erase(found);
}

void Usage::added(const std::string& bucket, Kind kind, std::uint64_t bytes) {
  auto& entry = buckets_[bucket];
  entry.used_bytes += bytes;
  ++(kind == Kind::kObject ? entry.objects : entry.steps);
}

void Usage::removed(const std::string& bucket, Kind kind, std::uint64_t bytes) {
  auto& entry = buckets_[bucket];
  auto& count = kind == Kind::kObject ? entry.objects : entry.steps;
  assert(entry.used_bytes >= bytes && count > 0);
  entry.used_bytes -= bytes;
  --count;
}

/// Keeps the sums in step with a change of one owner's numbers.
template <class F>
void Usage::change(Open& open, F change) {
  auto& bucket = buckets_[open.bucket];
  bucket.reserved_bytes -= open.reserved();
  to_come_ -= open.to_come();
  change(open);
  bucket.reserved_bytes += open.reserved();
  to_come_ += open.to_come();
}

Result<void> Usage::check_quota(const Open& open, std::uint64_t own, std::uint64_t replaces,
                                std::uint64_t slack) const {
  const auto bucket = of(open.bucket);
  if (bucket.quota_bytes == 0) return {};
  const auto others = bucket.reserved_bytes - open.reserved();
  const auto used = bucket.used_bytes - std::min(bucket.used_bytes, replaces);
  std::uint64_t sum = 0;
  if (add_checked(used, others, sum) && add_checked(sum, own, sum) && sum <= bucket.quota_bytes + slack) return {};
  return fail(Errc::kNoSpace, "the quota of bucket '" + open.bucket + "' would be exceeded: limit " +
                                  number(bucket.quota_bytes) + " bytes, used " + number(bucket.used_bytes) +
                                  ", reserved by other open uploads and saves " + number(others) + ", asked " +
                                  number(own) + (replaces > 0 ? ", replacing " + number(replaces) : std::string()));
}

Task<void> Usage::look() {
  CO_CHECK_OK(co_await chunks_.look());
  co_return {};
}

Usage::Disk Usage::disk() const {
  Disk out;
  out.room = chunks_.room();
  out.reserved_bytes = to_come_;
  const auto there = out.room.free_bytes + out.room.open_bytes;
  const auto taken = out.room.ballast_bytes + to_come_;
  out.available_bytes = there > taken ? there - taken : 0;
  return out;
}

namespace {
Failure disk_full(const Usage::Disk& disk, std::uint64_t asked) {
  return fail(Errc::kNoSpace, "the disk has no room: asked " + number(asked) + " bytes, free " +
                                  number(disk.room.free_bytes + disk.room.open_bytes) + ", of which " +
                                  number(disk.room.ballast_bytes) + " are kept for deletes and the index and " +
                                  number(disk.reserved_bytes) + " are reserved by open uploads and saves");
}
}  // namespace

Result<void> Usage::declare(const OwnerId& owner, std::uint32_t part, std::uint64_t bytes,
                            std::uint64_t replaces_bytes) {
  auto& open = open_.at(owner);
  const auto before = open.parts.contains(part) ? open.parts.at(part) : 0;
  std::uint64_t declared = 0;
  if (!add_checked(open.declared - before, bytes, declared))
    return fail(Errc::kInvalid, "declared are more than 2^64 bytes");
  // A part that says less than before, or the same, is let in: it was.
  if (bytes > before) {
    CHECK_OK(check_quota(open, std::max(declared, open.arrived), replaces_bytes, 0));
    const auto more = bytes - before;
    const auto more_to_come = declared > open.arrived ? open.copied(declared - open.arrived) - open.to_come() : 0;
    if (const auto there = disk(); more_to_come > there.available_bytes) return disk_full(there, open.copied(more));
  }
  change(open, [&](Open& o) {
    o.parts[part] = bytes;
    o.declared = declared;
    o.replaces = replaces_bytes;
  });
  return {};
}

void Usage::declared_before(const OwnerId& owner, std::uint32_t part, std::uint64_t bytes) {
  const auto found = open_.find(owner);
  if (found == open_.end() || bytes == 0 || found->second.parts.contains(part)) return;
  std::uint64_t declared = 0;
  if (!add_checked(found->second.declared, bytes, declared)) return;
  change(found->second, [&](Open& open) {
    open.parts[part] = bytes;
    open.declared = declared;
  });
}

Result<Usage::Charge> Usage::charge(const OwnerId& owner, std::uint64_t bytes) {
  const auto found = open_.find(owner);
  if (found == open_.end()) return Charge();  // it has ended; whoever stores chunks is told so elsewhere
  auto& open = found->second;
  const auto arrived = open.arrived + bytes;
  if (arrived > open.declared) {
    CHECK_OK(check_quota(open, arrived, open.replaces, slack_of(open.declared)));
    const auto beyond = open.copied(arrived - std::max(open.declared, open.arrived));
    if (const auto there = disk(); beyond > there.available_bytes) return disk_full(there, beyond);
  }
  change(open, [&](Open& o) { o.arrived = arrived; });
  return Charge(*this, owner, bytes);
}

void Usage::give_back(const OwnerId& owner, std::uint64_t bytes) {
  const auto found = open_.find(owner);
  if (found == open_.end()) return;
  change(found->second, [&](Open& open) { open.arrived -= std::min(open.arrived, bytes); });
}

std::uint64_t Usage::arrived(const OwnerId& owner) const {
  const auto found = open_.find(owner);
  return found == open_.end() ? 0 : found->second.arrived;
}

Result<void> Usage::admit(const OwnerId& owner, std::uint64_t bytes, std::uint64_t replaced_bytes) {
  const auto found = open_.find(owner);
  if (found == open_.end()) return {};  // its transaction will find the same
  CHECK_OK(check_quota(found->second, bytes, replaced_bytes, 0));
  change(found->second, [&](Open& open) { open.admitted = bytes; });
  return {};
}

void Usage::ended(const OwnerId& owner) {
  const auto found = open_.find(owner);
  if (found == open_.end()) return;
  change(found->second, [](Open& open) { open.declared = open.arrived = open.admitted = 0; });
  open_.erase(found);
}

Usage::Level Usage::level_of(const storage::ChunkStore::Room& room) const {
  const auto there = room.free_bytes + room.open_bytes;
  if (there <= room.ballast_bytes + room.total_bytes / 100 * options_.full_percent) return Level::kFull;
  if (there <= room.ballast_bytes + room.total_bytes / 100 * options_.low_percent) return Level::kLow;
  return Level::kPlenty;
}

Task<void> Usage::watch() {
  for (;;) {
    co_await runtime_.loop.sleep(options_.watch_every);
    if (auto looked = co_await look(); !looked) continue;  // the disk is asked again; whoever needs it is told
    const auto disk = this->disk();
    const auto level = level_of(disk.room);
    if (level == std::exchange(level_, level)) continue;
    runtime_.log.write(level == Level::kPlenty ? rt::Level::kInfo : rt::Level::kWarning,
                       level == Level::kPlenty ? "space_enough"
                       : level == Level::kLow  ? "space_low"
                                               : "space_full",
                       {{"free_bytes", number(disk.room.free_bytes + disk.room.open_bytes)},
                        {"total_bytes", number(disk.room.total_bytes)},
                        {"ballast_bytes", number(disk.room.ballast_bytes)},
                        {"reserved_bytes", number(disk.reserved_bytes)}});
  }
}

}  // namespace cairn::server
