#include "bench/tiny/tiny.h"

#include <cairn/client.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>

#include "bench/common/processes.h"

namespace cairn::bench {
namespace {

constexpr char kBucket[] = "tiny";
constexpr std::uint64_t kLargeBytes = 64ull << 20;
constexpr std::uint64_t kAlign = 64;

enum Phase : std::uint32_t { kConnect, kSave, kRestore, kCheck };
enum Kind : std::uint32_t { kMixed, kLarge, kKinds };
constexpr const char* kNames[] = {"mixed", "large"};

std::uint64_t mixed_bits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

struct Tensor {
  std::string name;
  std::uint64_t offset = 0, bytes = 0;  // in the rank's memory
};

/// What a rank holds: the same memory, cut in two ways.
struct Layout {
  std::vector<Tensor> tensors[kKinds];
  std::uint64_t bytes = 0;
};

Layout lay_out(const TinyOptions& options, std::uint32_t rank) {
  Layout out;
  const auto large = [&](Kind kind, std::uint64_t from, std::uint64_t end) {
    for (auto at = from; at < end; at += kLargeBytes)
      out.tensors[kind].push_back(
          {fmt::format("rank{}.large.{}", rank, out.tensors[kind].size()), at, std::min(kLargeBytes, end - at)});
  };
  out.bytes = options.bytes / options.ranks / kAlign * kAlign;
  large(kMixed, 0, out.bytes);
  for (auto i = rank; i < options.tensors; i += options.ranks) {
    const auto bytes = 1024 + mixed_bits(i) % (63 * 1024);
    out.tensors[kMixed].push_back({fmt::format("layers.{:05}.bias", i), out.bytes, bytes});
    out.bytes += bytes;
  }
  large(kLarge, 0, out.bytes);
  return out;
}

class RankWork {
 public:
  RankWork(const TinyOptions& options, const std::string& address, std::uint32_t rank)
      : options_(options), address_(address), rank_(rank), layout_(lay_out(options, rank)) {
    source_ = memory(layout_.bytes);
    target_ = memory(layout_.bytes);
    for (std::uint64_t at = 0; at + 8 <= source_.size(); at += 8) {
      const auto word = mixed_bits(std::uint64_t{rank} << 40 | at);
      std::memcpy(source_.data() + at, &word, sizeof word);
    }
  }

  std::string run(std::uint32_t phase, std::uint64_t argument, Report& report) {
    const auto kind = static_cast<Kind>(argument % kKinds);
    const auto step = argument / kKinds;
    switch (phase) {
      case kConnect:
        return connect(argument);
      case kSave:
        return save(kind, step);
      case kRestore:
        return restore(kind, step, report);
      case kCheck:
        if (std::memcmp(source_.data(), target_.data(), layout_.bytes) != 0) report.wrong_bytes = 1;
        std::ranges::fill(target_, std::byte{0});
        return {};
      default:
        return "no such phase";
    }
  }

 private:
  static std::span<std::byte> memory(std::uint64_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) {
      fmt::print(stderr, "cairn-bench: no memory for {} bytes\n", bytes);
      std::exit(1);
    }
    return {static_cast<std::byte*>(at), bytes};
  }

  std::string connect(std::uint64_t launch) {
    ClientOptions options;
    options.servers = {address_};
    options.unix_socket = options_.transport != "tcp";
    options.shared_memory = options_.transport != "unix";
    auto client = Client::connect(options);
    if (!client) return client.error().message;
    client_ = *client;
    for (const auto kind : {kMixed, kLarge}) {
      auto run = client_->open_run({.name = fmt::format("{}/{}", kBucket, kNames[kind]),
                                    .launch = {.job = "cairn-bench", .restart = launch},
                                    .resume = {},
                                    .discard_after = false});
      if (!run) return run.error().message;
      runs_[kind] = *run;
    }
    return {};
  }

