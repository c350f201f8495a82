// cairn-bench: load generator and benchmarks.

#include <unistd.h>
#include <CLI/CLI.hpp>
#include <filesystem>

#include "bench/checkpoint/checkpoint.h"
#include "bench/disk/disk.h"
#include "bench/open/open.h"
#include "bench/plan/plan.h"
#include "bench/tiny/tiny.h"

namespace {

std::string beside_this_program(const char* name) {
  char self[4096] = {};
  const auto n = readlink("/proc/self/exe", self, sizeof self - 1);
  return n > 0 ? (std::filesystem::path(self).parent_path() / name).string() : name;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace cairn::bench;
  CLI::App app{"Benchmarks for Cairn. Every figure stands beside plain files or the disk itself in the same run."};
  app.require_subcommand(1);
  CheckpointOptions o;
  o.daemon_program = beside_this_program("cairnd");
  std::string layout, content = "weights", peers;
  auto* checkpoint =
      app.add_subcommand("checkpoint", "Save and restore a sharded checkpoint with several rank processes");
  checkpoint->footer(
      "Example: cairn-bench checkpoint --bytes 4GiB --ranks 4 --data /data/bench --peer files,odirect --json");
  checkpoint->add_option("--model", o.model, "8b, 70b, 405b or 1t (MLPerf Storage)")
      ->check(CLI::IsMember({"8b", "70b", "405b", "1t"}))
      ->capture_default_str();
  auto* scale =
      checkpoint->add_option("--scale", o.scale, "factor on every element count")->check(CLI::Range(1e-9, 100.0));
  auto* bytes =
      checkpoint->add_option("--bytes", o.bytes, "total size, instead of --scale")->transform(CLI::AsSizeValue(false));
  bytes->excludes(scale);
  checkpoint->add_option("--ranks", o.ranks, "rank processes")->check(CLI::Range(1, 256))->capture_default_str();
  checkpoint->add_option("--processes", o.processes, "that the ranks share, each a thread; default: one a rank")
      ->check(CLI::Range(1, 256));
  checkpoint->add_option("--layout", layout, "tensor,pipeline,data parallel; their product is the number of ranks");
  checkpoint->add_option("--rounds", o.rounds, "measured rounds, after a first one that is reported apart")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  checkpoint->add_option("--mode", o.mode, "what to measure")
      ->check(CLI::IsMember({"save", "restore", "reshard", "async"}))
      ->capture_default_str();
  checkpoint->add_flag("--steady", o.steady,
                       "each save comes after an older step is freed; beside it a daemon that recycles no segments");
  checkpoint->add_option("--restore-ranks", o.restore_ranks, "reshard: ranks that restore, each a range of columns");
  checkpoint->add_option("--content", content, "weights or random")
      ->check(CLI::IsMember({"weights", "random"}))
      ->capture_default_str();
  checkpoint->add_option("--peer", peers, "files,odirect: the same bytes by as many processes, in every round");
  auto* data = checkpoint->add_option("--data", o.data, "folder for a daemon of its own, and for the peers' files");
  auto* server = checkpoint->add_option("--server", o.server, "a running daemon, HOST:PORT");
  data->excludes(server);
  checkpoint->add_option("--server-http", o.server_http, "its http address, for its CPU time and memory")
      ->needs(server);
  checkpoint->add_option("--transport", o.transport, "auto, tcp, unix or shm")
      ->check(CLI::IsMember({"auto", "tcp", "unix", "shm"}))
      ->capture_default_str();
  checkpoint->add_option("--arena", o.arena_bytes, "staging memory of a rank")->transform(CLI::AsSizeValue(false));
  checkpoint->add_option("--chunk", o.chunk_bytes, "bytes of a chunk")->transform(CLI::AsSizeValue(false));
  checkpoint->add_option("--in-flight", o.chunks_in_flight, "chunks on their way at once, per rank");
  checkpoint->add_option("--connections", o.connections, "connections for bulk data, per rank");
  checkpoint->add_option("--daemon-flag", o.daemon_flags, "passed to the own daemon; may be repeated")
      ->allow_extra_args(false);
  checkpoint->add_option("--seed", o.seed, "of the content");
  checkpoint->add_flag("--json", o.json, "one JSON object instead of a table");

  PlanOptions p;
  p.daemon_program = o.daemon_program;
  auto* plan = app.add_subcommand(
      "plan",
      "Commit a step of many ranks and tensors, each tensor split over all ranks; open and plan it as one rank");
  plan->footer("Example: cairn-bench plan --ranks 16384 --tensors 1000 --json");
  plan->add_option("--ranks", p.ranks, "ranks, all played by one process")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  plan->add_option("--tensors", p.tensors, "tensors")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  plan->add_option("--rounds", p.rounds, "how often the step is opened and planned, each time by another rank")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  auto* plan_data = plan->add_option("--data", p.data, "folder for a daemon of its own; default: a temporary one");
  plan_data->excludes(plan->add_option("--server", p.server, "a running daemon, HOST:PORT"));
  plan->add_option("--memory", p.memory_bytes, "budget of the own daemon")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  plan->add_option("--daemon-flag", p.daemon_flags, "passed to the own daemon; may be repeated")
      ->allow_extra_args(false);
  plan->add_option("--seed", p.seed, "of the order in which ranks save");
  plan->add_flag("--json", p.json, "one JSON object instead of a table");

  OpenOptions n;
  n.daemon_program = o.daemon_program;
  auto* open = app.add_subcommand(
      "open", "Start a daemon on a store of many small chunks, and read a first byte, after a kill and after an end");
  open->footer("Example: cairn-bench open --chunks 1000000 --data /data/bench --json");
  open->add_option("--chunks", n.chunks, "chunks of 4 KiB; what the store has of them already is used")
      ->check(CLI::Range(1, 1'000'000'000))
      ->capture_default_str();
  open->add_option("--rounds", n.rounds, "starts of each kind")->check(CLI::Range(1, 1000))->capture_default_str();
  open->add_option("--data", n.data, "folder for the store")->required();
  open->add_option("--daemon-flag", n.daemon_flags, "passed to the daemon; may be repeated")->allow_extra_args(false);
  open->add_flag("--json", n.json, "one JSON object instead of a table");

  TinyOptions t;
  t.daemon_program = o.daemon_program;
  auto* tiny = app.add_subcommand("tiny", "Save and restore many tiny tensors beside large ones, and large ones only");
  tiny->footer("Example: cairn-bench tiny --tensors 10000 --bytes 1GiB --ranks 4 --data /data/bench --json");
  tiny->add_option("--tensors", t.tensors, "tensors of 1 to 64 KiB")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  tiny->add_option("--bytes", t.bytes, "of large tensors beside, together")->transform(CLI::AsSizeValue(false));
  tiny->add_option("--ranks", t.ranks, "rank processes")->check(CLI::Range(1, 256))->capture_default_str();
  tiny->add_option("--rounds", t.rounds, "measured rounds, after a first one that does not count")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  tiny->add_option("--data", t.data, "folder for a daemon of its own")->required();
  tiny->add_option("--transport", t.transport, "auto, tcp, unix or shm")
      ->check(CLI::IsMember({"auto", "tcp", "unix", "shm"}))
      ->capture_default_str();
  tiny->add_option("--daemon-flag", t.daemon_flags, "passed to the own daemon; may be repeated")
      ->allow_extra_args(false);
  tiny->add_flag("--json", t.json, "one JSON object instead of a table");

  DiskOptions d;
  auto* disk = app.add_subcommand("disk", "The storage engine alone, without network, beside O_DIRECT files");
  disk->footer("Example: cairn-bench disk --data /data/bench --streams 4 --json");
  disk->add_option("--data", d.data, "folder; DATA/engine is made, and removed at the end")->required();
  disk->add_option("--bytes", d.bytes, "total size")->transform(CLI::AsSizeValue(false))->capture_default_str();
  disk->add_option("--chunk-bytes", d.chunk_bytes, "64 KiB to 64 MiB, a multiple of 64 KiB")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  disk->add_option("--streams", d.streams, "writers, then readers, at once")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  disk->add_option("--rounds", d.rounds, "measured rounds, after a first one that is reported apart")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  disk->add_flag("--json", d.json, "one JSON object instead of a table");
  CLI11_PARSE(app, argc, argv);
  if (plan->parsed()) return run_plan(p);
  if (open->parsed()) return run_open(n);
  if (tiny->parsed()) return run_tiny(t);

  if (disk->parsed()) {
    if (d.chunk_bytes < 64 * 1024 || d.chunk_bytes > 64 * 1024 * 1024 || d.chunk_bytes % (64 * 1024) != 0) {
      std::cerr << "cairn-bench disk: --chunk-bytes " << d.chunk_bytes
                << ": must be 64 KiB to 64 MiB, a multiple of 64 KiB\n";
      return 2;
    }
    return run_disk(d);
  }

  const auto usage = [](const std::string& what) {
    std::cerr << "cairn-bench checkpoint: " << what << "\n";
    return 2;
  };
  if (o.scale == 0 && o.bytes == 0) return usage("give --scale or --bytes");
  if (o.data.empty() && o.server.empty()) return usage("give --data DIR (starts a daemon there) or --server HOST:PORT");
  if (o.steady && (o.data.empty() || o.mode != "save")) return usage("--steady needs --data DIR and --mode save");
  if (!layout.empty()) {
    Parallelism p;
    if (std::sscanf(layout.c_str(), "%u,%u,%u", &p.tensor, &p.pipeline, &p.data) != 3 || p.ranks() != o.ranks)
      return usage("--layout " + layout + ": three numbers whose product is --ranks " + std::to_string(o.ranks));
    o.layout = p;
  }
  for (std::size_t at = 0; at < peers.size();) {
    const auto comma = std::min(peers.find(',', at), peers.size());
    const auto name = peers.substr(at, comma - at);
    if (name != "files" && name != "odirect") return usage("--peer " + name + ": files or odirect");
    o.peers.push_back(name);
    at = comma + 1;
  }
  if (!o.peers.empty() && o.data.empty()) return usage("--peer needs --data DIR for the files");
  o.content = content == "random" ? Content::kRandom : Content::kWeights;
  return run_checkpoint(o);
}
