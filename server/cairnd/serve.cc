#include "server/cairnd/serve.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <utility>

#include "proto/rpc/rpc.h"
#include "proto/runtime/address.h"
#include "server/cairnd/directories.h"
#include "server/cairnd/faults.h"
#include "server/daemon/daemon.h"
#include "server/http/http.h"
#include "server/http/metrics_text.h"

namespace cairn::server {
namespace {

constexpr auto kCloseMax = std::chrono::seconds(60);
constexpr std::size_t kFilesKept = 512;  // of the index, segments and ourselves

std::uint32_t connections_max() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur <= 2 * kFilesKept) return 64;
  return static_cast<std::uint32_t>(std::min<rlim_t>(limit.rlim_cur - kFilesKept, 16'384));
}

std::string process_metrics() {
  MetricsText out;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  out.counter("cairn_process_cpu_seconds_total", "CPU time of the daemon, user and system.",
              seconds(usage.ru_utime) + seconds(usage.ru_stime));
  std::ifstream statm("/proc/self/statm");
  std::uint64_t size = 0, resident = 0;
  statm >> size >> resident;
  out.gauge("cairn_process_resident_bytes", "Resident memory of the daemon.",
            resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)));
  out.gauge("cairn_process_resident_max_bytes", "Highest resident memory of the daemon since it started.",
            static_cast<std::uint64_t>(usage.ru_maxrss) * 1024);
  return out.text();
}

Result<std::unique_ptr<rt::Listener>> listen_on(rt::Net& net, const CairndOptions& options, const std::string& flag,
                                                const std::string& address) {
  if (auto allowed = check_listen(options, address); !allowed)
    return fail(std::move(allowed).error().with(flag + " " + address));
  auto listener = net.listen(address);
  if (!listener) return fail(std::move(listener).error().with(flag + " " + address));
  return listener;
}

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 && name[0] != '\0' ? name : "localhost";
}

/// The unix socket of clients on this host; nothing when there is none.
Result<std::unique_ptr<rt::Listener>> listen_unix(rt::Runtime runtime, const CairndOptions& options) {
  if (options.unix_socket == "none") return std::unique_ptr<rt::Listener>();
  const auto path = options.unix_socket.empty() ? options.data.front() + "/cairn.sock" : options.unix_socket;
  auto listener = runtime.net.listen("unix:" + path);
  if (listener) return listener;
  if (!options.unix_socket.empty()) return fail(std::move(listener).error().with("--unix-socket " + path));
  // Nobody asked for it, and TCP serves: a data directory may have a path that is too long for a socket.
  runtime.log.write(rt::Level::kWarning, "cairnd_no_unix_socket",
                    {{"path", path}, {"error", listener.error().message}});
  return std::unique_ptr<rt::Listener>();
}

struct Stack {
  std::unique_ptr<rt::UnitPool> units;
  TargetSet targets;
  std::unique_ptr<Daemon> daemon;
  std::unique_ptr<rpc::Server> rpc;
  std::unique_ptr<HttpServer> http;
};

HttpReply answer_http(const Stack& stack, const std::string& path) {
  if (path == "/healthz") return {.status = 200, .type = "text/plain", .body = "ok\n"};
  if (path == "/readyz") {
    if (const auto failure = stack.daemon->failure())
      return {.status = 503, .type = "text/plain", .body = "the target has failed: " + failure->message + "\n"};
    std::string body = "ready\n";
    for (const auto& target : stack.daemon->map().targets)
      if (target.out) body += "degraded: target " + target.uuid.text() + " (" + target.directory + ") is out\n";
    return {.status = 200, .type = "text/plain", .body = std::move(body)};
  }
  if (path == "/metrics")
    return {.status = 200,
            .type = "text/plain; version=0.0.4",
            .body = stack.daemon->metrics(stack.rpc->stats()) + process_metrics()};
  return {.status = 404, .type = "text/plain", .body = "not here; try /healthz, /readyz or /metrics\n"};
}

}  // namespace

Task<void> serve(rt::RealRuntime& real, CairndOptions options, rt::OneShot<bool>& stop) {
  const auto runtime = real.seams();
  CO_TRY(const auto faults, planted_faults());
  const auto shares = memory_shares(options);
  if (options.node.empty()) options.node = host_name();

  // First what can be refused without having touched the directory.
  CO_TRY(auto tcp, listen_on(runtime.net, options, "--listen", options.listen));
  CO_TRY(auto http, listen_on(runtime.net, options, "--http", options.http));
  const auto address = tcp->address();
  const auto http_address = http->address();

  Stack stack;
  CO_TRY(stack.units, rt::UnitPool::create(runtime.loop, shares.units));
  CO_CHECK_OK(
      co_await open_directories(real, options, shares.index_bytes, faults.storage, *stack.units, stack.targets));
  CO_TRY(auto local, listen_unix(runtime, options));

  Daemon::Options daemon_options;
  daemon_options.node = options.node;
  daemon_options.addresses = {address};
  daemon_options.checkpoints.rank_silence_max = options.rank_silence;
  daemon_options.checkpoints.check_every = std::min<rt::Duration>(options.rank_silence / 8, std::chrono::seconds(1));
  daemon_options.checkpoints.merge_memory_bytes = shares.merge_bytes;
  daemon_options.readers.ttl = options.reader_ttl;
  daemon_options.readers.readers_max = options.readers_max;
  daemon_options.readers.connection_readers_max = options.connection_readers_max;
  daemon_options.retention.interval = options.retention_interval;
  daemon_options.garbage.grace = options.garbage_grace;
  daemon_options.garbage.interval = options.garbage_interval;
  daemon_options.lost_targets = options.lost_targets;
  daemon_options.bugs = faults.saves;
  auto daemon = co_await Daemon::create(runtime, stack.targets, *stack.units, std::move(daemon_options));
  if (!daemon) co_return fail(std::move(daemon).error());
  stack.daemon = *std::move(daemon);

  rpc::Server::Options rpc_options;
  rpc_options.node = options.node;
  rpc_options.cluster = stack.daemon->cluster();
  rpc_options.host = rt::boot_id();
  rpc_options.connections_max = connections_max();
  rpc_options.message_budget_bytes = shares.message_bytes;
  if (local) rpc_options.unix_socket = local->address().substr(std::string_view("unix:").size());
  stack.rpc =
      rpc::Server::create(runtime, *stack.units, rpc_options, stack.daemon->handler(), stack.daemon->stale_map());
  stack.rpc->serve(std::move(tcp));
  if (local) stack.rpc->serve(std::move(local));
  stack.http = HttpServer::create(runtime, [&stack](const std::string& path) { return answer_http(stack, path); });
  stack.http->serve(std::move(http));
  std::printf("cairnd ready listen=%s http=%s node=%s\n", address.c_str(), http_address.c_str(), options.node.c_str());
  std::fflush(stdout);
  runtime.log.write(rt::Level::kInfo, "cairnd_ready",
                    {{"listen", address},
                     {"disk", stack.targets.all().front().target->disk().description()},
                     {"node", options.node}});

  co_await stop;
  runtime.log.write(rt::Level::kInfo, "cairnd_stopping", {});
  stack.daemon->drain();
  CO_CHECK_OK(co_await stack.rpc->close(runtime.loop.now() + kCloseMax));
  stack.http.reset();
  CO_CHECK_OK(co_await stack.daemon->close());
  CO_CHECK_OK(co_await stack.targets.close());
  runtime.log.write(rt::Level::kInfo, "cairnd_stopped", {});
  co_return {};
}

}  // namespace cairn::server