  std::string save(Kind kind, std::uint64_t step) {
    auto save = runs_[kind]->begin_save(
        {.step = step, .rank = rank_, .world_size = options_.ranks, .declared_bytes = layout_.bytes});
    if (!save) return save.error().message;
    for (const auto& tensor : layout_.tensors[kind]) {
      auto added = save->add_tensor(
          {.name = tensor.name, .dtype = DType::u8, .global_shape = {tensor.bytes}, .box = std::nullopt, .holder = {}},
          std::span<const std::byte>(source_).subspan(tensor.offset, tensor.bytes));
      if (!added) return added.error().message;
    }
    auto ticket = save->stage();
    if (!ticket) return ticket.error().message;
    auto committed = ticket->wait();
    return committed ? "" : committed.error().message;
  }

  std::string restore(Kind kind, std::uint64_t step, Report& report) {
    auto opened = client_->open_step(fmt::format("{}/{}", kBucket, kNames[kind]), step);
    if (!opened) return opened.error().message;
    auto restore = opened->restore();
    for (const auto& tensor : layout_.tensors[kind])
      restore.want({.name = tensor.name, .box = std::nullopt}, target_.subspan(tensor.offset, tensor.bytes));
    auto done = restore.run();
    if (!done) return done.error().message;
    report.from_disk = done->bytes_from_disk;
    return {};
  }

  const TinyOptions& options_;
  const std::string& address_;
  std::uint32_t rank_;
  Layout layout_;
  std::span<std::byte> source_, target_;
  std::optional<Client> client_;
  std::optional<Run> runs_[kKinds];
};

struct Figures {
  std::map<std::string, std::vector<double>> rounds;
  void add(const std::string& name, double value) { rounds[name].push_back(value); }
  nlohmann::ordered_json json() const {
    nlohmann::ordered_json out;
    for (auto [name, values] : rounds) {
      std::ranges::sort(values);
      const auto middle = values.size() / 2;
      const auto median = values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
      out[name] = {{"min", values.front()}, {"median", median}, {"max", values.back()}};
    }
    return out;
  }
};

std::vector<std::string> files_below(const std::string& folder) {
  std::vector<std::string> out;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, ignored)) out.push_back(entry.path());
  return out;
}

}  // namespace

