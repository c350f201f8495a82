#include "server/daemon/daemon.h"

#include <algorithm>
#include <utility>

#include "proto/common/text.h"
#include "proto/wire/codec.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"
#include "server/chunks/chunks.h"
#include "server/chunks/repair.h"
#include "server/coordinator/coordinator.h"
#include "server/http/metrics_text.h"
#include "server/records/keys.h"
#include "server/scrub/jobs.h"

namespace cairn::server {
namespace {

using wire::Method;

constexpr auto kHandoversMax = std::chrono::seconds(30);  // that a stop waits for them

/// The home group that a request about records belongs to.
template <class Request>
HomeGroup group_of(const Request& request) {
  if constexpr (requires { request.home_group(); })
    return static_cast<HomeGroup>(request.home_group());
  else if constexpr (requires { request.key(); })
    return home_group(request.bucket(), request.key());
  else if constexpr (requires { request.run(); })
    return home_group(request.bucket(), request.run());
  else
    return bucket_group(request.bucket());
}

class DaemonImpl final : public Daemon {
 public:
  DaemonImpl(rt::Runtime runtime, TargetSet& targets, rt::UnitPool& units, LocalMap local, Options options)
      : runtime_(runtime),
        targets_(targets),
        forced_(local.forced),
        coordinator_(std::move(local.coordinator)),
        members_(runtime, targets, *coordinator_, options.membership_bugs),
        records_(runtime, members_, options.membership_bugs),
        store_(storage::RecordStore::open(runtime, records_)),
        owners_(runtime.loop, *store_),
        copies_(runtime, members_),
        copier_(targets, units, options.membership_bugs.repair_unchecked),
        repair_pace_(runtime.loop, options.repair_pace),
        repair_(runtime, members_, copier_, repair_pace_),
        usage_(runtime, *store_, copies_, options.usage),
        buckets_(runtime, *store_, *coordinator_, usage_),
        readers_(runtime, *store_, reader_options(options)),
        objects_(runtime, *store_, *coordinator_, buckets_, owners_, readers_, usage_, options.objects),
        checkpoints_(runtime, copies_, *store_, units, *coordinator_, buckets_, owners_, readers_, usage_,
                     with_bugs(options)),
        retention_(runtime, *store_, buckets_, readers_, usage_, retention_options(options)),
        liveness_(make_liveness(*store_, *coordinator_, copies_)),
        chunks_(runtime, copies_, owners_, usage_, units, chunk_options(options)),
        handovers_(runtime, chunks_, checkpoints_, handover_options(options)),
        records_calls_(runtime.loop),
        background_(runtime.loop) {
    if (options.wrap_liveness) liveness_ = options.wrap_liveness(std::move(liveness_));
    auto garbage = options.garbage;
    garbage.absence_is_death |= options.bugs.absence_is_death;
    garbage.ask_once |= options.bugs.ask_once;
    garbage_ = std::make_unique<Garbage>(runtime, copies_, *liveness_, garbage);
    scrub_ = std::make_unique<Scrub>(runtime, members_, copier_, repair_pace_, *liveness_, options.scrub);
    jobs_ = std::make_unique<Jobs>(*scrub_, repair_, *store_);
    copies_.on_bad_copy = [this](storage::Target& target, const ChunkId& id) { scrub_->suspect(target, id); };
  }

  Task<void> start(Options options) {
    CO_CHECK_OK(co_await members_.start(
        {.node = options.node, .addresses = options.addresses, .lost = options.lost_targets, .forced = forced_}));
    members_.on_change = [this] {
      // One range holds all home groups, so one epoch is theirs.
      const auto& home = *map().find(true, 0);
      store_->set_epoch(home.loss, home.epoch.count);
    };
    members_.on_change();
    CO_CHECK_OK(co_await records_.take_over());
    CO_CHECK_OK(co_await usage_.load());
    CO_TRY(const auto open, co_await owners_.load());
    for (const auto& owner : open) CO_CHECK_OK(co_await usage_.resume(owner.id, owner.bucket, owner.declared_bytes));
    CO_CHECK_OK(co_await checkpoints_.start());
    CO_CHECK_OK(co_await scrub_->load());
    background_.spawn(members_.watch());
    background_.spawn(records_.bring_up(*store_));
    background_.spawn(repair_.run());
    background_.spawn(checkpoints_.watch());
    background_.spawn(objects_.sweep());
    checkpoints_.on_change(
        [this](const std::string& bucket, const std::string& run) { retention_.look_at(bucket, run); });
    checkpoints_.on_join([this](OwnerId owner, std::uint32_t rank) { return handovers_.settled(owner, rank); });
    background_.spawn(handovers_.watch());
    background_.spawn(retention_.run());
    background_.spawn(readers_.run());
    background_.spawn(garbage_->run());
    background_.spawn(usage_.watch());
    background_.spawn(scrub_->run());
    co_return {};
  }

