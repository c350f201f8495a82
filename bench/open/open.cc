#include "bench/open/open.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/common/processes.h"
#include "client/core/arena.h"
#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "proto/runtime/runtime.h"

namespace cairn::bench {
namespace {

constexpr char kBucket[] = "open";
constexpr std::uint32_t kChunkBytes = 4 * kKiB;
constexpr std::uint64_t kChunksOfObject = 1000;
constexpr std::size_t kWriters = 16;
constexpr std::uint32_t kInFlight = 32;
constexpr rt::Duration kTimeout = std::chrono::minutes(10);

std::string key_of(std::uint64_t object) {
  return fmt::format("objects/{:06}", object);
}

/// Bytes of a chunk: its number, again and again.
std::string bytes_of_object(std::uint64_t object, std::uint64_t chunks) {
  std::string out(chunks * kChunkBytes, '\0');
  for (std::uint64_t at = 0; at < out.size(); at += 8) {
    const auto value = object * kChunksOfObject + at / kChunkBytes;
    std::memcpy(out.data() + at, &value, sizeof value);
  }
  return out;
}

class Player {
 public:
  Player(rt::RealRuntime& runtime, const OpenOptions& options) : runtime_(runtime), options_(options) {}

  std::uint64_t objects() const { return (options_.chunks + kChunksOfObject - 1) / kChunksOfObject; }

  Task<std::shared_ptr<client::Session>> connect(std::string address) {
    client::SessionOptions session;
    session.servers = {address};
    session.name = "cairn-bench open";
    session.host = rt::boot_id();
    co_return co_await client::Session::connect(runtime_.seams(), session, deadline());
  }

  /// What is missing of the store.
  Task<void> build(std::string address) {
    CO_TRY(auto session, co_await connect(address));
    if (auto made = co_await client::create_bucket(session, {.name = kBucket}, deadline());
        !made && made.error().code != Errc::kExists)
      co_return fail(std::move(made).error());
    std::vector<Task<void>> writers;
    for (std::size_t i = 0; i < kWriters; ++i) writers.push_back(write(session));
    auto done = co_await rt::all(runtime_.loop(), std::move(writers));
    session->close();
    co_return std::move(done);
  }

  /// The first byte of an object, whatever round it is.
  Task<void> read(std::string address, std::uint64_t object) {
    CO_TRY(auto session, co_await connect(address));
    CO_TRY(auto opened, co_await client::open_object(session, kBucket, key_of(object), deadline()));
    auto shared = std::make_shared<const client::OpenedObject>(std::move(opened));
    const auto last = shared->summary.size - kChunkBytes;
    std::string got(8, '\0');
    CO_CHECK_OK(
        co_await client::read_object(session, kBucket, shared, last, std::as_writable_bytes(std::span(got)), kTimeout));
    session->close();
    const auto expected = bytes_of_object(object, shared->summary.size / kChunkBytes).substr(last, 8);
    if (got != expected) co_return fail(Errc::kFailed, "the bytes of " + key_of(object) + " are wrong");
    co_return {};
  }

 private:
  rt::TimePoint deadline() { return runtime_.loop().now() + kTimeout; }

  Task<void> write(std::shared_ptr<client::Session> session) {
    // Each chunk takes one of the daemon's units, of which only its bytes are touched.
    CO_TRY(auto arena, client::Arena::create(runtime_.loop(), kInFlight * kUnitBytes, kChunkBytes));
    while (next_ < objects()) {
      const auto object = next_++;
      const auto chunks = std::min(kChunksOfObject, options_.chunks - object * kChunksOfObject);
      client::ChunkWriter::Options options;
      options.chunks_in_flight = kInFlight;
      options.timeout = kTimeout;
      auto writer = co_await client::ObjectWriter::begin(
          session, *arena, kBucket, key_of(object), {.if_absent = true, .size_bytes = chunks * kChunkBytes}, options);
      if (!writer && writer.error().code == Errc::kExists) continue;
      if (!writer) co_return fail(std::move(writer).error());
      const auto bytes = bytes_of_object(object, chunks);
      CO_CHECK_OK(co_await (*writer)->write(std::as_bytes(std::span(bytes))));
      auto sealed = co_await (*writer)->seal();
      if (!sealed && sealed.error().code != Errc::kExists) co_return fail(std::move(sealed).error());
      if (isatty(STDERR_FILENO) != 0) fmt::print(stderr, "\rwriting: object {} of {} ", object + 1, objects());
    }
    co_return {};
  }

  rt::RealRuntime& runtime_;
  const OpenOptions& options_;
  std::uint64_t next_ = 0;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const auto middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

std::vector<std::string> files_below(const std::string& folder) {
  std::vector<std::string> out;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, ignored)) out.push_back(entry.path());
  return out;
}

}  // namespace

int run_open(const OpenOptions& options) {
  const auto fail_with = [](const std::string& what) {
    fmt::print(stderr, "cairn-bench open: {}\n", what);
    return 1;
  };
  mkdir(options.data.c_str(), 0700);
  OwnDaemon daemon(options.daemon_program, options.data + "/store", options.daemon_flags);
  if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
  auto runtime = rt::RealRuntime::create({.offload_threads = 2, .log_min = rt::Level::kWarning, .log = nullptr});
  if (!runtime) return fail_with(runtime.error().message);
  auto& loop = (*runtime)->loop();
  Player player(**runtime, options);
  const double building = now_seconds();
  if (auto built = rt::run(loop, player.build(daemon.address())); !built) return fail_with(built.error().message);
  const double built = now_seconds();
  const auto chunks = daemon.metric("cairn_chunk_store_chunks");

  // By how the process before has ended.
  std::map<std::string, std::vector<double>> ready, first, cpu;
  std::uint64_t rss = 0;
  std::string cold;
  for (std::uint32_t round = 0; round < 2 * options.rounds; ++round) {
    const std::string end = round % 2 == 0 ? "kill" : "stop";
    if (round % 2 == 0)
      daemon.kill();
    else
      daemon.stop();
    cold = drop_caches(files_below(options.data));
    const double begun = now_seconds();
    if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
    ready[end].push_back(now_seconds() - begun);
    const auto object = std::uint64_t{round} * 7919 % player.objects();
    if (auto read = rt::run(loop, player.read(daemon.address(), object)); !read) return fail_with(read.error().message);
    first[end].push_back(now_seconds() - begun);
    const auto use = use_of(daemon.pid());
    cpu[end].push_back(use.cpu_seconds);
    rss = std::max(rss, use.rss_bytes_max);
  }

  nlohmann::ordered_json out;
  out["chunks"] = static_cast<std::uint64_t>(chunks.value_or(0));
  out["build_seconds"] = built - building;
  for (const auto& end : {"kill", "stop"}) {
    out[fmt::format("ready_seconds_after_{}", end)] = median(ready[end]);
    out[fmt::format("first_byte_seconds_after_{}", end)] = median(first[end]);
    out[fmt::format("first_byte_seconds_after_{}_max", end)] = *std::ranges::max_element(first[end]);
    out[fmt::format("cpu_seconds_server_after_{}", end)] = median(cpu[end]);
  }
  out["rss_bytes_max"] = rss;
  out["rounds"] = options.rounds;
  out["cold"] = cold;
  if (options.json) {
    fmt::print("{}\n", out.dump(1));
  } else {
    for (const auto& [name, value] : out.items()) fmt::print("{:<36}{:>16}\n", name, value.dump());
  }
  return 0;
}

}  // namespace cairn::bench
