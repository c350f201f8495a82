#include "tests/sim/daemon.h"

#include <map>

#include "proto/rpc/rpc.h"
#include "proto/wire/frame.h"
#include "server/daemon/daemon.h"
#include "storage/target/target.h"
#include "tests/sim/bugs.h"
#include "tests/sim/net.h"

namespace cairn::sim {

/// In the order in which they are made; destroyed the other way round.
struct SimDaemon::Process {
  std::unique_ptr<rt::UnitPool> units;
  server::TargetSet targets;
  std::unique_ptr<server::Daemon> daemon;
  std::unique_ptr<rpc::Server> server;
};

/// Answers that protocol.md 7 guards against: of some owners none ever comes, or only that of a group that has lost
/// records since, and the first answer about an owner may be a wrong "absent".
class SimDaemon::LyingLiveness final : public server::Liveness {
 public:
  LyingLiveness(std::unique_ptr<server::Liveness> honest, SimDaemon& daemon)
      : honest_(std::move(honest)), daemon_(daemon) {}
  Task<server::Answer> ask(OwnerId owner) override {
    const auto [it, first] = lies_.try_emplace(owner, kNoLie);
    if (first && daemon_.lies_.chance(daemon_.options_.liveness_lies)) it->second = daemon_.lies_.below(3);
    auto lie = it->second;
    if (daemon_.options_.liveness_lies == 0) lie = kNoLie;
    if (lie == kAbsentOnce) it->second = kNoLie;
    return lie == kNoLie ? honest_->ask(owner) : answer_with(owner, lie);
  }

 private:
  enum Lie : std::uint64_t { kNone, kOtherLoss, kAbsentOnce, kNoLie };
  static Task<server::Answer> answer_with(OwnerId owner, std::uint64_t lie) {
    server::Answer answer;
    answer.loss = owner.loss();
    if (lie == kNone) co_return answer;
    answer.kind = server::Answer::Kind::kAbsent;
    if (lie == kOtherLoss) ++answer.loss;
    co_return answer;
  }
  std::unique_ptr<server::Liveness> honest_;
  SimDaemon& daemon_;
  std::map<OwnerId, std::uint64_t> lies_;
};

/// A request that has arrived before: the copy that a cut connection held back while its sender went on by another one.
/// Nobody waits for the answer, and no data follows.
class SimDaemon::LateCall final : public rpc::ServerCall {
 public:
  explicit LateCall(const rpc::ServerCall& first)
      : method_(first.method()), request_(first.request()), client_(first.client()), connection_(first.connection()) {}
  wire::Method method() const override { return method_; }
  const std::string& request() const override { return request_; }
  const std::string& client() const override { return client_; }
  std::uint64_t connection() const override { return connection_; }
  Task<Data> next_data() override { return lost(); }
  Task<void> send_data(std::string, std::vector<Buffer>) override { return sent(); }

