#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "client/cli/commands.h"
#include "client/cli/output.h"
#include "proto/common/ids.h"

namespace cairn::cli {
namespace {

nlohmann::ordered_json json_of(const BucketInfo& info) {
  return {{"bucket", info.name},
          {"copies", info.copies},
          {"quota_bytes", info.quota_bytes},
          {"created", time_iso(info.created_unix_nanos)}};
}

std::string quota_text(const BucketInfo& info) {
  return info.quota_bytes == 0 ? "none" : size_text(info.quota_bytes);
}

}  // namespace

Result<void> bucket_create(Context& context, const BucketCreate& args) {
  CHECK_OK(check_bucket_name(args.bucket));
  BucketOptions options{.name = args.bucket, .copies = args.copies};
  if (!args.quota.empty()) {
    TRY(options.quota_bytes, size_of(args.quota));
  }
  TRY(auto client, context.client());
  CHECK_OK(client.create_bucket(options));
  if (context.json) print_json({{"bucket", args.bucket}, {"created", true}});
  return {};
}

Result<void> bucket_list(Context& context) {
  TRY(auto client, context.client());
  TRY(const auto buckets, client.buckets());
  if (context.json) {
    for (const auto& bucket : buckets) print_json(json_of(bucket));
    return {};
  }
  Table table({"BUCKET", "COPIES", "QUOTA", "CREATED"});
  for (const auto& bucket : buckets)
    table.add({bucket.name, std::to_string(bucket.copies), quota_text(bucket), time_text(bucket.created_unix_nanos)});
  table.print();
  return {};
}

Result<void> bucket_show(Context& context, const std::string& bucket) {
  CHECK_OK(check_bucket_name(bucket));
  TRY(auto client, context.client());
  TRY(const auto info, client.bucket(bucket));
  if (context.json) {
    print_json(json_of(info));
    return {};
  }
  print_line(fmt::format("bucket   {}", info.name));
  print_line(fmt::format("copies   {}", info.copies));
  print_line(fmt::format("quota    {}", quota_text(info)));
  print_line(fmt::format("created  {}", time_text(info.created_unix_nanos)));
  return {};
}

Result<void> bucket_remove(Context& context, const std::string& bucket) {
  CHECK_OK(check_bucket_name(bucket));
  TRY(auto client, context.client());
  CHECK_OK(client.remove_bucket(bucket));
  if (context.json) print_json({{"bucket", bucket}, {"removed", true}});
  return {};
}

}  // namespace cairn::cli
