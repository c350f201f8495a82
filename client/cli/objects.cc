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
  return {{"bucket", bucket},        {"key", info.key},
          {"size", info.size_bytes}, {"crc32c", fmt::format("{:08x}", info.crc32c)},
          {"version", info.version}, {"created", time_iso(info.created_unix_nanos)}};
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
  PutOptions options{.if_absent = args.if_absent, .if_version = args.if_version};
  std::unique_ptr<FileSource> file;
  if (args.file != "-") {
    TRY(file, FileSource::open(args.file));
    options.size_bytes = file->size();
  }
  TRY(auto client, context.client());
  Progress progress("put", file ? file->size() : 0);
  const auto read = [&](std::span<std::byte> out) -> Result<std::size_t> {
    if (stop_requested) return fail(stopped());
    if (!file) {
      TRY(const auto size, read_stdin(out));
      progress.add(size);
      return size;
    }
    const auto size = std::min<std::uint64_t>(out.size(), file->size() - progress.done());
    CHECK_OK(file->read(progress.done(), out.first(size)));
    progress.add(size);
    return size;
  };
  TRY(const auto info, client.put_stream(name.bucket, name.key, read, std::move(options)));
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
  TRY(auto object, client.open_object(name.bucket, name.key));
  const auto size = object.info().size_bytes;
  if (range.from_end) range.first = size - std::min(size, range.first);
  const auto last = range.last == Client::npos ? std::max(size, range.first) : range.last;
  if (last > size || range.first > last)
    return fail(Errc::kInvalid, fmt::format("the range {} reaches beyond the object's {} bytes", args.range, size));
  std::optional<FileInPlace> file;
  if (args.file != "-") {
    TRY(auto made, FileInPlace::create(args.file));
    file.emplace(std::move(made));
  }
  Progress progress("get", last - range.first);
  const auto write = [&](std::span<const std::byte> bytes) -> Result<void> {
    if (stop_requested) return fail(stopped());
    progress.add(bytes.size());
    return file ? file->file().append(bytes) : write_stdout(bytes);
  };
  CHECK_OK(object.stream(range.first, last, write));
  if (file) CHECK_OK(file->commit());
  // With "-" stdout carries the object's bytes and nothing else.
  if (context.json && file) print_json(json_of(name.bucket, object.info()));
  return {};
}

Result<void> list(Context& context, const List& args) {
  TRY(const auto name, object_name(args.url));
  TRY(auto client, context.client());
  Table table({"SIZE", "CREATED", "KEY"});
  ListOptions options{.prefix = name.key, .after = args.after, .delimiter = args.delimiter, .token = {}};
  for (bool more = true; more;) {
    TRY(const auto page, client.list(name.bucket, options));
    // Keys and prefixes of a page in one order.
    auto prefix = page.prefixes.begin();
    const auto print_prefixes = [&](const std::string* before) {
      for (; prefix != page.prefixes.end() && (before == nullptr || *prefix < *before); ++prefix) {
        if (context.json)
          print_json({{"bucket", name.bucket}, {"prefix", *prefix}});
        else
          table.add({"", "", *prefix});
      }
    };
    for (const auto& info : page.items) {
      print_prefixes(&info.key);
      if (context.json)
        print_json(json_of(name.bucket, info));
      else
        table.add({size_text(info.size_bytes), time_text(info.created_unix_nanos), info.key});
    }
    print_prefixes(nullptr);
    options.token = page.next;
    more = page.more;
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
  print_line(fmt::format("version  {}", info.version));
  print_line(fmt::format("created  {}", time_text(info.created_unix_nanos)));
  return {};
}

Result<void> remove(Context& context, const Remove& args) {
  TRY(const auto name, key_of(args.url));
  TRY(auto client, context.client());
  CHECK_OK(client.remove(name.bucket, name.key, {.if_version = args.if_version}));
  if (context.json) print_json({{"bucket", name.bucket}, {"key", name.key}, {"removed", true}});
  return {};
}

}  // namespace cairn::cli
