#include "bench/checkpoint/checkpoint.h"

#include <cairn/client.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "bench/checkpoint/peers.h"
#include "bench/common/figures.h"
#include "bench/common/processes.h"

namespace cairn::bench {
namespace {

enum Phase : std::uint32_t {
  kConnect,
  kSave,
  kRestore,
  kFileSave,
  kFileRestore,
  kDirectSave,
  kDirectRestore,
  kConnectFresh,
  kSaveFresh,
  kMemcpy,
  kCheck,
  kCheckAll
};
constexpr char kRun[] = "bench/checkpoint";
constexpr char kReadBytes[] = "cairn_chunk_store_read_bytes_total";

std::span<std::byte> touched_memory(std::uint64_t bytes) {
  bytes = std::max<std::uint64_t>((bytes + 4095) / 4096 * 4096, 4096);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    fmt::print(stderr, "cairn-bench: no memory for {} bytes\n", bytes);
    std::exit(1);
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  return {static_cast<std::byte*>(memory), bytes};
}

/// One rank: its memory, its client, what it does in each phase.
class RankWork {
 public:
  RankWork(const CheckpointOptions& options, const std::string& address, const std::string& fresh, std::string files,
           std::uint32_t world, const RankLayout* saves, const RankLayout* restores, std::uint32_t rank)
      : options_(options),
        store_{.address = address, .client = {}, .run = {}},
        fresh_{.address = fresh, .client = {}, .run = {}},
        files_(std::move(files)),
        world_(world),
        saves_(saves),
        restores_(restores),
        rank_(rank) {
    if (saves_ != nullptr) {
      source_ = touched_memory(saves_->bytes);
      generate(*saves_, source_, options_.seed, options_.content, false);
    }
    if (restores_ != nullptr) target_ = touched_memory(restores_->bytes);
  }

  void operator()(std::uint32_t phase, std::uint64_t argument, Report& report) {
    std::string failed;
    switch (phase) {
      case kConnect:
        failed = connect(store_, argument);
        break;
      case kSave:
        failed = save(store_, argument, report);
        break;
      case kConnectFresh:
        failed = connect(fresh_, argument);
        break;
      case kSaveFresh:
        failed = save(fresh_, argument, report);
        break;
      case kRestore:
        failed = restore(argument, report);
        break;
      case kFileSave:
        failed = saves_ ? save_file(path("file", argument), source_) : "";
        break;
      case kFileRestore:
        failed = saves_ ? load_file(path("file", argument), target_.first(source_.size())) : "";
        break;
      case kDirectSave:
        failed = saves_ ? save_direct(path("direct", argument), source_) : "";
        break;
      case kDirectRestore:
        failed = saves_ ? load_direct(path("direct", argument), target_.first(source_.size())) : "";
        break;
      case kMemcpy:
        if (saves_ && target_.size() >= source_.size()) std::memcpy(target_.data(), source_.data(), source_.size());
        break;
      case kCheck:
      case kCheckAll:
        if (restores_)
          report.wrong_bytes =
              generate(*restores_, target_, options_.seed, options_.content, true, phase == kCheckAll ? 1 : 16);
        break;
      default:
        break;
    }
    report.failed = !failed.empty();
    std::strncpy(report.error, failed.c_str(), sizeof report.error - 1);
  }

 private:
  struct Store {
    const std::string& address;
    std::optional<Client> client;
    std::optional<Run> run;
  };

  std::string path(const char* kind, std::uint64_t round) const {
    return fmt::format("{}/{}.{}.{}", files_, kind, rank_, round);
  }

  std::string connect(Store& store, std::uint64_t launch) const {
    ClientOptions options;
    options.servers = {store.address};
    options.arena_bytes = options_.arena_bytes;
    // A save that is to stall for a copy only needs room for all of it.
    if (options_.mode == "async" && saves_ != nullptr)
      options.arena_bytes = std::max(options.arena_bytes, saves_->bytes + 4 * std::uint64_t{options_.chunk_bytes});
    options.chunk_bytes = options_.chunk_bytes;
    options.chunks_in_flight = options_.chunks_in_flight;
    options.connections = options_.connections;
    options.unix_socket = options_.transport != "tcp";
    options.shared_memory = options_.transport != "unix";
    auto client = Client::connect(options);
    if (!client) return client.error().message;
    store.client = *client;
    auto run = store.client->open_run(
        {.name = kRun, .launch = {.job = "cairn-bench", .restart = launch}, .resume = {}, .discard_after = false});
    if (!run) return run.error().message;
    store.run = *run;
    return {};
  }