int run_tiny(const TinyOptions& options) {
  const auto fail_with = [](const std::string& what) {
    fmt::print(stderr, "cairn-bench tiny: {}\n", what);
    return 1;
  };
  mkdir(options.data.c_str(), 0700);
  OwnDaemon daemon(options.daemon_program, options.data + "/store", options.daemon_flags);
  if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
  auto address = daemon.address();
  if (options.transport == "unix" || options.transport == "shm") address = "unix:" + options.data + "/store/cairn.sock";
  Ranks ranks(options.ranks, [&](std::uint32_t rank) -> Ranks::Work {
    auto work = std::make_shared<RankWork>(options, address, rank);
    return [work](std::uint32_t, std::uint32_t phase, std::uint64_t argument, Report& report) {
      const auto failed = work->run(phase, argument, report);
      report.failed = !failed.empty();
      std::strncpy(report.error, failed.c_str(), sizeof report.error - 1);
    };
  });
  {
    auto admin = Client::connect({.servers = {address}});
    if (!admin) return fail_with(admin.error().message);
    auto made = admin->create_bucket({.name = kBucket});
    if (!made && made.error().code != Errc::kExists) return fail_with(made.error().message);
  }
  std::uint64_t bytes = 0, tiny_bytes = 0;
  for (std::uint32_t rank = 0; rank < options.ranks; ++rank) {
    const auto layout = lay_out(options, rank);
    bytes += layout.bytes;
    tiny_bytes += layout.bytes - options.bytes / options.ranks / kAlign * kAlign;
  }

  Figures figures;
  std::string failed;
  // Seconds from the first rank's beginning to the last one's end; -1: `failed` says why.
  const auto phase = [&](Phase what, std::uint64_t argument, Report* sum = nullptr) {
    double begin = 1e300, end = 0;
    for (const auto& report : ranks.run(what, argument)) {
      if (report.failed && failed.empty()) failed = report.error;
      if (report.wrong_bytes > 0) failed = "bytes that were restored are wrong";
      begin = std::min(begin, report.begin);
      end = std::max(end, report.end);
      if (sum == nullptr) continue;
      sum->cpu_seconds += report.cpu_seconds;
      sum->from_disk += report.from_disk;
    }
    return end - begin;
  };
  const auto metric = [&](const char* name) { return daemon.metric(name).value_or(0); };
  phase(kConnect, static_cast<std::uint64_t>(now_seconds() * 1000));
  if (!failed.empty()) return fail_with("connect: " + failed);
  for (std::uint32_t round = 0; round <= options.rounds; ++round) {
    double save[kKinds] = {}, restore[kKinds] = {}, save_cpu[kKinds] = {}, restore_cpu[kKinds] = {};
    for (std::uint32_t turn = 0; turn < kKinds; ++turn) {
      const auto kind = static_cast<Kind>((round + turn) % kKinds);
      const auto argument = (std::uint64_t{round} + 1) * kKinds + kind;
      const std::string name = kNames[kind];
      const auto live = metric("cairn_chunk_store_live_bytes"), received = metric("cairn_rpc_received_bytes_total");
      Report saved, restored;
      auto server = use_of(daemon.pid()).cpu_seconds;
      save[kind] = phase(kSave, argument, &saved);
      if (!failed.empty()) return fail_with("save: " + failed);
      save_cpu[kind] = saved.cpu_seconds + use_of(daemon.pid()).cpu_seconds - server;
      const auto per_byte = [&](double value) { return value / static_cast<double>(bytes); };
      if (round > 0) {
        figures.add(name + "_save_seconds", save[kind]);
        figures.add(name + "_bytes_on_disk", per_byte(metric("cairn_chunk_store_live_bytes") - live));
        figures.add(name + "_bytes_received", per_byte(metric("cairn_rpc_received_bytes_total") - received));
      }
      daemon.stop();
      if (failed = daemon.start(); !failed.empty()) return fail_with(failed);
      drop_caches(files_below(options.data));
      const auto sent = metric("cairn_rpc_sent_bytes_total");
      server = use_of(daemon.pid()).cpu_seconds;
      restore[kind] = phase(kRestore, argument, &restored);
      if (!failed.empty()) return fail_with("restore: " + failed);
      restore_cpu[kind] = restored.cpu_seconds + use_of(daemon.pid()).cpu_seconds - server;
      if (round > 0) {
        figures.add(name + "_restore_seconds", restore[kind]);
        figures.add(name + "_bytes_sent", per_byte(metric("cairn_rpc_sent_bytes_total") - sent));
        figures.add(name + "_bytes_read", per_byte(static_cast<double>(restored.from_disk)));
      }
      phase(kCheck, 0);
      if (!failed.empty()) return fail_with(failed);
      auto admin = Client::connect({.servers = {address}});
      if (admin && round > 0) (void)admin->remove_step(fmt::format("{}/{}", kBucket, name), round);
    }
    if (round == 0) continue;  // memory and disk are warm from now on
    figures.add("save_ratio", save[kMixed] / save[kLarge]);
    figures.add("restore_ratio", restore[kMixed] / restore[kLarge]);
    figures.add("save_cpu_ratio", save_cpu[kMixed] / save_cpu[kLarge]);
    figures.add("restore_cpu_ratio", restore_cpu[kMixed] / restore_cpu[kLarge]);
    if (!options.json)
      fmt::print("round {}: save {:.3f} and {:.3f} s, restore {:.3f} and {:.3f} s\n", round, save[kMixed], save[kLarge],
                 restore[kMixed], restore[kLarge]);
  }
  auto out = figures.json();
  if (options.json) {
    out["tensors"] = options.tensors;
    out["tiny_bytes"] = tiny_bytes;
    out["bytes"] = bytes;
    out["ranks"] = options.ranks;
    out["rounds"] = options.rounds;
    out["transport"] = options.transport;
    fmt::print("{}\n", out.dump(1));
    return 0;
  }
  fmt::print("\n{} tensors of {} bytes together, in {} bytes on {} ranks; bytes per byte saved\n", options.tensors,
             tiny_bytes, bytes, options.ranks);
  fmt::print("{:<28}{:>12}{:>12}{:>12}\n", "", "min", "median", "max");
  for (const auto& [name, value] : out.items())
    fmt::print("{:<28}{:>12.5g}{:>12.5g}{:>12.5g}\n", name, value["min"].get<double>(), value["median"].get<double>(),
               value["max"].get<double>());
  return 0;
}

}  // namespace cairn::bench
