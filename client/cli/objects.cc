#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>

#include "client/cli/commands.h"
#include "client/cli/files.h"
#include "client/cli/output.h"
#include "proto/common/ids.h"

namespace cairn::cli {
namespace {

Result<ObjectName> key_of(const std::string& url) {
  TRY(auto name, object_name(url));
  CHECK_OK(check_free_name("object", name.key));
  return name;
}

nlohmann::ordered_json json_of(const std::string& bucket, const ObjectInfo& info) {
  return {{"bucket", bucket},
          {"key", info.key},
          {"size", info.size_bytes},
          {"crc32c", fmt::format("{:08x}", info.crc32c)},
          {"created", time_iso(info.created_unix_nanos)}};
}

Result<std::size_t> read_stdin(std::span<std::byte> out) {
  for (;;) {
    const auto got = ::read(STDIN_FILENO, out.data(), out.size());
    if (got >= 0) return static_cast<std::size_t>(got);
    if (stop_requested) return fail(stopped());
    if (errno != EINTR) return errno_failure("read", "stdin", errno);
  }
}

Result<void> write_stdout(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const auto put = ::write(STDOUT_FILENO, bytes.data(), bytes.size());
    if (put < 0 && stop_requested) return fail(stopped());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_failure("write", "stdout", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
  return {};
}

}  // namespace

Result<void> put(Context& context, const Put& args) {
  TRY(const auto name, key_of(args.url));
  std::unique_ptr<FileSource> file;
  if (args.file != "-") {
    TRY(file, FileSource::open(args.file));
  }
  TRY(auto client, context.client());
  Progress progress("put", file ? file->size() : 0);
  const auto read = [&](std::span<std::byte> out) -> Result<std::size_t> {
    if (stop_requested) return fail(stopped());
    if (!file) return read_stdin(out);
    const auto size = std::min<std::uint64_t>(out.size(), file->size() - progress.done());
    CHECK_OK(file->read(progress.done(), out.first(size)));
    progress.add(size);
    return size;
  };
  TRY(const auto info, client.put_stream(name.bucket, name.key, read, {.if_absent = args.if_absent}));
  if (context.json) print_json(json_of(name.bucket, info));
  return {};
}

Result<void> get(Context& context, const Get& args) {
  TRY(const auto name, key_of(args.url));
  ByteRange range;
  if (!args.range.empty()) {
    TRY(range, range_of(args.range));
  }
  TRY(auto client, context.client());
  TRY(const auto info, client.stat(name.bucket, name.key));
  if (range.first > info.size_bytes)
    return fail(Errc::kInvalid, fmt::format("range begins at {} of {} bytes", range.first, info.size_bytes));
  std::optional<FileInPlace> file;
  if (args.file != "-") {
    TRY(auto made, FileInPlace::create(args.file));
    file.emplace(std::move(made));
  }
  Progress progress("get", std::min(range.last, info.size_bytes) - range.first);
  const auto write = [&](std::span<const std::byte> bytes) -> Result<void> {
    if (stop_requested) return fail(stopped());
    progress.add(bytes.size());
    return file ? file->file().append(bytes) : write_stdout(bytes);
  };
  TRY(const auto got, client.get_stream(name.bucket, name.key, range.first, range.last, write));
  if (file) CHECK_OK(file->commit());
  // With "-" stdout carries the object's bytes and nothing else.
  if (context.json && file) print_json(json_of(name.bucket, got));
  return {};
}

Result<void> list(Context& context, const std::string& url) {
  TRY(const auto name, object_name(url));
  TRY(auto client, context.client());
  Table table({"SIZE", "CREATED", "KEY"});
  std::string after;
  for (bool more = true; more;) {
    TRY(const auto page, client.list(name.bucket, name.key, after));
    for (const auto& info : page.items) {
      if (context.json)
        print_json(json_of(name.bucket, info));
      else
        table.add({size_text(info.size_bytes), time_text(info.created_unix_nanos), info.key});
      after = info.key;
    }
    more = page.more && !page.items.empty();
  }
  if (!context.json) table.print();
  return {};
}

Result<void> stat(Context& context, const std::string& url) {
  TRY(const auto name, key_of(url));
  TRY(auto client, context.client());
  TRY(const auto info, client.stat(name.bucket, name.key));
  if (context.json) {
    print_json(json_of(name.bucket, info));
    return {};
  }
  print_line(fmt::format("object   cairn://{}/{}", name.bucket, name.key));
  print_line(fmt::format("size     {} ({} bytes)", size_text(info.size_bytes), info.size_bytes));
  print_line(fmt::format("crc32c   {:08x}", info.crc32c));
  print_line(fmt::format("created  {}", time_text(info.created_unix_nanos)));
  return {};
}

Result<void> remove(Context& context, const std::string& url) {
  TRY(const auto name, key_of(url));
  TRY(auto client, context.client());
  CHECK_OK(client.remove(name.bucket, name.key));
  if (context.json) print_json({{"bucket", name.bucket}, {"key", name.key}, {"removed", true}});
  return {};
}

}  // namespace cairn::cli