  std::string save(Store& store, std::uint64_t step, Report& report) const {
    if (saves_ == nullptr) return {};
    auto save = store.run->start_save({.step = step,
                                       .rank = rank_,
                                       .world_size = world_,
                                       .declared_bytes = saves_->bytes,
                                       .stage_first = options_.mode == "async"});
    if (!save) return save.error().message;
    for (const auto& part : saves_->parts) {
      auto added = save->add_tensor(
          {.name = part.name, .dtype = part.dtype, .global_shape = part.global_shape, .box = part.box, .holder = {}},
          std::span<const std::byte>(source_).subspan(part.offset, part.bytes));
      if (!added) return added.error().message;
    }
    auto ticket = save->stage();
    if (!ticket) return ticket.error().message;
    report.stall = now_seconds() - report.begin;
    auto committed = ticket->wait();
    return committed ? "" : committed.error().message;
  }

  std::string restore(std::uint64_t step, Report& report) {
    if (restores_ == nullptr) return {};
    auto opened = store_.client->open_step(kRun, step);
    if (!opened) return opened.error().message;
    auto restore = opened->restore();
    for (const auto& part : restores_->parts)
      if (part.bytes > 0) restore.want({.name = part.name, .box = part.box}, target_.subspan(part.offset, part.bytes));
    auto done = restore.run();
    if (!done) return done.error().message;
    report.wanted = done->bytes_wanted;
    report.moved = done->bytes_moved;
    report.from_disk = done->bytes_from_disk;
    return {};
  }

  const CheckpointOptions& options_;
  Store store_, fresh_;
  std::string files_;
  std::uint32_t world_;
  const RankLayout *saves_, *restores_;
  std::uint32_t rank_;
  std::span<std::byte> source_, target_;
};

struct Span {
  double seconds = 0, stall = 0, cpu = 0;
  std::uint64_t wanted = 0, moved = 0, from_disk = 0, wrong = 0;
  std::string failed;
};
Span together(const std::vector<Report>& reports) {
  Span s;
  double begin = 1e300, end = 0;
  for (const auto& r : reports) {
    begin = std::min(begin, r.begin);
    end = std::max(end, r.end);
    s.stall = std::max(s.stall, r.stall);
    s.cpu += r.cpu_seconds;
    s.wanted += r.wanted;
    s.moved += r.moved;
    s.from_disk += r.from_disk;
    s.wrong += r.wrong_bytes;
    if (r.failed && s.failed.empty()) s.failed = r.error;
  }
  s.seconds = end - begin;
  return s;
}

bool wants(const CheckpointOptions& o, const char* peer) {
  return std::find(o.peers.begin(), o.peers.end(), peer) != o.peers.end();
}

std::vector<std::string> files_below(const std::string& folder) {
  std::vector<std::string> out;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, ignored)) out.push_back(entry.path());
  return out;
}

}  // namespace

