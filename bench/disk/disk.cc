#include "bench/disk/disk.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "bench/checkpoint/peers.h"
#include "bench/checkpoint/workload.h"
#include "bench/common/figures.h"
#include "bench/common/processes.h"
#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/runtime/runtime.h"
#include "storage/disk/directory.h"
#include "storage/index/rocksdb_index.h"
#include "storage/target/target.h"

namespace cairn::bench {
namespace {

/// What one stream writes: chunks of its own part of the memory.
struct Stream {
  std::span<std::byte> source, target;
  std::vector<ChunkId> ids;
  std::vector<std::vector<std::uint32_t>> crcs;  // by chunk: a client has them when it sends
  bool keep = false;                             // what is read is copied, to be compared
};

class Bench {
 public:
  explicit Bench(const DiskOptions& options) : options_(options) {}
  int run();

 private:
  std::string open_engine();
  std::string close_engine();
  void prepare(std::uint32_t round);
  std::string peers(std::uint32_t round, double write_seconds, double read_seconds);
  static Task<void> write_stream(storage::ChunkStore& chunks, rt::Loop& loop, const Stream& stream,
                                 std::uint32_t chunk_bytes);
  static Task<void> read_stream(storage::ChunkStore& chunks, rt::Loop& loop, const Stream& stream,
                                std::uint32_t chunk_bytes);
  static Task<void> read_unit(storage::ChunkStore& chunks, ChunkId id, std::uint32_t offset, std::span<std::byte> into,
                              bool keep);
  using Work = Task<void> (*)(storage::ChunkStore&, rt::Loop&, const Stream&, std::uint32_t);
  /// All streams at once. Empty, or what failed.
  std::string together(Work work, double* seconds, double* cpu);

  const DiskOptions& options_;
  std::unique_ptr<rt::RealRuntime> runtime_;
  std::shared_ptr<storage::Io> io_;
  std::unique_ptr<rt::UnitPool> units_;
  std::unique_ptr<storage::Target> target_;
  std::vector<Stream> streams_;
  Figures figures_;
};

std::span<std::byte> memory_of(std::uint64_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) {
    fmt::print(stderr, "cairn-bench disk: no memory for {} bytes\n", bytes);
    std::exit(1);
  }
  madvise(at, bytes, MADV_HUGEPAGE);
  std::memset(at, 1, bytes);
  return {static_cast<std::byte*>(at), bytes};
}

std::string Bench::open_engine() {
  rt::RealRuntime::Options real;
  real.log_min = rt::Level::kWarning;
  auto runtime = rt::RealRuntime::create(std::move(real));
  if (!runtime) return runtime.error().message;
  runtime_ = *std::move(runtime);
  auto seams = runtime_->seams();
  auto& loop = runtime_->loop();
  auto io = storage::Io::create(seams, loop);
  if (!io) return io.error().message;
  io_ = *io;
  // Readers hold a unit for each read; what is written lies in the streams' own memory.
  auto units = rt::UnitPool::create(loop, std::size_t{16} * options_.streams);
  if (!units) return units.error().message;
  units_ = *std::move(units);
  auto disk = rt::run(loop, storage::open_directory(seams, io_, options_.data + "/engine"));
  if (!disk) return disk.error().message;
  auto index = rt::run(loop, storage::open_rocksdb_index(seams, options_.data + "/engine/index"));
  if (!index) return index.error().message;
  auto target = rt::run(
      loop, storage::Target::open(seams, *std::move(disk), *std::move(index), *units_, storage::Target::Options{}));
  if (!target) return target.error().message;
  target_ = *std::move(target);
  return {};
}

std::string Bench::close_engine() {
  auto closed = rt::run(runtime_->loop(), target_->close());
  target_.reset();
  units_.reset();
  io_.reset();
  runtime_.reset();
  return closed ? "" : closed.error().message;
}

/// Ids and CRCs of this round, before the clock starts.
void Bench::prepare(std::uint32_t round) {
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    auto& stream = streams_[s];
    stream.ids.clear();
    stream.crcs.clear();
    const auto writer = static_cast<std::uint64_t>(now_seconds() * 1e9);
    std::string owner(16, '\0');
    std::memcpy(owner.data(), &writer, sizeof writer);
    owner[8] = static_cast<char>(round);
    owner[9] = static_cast<char>(s);
    for (std::uint64_t at = 0; at < stream.source.size(); at += options_.chunk_bytes) {
      const ChunkId id{.owner = *OwnerId::from_bytes(owner),
                       .writer = writer,
                       .index = static_cast<std::uint32_t>(at / options_.chunk_bytes)};
      auto& crcs = stream.crcs.emplace_back();
      for (std::uint32_t block = 0; block * kBlockBytes < options_.chunk_bytes; ++block)
        crcs.push_back(crc32c(stream.source.subspan(at + block * kBlockBytes, kBlockBytes), block_seed(id, block)));
      stream.ids.push_back(id);
    }
  }
}

