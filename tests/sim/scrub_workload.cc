#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "client/core/session.h"
#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"
#include "storage/chunk_store/layout.h"
#include "tests/sim/daemon.h"
#include "tests/sim/net.h"
#include "tests/sim/prng.h"
#include "tests/sim/sessions.h"
#include "tests/sim/workload.h"

namespace cairn::sim {
namespace {

using namespace std::chrono_literals;

constexpr const char* kBucket = "b";
constexpr rt::Duration kPassMax = 30min;  // virtual

std::string bytes_of_object(std::uint64_t version, std::uint64_t size) {
  Prng draw(version, "bytes");
  std::string out(size, '\0');
  for (std::size_t i = 0; i < out.size(); i += 8) {
    const auto value = draw.next();
    std::memcpy(out.data() + i, &value, std::min<std::size_t>(8, out.size() - i));
  }
  return out;
}

/// A copy as it lies on the disk: which of its blocks are bad.
struct Copy {
  std::vector<std::uint32_t> bad;  // offsets in the chunk
  bool whole() const { return bad.empty(); }
};
using Copies = std::map<ChunkId, std::map<std::size_t, Copy>>;  // by chunk and directory

class ScrubWorkload {
 public:
  explicit ScrubWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        world_(options_.seed),
        draw_(options_.seed, "scrub"),
        admin_(world_.make_node("admin")),
        client_(world_.make_node("client")),
        director_(world_.make_node("director")) {
    world_.on_trace = options_.trace;
    SimDaemon::Options daemon;
    daemon.directories = draw_.between(1, 3);
    daemon.garbage_grace = std::chrono::milliseconds(draw_.between(300, 3000));
    daemon.garbage_interval = std::chrono::milliseconds(draw_.between(100, 1000));
    daemon.readers_ttl = 2s;
    daemon.bug = options_.bug;
    daemon_ = std::make_unique<SimDaemon>(world_, std::move(daemon));
    for (auto& directory : daemon_->directories())
      if (draw_.chance(0.3)) directory.disk->faults.slow = 0.02;
  }
  ~ScrubWorkload() {
    for (auto* node : {&admin_, &client_, &director_})
      if (node->alive()) node->kill(Death::kProcess);
    if (daemon_->node().alive()) daemon_->node().kill(Death::kProcess);
  }
  WorkloadResult run();

 private:
  using Session = std::shared_ptr<client::Session>;

  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    trace("BROKEN " + violations_.back());
  }
  void trace(const std::string& line) {
    if (world_.tracing()) world_.trace("scrub", line);
  }
  template <class T>
  Result<T> admin(Task<T> task) {
    return world_.run(admin_, std::move(task), 10min);
  }
  static Task<Session> connect(ScrubWorkload* w, Node* node) { return sim::connect(node, *w->daemon_, {}); }
  static Task<void> make_bucket(ScrubWorkload* w, std::uint32_t copies) {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    client::BucketSummary bucket;
    bucket.name = kBucket;
    bucket.copies = copies;
    co_return co_await client::create_bucket(session, bucket, w->admin_.now() + kCallTimeout);
  }
  static Task<void> put(ScrubWorkload* w, Node* node, std::string key);
  static Task<void> read_all(ScrubWorkload* w);
  static Task<void> churn(ScrubWorkload* w);
  static Task<std::string> ask(ScrubWorkload* w, wire::Method method, std::string request) {
    CO_TRY(auto session, co_await connect(w, &w->admin_));
    CloseSession close(session);
    CO_TRY(auto reply, co_await session->plain_call(method, std::move(request), w->admin_.now() + kCallTimeout));
    co_return std::move(reply.message);
  }
  Result<std::vector<wire::Job>> scrubs();

  Copies look() const;
  void damage();
  void pass(bool quiet);
  void check(const Copies& before, bool quiet, bool killed);
  std::map<std::size_t, std::map<ChunkId, wire::Damage>> reported();