  rpc::Server::Handler handler() override {
    return [this](std::shared_ptr<rpc::ServerCall> call) { return handle(std::move(call)); };
  }
  std::function<std::string()> stale_map() override {
    return [this] { return encode_map(map()); };
  }
  std::string cluster() const override { return std::string(map().cluster.view()); }
  const ClusterMap& map() const override { return *coordinator_->map(); }
  storage::RecordStore& records() override { return *store_; }
  std::optional<Error> failure() const override { return members_.failure(); }
  Stats stats() const override {
    return {checkpoints_.stats(), readers_.stats(), retention_.stats(), garbage_->stats()};
  }
  std::string metrics(const rpc::Server::Stats& rpc) const override;

  void set(const Paces& paces) override {
    garbage_->set(paces.garbage_grace, paces.garbage_interval);
    retention_.set_interval(paces.retention_interval);
    scrub_->set(paces.scrub_pace, paces.scrub_interval);
    repair_pace_.set(paces.repair_pace);
    handovers_.set_memory_bytes_max(paces.handover_memory);
  }
  void drain() override {
    checkpoints_.drain();
    handovers_.drain();
  }
  Task<void> close() override {
    // Ranks that are gone cannot do it later, as those can that only lose their connection now.
    if (auto ended = co_await handovers_.close(runtime_.loop.now() + kHandoversMax); !ended)
      runtime_.log.write(rt::Level::kWarning, "handovers_cut_off", {{"error", ended.error().message}});
    CO_CHECK_OK(co_await records_calls_.join());
    background_.cancel();
    CO_CHECK_OK(co_await scrub_->close());
    checkpoints_.stop();
    co_return co_await store_->close();
  }

 private:
  static Checkpoints::Options with_bugs(const Options& options) {
    auto out = options.checkpoints;
    out.bugs = options.bugs;
    return out;
  }
  static Readers::Options reader_options(const Options& options) {
    auto out = options.readers;
    out.unasked |= options.bugs.readers_unasked;
    out.takeover_unwaited |= options.bugs.takeover_unwaited;
    return out;
  }
  static Retention::Options retention_options(const Options& options) {
    auto out = options.retention;
    out.pins_ignored |= options.bugs.retention_unpinned;
    out.one_fewer |= options.bugs.retention_one_fewer;
    out.blind |= options.bugs.retention_blind;
    return out;
  }
  static ChunkService::Options chunk_options(const Options& options) {
    auto out = options.chunks;
    out.existing_unseen |= options.bugs.existing_unseen;
    return out;
  }

  static Handovers::Options handover_options(const Options& options) {
    auto out = options.handovers;
    out.unwritten |= options.bugs.handover_unwritten;
    return out;
  }

  void target_metrics(MetricsText& out) const;
  void scrub_metrics(MetricsText& out) const;
  Result<void> check_stamp(const wire::Stamp& stamp, bool home, std::uint32_t group) const;
  Task<std::string> handle(std::shared_ptr<rpc::ServerCall> call);
  Task<std::string> put_chunk(std::shared_ptr<rpc::ServerCall> call);
  Task<std::string> handover(std::shared_ptr<rpc::ServerCall> call);
  Task<std::string> read_ranges(std::shared_ptr<rpc::ServerCall> call);
  Task<std::string> read_shared(std::shared_ptr<rpc::ServerCall> call);
  Task<std::string> bucket_set(std::string request);
  static Task<std::string> at_once(Result<std::string> answer) { co_return answer; }