Task<void> Bench::write_stream(storage::ChunkStore& chunks, rt::Loop& loop, const Stream& stream,
                               std::uint32_t chunk_bytes) {
  const auto unit = static_cast<std::uint32_t>(chunks.unit_bytes());
  for (std::size_t c = 0; c < stream.ids.size(); ++c) {
    CO_TRY(const auto upload, co_await chunks.start(stream.ids[c], chunk_bytes, stream.crcs[c]));
    if (!upload) co_return fail(Errc::kExists, "a chunk of an earlier run is there");
    std::vector<Task<void>> writes;
    for (std::uint32_t at = 0; at < chunk_bytes; at += unit) {
      const auto size = std::min(unit, chunk_bytes - at);
      const rt::MutableBuffer piece{.owner = {}, .bytes = stream.source.subspan(c * chunk_bytes + at, size)};
      writes.push_back(upload->write(at, piece, size));
    }
    CO_CHECK_OK(co_await rt::all(loop, std::move(writes)));
    CO_CHECK_OK(co_await upload->finish());
  }
  co_return {};
}

Task<void> Bench::read_unit(storage::ChunkStore& chunks, ChunkId id, std::uint32_t offset, std::span<std::byte> into,
                            bool keep) {
  CO_TRY(const auto read, co_await chunks.read(id, offset, static_cast<std::uint32_t>(into.size())));
  // The engine's work ends with verified bytes in its own memory; a copy of them would measure the copy.
  if (keep) std::memcpy(into.data(), read.bytes.bytes().data(), into.size());
  co_return {};
}

Task<void> Bench::read_stream(storage::ChunkStore& chunks, rt::Loop& loop, const Stream& stream,
                              std::uint32_t chunk_bytes) {
  const auto unit = static_cast<std::uint32_t>(chunks.unit_bytes());
  std::vector<Task<void>> reads;
  for (std::size_t c = 0; c < stream.ids.size(); ++c) {
    reads.clear();
    for (std::uint32_t at = 0; at < chunk_bytes; at += unit)
      reads.push_back(read_unit(chunks, stream.ids[c], at,
                                stream.target.subspan(c * chunk_bytes + at, std::min(unit, chunk_bytes - at)),
                                stream.keep));
    CO_CHECK_OK(co_await rt::all(loop, std::move(reads)));
  }
  co_return {};
}

std::string Bench::together(Work work, double* seconds, double* cpu) {
  auto& loop = runtime_->loop();
  std::vector<Task<void>> all;
  for (const auto& stream : streams_) all.push_back(work(target_->chunks(), loop, stream, options_.chunk_bytes));
  const double began = now_seconds(), cpu_began = own_cpu_seconds();
  auto done = rt::run(loop, rt::all(loop, std::move(all)));
  *seconds = now_seconds() - began;
  *cpu = own_cpu_seconds() - cpu_began;
  return done ? "" : done.error().message;
}

std::string Bench::peers(std::uint32_t round, double write_seconds, double read_seconds) {
  const auto in_threads = [&](auto work, double* seconds) {
    std::vector<std::string> failed(streams_.size());
    std::vector<std::thread> threads;
    const double began = now_seconds();
    for (std::size_t s = 0; s < streams_.size(); ++s)
      threads.emplace_back([&, s] { failed[s] = work(options_.data + "/direct." + std::to_string(s), streams_[s]); });
    for (auto& thread : threads) thread.join();
    *seconds = now_seconds() - began;
    for (auto& f : failed)
      if (!f.empty()) return f;
    return std::string();
  };
  double write = 0, read = 0;
  const double cpu_began = own_cpu_seconds();
  auto failed = in_threads([](const std::string& path, Stream& s) { return save_direct(path, s.source); }, &write);
  const double cpu_wrote = own_cpu_seconds();
  drop_caches({});
  if (failed.empty())
    failed = in_threads([](const std::string& path, Stream& s) { return load_direct(path, s.target); }, &read);
  const double gb = static_cast<double>(streams_.size() * streams_[0].source.size()) / 1e9;
  figures_.add("odirect_write_cpu_seconds_per_gb", round, (cpu_wrote - cpu_began) / gb);
  figures_.add("odirect_read_cpu_seconds_per_gb", round, (own_cpu_seconds() - cpu_wrote) / gb);
  for (std::size_t s = 0; s < streams_.size(); ++s)
    std::filesystem::remove(options_.data + "/direct." + std::to_string(s));
  figures_.add("odirect_write_seconds", round, write);
  figures_.add("odirect_read_seconds", round, read);
  figures_.add("write_vs_odirect", round, write_seconds / write);
  figures_.add("read_vs_odirect", round, read_seconds / read);
  return failed;
}

