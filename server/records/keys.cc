#include "server/records/keys.h"

#include <cassert>

namespace cairn::server {
namespace {

std::string big_endian(std::uint64_t value, std::size_t size) {
  std::string out(size, '\0');
  for (auto i = size; i-- > 0; value >>= 8) out[i] = static_cast<char>(value & 0xff);
  return out;
}

std::string join(std::string_view table, std::string_view first, std::string_view second) {
  std::string out(table);
  out.append(first).push_back('\0');
  out.append(second);
  return out;
}

std::string prefix_of_run(std::string_view table, std::string_view bucket, std::string_view run) {
  auto out = join(table, bucket, run);
  out.push_back('\0');
  return out;
}

}  // namespace

HomeGroup bucket_group(std::string_view bucket) {
  return home_group_of(bucket);
}
HomeGroup home_group(std::string_view bucket, std::string_view name) {
  return home_group_of(bucket, name);
}

std::string bucket_key(std::string_view bucket) {
  return std::string(kBucketPrefix).append(bucket);
}
std::string owner_key(const OwnerId& owner) {
  return std::string(kOwnerPrefix).append(owner.view());
}
std::string deleting_key(const OwnerId& owner) {
  return std::string(kDeletingPrefix).append(owner.view());
}
std::string object_prefix(std::string_view bucket) {
  return join("o/", bucket, "");
}
std::string object_key(std::string_view bucket, std::string_view key) {
  return join("o/", bucket, key);
}
std::string run_prefix(std::string_view bucket) {
  return join("r/", bucket, "");
}
std::string run_key(std::string_view bucket, std::string_view run) {
  return join("r/", bucket, run);
}
std::string attempt_prefix(std::string_view bucket) {
  return join(kAttemptPrefix, bucket, "");
}
std::string attempt_prefix(std::string_view bucket, std::string_view run) {
  return prefix_of_run(kAttemptPrefix, bucket, run);
}
std::string attempt_key(std::string_view bucket, std::string_view run, RunEpoch run_epoch, std::uint64_t step) {
  return attempt_prefix(bucket, run) + big_endian(run_epoch.loss, 4) + big_endian(run_epoch.count, 8) +
         big_endian(step, 8);
}
std::string failed_key(const OwnerId& owner) {
  return std::string(kFailedPrefix).append(owner.view());
}
std::string joined_key(const OwnerId& owner) {
  return std::string("j/").append(owner.view());
}
std::string seal_prefix(const OwnerId& owner) {
  return std::string(kSealPrefix).append(owner.view());
}
std::string seal_key(const OwnerId& owner, std::uint32_t rank) {
  return seal_prefix(owner) + big_endian(rank, 4);
}
std::string step_prefix(std::string_view bucket) {
  return join("s/", bucket, "");
}
std::string step_prefix(std::string_view bucket, std::string_view run) {
  return prefix_of_run("s/", bucket, run);
}
std::string step_key(std::string_view bucket, std::string_view run, std::uint64_t step) {
  return step_prefix(bucket, run) + big_endian(step, 8);
}

Result<void> check_object_name(std::string_view bucket, std::string_view key) {
  CHECK_OK(check_bucket_name(bucket));
  return check_free_name("object", key);
}
Result<void> check_run_of(std::string_view bucket, std::string_view run) {
  CHECK_OK(check_bucket_name(bucket));
  return check_run_name(run);
}

std::uint64_t number_at_end(std::string_view key, std::size_t size) {
  assert(key.size() >= size);
  std::uint64_t value = 0;
  for (const char c : key.substr(key.size() - size)) value = value << 8 | static_cast<unsigned char>(c);
  return value;
}

}  // namespace cairn::server
