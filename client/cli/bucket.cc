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
          {"used_bytes", info.used_bytes},
          {"reserved_bytes", info.reserved_bytes},
          {"objects", info.objects},
          {"steps", info.steps},
          {"keep_last", info.keep_last},
          {"keep_every", info.keep_every},
          {"keep_days", info.keep_days},
          {"created", time_iso(info.created_unix_nanos)}};
}

std::string quota_text(const BucketInfo& info) {
  return info.quota_bytes == 0 ? "none" : size_text(info.quota_bytes);
}

Result<std::uint64_t> quota_of(const std::string& text) {
  if (text == "none") return 0;
  return size_of(text);
}

/// What retention keeps.
std::string keep_text(const BucketInfo& info) {
  std::vector<std::string> rules;
  if (info.keep_last > 0) rules.push_back(fmt::format("last {}", info.keep_last));
  if (info.keep_every > 0) rules.push_back(fmt::format("every {}", info.keep_every));
  if (info.keep_days > 0) rules.push_back(fmt::format("{} {}", info.keep_days, info.keep_days == 1 ? "day" : "days"));
  return rules.empty() ? "all" : fmt::format("{}", fmt::join(rules, ", "));
}

void print_bucket(const BucketInfo& info) {
  print_line(fmt::format("bucket   {}", info.name));
  print_line(fmt::format("copies   {}", info.copies));
  print_line(fmt::format("quota    {}", quota_text(info)));
  print_line(fmt::format("used     {} ({} bytes): {} {}, {} {}", size_text(info.used_bytes), info.used_bytes,
                         info.objects, info.objects == 1 ? "object" : "objects", info.steps,
                         info.steps == 1 ? "step" : "steps"));
  if (info.reserved_bytes > 0)
    print_line(fmt::format("open     {} reserved by uploads and saves", size_text(info.reserved_bytes)));
  print_line(fmt::format("keep     {}", keep_text(info)));
  print_line(fmt::format("created  {}", time_text(info.created_unix_nanos)));
}

}  // namespace

Result<void> bucket_create(Context& context, const BucketCreate& args) {
  CHECK_OK(check_bucket_name(args.bucket));
  BucketOptions options{.name = args.bucket,
                        .copies = args.copies,
                        .keep_last = args.keep_last,
                        .keep_every = args.keep_every,
                        .keep_days = args.keep_days};
  if (!args.quota.empty()) {
    TRY(options.quota_bytes, quota_of(args.quota));
  }
  TRY(auto client, context.client());
  CHECK_OK(client.create_bucket(options));
  if (context.json) print_json({{"bucket", args.bucket}, {"created", true}});
  return {};
}

Result<void> bucket_set(Context& context, const BucketSet& args) {
  CHECK_OK(check_bucket_name(args.bucket));
  auto change = args.change;
  if (!args.quota.empty()) {
    TRY(change.quota_bytes, quota_of(args.quota));
  }
  if (!change.quota_bytes && !change.keep_last && !change.keep_every && !change.keep_days)
    return fail(Errc::kInvalid, "nothing to change: name --quota, --keep-last, --keep-every or --keep-days");
  TRY(auto client, context.client());
  TRY(const auto info, client.set_bucket(args.bucket, change));
  if (context.json)
    print_json(json_of(info));
  else
    print_bucket(info);
  return {};
}

Result<void> bucket_list(Context& context) {
  TRY(auto client, context.client());
  TRY(const auto buckets, client.buckets());
  if (context.json) {
    for (const auto& bucket : buckets) print_json(json_of(bucket));
    return {};
  }
  Table table({"BUCKET", "COPIES", "USED", "QUOTA", "KEEP", "CREATED"});
  for (const auto& bucket : buckets)
    table.add({bucket.name, std::to_string(bucket.copies), size_text(bucket.used_bytes), quota_text(bucket),
               keep_text(bucket), time_text(bucket.created_unix_nanos)});
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
  print_bucket(info);
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
