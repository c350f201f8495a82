#include "server/daemon/handovers.h"

#include <set>
#include <string>
#include <vector>

#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {

struct Handovers::Plan {
  OwnerId owner;
  wire::Seal seal;                           // at first only whose it is
  std::shared_ptr<rt::SharedMemory> memory;  // until nothing is left to write
  std::weak_ptr<const void> connection;
  std::map<std::uint32_t, wire::PutChunk> left;  // by index
  std::uint64_t chunk_bytes = 0;                 // of all that were named
  std::uint64_t plan_bytes = 0;
  std::uint32_t parts = 0;  // that have come
  bool taken = false;       // all have
  bool running = false;

  std::uint32_t rank() const { return seal.rank(); }
  Key key() const { return {owner, seal.rank()}; }
  std::string name() const {
    return "rank " + std::to_string(rank()) + " of save " + owner.hex() + " of run '" + seal.bucket() + "/" +
           seal.run() + "'";
  }
};

bool Handovers::wanted(const Plan& plan) const {
  return checkpoints_.unsealed(plan.owner, plan.rank());
}

Handovers::Stats Handovers::stats() const {
  auto out = stats_;
  std::set<const rt::SharedMemory*> kept;
  for (const auto& [key, plan] : plans_) {
    ++out.plans;
    if (plan->running) ++out.running;
    if (plan->memory && kept.insert(plan->memory.get()).second) out.memory_bytes += plan->memory->bytes().size();
  }
  return out;
}

Result<void> Handovers::admit(const std::shared_ptr<rt::SharedMemory>& memory, std::uint64_t plan_bytes) const {
  std::uint64_t memory_bytes = memory->bytes().size();
  for (std::set<const rt::SharedMemory*> kept{memory.get()}; const auto& [key, plan] : plans_) {
    plan_bytes += plan->plan_bytes;
    if (plan->memory && kept.insert(plan->memory.get()).second) memory_bytes += plan->memory->bytes().size();
  }
  if (memory_bytes > options_.memory_bytes_max)
    return fail(Errc::kBusy, "memory of clients with saves handed over would be " + std::to_string(memory_bytes) +
                                 " bytes, more than handover.memory allows, " +
                                 std::to_string(options_.memory_bytes_max));
  if (plan_bytes > options_.plan_bytes_max)
    return fail(Errc::kBusy, "the lists of chunks handed over would have " + std::to_string(plan_bytes) +
                                 " bytes, more than " + std::to_string(options_.plan_bytes_max));
  return {};
}

Result<void> Handovers::add(Plan& plan, wire::Handover request) const {
  for (auto& put : *request.mutable_chunks()) {
    TRY(const auto id, chunks_.check_shared(*plan.memory, put));
    if (id.owner != plan.owner || id.writer != request.writer())
      return fail(Errc::kInvalid, "chunk " + id.text() + " is not of this save and writer");
    // They all lie in the memory at the same time.
    plan.chunk_bytes += put.length();
    if (plan.chunk_bytes > plan.memory->bytes().size())
      return fail(Errc::kInvalid, "chunks of more bytes than the memory that they are to lie in");
    if (!plan.left.emplace(id.index, std::move(put)).second)
      return fail(Errc::kInvalid, "chunk " + id.text() + " is named twice");
  }
  return {};
}

Task<wire::Empty> Handovers::take(std::shared_ptr<rpc::ServerCall> call, wire::Handover request) {
  const auto what = "hand-over of rank " + std::to_string(request.rank());
  const auto memory = call->memory();
  if (!memory) co_return fail(Errc::kInvalid, what + ": this connection shares no memory");
  if (draining_) co_return fail(Errc::kBusy, what + ": the daemon is stopping");
  CO_TRY(const auto owner, OwnerId::from_bytes(request.owner()));
  const bool last = request.has_seal();
  auto seal = std::move(*request.mutable_seal());
  seal.set_bucket(request.bucket());
  seal.set_run(request.run());
  seal.set_owner(request.owner());
  seal.set_rank(request.rank());
  seal.set_writer(request.writer());
  CO_TRY(const bool expected, co_await checkpoints_.expects(seal, last));
  if (!expected) co_return wire::Empty();

  // From here on nothing waits.
  const Key key{owner, request.rank()};
  auto found = plans_.find(key);
  PlanPtr plan = found == plans_.end() ? nullptr : found->second;
  if (plan && plan->seal.writer() == request.writer() && request.part() < plan->parts) co_return wire::Empty();
  if (plan && plan->taken) co_return fail(Errc::kConflict, what + ": this rank has handed over its part already");
  if (request.part() == 0) {
    plan = std::make_shared<Plan>();
    plan->owner = owner;
    plan->memory = memory;
    plan->connection = call->connection_open();
  } else if (!plan || plan->seal.writer() != request.writer() || plan->parts != request.part() ||
             plan->memory != memory) {
    co_return fail(Errc::kInvalid,
                   what + ": part " + std::to_string(request.part()) + " without those before, on this connection");
  }
  const auto bytes = request.ByteSizeLong();
  auto added = admit(memory, bytes);
  if (added) added = add(*plan, std::move(request));
  if (!added) {
    ++stats_.refused;
    plans_.erase(key);
    co_return fail(std::move(added).error().with(what));
  }
  plan->seal = std::move(seal);
  plan->plan_bytes += bytes;
  ++plan->parts;
  plan->taken = last;
  plans_[key] = std::move(plan);
  if (last) ++stats_.taken;
  changed_.notify_all();
  co_return wire::Empty();
}

