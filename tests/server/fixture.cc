#include "tests/server/fixture.h"

#include <cstring>
#include <deque>

#include "proto/common/checksum.h"
#include "storage/format/index_pages.h"
#include "tests/sim/prng.h"

namespace cairn::server {

std::string pattern(std::uint64_t seed, std::size_t size) {
  std::string out(size, '\0');
  sim::Prng random(seed);
  for (auto& c : out) c = static_cast<char>(random.next());
  return out;
}

Uuid uuid(std::uint8_t n) {
  Uuid id;
  id.bytes.fill(n);
  return id;
}

namespace {

/// A call whose data frames are a list.
class LocalCall final : public rpc::ServerCall {
 public:
  LocalCall(rt::UnitPool& units, Method method, std::string request, std::vector<Fixture::Piece> pieces,
            std::uint64_t connection, std::shared_ptr<rt::SharedMemory> memory, std::weak_ptr<const void> open)
      : units_(units),
        method_(method),
        request_(std::move(request)),
        connection_(connection),
        memory_(std::move(memory)),
        open_(std::move(open)),
        pieces_(pieces.begin(), pieces.end()) {}
  Method method() const override { return method_; }
  const std::string& request() const override { return request_; }
  const std::string& client() const override { return client_; }
  std::uint64_t connection() const override { return connection_; }
  std::shared_ptr<rt::SharedMemory> memory() const override { return memory_; }
  std::weak_ptr<const void> connection_open() const override { return open_; }
  Task<Data> next_data() override {
    if (pieces_.empty()) co_return fail(Errc::kUnavailable, "the test has no more data");
    CO_TRY(auto memory, co_await units_.acquire());
    const auto piece = std::move(pieces_.front());
    pieces_.pop_front();
    std::memcpy(memory.bytes.data(), piece.payload.data(), piece.payload.size());
    co_return Data{.message = piece.message,
                   .memory = std::move(memory),
                   .size = static_cast<std::uint32_t>(piece.payload.size())};
  }
  Task<void> send_data(std::string message, std::vector<Buffer> payload) override {
    if (stands > rt::Duration()) co_await loop->sleep(stands);
    std::string bytes;
    for (const auto& piece : payload) bytes += piece.text();
    frames.emplace_back(std::move(message), std::move(bytes));
    co_return {};
  }
  std::vector<std::pair<std::string, std::string>> frames;
  rt::Loop* loop = nullptr;
  rt::Duration stands{};  // before it takes a frame