 private:
  static Task<Data> lost() { co_return fail(Errc::kUnavailable, "connection reset"); }
  static Task<void> sent() { co_return {}; }
  wire::Method method_;
  std::string request_, client_;
  std::uint64_t connection_;
};

Task<void> SimDaemon::arrive_late(SimDaemon* self, std::shared_ptr<rpc::ServerCall> call, rt::Duration delay) {
  co_await self->node_.sleep(delay);
  if (!self->ready()) co_return {};
  const auto name = wire::name_of(call->method());
  self->world_.injected(Fault::kDuplicate, name);
  auto answer = co_await self->process_->daemon->handler()(std::move(call));
  if (self->world_.tracing())
    self->world_.trace("daemon", "late " + std::string(name) + ": " + (answer ? "done" : answer.error().message));
  co_return {};
}

SimDaemon::SimDaemon(World& world, Options options)
    : world_(world),
      options_(std::move(options)),
      node_(world.make_node("daemon")),
      disk_(world.make_disk("d0", {.capacity_bytes = options_.capacity_bytes})),
      index_(world.make_index("i0")),
      lies_(world.seed(), "lies"),
      duplicates_(world.seed(), "duplicates") {}

Task<void> SimDaemon::run(SimDaemon* self) {
  const auto& options = self->options_;
  auto runtime = self->node_.runtime();
  auto owned = std::make_unique<Process>();
  auto& p = self->node_.hold(std::move(owned));

  CO_TRY(p.units, rt::UnitPool::create(self->node_, 48, 64 * kKiB));
  auto disk = self->disk_.attach(self->node_);
  CO_CHECK_OK(co_await storage::Target::check(*disk));
  storage::Target::Options target;
  target.chunks.segment_bytes = options.segment_bytes;
  target.chunks.ballast_bytes = 1 * kMiB;
  target.bugs = storage_bugs(options.bug);
  CO_TRY(auto opened,
         co_await storage::Target::open(runtime, std::move(disk), self->index_.attach(self->node_), *p.units, target));

  p.targets.add("d0", std::move(opened));

  server::Daemon::Options daemon;
  daemon.node = "daemon";
  daemon.addresses = {self->address()};
  daemon.garbage.grace = options.garbage_grace;
  daemon.garbage.interval = options.garbage_interval;
  daemon.readers.ttl = options.readers_ttl;
  daemon.readers.sweep_every = std::min<rt::Duration>(options.readers_ttl / 8, std::chrono::seconds(1));
  daemon.retention.interval = options.retention_interval;
  daemon.objects.upload_idle_max = std::chrono::minutes(1);
  daemon.checkpoints.index_chunk_bytes = 64 * kKiB;
  daemon.bugs = save_bugs(options.bug);
  daemon.wrap_liveness = [self](std::unique_ptr<server::Liveness> honest) -> std::unique_ptr<server::Liveness> {
    return std::make_unique<LyingLiveness>(std::move(honest), *self);
  };
  CO_TRY(p.daemon, co_await server::Daemon::create(runtime, p.targets, *p.units, std::move(daemon)));

  rpc::Server::Options server;
  server.node = "daemon";
  server.cluster = p.daemon->cluster();
  auto handler = [self, handle = p.daemon->handler()](std::shared_ptr<rpc::ServerCall> call) {
    if (self->duplicates_.chance(self->options_.duplicates)) {
      const auto delay = self->duplicates_.between(rt::Duration(0), rt::Duration(std::chrono::seconds(5))) /
                         (1 << self->duplicates_.below(10));
      self->node_.spawn(arrive_late(self, std::make_shared<LateCall>(*call), delay));
    }
    return handle(std::move(call));
  };
  p.server = rpc::Server::create(runtime, *p.units, std::move(server), std::move(handler), p.daemon->stale_map());
  CO_TRY(auto listener, runtime.net.listen(self->address()));
  p.server->serve(std::move(listener));
  self->process_ = &p;
  if (self->world_.tracing()) self->world_.trace("daemon", "ready");
  co_return {};
}

void SimDaemon::start() {
  node_.spawn(run(this), [this](Result<void> opened) {
    if (opened) return;
    last_error_ = opened.error().message;
    if (world_.tracing()) world_.trace("daemon", "does not open: " + last_error_);
    if (opened.error().code == Errc::kDataLoss) {
      refused_ = std::move(opened).error();
      return;
    }
    // The process ends with its error; the supervisor starts it again.
    world_.after(rt::Duration(0), [this, incarnation = node_.incarnation()] {
      if (node_.alive() && node_.incarnation() == incarnation) kill(Death::kProcess, false, std::chrono::seconds(1));
    });
  });
}

void SimDaemon::kill(Death death, bool silent, rt::Duration down) {
  process_ = nullptr;
  node_.kill(death, silent);
  world_.after(down, [this] {
    node_.restart();
    start();
  });
}

bool SimDaemon::fail_stopped() const {
  return process_ != nullptr && process_->daemon->failure().has_value();
}

}  // namespace cairn::sim
