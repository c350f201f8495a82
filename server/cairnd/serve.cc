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

/// What descriptors allow: the limit that was left to us decides how many connections are taken.
std::uint32_t connections_max(std::uint32_t wanted) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur <= 2 * kFilesKept) return std::min(wanted, 64u);
  return static_cast<std::uint32_t>(std::min<rlim_t>(limit.rlim_cur - kFilesKept, wanted));
}

rpc::Server::Limits limits_of(const CairndOptions& options) {
  return {.connections_max = connections_max(memory_shares(options).connections),
          .connections_per_peer = options.connections_per_peer,
          .connections_unknown = options.connections_unknown,
          .handshake_max = options.handshake,
          .header_max = options.header,
          .idle_max = options.idle,
          .body_bytes_per_second = options.body_rate,
          .body_window = options.body_window,
          .connection_bytes_max = options.connection_bytes};
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

std::string joined(const std::vector<std::string>& values) {
  std::string out;
  for (const auto& value : values) out += (out.empty() ? "" : ", ") + value;
  return out;
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

/// Brings the running parts in line with options that may change while they run.
void apply(rt::RealRuntime& real, const Stack& stack, const CairndOptions& options) {
  real.set_log(log_options(options));
  stack.rpc->set(limits_of(options));
  stack.daemon->set({.garbage_grace = options.garbage_grace,
                     .garbage_interval = options.garbage_interval,
                     .retention_interval = options.retention_interval,
                     .scrub_interval = options.scrub_interval,
                     .scrub_pace = options.scrub_pace,
                     .repair_pace = options.repair_pace,
                     .handover_memory = options.handover_memory});
}

/// Takes over what may change at once and says so; a configuration with any mistake changes nothing.
void reload(rt::RealRuntime& real, const Stack& stack, CairndOptions& current, const Configured& next) {
  auto& log = real.seams().log;
  for (const auto& mistake : next.mistakes)
    log.write(rt::Level::kError, "config_mistake", {{"error", mistake.message}});
  if (!next.mistakes.empty()) {
    log.write(rt::Level::kError, "config_kept",
              {{"mistakes", std::to_string(next.mistakes.size())}, {"effect", "nothing has changed"}});
    return;
  }
  int changed = 0;
  for (const auto& option : option_table()) {
    const auto before = option.get(current), after = option.get(next.options);
    if (before == after) continue;
    ++changed;
    const bool live = option.when == Option::When::kLive;
    if (live) (void)option.set(current, after);
    log.write(live ? rt::Level::kInfo : rt::Level::kWarning, live ? "config_changed" : "config_needs_restart",
              {{"key", std::string(option.key)}, {"before", joined(before)}, {"after", joined(after)}});
  }
  apply(real, stack, current);
  log.write(rt::Level::kInfo, "config_read", {{"changed", std::to_string(changed)}});
}

Task<void> reload_at_hangup(rt::RealRuntime& real, const Stack& stack, CairndOptions current, Hangup& hangup) {
  for (;;) {
    while (!hangup.pending) co_await hangup.arrived.wait();
    hangup.pending = false;
    reload(real, stack, current, hangup.configure());
  }
}

}  // namespace

rt::LogOptions log_options(const CairndOptions& options) {
  return {.min = options.log_level, .format = options.log_format, .lines_per_second = options.log_lines};
}

Task<void> serve(rt::RealRuntime& real, CairndOptions options, rt::OneShot<bool>& stop, Hangup& hangup) {
  const auto runtime = real.seams();
  CO_TRY(const auto faults, planted_faults());
  const auto shares = memory_shares(options);
  const auto node = options.node.empty() ? host_name() : options.node;

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
  daemon_options.node = node;
  daemon_options.addresses = {address};
  daemon_options.checkpoints.rank_silence_max = options.rank_silence;
  daemon_options.checkpoints.join_max = options.rank_join;
  daemon_options.checkpoints.check_every = std::min<rt::Duration>(options.rank_silence / 8, std::chrono::seconds(1));
  daemon_options.checkpoints.merge_memory_bytes = shares.merge_bytes;
  daemon_options.usage.low_percent = options.space_low;
  daemon_options.objects.upload_idle_max = options.upload_idle;
  daemon_options.objects.sweep_every = std::min<rt::Duration>(options.upload_idle / 8, std::chrono::seconds(30));
  daemon_options.readers.ttl = options.reader_ttl;
  daemon_options.readers.readers_max = options.readers_max;
  daemon_options.readers.connection_readers_max = options.connection_readers_max;
  daemon_options.retention.interval = options.retention_interval;
  daemon_options.garbage.grace = options.garbage_grace;
  daemon_options.garbage.interval = options.garbage_interval;
  daemon_options.scrub.pace = options.scrub_pace;
  daemon_options.scrub.interval = options.scrub_interval;
  daemon_options.repair_pace = options.repair_pace;
  daemon_options.handovers.memory_bytes_max = options.handover_memory;
  daemon_options.handovers.plan_bytes_max = shares.message_bytes / 4;
  daemon_options.lost_targets = options.lost_targets;
  daemon_options.bugs = faults.saves;
  auto daemon = co_await Daemon::create(runtime, stack.targets, *stack.units, std::move(daemon_options));
  if (!daemon) co_return fail(std::move(daemon).error());
  stack.daemon = *std::move(daemon);

  rpc::Server::Options rpc_options;
  static_cast<rpc::Server::Limits&>(rpc_options) = limits_of(options);
  rpc_options.node = node;
  rpc_options.cluster = stack.daemon->cluster();
  rpc_options.host = rt::boot_id();
  rpc_options.message_budget_bytes = shares.message_bytes;
  if (local) rpc_options.unix_socket = local->address().substr(std::string_view("unix:").size());
  stack.rpc =
      rpc::Server::create(runtime, *stack.units, rpc_options, stack.daemon->handler(), stack.daemon->stale_map());
  stack.rpc->serve(std::move(tcp));
  if (local) stack.rpc->serve(std::move(local));
  stack.http = HttpServer::create(
      runtime, [&stack](const std::string& path) { return answer_http(stack, path); },
      {.connections_max = options.http_connections, .head_bytes_max = static_cast<std::uint32_t>(options.http_head)});
  stack.http->serve(std::move(http));
  std::printf("cairnd ready listen=%s http=%s node=%s\n", address.c_str(), http_address.c_str(), node.c_str());
  std::fflush(stdout);
  runtime.log.write(
      rt::Level::kInfo, "cairnd_ready",
      {{"listen", address}, {"disk", stack.targets.all().front().target->disk().description()}, {"node", node}});

  rt::Scope reloads(runtime.loop);
  reloads.spawn(reload_at_hangup(real, stack, options, hangup));
  co_await stop;
  reloads.cancel();
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