void Handovers::stored(const ChunkId& id) {
  for (auto it = plans_.lower_bound({id.owner, 0}); it != plans_.end() && it->first.first == id.owner; ++it)
    if (it->second->seal.writer() == id.writer) it->second->left.erase(id.index);
}

Task<void> Handovers::settled(OwnerId owner, std::uint32_t rank) {
  for (;;) {
    const auto found = plans_.find({owner, rank});
    if (found == plans_.end() || !found->second->running || draining_) co_return {};
    co_await changed_.wait();
  }
}

Task<void> Handovers::watch() {
  for (;;) {
    while (plans_.empty()) co_await changed_.wait();
    co_await runtime_.loop.sleep(options_.look_every);
    look();
  }
}

void Handovers::look() {
  std::vector<PlanPtr> all;  // plans_ changes
  for (const auto& [key, plan] : plans_) all.push_back(plan);
  for (const auto& plan : all) {
    if (plan->running) continue;
    const bool gone = plan->connection.expired();
    if (!wanted(*plan) || (gone && !plan->taken))
      forget(plan);
    else if (draining_ || !plan->taken)
      continue;
    else if (gone)
      begin(plan, "its connection has ended");
    // A process that hangs, or whose connection somebody else holds open.
    else if (checkpoints_.silent(plan->owner, plan->rank(), checkpoints_.rank_silence_max() / 2))
      begin(plan, "it is silent");
  }
}

void Handovers::forget(const PlanPtr& plan) {
  const auto found = plans_.find(plan->key());
  if (found != plans_.end() && found->second == plan) plans_.erase(found);
  changed_.notify_all();
}

void Handovers::begin(const PlanPtr& plan, const char* why) {
  plan->running = true;
  std::uint64_t bytes = 0;
  for (const auto& [index, put] : plan->left) bytes += put.length();
  runtime_.log.write(rt::Level::kInfo, "handover_begun",
                     {{"rank", plan->name()},
                      {"why", why},
                      {"chunks", std::to_string(plan->left.size())},
                      {"bytes", std::to_string(bytes)}});
  work_.spawn(carry_out(plan), [this, plan](Result<void> done) {
    ++(done ? stats_.finished : stats_.failed);
    if (!done)
      runtime_.log.write(rt::Level::kWarning, "handover_failed",
                         {{"rank", plan->name()}, {"error", done.error().message}});
    forget(plan);
  });
}

Task<void> Handovers::carry_out(PlanPtr plan) {
  checkpoints_.heard(plan->owner, plan->rank());
  if (options_.unwritten) (void)co_await seal(plan);
  auto done = co_await store_all(plan);
  plan->memory.reset();
  if (done) done = co_await seal(plan);
  if (done || !wanted(*plan)) co_return done;
  auto failed = co_await checkpoints_.give_up(plan->owner, plan->rank(), done.error());
  if (!failed) co_return fail(std::move(failed).error().with(done.error().message));
  co_return done;
}

Task<void> Handovers::store_all(PlanPtr plan) {
  std::vector<std::uint32_t> indices;  // what is left changes
  for (const auto& [index, put] : plan->left) indices.push_back(index);
  std::optional<Error> failure;
  rt::Semaphore turns(runtime_.loop, options_.chunks_at_once);
  rt::Scope stores(runtime_.loop);  // after what its tasks use
  for (const auto index : indices) {
    CO_TRY(auto turn, co_await turns.acquire(1));
    if (failure) break;
    stores.spawn(store(plan, index, std::move(turn)), [&failure](Result<void> stored) {
      if (!stored && !failure) failure = std::move(stored).error();
    });
  }
  CO_CHECK_OK(co_await stores.join());
  if (failure) co_return fail(*std::move(failure));
  co_return {};
}

Task<void> Handovers::store(PlanPtr plan, std::uint32_t index, rt::Semaphore::Lease /*turn*/) {
  for (;;) {
    const auto found = plan->left.find(index);
    if (found == plan->left.end()) co_return {};  // the rank itself was first
    if (!wanted(*plan)) co_return fail(Errc::kFenced, "nobody waits for it any more");
    auto put = found->second;
    auto stored = co_await chunks_.put_shared(plan->memory, std::move(put),
                                              [this, plan] { checkpoints_.heard(plan->owner, plan->rank()); });
    if (stored) {
      checkpoints_.heard(plan->owner, plan->rank());
      plan->left.erase(index);
      co_return {};
    }
    // Was the rank first, its memory may hold other bytes by now.
    if (!plan->left.contains(index)) co_return {};
    if (stored.error().code != Errc::kUnavailable) co_return stored;
    co_await runtime_.loop.sleep(options_.retry_every);
  }
}

Task<void> Handovers::seal(PlanPtr plan) {
  for (;;) {
    auto sealed = co_await checkpoints_.seal_for(plan->seal);
    if (sealed) co_return {};
    if (sealed.error().code != Errc::kUnavailable || !wanted(*plan)) co_return fail(std::move(sealed).error());
    co_await runtime_.loop.sleep(options_.retry_every);
  }
}

Task<void> Handovers::close(rt::TimePoint deadline) {
  draining_ = true;
  changed_.notify_all();
  auto ended = co_await rt::with_deadline(runtime_.loop, deadline, work_.join(), "hand-overs");
  work_.cancel();
  plans_.clear();
  co_return ended;
}

}  // namespace cairn::server