int Bench::run() {
  const auto fail_with = [](const std::string& what) {
    fmt::print(stderr, "cairn-bench disk: {}\n", what);
    return 1;
  };
  const auto chunks = options_.bytes / options_.streams / options_.chunk_bytes;
  const auto per_stream = chunks * options_.chunk_bytes;
  if (chunks == 0)
    return fail_with(fmt::format("--bytes {} is less than one chunk of {} bytes for each of {} streams", options_.bytes,
                                 options_.chunk_bytes, options_.streams));
  const auto bytes = per_stream * options_.streams;
  const double gb = static_cast<double>(bytes) / 1e9, gib = static_cast<double>(bytes) / kGiB;
  for (std::uint32_t s = 0; s < options_.streams; ++s) {
    streams_.push_back(
        {.source = memory_of(per_stream), .target = memory_of(per_stream), .ids = {}, .crcs = {}, .keep = true});
    fill(streams_.back().source, 1, s, DType::bf16, 0, Content::kWeights);
  }
  mkdir(options_.data.c_str(), 0700);
  std::filesystem::remove_all(options_.data + "/engine");
  if (auto failed = open_engine(); !failed.empty()) return fail_with(failed);
  std::string cold;
  for (std::uint32_t round = 0; round <= options_.rounds; ++round) {
    prepare(round);
    double write = 0, write_cpu = 0, read = 0, read_cpu = 0;
    if (auto failed = together(write_stream, &write, &write_cpu); !failed.empty()) return fail_with("write: " + failed);
    if (auto failed = close_engine(); !failed.empty()) return fail_with("close: " + failed);
    cold = drop_caches({});
    const double opening = now_seconds();
    if (auto failed = open_engine(); !failed.empty()) return fail_with("open: " + failed);
    figures_.add("open_seconds", round, now_seconds() - opening);
    if (auto failed = together(read_stream, &read, &read_cpu); !failed.empty()) return fail_with("read: " + failed);
    for (auto& stream : streams_) {
      if (stream.keep && std::memcmp(stream.source.data(), stream.target.data(), per_stream) != 0)
        return fail_with("read: wrong bytes");
      stream.keep = false;
    }
    figures_.add("write_seconds", round, write);
    figures_.add("write_gib_per_s", round, gib / write);
    figures_.add("write_cpu_seconds_per_gb", round, write_cpu / gb);
    figures_.add("read_seconds", round, read);
    figures_.add("read_gib_per_s", round, gib / read);
    figures_.add("read_cpu_seconds_per_gb", round, read_cpu / gb);
    if (auto failed = peers(round, write, read); !failed.empty()) return fail_with("odirect: " + failed);
    for (const auto& stream : streams_)
      if (auto removed = rt::run(runtime_->loop(), target_->chunks().remove(stream.ids)); !removed)
        return fail_with("remove: " + removed.error().message);
    if (!options_.json)
      fmt::print("round {}{}: write {:.3f} s, read {:.3f} s\n", round, round == 0 ? " (first, apart)" : "", write,
                 read);
  }
  if (auto failed = close_engine(); !failed.empty()) return fail_with("close: " + failed);
  std::filesystem::remove_all(options_.data + "/engine");
  if (options_.json) {
    auto out = figures_.json();
    out["bytes"] = bytes;
    out["chunk_bytes"] = options_.chunk_bytes;
    out["streams"] = options_.streams;
    out["rounds"] = options_.rounds;
    out["cold"] = "engine opened again, O_DIRECT, " + cold;
    out["load_average"] = load_average();
    fmt::print("{}\n", out.dump(1));
  } else {
    fmt::print(
        "\n{} streams, chunks of {} bytes, {:.2f} GiB, {} rounds; cold reads: opened again, O_DIRECT, {}; load {}\n",
        options_.streams, options_.chunk_bytes, gib, options_.rounds, cold, load_average());
    figures_.print();
  }
  return 0;
}

}  // namespace

int run_disk(const DiskOptions& options) {
  return Bench(options).run();
}

}  // namespace cairn::bench