 private:
  rt::UnitPool& units_;
  Method method_;
  std::string request_, client_ = "test";
  std::uint64_t connection_;
  std::shared_ptr<rt::SharedMemory> memory_;
  std::weak_ptr<const void> open_;
  std::deque<Fixture::Piece> pieces_;
};

Task<void> keep(Task<std::string> task, std::shared_ptr<std::optional<Result<std::string>>> out) {
  out->emplace(co_await std::move(task));
  co_return {};
}

}  // namespace

Fixture::Fixture(Daemon::Options o, std::uint64_t seed, std::size_t directories)
    : world(seed),
      node(world.make_node("daemon")),
      disk(world.make_disk("d0", {})),
      index(world.make_index("d0/index")),
      disks{&disk},
      indexes{&index},
      options(std::move(o)) {
  static_assert(kFirstDataGroup == 1);
  for (std::size_t i = 1; i < directories; ++i) {
    disks.push_back(&world.make_disk("d" + std::to_string(i), {}));
    indexes.push_back(&world.make_index("d" + std::to_string(i) + "/index"));
  }
  options.node = "n1";
  options.addresses = {"127.0.0.1:7420"};
  options.checkpoints.index_chunk_bytes = 2 * kTestUnitBytes;
  start();
}

Fixture::~Fixture() {
  if (targets) crash(sim::Death::kProcess);
}

void Fixture::use_group_of(std::size_t copies) {
  const auto& groups = daemon->map().groups;
  const auto found =
      std::ranges::find_if(groups, [&](const GroupRange& range) { return !range.home && range.copies == copies; });
  REQUIRE(found != groups.end());
  data_group = found->first;
}

Result<void> Fixture::try_start() {
  TRY(units, rt::UnitPool::create(node, 32, kTestUnitBytes));
  storage::Target::Options target_options;
  target_options.chunks.segment_bytes = 16 * kMiB;
  target_options.chunks.ballast_bytes = 1 * kMiB;
  targets = std::make_unique<TargetSet>();
  target_options.bugs = storage_bugs;
  for (std::size_t i = 0; i < disks.size(); ++i) {
    TRY(auto opened, run(storage::Target::open(node.runtime(), disks[i]->attach(node), indexes[i]->attach(node), *units,
                                               target_options)));
    targets->add("d" + std::to_string(i), std::move(opened));
  }
  target = targets->all().front().target.get();
  TRY(daemon, run(Daemon::create(node.runtime(), *targets, *units, options)));
  return {};
}

void Fixture::start() {
  auto started = try_start();
  INFO((started ? "" : started.error().message));
  REQUIRE(started);
}

void Fixture::stop() {
  daemon->drain();
  REQUIRE(run(daemon->close()));
  REQUIRE(run(targets->close()));
  crash(sim::Death::kProcess);
}

void Fixture::crash(sim::Death death) {
  // Frames go first, then what they use, last first.
  node.hold(std::move(units));
  if (targets) node.hold(std::move(targets));
  target = nullptr;
  if (daemon) node.hold(std::move(daemon));
  node.kill(death);
  node.restart();
}

namespace {

Answered answered(const LocalCall& call, Result<std::string> reply) {
  Answered out{.reply = std::move(reply), .bytes = {}, .frames = call.frames.size(), .at = {}};
  for (const auto& [message, payload] : call.frames) {
    wire::DataHeader header;
    REQUIRE(wire::decode(message, header, "data header"));
    CHECK(header.offset() == out.bytes.size());
    CHECK(header.crc() == crc32c(payload));
    out.bytes += payload;
  }
  return out;
}

}  // namespace

Answered Fixture::exchange(Method method, std::string request, std::vector<Piece> pieces) {
  auto call = std::make_shared<LocalCall>(*units, method, std::move(request), std::move(pieces), connection, memory,
                                          connection_open);
  auto reply = run(daemon->handler()(call));
  return answered(*call, std::move(reply));
}

std::vector<Answered> Fixture::exchange_all(Method method, std::vector<std::string> requests,
                                            rt::Duration first_stands) {
  struct Under {
    std::shared_ptr<LocalCall> call;
    std::shared_ptr<std::optional<Result<std::string>>> outcome;
    rt::TimePoint at;
  };
  std::vector<Under> under;
  for (auto& request : requests) {
    under.push_back({.call = std::make_shared<LocalCall>(*units, method, std::move(request), std::vector<Piece>{},
                                                         connection + under.size(), memory, connection_open),
                     .outcome = std::make_shared<std::optional<Result<std::string>>>(),
                     .at = rt::kNever});
    auto& call = *under.back().call;
    call.loop = &node;
    if (under.size() == 1) call.stands = first_stands;
    node.spawn(keep(daemon->handler()(under.back().call), under.back().outcome));
  }
  REQUIRE(eventually([&] {
    bool all = true;
    for (auto& one : under) {
      if (*one.outcome && one.at == rt::kNever) one.at = world.now();
      all = all && *one.outcome;
    }
    return all;
  }));
  std::vector<Answered> out;
  for (auto& one : under) {
    out.push_back(answered(*one.call, **one.outcome));
    out.back().at = one.at;
  }
  return out;
}

std::shared_ptr<std::optional<Result<std::string>>> Fixture::spawn(Method method, std::string request) {
  auto outcome = std::make_shared<std::optional<Result<std::string>>>();
  auto call = std::make_shared<LocalCall>(*units, method, std::move(request), std::vector<Piece>{}, connection, memory,
                                          connection_open);
  node.spawn(keep(daemon->handler()(call), outcome));
  return outcome;
}

wire::Stamp Fixture::stamp_of(bool home, std::uint32_t group) const {
  wire::Stamp stamp;
  const auto& range = *daemon->map().find(home, group);
  stamp.set_group(group);
  stamp.set_generation(range.epoch.generation);
  stamp.set_epoch(range.epoch.count);
  return stamp;
}

Result<void> Fixture::make_bucket(const std::string& bucket) {
  wire::BucketCreate request;
  request.set_bucket(bucket);
  auto made = call<wire::Empty>(Method::kBucketCreate, request);
  if (!made) return fail(made.error());
  return {};
}

Result<void> Fixture::put(ChunkId id, const std::string& bytes) {
  wire::PutChunk request;
  *request.mutable_stamp() = stamp_of(false, data_group);
  wire::to_wire(id, *request.mutable_id());
  request.set_length(static_cast<std::uint32_t>(bytes.size()));
  std::vector<std::uint32_t> crcs;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    crcs.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                          block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  request.mutable_block_crcs()->Assign(crcs.begin(), crcs.end());
  request.set_digest(storage::chunk_digest(crcs));
  std::vector<Piece> pieces;
  for (std::size_t at = 0; at < bytes.size(); at += kTestUnitBytes) {
    wire::DataHeader header;
    header.set_offset(static_cast<std::uint32_t>(at));
    pieces.push_back({wire::encode(header), bytes.substr(at, kTestUnitBytes)});
  }
  auto answered = exchange(Method::kPutChunk, wire::encode(request), std::move(pieces));
  if (!answered.reply) return fail(answered.reply.error());
  return {};
}

Result<std::string> Fixture::read(ChunkId id, std::uint32_t offset, std::uint32_t size) {
  wire::ReadRanges request;
  *request.mutable_stamp() = stamp_of(false, data_group);
  auto& chunk = *request.add_chunks();
  wire::to_wire(id, *chunk.mutable_id());
  chunk.add_offsets(offset);
  chunk.add_lengths(size);
  auto answered = exchange(Method::kReadRanges, wire::encode(request), {});
  if (!answered.reply) return fail(answered.reply.error());
  return answered.bytes;
}

double Fixture::metric(const std::string& series) const {
  const auto text = daemon->metrics({});
  const auto at = text.find("\n" + series + " ");
  INFO(series);
  REQUIRE(at != text.npos);
  return std::stod(text.substr(at + series.size() + 2));
}

std::uint64_t Fixture::records(std::string_view prefix) {
  std::uint64_t count = 0;
  for (HomeGroup group = 0; group < kHomeGroups; ++group)
    count += run(daemon->records().scan(group, std::string(prefix), "", 1000)).value().size();
  return count;
}

Result<OwnerId> Fixture::begin_object(const std::string& bucket, const std::string& key, bool if_absent) {
  wire::ObjectBegin request;
  request.set_bucket(bucket);
  request.set_key(key);
  request.set_if_absent(if_absent);
  auto reply = call<wire::ObjectBeginReply>(Method::kObjectBegin, request);
  if (!reply) return fail(reply.error());
  return OwnerId::from_bytes(reply->owner());
}

Result<wire::ObjectInfo> Fixture::seal_object(const std::string& bucket, const std::string& key, OwnerId owner,
                                              std::uint64_t writer, const std::string& bytes, bool if_absent) {
  wire::ObjectSeal request;
  request.set_bucket(bucket);
  request.set_key(key);
  request.set_owner(std::string(owner.view()));
  request.set_if_absent(if_absent);
  request.set_size(bytes.size());
  request.set_crc32c(crc32c(bytes));
  if (!bytes.empty()) {
    auto& run = *request.add_runs();
    run.set_group(data_group);
    run.set_writer(writer);
    run.set_count(1);
    run.set_chunk_bytes(static_cast<std::uint32_t>(bytes.size()));
    run.set_last_bytes(static_cast<std::uint32_t>(bytes.size()));
  }
  return call<wire::ObjectInfo>(Method::kObjectSeal, request);
}

Result<wire::ObjectInfo> Fixture::put_object(const std::string& bucket, const std::string& key,
                                             const std::string& bytes) {
  TRY(const auto owner, begin_object(bucket, key));
  if (!bytes.empty()) CHECK_OK(put({.owner = owner, .writer = 5, .index = 0}, bytes));
  return seal_object(bucket, key, owner, 5, bytes);
}

RunFixture::RunFixture(Daemon::Options o, std::uint64_t seed, std::size_t directories)
    : Fixture(std::move(o), seed, directories) {
  REQUIRE(make_bucket(bucket));
}

Result<RunFixture::Launched> RunFixture::open(const std::string& job, std::uint64_t restart,
                                              std::optional<std::uint64_t> resume, bool discard_after) {
  auto request = named<wire::OpenRun>();
  request.mutable_launch()->set_job(job);
  request.mutable_launch()->set_restart(restart);
  if (resume) request.mutable_resume()->set_step(*resume);
  request.set_discard_after(discard_after);
  TRY(const auto reply, call<wire::OpenRunReply>(Method::kOpenRun, request));
  Launched out{request.launch(), reply.run_epoch(), {}};
  if (reply.has_resume()) out.resume = reply.resume().step();
  return out;
}

wire::Begin RunFixture::begin_request(const Launched& launched, std::uint64_t step, std::uint32_t rank,
                                      Terms terms) const {
  auto request = named<wire::Begin>();
  request.set_step(step);
  *request.mutable_launch() = launched.launch;
  *request.mutable_run_epoch() = launched.run_epoch;
  request.set_rank(rank);
  request.set_world_size(terms.world_size);
  request.set_overwrite(terms.overwrite);
  request.set_explicit_commit(terms.explicit_commit);
  return request;
}

format::Contents RunFixture::contents(OwnerId owner, std::uint32_t rank, std::uint32_t world_size) const {
  format::Contents out;
  format::ShardEntry shard;
  shard.tensor = "w";
  shard.dtype = format::DType::kU8;
  shard.global_shape = {world_size, 1000};
  shard.box = {.offset = {rank, 0}, .shape = {1, 1000}};
  shard.rank = rank;
  shard.crc = crc32c(std::string(1000, static_cast<char>('a' + rank)));
  shard.extents = {{.group = kFirstDataGroup,
                    .chunk = {.owner = owner, .writer = writer_of(rank), .index = 0},
                    .offset = 0,
                    .length = 1000}};
  out.shards.push_back(std::move(shard));
  return out;
}

wire::Seal RunFixture::upload(OwnerId owner, std::uint32_t rank, std::uint32_t world_size,
                              std::optional<format::Contents> given) {
  const auto writer = writer_of(rank);
  REQUIRE(put({.owner = owner, .writer = writer, .index = 0}, std::string(1000, static_cast<char>('a' + rank))));
  auto manifest = format::encode(given ? *given : contents(owner, rank, world_size));
  REQUIRE(manifest);
  REQUIRE(put({.owner = owner, .writer = writer, .index = 1}, *manifest));
  return seal_request(owner, rank, *manifest);
}

wire::Seal RunFixture::seal_request(OwnerId owner, std::uint32_t rank, const std::string& manifest) const {
  const auto writer = writer_of(rank);
  auto request = named<wire::Seal>();
  request.set_owner(std::string(owner.view()));
  request.set_rank(rank);
  request.set_writer(writer);
  auto& run = *request.add_manifest();
  run.set_group(data_group);
  run.set_writer(writer);
  run.set_first_index(1);
  run.set_count(1);
  run.set_chunk_bytes(static_cast<std::uint32_t>(manifest.size()));
  run.set_last_bytes(static_cast<std::uint32_t>(manifest.size()));
  request.set_manifest_bytes(manifest.size());
  request.set_digest(sha256(manifest));
  request.set_data_bytes(1000);
  request.add_groups(kFirstDataGroup);
  return request;
}

Result<OwnerId> RunFixture::save(const Launched& launched, std::uint64_t step, Terms terms) {
  OwnerId owner;
  for (std::uint32_t rank = 0; rank < terms.world_size; ++rank) {
    TRY(owner, begin(launched, step, rank, terms));
    CHECK_OK(save_rank(owner, rank, terms.world_size));
  }
  if (terms.explicit_commit) CHECK_OK(commit(owner));
  const auto reply = final_status(owner);
  if (reply.state() == wire::AttemptStatusReply::COMMITTED) return owner;
  return fail(static_cast<Errc>(reply.error_code()), reply.error());
}

Result<void> RunFixture::heartbeat(OwnerId owner, std::uint32_t rank) {
  auto request = named<wire::Heartbeat>();
  request.set_owner(std::string(owner.view()));
  request.set_rank(rank);
  auto reply = call<wire::Empty>(Method::kHeartbeat, request);
  if (!reply) return fail(reply.error());
  return {};
}

Result<void> RunFixture::abort(OwnerId owner, std::uint32_t rank, const std::string& reason) {
  auto request = named<wire::Abort>();
  request.set_owner(std::string(owner.view()));
  request.set_rank(rank);
  request.set_reason(reason);
  auto reply = call<wire::Empty>(Method::kAbort, request);
  if (!reply) return fail(reply.error());
  return {};
}

Result<void> RunFixture::commit(OwnerId owner) {
  auto request = named<wire::Commit>();
  request.set_owner(std::string(owner.view()));
  auto reply = call<wire::Empty>(Method::kCommit, request);
  if (!reply) return fail(reply.error());
  return {};
}

wire::AttemptStatusReply RunFixture::status(OwnerId owner, std::chrono::milliseconds wait) {
  auto request = named<wire::AttemptStatus>();
  request.set_owner(std::string(owner.view()));
  request.set_wait_millis(static_cast<std::uint32_t>(wait.count()));
  auto reply = call<wire::AttemptStatusReply>(Method::kAttemptStatus, request);
  INFO((reply ? "" : reply.error().message));
  REQUIRE(reply);
  return *reply;
}

wire::AttemptStatusReply RunFixture::final_status(OwnerId owner) {
  return status(owner, 20s);
}

Result<wire::StepInfo> RunFixture::open_step(std::optional<std::uint64_t> step) {
  auto request = named<wire::StepOpen>();
  if (step) request.mutable_step()->set_step(*step);
  return call<wire::StepInfo>(Method::kStepOpen, request);
}

std::vector<std::uint64_t> RunFixture::steps() {
  auto request = named<wire::StepList>();
  auto reply = call<wire::StepListReply>(Method::kStepList, request);
  REQUIRE(reply);
  std::vector<std::uint64_t> out;
  for (const auto& step : reply->steps()) out.push_back(step.step());
  return out;
}

}  // namespace cairn::server