  /// A call about records: decoded, its stamp checked, answered.
  /// `more`: what the service wants to know of the caller.
  template <class Service, class Reply, class Request, class... More>
  Task<std::string> answer(std::string bytes, Method method, Service& service,
                           Task<Reply> (Service::*serve)(Request, More...), More... more) {
    Request request;
    CO_CHECK_OK(wire::decode(bytes, request, wire::name_of(method)));
    if constexpr (requires { request.stamp(); }) CO_CHECK_OK(check_stamp(request.stamp(), true, group_of(request)));
    CO_TRY(const auto reply, co_await (service.*serve)(std::move(request), more...));
    co_return wire::encode(reply);
  }
  /// Runs to its end also when the caller goes away: what follows a transaction must not be lost with the connection.
  Task<std::string> whole(Task<std::string> task) {
    rt::OneShot<Result<std::string>> done(runtime_.loop);
    records_calls_.spawn(into(std::move(task), done.setter()));
    co_return co_await done;
  }
  static Task<void> into(Task<std::string> task, rt::OneShot<Result<std::string>>::Setter setter) {
    setter.set(co_await std::move(task));
    co_return {};
  }

  rt::Runtime runtime_;
  TargetSet& targets_;
  bool forced_;
  std::unique_ptr<Coordinator> coordinator_;
  Membership members_;
  ReplicatedRecords records_;
  std::unique_ptr<storage::RecordStore> store_;
  Owners owners_;
  Chunks copies_;
  Copier copier_;
  Pace repair_pace_;
  Repair repair_;
  Usage usage_;
  Buckets buckets_;
  Readers readers_;
  Objects objects_;
  Checkpoints checkpoints_;
  Retention retention_;
  std::unique_ptr<Liveness> liveness_;
  std::unique_ptr<Garbage> garbage_;
  std::unique_ptr<Scrub> scrub_;
  std::unique_ptr<Jobs> jobs_;
  ChunkService chunks_;
  Handovers handovers_;
  std::uint64_t bytes_in_ = 0, bytes_out_ = 0, bytes_from_disk_ = 0;
  rt::Scope records_calls_;  // after what its tasks use
  rt::Scope background_;
};

Result<void> DaemonImpl::check_stamp(const wire::Stamp& stamp, bool home, std::uint32_t group) const {
  const char* kind = home ? "home" : "data";
  if (stamp.epoch() == 0) return fail(Errc::kInvalid, "request without a group and its epoch");
  if (stamp.group() != group)
    return fail(Errc::kInvalid, "request for " + std::string(kind) + " group " + std::to_string(stamp.group()) +
                                    " where group " + std::to_string(group) + " is meant");
  const auto* range = map().find(home, group);
  if (range == nullptr)
    return fail(Errc::kStale, std::string(kind) + " group " + std::to_string(group) + " does not exist");
  const GroupEpoch said{.generation = stamp.generation(), .count = stamp.epoch()};
  if (said != range->epoch)
    return fail(Errc::kStale, std::string(kind) + " group " + std::to_string(group) + " has epoch " +
                                  std::to_string(range->epoch.count) + ", the request says " +
                                  std::to_string(said.count));
  return {};
}

Task<std::string> DaemonImpl::put_chunk(std::shared_ptr<rpc::ServerCall> call) {
  wire::PutChunk request;
  CO_CHECK_OK(wire::decode(call->request(), request, "put_chunk"));
  CO_CHECK_OK(check_stamp(request.stamp(), false, request.stamp().group()));
  const auto length = request.length();
  const auto id = wire::from_wire(request.id());
  CO_CHECK_OK(co_await chunks_.put(std::move(call), std::move(request)));
  bytes_in_ += length;
  if (id) handovers_.stored(*id);
  co_return wire::encode(wire::PutChunkReply());
}

Task<std::string> DaemonImpl::handover(std::shared_ptr<rpc::ServerCall> call) {
  wire::Handover request;
  CO_CHECK_OK(wire::decode(call->request(), request, "handover"));
  CO_CHECK_OK(check_stamp(request.stamp(), true, group_of(request)));
  CO_TRY(const auto reply, co_await handovers_.take(std::move(call), std::move(request)));
  co_return wire::encode(reply);
}

Task<std::string> DaemonImpl::read_ranges(std::shared_ptr<rpc::ServerCall> call) {
  wire::ReadRanges request;
  CO_CHECK_OK(wire::decode(call->request(), request, "read_ranges"));
  CO_CHECK_OK(check_stamp(request.stamp(), false, request.stamp().group()));
  CO_TRY(const auto reply, co_await chunks_.read(std::move(call), std::move(request)));
  bytes_out_ += reply.bytes();
  bytes_from_disk_ += reply.bytes_from_disk();
  co_return wire::encode(reply);
}

Task<std::string> DaemonImpl::read_shared(std::shared_ptr<rpc::ServerCall> call) {
  wire::ReadShared request;
  CO_CHECK_OK(wire::decode(call->request(), request, "read_shared"));
  CO_CHECK_OK(check_stamp(request.stamp(), false, request.stamp().group()));
  CO_TRY(const auto reply, co_await chunks_.read_shared(std::move(call), std::move(request)));
  bytes_out_ += reply.bytes_from_disk();
  bytes_from_disk_ += reply.bytes_from_disk();
  co_return wire::encode(reply);
}

Task<std::string> DaemonImpl::bucket_set(std::string request) {
  CO_TRY(auto reply, co_await whole(answer(std::move(request), Method::kBucketSet, buckets_, &Buckets::set)));
  retention_.look_at_all();
  co_return std::move(reply);
}

// No coroutine: its frame would hold room for every method, for as long as a rank waits for the end of its save.
Task<std::string> DaemonImpl::handle(std::shared_ptr<rpc::ServerCall> call) {
  const auto method = call->method();
  const auto serve = [&](auto& service, auto member, auto... more) {
    return whole(answer(call->request(), method, service, member, more...));
  };
  switch (method) {
    case Method::kMap:
      return at_once(encode_map(map()));
    case Method::kPutChunk:
      return put_chunk(std::move(call));
    case Method::kReadRanges:
      return read_ranges(std::move(call));
    case Method::kReadShared:
      return read_shared(std::move(call));
    case Method::kBucketCreate:
      return serve(buckets_, &Buckets::create);
    case Method::kBucketShow:
      return serve(buckets_, &Buckets::show);
    case Method::kBucketList:
      return serve(buckets_, &Buckets::list);
    case Method::kBucketRemove:
      return serve(buckets_, &Buckets::remove);
    case Method::kBucketSet:
      return bucket_set(call->request());
    case Method::kObjectBegin:
      return serve(objects_, &Objects::begin);
    case Method::kObjectSeal:
      return serve(objects_, &Objects::seal);
    case Method::kObjectAbort:
      return serve(objects_, &Objects::abort);
    case Method::kObjectStat:
      return serve(objects_, &Objects::stat, call->connection());
    case Method::kObjectList:
      return serve(objects_, &Objects::list);
    case Method::kObjectRemove:
      return serve(objects_, &Objects::remove);
    case Method::kOpenRun:
      return serve(checkpoints_, &Checkpoints::open_run);
    case Method::kBegin:
      return serve(checkpoints_, &Checkpoints::begin);
    case Method::kSeal:
      return serve(checkpoints_, &Checkpoints::seal);
    case Method::kHandover:
      return handover(std::move(call));
    case Method::kAbort:
      return serve(checkpoints_, &Checkpoints::abort);
    case Method::kHeartbeat:
      return serve(checkpoints_, &Checkpoints::heartbeat);
    // These two wait for the end of an attempt, which comes without them.
    case Method::kCommit:
      return answer(call->request(), method, checkpoints_, &Checkpoints::commit);
    case Method::kAttemptStatus:
      return answer(call->request(), method, checkpoints_, &Checkpoints::status);
    case Method::kStepOpen:
      return serve(checkpoints_, &Checkpoints::step_open, call->connection());
    case Method::kStepList:
      return serve(checkpoints_, &Checkpoints::step_list);
    case Method::kStepRemove:
      return serve(checkpoints_, &Checkpoints::step_remove);
    case Method::kRunList:
      return serve(checkpoints_, &Checkpoints::run_list);
    case Method::kRunActivity:
      return serve(checkpoints_, &Checkpoints::run_activity);
    case Method::kStepPin:
      return serve(checkpoints_, &Checkpoints::step_pin);
    case Method::kReaderRenew:
      return serve(readers_, &Readers::renew, call->connection());
    case Method::kJobList:
      return serve(*jobs_, &Jobs::list);
    case Method::kJobControl:
      return serve(*jobs_, &Jobs::control);
    case Method::kScrubStart:
      return serve(*jobs_, &Jobs::scrub);
    case Method::kDamageList:
      return serve(*jobs_, &Jobs::damage);
    case Method::kNone:
      break;
  }
  return at_once(
      fail(Errc::kInvalid, "method " + std::to_string(static_cast<int>(method)) + " is not known to this version"));
}

void DaemonImpl::target_metrics(MetricsText& out) const {
  struct Row {
    std::string uuid, directory, state;
    std::uint64_t free_bytes = 0, total_bytes = 0;
  };
  std::vector<Row> rows;
  for (const auto& known : map().targets) {
    Row row{.uuid = known.uuid.text(), .directory = known.directory, .state = "missing"};
    if (auto* target = targets_.find(known.uuid)) {
      const bool syncing = std::ranges::any_of(map().groups, [&](const GroupRange& range) {
        const auto* member = range.member(known.uuid);
        return member != nullptr && !member->serving;
      });
      row.state = target->committer().failure() ? "failed" : syncing ? "syncing" : "serving";
      const auto stats = target->chunks().stats();
      row.free_bytes = stats.free_bytes;
      row.total_bytes = stats.total_bytes;
    }
    rows.push_back(std::move(row));
  }
  out.family("cairn_target_state", "1 for the state of each data directory: serving, syncing, failed or missing.",
             MetricsText::Type::kGauge);
  for (const auto& row : rows)
    out.sample({{"target", row.uuid}, {"directory", row.directory}, {"state", row.state}}, 1U);
  out.family("cairn_target_free_bytes", "Free bytes of the directory's disk.", MetricsText::Type::kGauge);
  for (const auto& row : rows) out.sample({{"target", row.uuid}, {"directory", row.directory}}, row.free_bytes);
  out.family("cairn_target_total_bytes", "Size of the directory's disk in bytes.", MetricsText::Type::kGauge);
  for (const auto& row : rows) out.sample({{"target", row.uuid}, {"directory", row.directory}}, row.total_bytes);
}

void DaemonImpl::scrub_metrics(MetricsText& out) const {
  const auto family = [&](const char* name, const char* help, MetricsText::Type type, auto value) {
    out.family(name, help, type);
    for (const auto& look : scrub_->looks())
      out.sample({{"target", look->target.uuid().text()}, {"directory", look->directory}}, value(*look));
  };
  using Look = Scrub::Look;
  family("cairn_scrub_damaged_chunks", "Chunks whose copy there is damaged or missing, and not repaired yet.",
         MetricsText::Type::kGauge, [](const Look& look) { return look.damage.left(); });
  family("cairn_scrub_repaired_chunks_total", "Damaged or missing copies that were repaired.",
         MetricsText::Type::kCounter, [](const Look& look) { return look.repaired; });
  family("cairn_scrub_read_bytes_total", "Bytes of chunks that were read to see whether they are whole.",
         MetricsText::Type::kCounter, [](const Look& look) { return look.bytes; });
  family("cairn_scrub_running", "1 while a pass is under way.", MetricsText::Type::kGauge,
         [](const Look& look) { return std::uint64_t{look.pass.state == Scrub::State::kRunning}; });
  family("cairn_scrub_last_full_pass_timestamp_seconds",
         "When the last pass ended that looked at everything; 0: none has.", MetricsText::Type::kGauge,
         [](const Look& look) { return static_cast<double>(look.pass.full_pass_unix_nanos) / 1e9; });
}

std::string DaemonImpl::metrics(const rpc::Server::Stats& rpc) const {
  MetricsText out;
  target_metrics(out);
  scrub_metrics(out);
  storage::ChunkStore::Stats chunks;
  std::uint64_t commits = 0, rounds = 0, failed = 0;
  for (const auto& entry : targets_.all()) {
    const auto one = entry.target->chunks().stats();
    chunks.live_bytes += one.live_bytes;
    chunks.chunks += one.chunks;
    chunks.uploading_bytes += one.uploading_bytes;
    chunks.segments += one.segments;
    chunks.free_bytes += one.free_bytes;
    chunks.kept_bytes += one.kept_bytes;
    chunks.segments_recycled += one.segments_recycled;
    chunks.total_bytes += one.total_bytes;
    chunks.bytes_written += one.bytes_written;
    chunks.bytes_read += one.bytes_read;
    chunks.blocks_bad += one.blocks_bad;
    commits += entry.target->committer().commits();
    rounds += entry.target->committer().rounds();
    if (entry.target->committer().failure()) ++failed;
  }
  out.gauge("cairn_chunk_store_live_bytes", "Bytes of chunks in the index, padded to sectors.", chunks.live_bytes);
  out.gauge("cairn_chunk_store_chunks", "Chunks in the index.", chunks.chunks);
  out.gauge("cairn_chunk_store_uploading_bytes", "Bytes reserved by uploads under way.", chunks.uploading_bytes);
  out.gauge("cairn_chunk_store_segments", "Segment files.", chunks.segments);
  out.gauge("cairn_chunk_store_free_bytes", "Free bytes of the disk, and what is kept to be written again.",
            chunks.free_bytes);
  out.gauge("cairn_chunk_store_kept_bytes", "Allocated bytes of deleted chunks that are kept to be written again.",
            chunks.kept_bytes);
  out.counter("cairn_chunk_store_segments_recycled_total", "Segments written again.", chunks.segments_recycled);
  out.gauge("cairn_chunk_store_total_bytes", "Size of the disk in bytes.", chunks.total_bytes);
  const auto disk = usage_.disk();
  out.gauge("cairn_usage_ballast_bytes", "Free bytes kept for deletes and the index.", disk.room.ballast_bytes);
  out.gauge("cairn_usage_reserved_bytes", "Bytes that open uploads and saves have declared and that are still to come.",
            disk.reserved_bytes);
  out.gauge("cairn_usage_available_bytes", "Bytes that a new upload or save may declare.", disk.available_bytes);
  out.counter("cairn_chunk_store_written_bytes_total", "Bytes of chunks written to disk.", chunks.bytes_written);
  out.counter("cairn_chunk_store_read_bytes_total", "Bytes of chunks read from disk.", chunks.bytes_read);
  out.counter("cairn_chunk_store_bad_blocks_total", "Blocks whose bytes did not match their CRC.", chunks.blocks_bad);
  const auto readers = readers_.stats();
  out.gauge("cairn_readers_open", "Steps and objects that clients have open for reading.", readers.readers);
  out.counter("cairn_readers_refused_total", "Readers refused because there were too many.", readers.refused);
  out.gauge("cairn_readers_held", "Removed steps and objects that are kept for their readers.", readers.held);
  out.counter("cairn_retention_removed_steps_total", "Steps removed by the policies of their buckets.",
              retention_.stats().removed);
  const auto repair = repair_.stats();
  out.gauge("cairn_repair_groups", "Data groups with a member that is being brought up to date.", repair.groups);
  out.counter("cairn_repair_chunks_total", "Chunks copied to members that lacked them.", repair.chunks);
  out.counter("cairn_repair_bytes_total", "Bytes of these chunks.", repair.bytes);
  out.counter("cairn_repair_damaged_chunks_total", "Chunks found without a good copy anywhere.", repair.damaged);
  out.counter("cairn_chunks_reads_elsewhere_total", "Reads that another copy had to answer.",
              copies_.reads_elsewhere());
  const auto& garbage = garbage_->stats();
  out.gauge("cairn_chunk_store_orphaned_bytes",
            "Bytes of chunks that no record names, not freed yet; at the last pass.", garbage.orphaned_bytes);
  out.counter("cairn_garbage_freed_bytes_total", "Bytes of dead chunks freed.", garbage.freed_bytes);
  out.counter("cairn_garbage_freed_chunks_total", "Dead chunks freed.", garbage.freed_chunks);
  out.gauge("cairn_garbage_last_pass_timestamp_seconds", "When the last pass of the garbage collector ended.",
            static_cast<double>(garbage.pass_unix_nanos) / 1e9);
  out.gauge("cairn_garbage_last_pass_seconds", "How long it took.",
            std::chrono::duration<double>(garbage.pass_time).count());
  out.gauge("cairn_garbage_last_pass_owners", "Owners of chunks that it asked about.", garbage.owners);
  out.counter("cairn_garbage_passes_total", "Passes of the garbage collector.", garbage.passes);
  out.counter("cairn_committer_commits_total", "Index batches made durable.", commits);
  out.counter("cairn_committer_rounds_total", "Rounds of flush and sync, each shared by all that waited.", rounds);
  out.gauge("cairn_committer_failed", "Targets that have failed and acknowledge nothing more.", failed);
  const auto saves = checkpoints_.stats();
  out.gauge("cairn_checkpoints_open_attempts", "Save attempts that ranks are writing.", saves.open);
  out.gauge("cairn_checkpoints_merging_attempts", "Save attempts whose manifests are being merged.", saves.merging);
  out.counter("cairn_checkpoints_committed_total", "Steps committed.", saves.committed);
  out.counter("cairn_checkpoints_failed_total", "Save attempts that failed.", saves.failed);
  const auto handovers = handovers_.stats();
  out.gauge("cairn_handovers", "Parts of saves that ranks have handed over and that are not sealed yet.",
            handovers.plans);
  out.gauge("cairn_handovers_running", "Those that the daemon finishes because their ranks are gone.",
            handovers.running);
  out.gauge("cairn_handovers_memory_bytes", "Memory of clients that is kept for them.", handovers.memory_bytes);
  out.counter("cairn_handovers_taken_total", "Parts of saves that were handed over.", handovers.taken);
  out.counter("cairn_handovers_refused_total", "Parts of saves for which there was no room.", handovers.refused);
  out.counter("cairn_handovers_finished_total", "Parts of saves that the daemon finished without their ranks.",
              handovers.finished);
  out.counter("cairn_handovers_failed_total", "Parts of saves that it could not finish.", handovers.failed);
  out.counter("cairn_daemon_put_bytes_total", "Bytes of chunks received and made durable.", bytes_in_);
  out.counter("cairn_daemon_read_bytes_total", "Bytes of chunks sent to readers.", bytes_out_);
  out.counter("cairn_daemon_read_block_bytes_total", "Bytes of blocks read from disk for readers.", bytes_from_disk_);
  const auto shared = chunks_.shared_blocks();
  out.counter("cairn_shared_blocks_read_bytes_total",
              "Bytes of blocks read from disk for readers that want parts of them.", shared.read_bytes);
  out.counter("cairn_shared_blocks_served_bytes_total", "Bytes of such blocks, counted for every reader they served.",
              shared.served_bytes);
  out.counter("cairn_shared_blocks_waits_total", "Times that a reader waited for those behind it.", shared.waits);
  out.gauge("cairn_shared_blocks_pieces", "Pieces of chunks held for readers to share.", shared.pieces);
  out.gauge("cairn_rpc_connections", "Open connections.", rpc.connections);
  out.counter("cairn_rpc_connections_total", "Connections accepted.", rpc.connections_total);
  out.gauge("cairn_rpc_calls_running", "Calls under way.", rpc.calls_running);
  out.counter("cairn_rpc_calls_total", "Calls received.", rpc.calls_total);
  out.counter("cairn_rpc_received_bytes_total", "Bytes received.", rpc.bytes_received);
  out.counter("cairn_rpc_sent_bytes_total", "Bytes sent.", rpc.bytes_sent);
  out.counter("cairn_rpc_refused_total", "Connections closed for a limit of their number, of time or of pace.",
              rpc.refused);
  out.counter("cairn_rpc_replies_dropped_total", "Replies for which there was no memory.", rpc.busy);
  out.counter("cairn_rpc_protocol_errors_total", "Connections closed because the peer broke a rule.",
              rpc.protocol_errors);
  return out.text();
}

}  // namespace

Task<std::unique_ptr<Daemon>> Daemon::create(rt::Runtime runtime, TargetSet& targets, rt::UnitPool& units,
                                             Options options) {
  CO_TRY(auto local, co_await open_local_coordinator(targets, options.lost_targets, options.membership_bugs));
  auto daemon = std::make_unique<DaemonImpl>(runtime, targets, units, std::move(local), options);
  CO_CHECK_OK(co_await daemon->start(std::move(options)));
  co_return std::unique_ptr<Daemon>(std::move(daemon));
}

}  // namespace cairn::server
