#include "tests/sim/daemon.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "proto/rpc/rpc.h"
#include "proto/wire/frame.h"
#include "server/coordinator/map.h"
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
      : method_(first.method()),
        request_(first.request()),
        client_(first.client()),
        connection_(first.connection()),
        memory_(first.memory()),
        open_(first.connection_open()) {}
  wire::Method method() const override { return method_; }
  const std::string& request() const override { return request_; }
  const std::string& client() const override { return client_; }
  std::uint64_t connection() const override { return connection_; }
  std::shared_ptr<rt::SharedMemory> memory() const override { return memory_; }
  std::weak_ptr<const void> connection_open() const override { return open_; }
  Task<Data> next_data() override { return lost(); }
  Task<void> send_data(std::string, std::vector<Buffer>) override { return sent(); }

 private:
  static Task<Data> lost() { co_return fail(Errc::kUnavailable, "connection reset"); }
  static Task<void> sent() { co_return {}; }
  wire::Method method_;
  std::string request_, client_;
  std::uint64_t connection_;
  std::shared_ptr<rt::SharedMemory> memory_;
  std::weak_ptr<const void> open_;
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
      lies_(world.seed(), "lies"),
      duplicates_(world.seed(), "duplicates") {
  Prng recycling(world.seed(), "recycling");
  if (recycling.chance(0.5)) {
    recycle_bytes_ = kMiB << recycling.below(6);
    options_.segment_bytes = 256 * kKiB << recycling.below(4);
  }
  for (std::size_t i = 0; i < options_.directories; ++i) directories_.push_back(make_directory());
}

SimDaemon::Directory SimDaemon::make_directory() {
  const auto number = std::to_string(made_++);
  return {.name = "d" + number,
          .disk = &world_.make_disk("d" + number, {.capacity_bytes = options_.capacity_bytes}),
          .index = &world_.make_index("i" + number),
          .uuid = {}};
}

bool SimDaemon::lose(std::size_t number) {
  auto& gone = directories_[number];
  std::optional<server::ClusterMap> newest;
  const auto age = [](const server::ClusterMap& map) { return std::tuple(map.generation, map.term, map.version); };
  for (const auto& directory : directories_) {
    const auto meta = directory.index->entries(storage::Table::kMeta);
    const auto stored = meta.find("map");
    if (stored == meta.end()) continue;
    auto map = server::decode_map(stored->second);
    if (map && (!newest || age(*newest) < age(*map))) newest = *std::move(map);
  }
  if (!newest || !gone.uuid || newest->target(*gone.uuid) == nullptr) return false;
  for (const auto& range : newest->groups) {
    if (range.copies < 2) continue;
    if (std::ranges::none_of(range.members, [&](const server::Member& member) {
          return member.serving && member.target != *gone.uuid && !newest->target(member.target)->out;
        }))
      return false;
  }
  if (world_.tracing()) world_.trace("daemon", gone.name + " is lost");
  world_.injected(Fault::kDirectoryLost);
  lost_.insert(*gone.uuid);
  gone = make_directory();
  return true;
}

bool SimDaemon::redundant() const {
  if (process_ == nullptr) return false;
  const auto& map = process_->daemon->map();
  return std::ranges::all_of(map.groups, [&](const server::GroupRange& range) {
    const auto wanted = std::min<std::size_t>(range.copies, map.targets.size());
    return range.copies < 2 ||
           (range.members.size() >= wanted && std::ranges::all_of(range.members, &server::Member::serving));
  });
}

std::uint32_t SimDaemon::loss() const {
  return process_ == nullptr ? 0 : process_->daemon->map().find(true, 0)->loss;
}

std::uint32_t SimDaemon::copies_of(DataGroup group) const {
  const auto* range = process_ == nullptr ? nullptr : process_->daemon->map().find(false, group);
  return range == nullptr ? 0 : range->copies;
}

std::uint64_t SimDaemon::kept_bytes() const {
  std::uint64_t bytes = 0;
  if (process_ != nullptr)
    for (const auto& entry : process_->targets.all()) bytes += entry.target->chunks().stats().kept_bytes;
  return bytes;
}

bool SimDaemon::any_failed() const {
  return process_ != nullptr &&
         (!process_->targets.failed().empty() || process_->targets.all().size() < directories_.size());
}

Task<void> SimDaemon::run(SimDaemon* self) {
  const auto& options = self->options_;
  auto runtime = self->node_.runtime();
  auto owned = std::make_unique<Process>();
  auto& p = self->node_.hold(std::move(owned));

  CO_TRY(p.units, rt::UnitPool::create(self->node_, 48, 64 * kKiB));
  storage::Target::Options target;
  target.chunks.segment_bytes = options.segment_bytes;
  target.chunks.ballast_bytes = 1 * kMiB;
  target.chunks.recycle_bytes = self->recycle_bytes_;
  target.bugs = storage_bugs(options.bug);
  const auto left_out = std::exchange(self->left_out_, std::nullopt);
  if (left_out) self->world_.injected(Fault::kDirectoryGone, self->directories_[*left_out].name);
  for (std::size_t i = 0; i < self->directories_.size(); ++i) {
    if (left_out == i) continue;
    auto& directory = self->directories_[i];
    auto disk = directory.disk->attach(self->node_);
    if (self->directories_.size() == 1) CO_CHECK_OK(co_await storage::Target::check(*disk));
    auto opened = co_await storage::Target::open(runtime, std::move(disk), directory.index->attach(self->node_),
                                                 *p.units, target);
    if (!opened) {
      if (self->directories_.size() == 1) co_return fail(std::move(opened).error());
      if (self->world_.tracing()) self->world_.trace("daemon", directory.name + ": " + opened.error().message);
      continue;  // as the daemon does it
    }
    directory.uuid = (*opened)->uuid();
    p.targets.add(directory.name, *std::move(opened));
  }
  if (p.targets.all().empty()) co_return fail(Errc::kFailed, "no directory opens");

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
  daemon.checkpoints.merge_fan_in = 2;           // so that a few ranks make levels
  daemon.checkpoints.writers_in_record_max = 2;  // a rank and the index
  daemon.bugs = save_bugs(options.bug);
  daemon.membership_bugs = membership_bugs(options.bug);
  daemon.lost_targets = self->lost_;
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
  self->lost_.clear();
  if (self->world_.tracing()) self->world_.trace("daemon", "ready");
  co_return {};
}

void SimDaemon::start() {
  refused_.reset();
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

rt::UnitPool& SimDaemon::units() {
  return *process_->units;
}
server::Daemon& SimDaemon::process() {
  return *process_->daemon;
}

bool SimDaemon::fail_stopped() const {
  return process_ != nullptr && process_->daemon->failure().has_value();
}

}  // namespace cairn::sim