  WorkloadOptions options_;
  World world_;
  Prng draw_;
  Node& admin_;
  Node& client_;
  Node& director_;
  std::unique_ptr<SimDaemon> daemon_;
  struct Object {
    std::uint64_t version = 0, size = 0;
    OwnerId owner;
    bool certain = true;  // nobody changes it, and its last change is known to have happened
  };
  std::map<std::string, Object> objects_;
  std::uint64_t next_ = 0;
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

Task<void> ScrubWorkload::put(ScrubWorkload* w, Node* node, std::string key) {
  auto& object = w->objects_[key];
  object.certain = false;
  const auto version = ++w->next_;
  const auto size = w->draw_.between(1, w->draw_.chance(0.3) ? 400'000 : 50'000);
  CO_TRY(auto session, co_await connect(w, node));
  CloseSession close(session);
  CO_TRY(auto arena, client::Arena::create(*node, 1 * kMiB, 128 * kKiB, session->unit_bytes()));
  client::ChunkWriter::Options options;
  options.timeout = kCallTimeout;
  CO_TRY(auto writer, co_await client::ObjectWriter::begin(session, *arena, kBucket, key, {}, options));
  const auto bytes = bytes_of_object(version, size);
  CO_CHECK_OK(co_await writer->write(std::as_bytes(std::span(bytes))));
  CO_TRY(const auto sealed, co_await writer->seal());
  object = {.version = version, .size = size, .owner = sealed.owner, .certain = true};
  ++w->result_.commits;
  co_return {};
}

/// Somebody who replaces and removes objects meanwhile.
Task<void> ScrubWorkload::churn(ScrubWorkload* w) {
  for (;;) {
    co_await w->client_.sleep(w->draw_.between(rt::Duration(0), rt::Duration(100ms)));
    const auto key = "churn" + std::to_string(w->draw_.below(4));
    if (w->draw_.chance(0.6)) {
      (void)co_await put(w, &w->client_, key);
      continue;
    }
    w->objects_.erase(key);
    auto session = co_await connect(w, &w->client_);
    if (!session) continue;
    CloseSession close(*session);
    (void)co_await client::remove_object(*session, kBucket, key, std::nullopt, w->client_.now() + kCallTimeout);
  }
}

/// What the disks hold, as an index entry says it must be.
Copies ScrubWorkload::look() const {
  Copies out;
  const auto& directories = daemon_->directories();
  for (std::size_t i = 0; i < directories.size(); ++i) {
    std::map<std::string, std::string> files;
    const auto crcs_of = directories[i].index->entries(storage::Table::kBlockCrcs);
    for (const auto& [key, value] : directories[i].index->entries(storage::Table::kChunks)) {
      const auto id = ChunkId::from_key(key);
      const auto location = storage::decode_location(value);
      const auto stored = crcs_of.find(key);
      if (!id || !location || stored == crcs_of.end()) continue;
      const auto crcs = storage::decode_block_crcs(stored->second, *location);
      if (!crcs) continue;
      const auto name = storage::segment_name(location->segment);
      if (!files.contains(name)) files[name] = directories[i].disk->contents(name).value_or("");
      auto& copy = out[*id][i];
      for (std::uint32_t at = 0; at < location->length; at += kBlockBytes) {
        const auto block = static_cast<std::uint32_t>(at / kBlockBytes);
        const auto size = std::min<std::size_t>(kBlockBytes, location->length - at);
        const auto begin = location->offset() + at;
        const auto& file = files[name];
        if (begin + size > file.size() ||
            crc32c(std::string_view(file).substr(begin, size), block_seed(*id, block)) != (*crcs)[block])
          copy.bad.push_back(at);
      }
    }
  }
  return out;
}

void ScrubWorkload::damage() {
  const auto one = draw_.below(daemon_->directories().size());
  const bool everywhere = draw_.chance(0.3);
  for (std::size_t i = 0; i < daemon_->directories().size(); ++i)
    for (auto flips = everywhere || i == one ? draw_.between(1, 6) : 0; flips > 0; --flips)
      if (daemon_->directories()[i].disk->rot("segment-")) world_.injected(Fault::kBitRot);
}

Result<std::vector<wire::Job>> ScrubWorkload::scrubs() {
  TRY(const auto bytes, admin(ask(this, wire::Method::kJobList, {})));
  wire::JobListReply reply;
  CHECK_OK(wire::decode(bytes, reply, "jobs"));
  std::vector<wire::Job> out;
  for (const auto& job : reply.jobs())
    if (job.id().starts_with("scrub-")) out.push_back(job);
  return out;
}

/// One scrub of all directories, from the damage to the check. `quiet`: nobody else does anything.
void ScrubWorkload::pass(bool quiet) {
  damage();
  const auto before = look();
  if (!quiet) client_.spawn(churn(this));
  wire::ScrubStart request;
  if (draw_.chance(0.5)) request.set_pace(draw_.between(100'000, 2'000'000));
  auto started = admin(ask(this, wire::Method::kScrubStart, wire::encode(request)));
  if (!started) return broken("P7", "a scrub does not start: " + started.error().message);

  bool killed = false;
  const auto until = world_.now() + kPassMax;
  for (;;) {
    if (!quiet && draw_.chance(0.2) && daemon_->ready()) {
      killed = true;
      const auto death = draw_.chance(0.6) ? Death::kPowerLoss : Death::kProcess;
      world_.injected(death == Death::kPowerLoss ? Fault::kPowerLoss : Fault::kProcessKill);
      daemon_->kill(death, false, 200ms);
    }
    world_.run_for(draw_.between(rt::Duration(0), rt::Duration(500ms)));
    auto jobs = scrubs();
    if (!jobs) return broken("P7", "jobs are not told: " + jobs.error().message);
    if (jobs->size() != daemon_->directories().size()) return broken("P3", "a job is lost");
    if (std::ranges::all_of(*jobs, [](const auto& job) { return job.state() == wire::Job::DONE; })) break;
    if (world_.now() > until) return broken("P7", "a scrub does not end");
  }
  if (!quiet) {
    client_.kill(Death::kProcess);
    client_.restart();
  }
  if (draw_.chance(0.5)) {  // what was acknowledged as repaired is so after that
    killed = true;
    world_.injected(Fault::kPowerLoss);
    daemon_->kill(Death::kPowerLoss, false, 200ms);
    if (!world_.run_until([&] { return daemon_->ready(); }, world_.now() + 5min))
      return broken("P7", "the daemon does not start: " + daemon_->last_error());
  }
  check(before, quiet, killed);
}

std::map<std::size_t, std::map<ChunkId, wire::Damage>> ScrubWorkload::reported() {
  std::map<std::size_t, std::map<ChunkId, wire::Damage>> out;
  for (std::size_t i = 0; i < daemon_->directories().size(); ++i) {
    wire::DamageList request;
    request.set_target(std::string(daemon_->directories()[i].uuid->view()));
    request.set_limit(1000);
    auto bytes = admin(ask(this, wire::Method::kDamageList, wire::encode(request)));
    wire::DamageListReply reply;
    if (!bytes || !wire::decode(*bytes, reply, "damage")) {
      broken("P7", "damage is not told");
      return out;
    }
    for (const auto& damage : reply.damage())
      if (const auto id = wire::from_wire(damage.chunk())) out[i][*id] = damage;
  }
  return out;
}

void ScrubWorkload::check(const Copies& before, bool quiet, bool killed) {
  const auto told = reported();
  const auto after = look();
  std::set<OwnerId> certain;
  for (const auto& [key, object] : objects_)
    if (object.certain && !key.starts_with("churn")) certain.insert(object.owner);
  for (const auto& [id, copies] : before) {
    if (!certain.contains(id.owner)) continue;
    // Blocks that no copy has good are lost.
    std::map<std::uint32_t, std::size_t> bad_copies;
    for (const auto& [directory, copy] : copies)
      for (const auto offset : copy.bad) ++bad_copies[offset];
    const bool lost = std::ranges::any_of(bad_copies, [&](const auto& one) { return one.second == copies.size(); });
    for (const auto& [directory, copy] : copies) {
      const auto where = id.text() + " in " + daemon_->directories()[directory].name;
      const auto found = told.find(directory);
      const auto* damage = found != told.end() && found->second.contains(id) ? &found->second.at(id) : nullptr;
      const auto now = after.find(id);
      if (now == after.end() || !now->second.contains(directory)) {
        broken("P1", where + " is gone after a scrub");
        continue;
      }
      const auto& then = now->second.at(directory);
      if (copy.whole()) {
        if (damage != nullptr) broken("P3", where + " is whole and was called damaged: " + damage->reason());
        if (!then.whole()) broken("P3", where + " was whole, and is damaged after a scrub");
        continue;
      }
      if (!lost && !then.whole()) broken("P6", where + " is damaged after a scrub, though there is a good copy");
      if (damage == nullptr) {
        // A daemon that dies between repair and note finds nothing wrong any more.
        if (!(killed && then.whole())) broken("P3", where + " is damaged and nobody says so");
        continue;
      }
      const std::vector<std::uint32_t> offsets(damage->offsets().begin(), damage->offsets().end());
      if (offsets != copy.bad && !(killed && !lost)) broken("P3", where + ": other offsets are told than are bad");
      const bool repaired = damage->repaired_unix_nanos() != 0;
      if (repaired != then.whole())
        broken("P3", where + (repaired ? ": called repaired, and is not" : ": is repaired, and is not called so"));
    }
  }
  if (quiet)
    for (const auto& [directory, list] : told)
      for (const auto& [id, damage] : list)
        if (!before.contains(id)) broken("P3", "damage of " + id.text() + ", which was never there");
  if (violations_.empty())
    if (auto read = admin(read_all(this)); !read) broken("P3", read.error().message);
}

/// What has a good copy of every block is read, to the byte.
Task<void> ScrubWorkload::read_all(ScrubWorkload* w) {
  CO_TRY(auto session, co_await connect(w, &w->admin_));
  CloseSession close(session);
  const auto copies = w->look();
  for (const auto& [key, object] : w->objects_) {
    if (!object.certain) continue;
    bool lost = false;
    for (const auto& [id, of] : copies)
      if (id.owner == object.owner)
        lost |= std::ranges::none_of(of, [](const auto& one) { return one.second.whole(); });
    auto opened = co_await client::open_object(session, kBucket, key, w->admin_.now() + kCallTimeout);
    if (!opened) co_return fail(std::move(opened).error().with(key));
    std::string out(object.size, '\0');
    auto held = std::make_shared<const client::OpenedObject>(*std::move(opened));
    auto read =
        co_await client::read_object(session, kBucket, held, 0, std::as_writable_bytes(std::span(out)), kCallTimeout);
    if (lost && !read && read.error().code == Errc::kDataLoss) continue;
    if (!read) co_return fail(std::move(read).error().with(key));
    if (out != bytes_of_object(object.version, object.size)) co_return fail(Errc::kFailed, key + ": wrong bytes");
    ++w->result_.restores;
  }
  co_return {};
}

WorkloadResult ScrubWorkload::run() {
  result_.seed = options_.seed;
  const auto began = world_.now();
  const auto directories = daemon_->directories().size();
  const auto copies = draw_.chance(0.7) ? directories : draw_.between(1, directories);
  result_.configuration = "directories=" + std::to_string(directories) + " copies=" + std::to_string(copies);
  world_.faults.enable(Fault::kBitRot);
  daemon_->start();
  if (!world_.run_until([&] { return daemon_->ready(); }, world_.now() + 5min))
    broken("P7", "the daemon does not start: " + daemon_->last_error());
  if (auto made = admin(make_bucket(this, static_cast<std::uint32_t>(copies))); !made)
    broken("P7", made.error().message);
  for (auto rounds = draw_.between(1, 3); rounds > 0 && violations_.empty(); --rounds) {
    for (auto puts = draw_.between(1, 8); puts > 0 && violations_.empty(); --puts)
      if (auto done = admin(put(this, &admin_, "k" + std::to_string(draw_.below(12)))); !done)
        broken("P7", "put: " + done.error().message);
    // Of what was replaced, nothing is left.
    world_.run_for(30s);
    if (violations_.empty()) pass(draw_.chance(0.5));
    for (auto it = objects_.begin(); it != objects_.end();)
      it = it->first.starts_with("churn") ? objects_.erase(it) : std::next(it);
  }
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_scrub_workload(WorkloadOptions options) {
  return ScrubWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