int run_checkpoint(const CheckpointOptions& options) {
  const auto fail_with = [](const std::string& what) {
    fmt::print(stderr, "cairn-bench checkpoint: {}\n", what);
    return 1;
  };
  const Model& model = *model_named(options.model);
  const double scale = options.scale > 0
                           ? options.scale
                           : static_cast<double>(options.bytes) / (14.0 * static_cast<double>(model.parameters()));
  const auto parallelism = options.layout.value_or(Parallelism{1, 1, options.ranks});
  const auto saved = lay_out(model, scale, parallelism);
  const auto restored = options.mode != "reshard"
                            ? saved
                            : by_columns(saved, options.restore_ranks ? options.restore_ranks : parallelism.ranks());
  std::uint64_t bytes = 0;
  for (const auto& r : saved) bytes += r.wanted();

  // The daemon starts once before the ranks fork, so that they know its address; then it is ours to restart.
  const bool own = options.server.empty();
  const auto work_folder = own ? options.data : std::string{};
  if (own) mkdir(options.data.c_str(), 0700);
  auto daemon_flags = options.daemon_flags;
  auto fresh_flags = daemon_flags;
  if (options.steady) {
    // What is removed is freed at once, not after the grace time of a daemon in service.
    const std::vector<std::string> soon{"--garbage-grace", "0ms", "--garbage-interval", "50ms", "--reader-ttl", "1s"};
    daemon_flags.insert(daemon_flags.end(), soon.begin(), soon.end());
    fresh_flags.insert(fresh_flags.end(), soon.begin(), soon.end());
    fresh_flags.insert(fresh_flags.end(), {"--space-recycle", "0B"});
  }
  OwnDaemon daemon(options.daemon_program, work_folder + "/store", daemon_flags);
  OwnDaemon fresh_daemon(options.daemon_program, work_folder + "/fresh", fresh_flags);
  std::string address = options.server, fresh_address;
  if (options.steady) {
    if (auto failed = fresh_daemon.start(); !failed.empty()) return fail_with(failed);
    fresh_address = fresh_daemon.address();
    if (options.transport == "unix" || options.transport == "shm")
      fresh_address = "unix:" + work_folder + "/fresh/cairn.sock";
  }
  if (own) {
    if (auto failed = daemon.start(); !failed.empty()) return fail_with(failed);
    address = daemon.address();
    if (options.transport == "unix" || options.transport == "shm")
      address = "unix:" + work_folder + "/store/cairn.sock";
    mkdir((work_folder + "/files").c_str(), 0700);
  }
  const auto world = static_cast<std::uint32_t>(saved.size());
  const auto rank_count = static_cast<std::uint32_t>(std::max(saved.size(), restored.size()));
  const auto processes = options.processes == 0 ? rank_count : std::min(options.processes, rank_count);
  Ranks ranks(processes, [&](std::uint32_t process) -> Ranks::Work {
    std::vector<std::shared_ptr<RankWork>> works;
    for (auto r = process; r < rank_count; r += processes)
      works.push_back(std::make_shared<RankWork>(options, address, fresh_address, work_folder + "/files", world,
                                                 r < saved.size() ? &saved[r] : nullptr,
                                                 r < restored.size() ? &restored[r] : nullptr, r));
    return [works](std::uint32_t, std::uint32_t phase, std::uint64_t argument, Report& report) {
      if (works.size() == 1) return (*works[0])(phase, argument, report);
      std::vector<Report> reports(works.size(), report);
      std::vector<std::thread> threads;
      for (std::size_t i = 0; i < works.size(); ++i)
        threads.emplace_back([&, i] {
          (*works[i])(phase, argument, reports[i]);
          reports[i].end = now_seconds();
        });
      for (auto& thread : threads) thread.join();
      for (const auto& one : reports) report.add(one);
    };
  });
  for (const auto& at : options.steady ? std::vector{address, fresh_address} : std::vector{address}) {
    auto admin = Client::connect({.servers = {at}});
    if (!admin) return fail_with(admin.error().message);
    auto made = admin->create_bucket({.name = "bench"});
    if (!made && made.error().code != Errc::kExists) return fail_with(made.error().message);
    // What an earlier run of the benchmark left.
    if (auto removed = admin->remove_steps_after(kRun, 0); !removed && removed.error().code != Errc::kNotFound)
      return fail_with(removed.error().message);
  }

  Figures figures;
  std::string cache_method = "none";
  const std::uint64_t launch = static_cast<std::uint64_t>(now_seconds() * 1000);
  const double gib = static_cast<double>(bytes) / (1ull << 30);
  const double gb = static_cast<double>(bytes) / 1e9;
  const bool restores = options.mode == "restore" || options.mode == "reshard";
  const bool comparable = options.mode != "reshard";
  // One client for the whole job, as a trainer has: it finds a restarted daemon by itself.
  if (auto s = together(ranks.run(kConnect, launch)); !s.failed.empty()) return fail_with("connect: " + s.failed);
  if (options.steady)
    if (auto s = together(ranks.run(kConnectFresh, launch)); !s.failed.empty())
      return fail_with("connect: " + s.failed);
  for (std::uint32_t round = 0; round <= options.rounds; ++round) {
    const std::uint64_t step = round + 1;
    const auto phase = [&](Phase p, std::uint64_t argument) { return together(ranks.run(p, argument)); };
    const auto cold = [&]() -> std::string {
      if (own) {
        daemon.stop();
        if (auto failed = daemon.start(); !failed.empty()) return failed;
      }
      cache_method = drop_caches(own ? files_below(work_folder) : std::vector<std::string>{});
      return {};
    };
    // The step before the last goes, as retention would have it, and its space is there again before the clock starts.
    const auto freed = [&](const OwnDaemon& at, const std::string& where) -> std::string {
      if (step < 3) return {};
      auto admin = Client::connect({.servers = {where}});
      if (!admin) return admin.error().message;
      if (auto removed = admin->remove_step(kRun, step - 2); !removed) return removed.error().message;
      for (int tries = 0; tries < 1200; ++tries) {
        const auto live = at.metric("cairn_chunk_store_live_bytes");
        if (live && *live < 1.5 * static_cast<double>(bytes)) return {};
        usleep(50'000);
      }
      return "step " + std::to_string(step - 2) + " is removed but its space does not come back";
    };
    if (options.steady) {
      auto failed = freed(daemon, address);
      if (failed.empty()) failed = freed(fresh_daemon, fresh_address);
      if (!failed.empty()) return fail_with(failed);
    }
    double fresh_seconds = 0;
    const auto save_fresh = [&]() -> std::string {
      const auto cpu = use_of(fresh_daemon.pid()).cpu_seconds;
      const auto fresh = phase(kSaveFresh, step);
      if (!fresh.failed.empty()) return "save without recycling: " + fresh.failed;
      fresh_seconds = fresh.seconds;
      figures.add("fresh_save_seconds", round, fresh.seconds);
      figures.add("fresh_save_cpu_seconds_per_gb", round,
                  (fresh.cpu + use_of(fresh_daemon.pid()).cpu_seconds - cpu) / gb);
      return {};
    };
    if (options.steady && round % 2 == 1)  // in turn the first, for what the first leaves to the second
      if (auto failed = save_fresh(); !failed.empty()) return fail_with(failed);
    // Cairn.
    const auto daemon_use = [&] { return own ? use_of(daemon.pid()) : use_from_metrics(options.server_http); };
    const bool sees_daemon = own || !options.server_http.empty();
    auto before = daemon_use();
    const auto save = phase(kSave, step);
    if (!save.failed.empty()) return fail_with("save: " + save.failed);
    auto after = daemon_use();
    auto rss_bytes_max = after.rss_bytes_max;
    if (sees_daemon) {
      figures.add("cpu_seconds_server", round, after.cpu_seconds - before.cpu_seconds);
      figures.add("save_cpu_seconds_per_gb", round, (save.cpu + after.cpu_seconds - before.cpu_seconds) / gb);
    }
    figures.add("bytes", round, static_cast<double>(bytes));
    figures.add("save_seconds", round, save.seconds);
    figures.add("stall_seconds", round, save.stall);
    figures.add("cpu_seconds_client", round, save.cpu);
    figures.add("gib_per_s", round, gib / save.seconds);
    if (options.steady) {
      if (round % 2 == 0)
        if (auto failed = save_fresh(); !failed.empty()) return fail_with(failed);
      figures.add("save_vs_fresh", round, save.seconds / fresh_seconds);
      figures.add("segments_recycled", round, daemon.metric("cairn_chunk_store_segments_recycled_total").value_or(0));
    }
    Span restore;
    if (restores) {
      if (auto failed = cold(); !failed.empty()) return fail_with(failed);
      before = daemon_use();
      const auto read_before = own ? daemon.metric(kReadBytes) : std::nullopt;
      restore = phase(kRestore, step);
      if (!restore.failed.empty()) return fail_with("restore: " + restore.failed);
      after = daemon_use();
      rss_bytes_max = std::max(rss_bytes_max, after.rss_bytes_max);
      if (sees_daemon) {
        figures.add("restore_cpu_seconds_server", round, after.cpu_seconds - before.cpu_seconds);
        figures.add("restore_cpu_seconds_per_gb", round, (restore.cpu + after.cpu_seconds - before.cpu_seconds) / gb);
      }
      figures.add("restore_cpu_seconds_client", round, restore.cpu);
      figures.add("restore_seconds", round, restore.seconds);
      figures.add("bytes_wanted", round, static_cast<double>(restore.wanted));
      figures.add("bytes_moved", round, static_cast<double>(restore.moved));
      // What the disk gave, index and all; of a daemon that is not ours, what it says that it read for the tensors.
      const auto read_after = read_before ? daemon.metric(kReadBytes) : std::nullopt;
      figures.add("bytes_from_disk", round,
                  read_after ? *read_after - *read_before : static_cast<double>(restore.from_disk));
      const auto check = phase(round == 0 ? kCheckAll : kCheck, 0);
      if (check.wrong > 0) return fail_with(fmt::format("restore: {} bytes are wrong", check.wrong));
    }
    if (sees_daemon) figures.add("rss_bytes_max", round, static_cast<double>(rss_bytes_max));
    if (round > 0 && !options.steady) {
      auto admin = Client::connect({.servers = {address}});
      if (admin) (void)admin->remove_step(kRun, step - 1);
    }
    // The peers, the same bytes from the same memory.
    const auto peer = [&](const char* name, Phase save_phase, Phase restore_phase, const char* save_ratio,
                          const char* restore_ratio) -> std::string {
      const auto peer_save = phase(save_phase, round);
      if (!peer_save.failed.empty()) return fmt::format("{} save: {}", name, peer_save.failed);
      figures.add(fmt::format("{}_save_seconds", name), round, peer_save.seconds);
      figures.add(save_ratio, round, save.seconds / peer_save.seconds);
      if (restores && comparable) {
        cache_method = drop_caches(files_below(work_folder));
        const auto peer_restore = phase(restore_phase, round);
        if (!peer_restore.failed.empty()) return fmt::format("{} restore: {}", name, peer_restore.failed);
        figures.add(fmt::format("{}_restore_seconds", name), round, peer_restore.seconds);
        figures.add(restore_ratio, round, restore.seconds / peer_restore.seconds);
      }
      for (std::uint32_t r = 0; r < world; ++r)
        std::filesystem::remove(
            fmt::format("{}/files/{}.{}.{}", work_folder, std::string(name) == "files" ? "file" : "direct", r, round));
      return {};
    };
    if (wants(options, "files"))
      if (auto failed = peer("files", kFileSave, kFileRestore, "save_vs_files", "restore_vs_files"); !failed.empty())
        return fail_with(failed);
    if (wants(options, "odirect"))
      if (auto failed = peer("odirect", kDirectSave, kDirectRestore, "save_vs_odirect", "restore_vs_odirect");
          !failed.empty())
        return fail_with(failed);
    if (comparable) {
      const auto memcpy_seconds = phase(kMemcpy, 0).seconds;
      figures.add("memcpy_seconds", round, memcpy_seconds);
      if (options.mode == "async") figures.add("stall_vs_memcpy", round, save.stall / memcpy_seconds);
    }
    if (!options.json)
      fmt::print("round {}{}: save {:.3f} s, restore {:.3f} s\n", round, round == 0 ? " (first, apart)" : "",
                 save.seconds, restore.seconds);
  }
  {
    auto admin = Client::connect({.servers = {address}});
    if (admin) (void)admin->remove_step(kRun, options.rounds + 1);
  }
  if (options.json) {
    auto out = figures.json();
    out["ranks"] = world;
    out["processes"] = processes;
    out["rounds"] = options.rounds;
    out["model"] = options.model;
    out["scale"] = scale;
    out["mode"] = options.mode;
    out["transport"] = options.transport;
    out["cold"] = restores ? "daemon restarted, " + cache_method : "not measured";
    out["load_average"] = load_average();
    fmt::print("{}\n", out.dump(1));
  } else {
    fmt::print("\n{} ranks, {} bytes ({:.2f} GiB), {} rounds, transport {}, cold reads by: {}; load {}\n", world, bytes,
               gib, options.rounds, options.transport, cache_method, load_average());
    figures.print();
  }
  return 0;
}

}  // namespace cairn::bench
