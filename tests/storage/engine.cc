#include "tests/storage/engine.h"

#include <algorithm>
#include <cstring>

#include "tests/storage/real_machine.h"

namespace cairn::storage {

SimMachine::SimMachine(std::uint64_t seed, sim::DiskOptions options)
    : world(seed),
      node(world.make_node("daemon")),
      image(world.make_disk("d0", options)),
      index_image(world.make_index("d0/index")) {}

void SimMachine::drive(Task<void> task) {
  auto done = world.run(node, std::move(task));
  REQUIRE(done);
}

void SimMachine::end_process(std::unique_ptr<rt::UnitPool> units, std::unique_ptr<Target> target) {
  // Frames of the process go first, then what they use: the order in which kill() lets go.
  node.hold(std::move(units));
  node.hold(std::move(target));
  node.kill(sim::Death::kProcess);
  node.restart();
}

std::string pattern(std::uint64_t seed, std::size_t size) {
  std::string out(size, '\0');
  sim::Prng random(seed);
  for (std::size_t at = 0; at < size; at += 8) {
    const auto word = random.next();
    std::memcpy(out.data() + at, &word, std::min<std::size_t>(8, size - at));
  }
  return out;
}

ChunkId chunk(std::uint32_t index, std::uint64_t owner) {
  return {.owner = OwnerId::make(3, 0, owner, owner), .writer = 7, .index = index};
}

std::vector<std::uint32_t> crcs_of(const ChunkId& id, const std::string& bytes) {
  std::vector<std::uint32_t> out;
  for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
    out.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                         block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
  return out;
}

Task<rt::MutableBuffer> piece_of(rt::UnitPool& units, const std::string& bytes, std::size_t offset) {
  CO_TRY(auto memory, co_await units.acquire());
  std::memset(memory.bytes.data(), 0x5a, memory.bytes.size());  // what an earlier user left behind
  std::memcpy(memory.bytes.data(), bytes.data() + offset, std::min(memory.bytes.size(), bytes.size() - offset));
  co_return memory;
}

namespace {
Task<void> write_piece(ChunkStore::Upload& upload, rt::UnitPool& units, const std::string& bytes, std::size_t offset) {
  CO_TRY(auto memory, co_await piece_of(units, bytes, offset));
  const auto size = static_cast<std::uint32_t>(std::min(units.unit_bytes(), bytes.size() - offset));
  co_return co_await upload.write(static_cast<std::uint32_t>(offset), std::move(memory), size);
}
}  // namespace

Task<void> write_pieces(ChunkStore::Upload& upload, rt::UnitPool& units, std::string bytes) {
  for (std::size_t at = 0; at < bytes.size(); at += units.unit_bytes())
    CO_CHECK_OK(co_await write_piece(upload, units, bytes, at));
  co_return {};
}

Task<void> put_chunk(rt::Loop& loop, ChunkStore& store, rt::UnitPool& units, ChunkId id, std::string bytes) {
  CO_TRY(auto upload, co_await store.start(id, static_cast<std::uint32_t>(bytes.size()), crcs_of(id, bytes)));
  if (!upload) co_return {};
  std::vector<Task<void>> pieces;
  for (std::size_t at = 0; at < bytes.size(); at += units.unit_bytes())
    pieces.push_back(write_piece(*upload, units, bytes, at));
  CO_CHECK_OK(co_await rt::all(loop, std::move(pieces)));
  co_return co_await upload->finish();
}

Task<std::string> get_chunk(ChunkStore& store, ChunkId id) {
  CO_TRY(auto found, co_await store.find(id));
  if (!found) co_return fail(Errc::kNotFound, "no " + id.text());
  std::string out;
  while (out.size() < found->length) {
    const auto size = std::min<std::size_t>(store.unit_bytes(), found->length - out.size());
    CO_TRY(auto bytes,
           co_await store.read(id, static_cast<std::uint32_t>(out.size()), static_cast<std::uint32_t>(size)));
    out += bytes.bytes.text();
  }
  co_return out;
}

Target::Options Engine::small(PlantedBugs bugs) {
  Target::Options options;
  options.chunks.segment_bytes = 4 * kMiB;
  options.chunks.ballast_bytes = 1 * kMiB;
  options.bugs = bugs;
  return options;
}

Engine::Engine(std::unique_ptr<Machine> machine, Target::Options o)
    : options(std::move(o)), machine_(std::move(machine)) {}

Engine::~Engine() {
  if (target_) machine_->end_process(std::move(units_), std::move(target_));
}

Result<void> Engine::try_open() {
  REQUIRE(!target_);
  TRY(units_, rt::UnitPool::create(machine_->runtime().loop, 32, kTestUnitBytes));
  TRY(auto disk, machine_->disk());
  CHECK_OK(run(Target::check(*disk)));
  TRY(auto index, machine_->index());
  TRY(target_, run(Target::open(machine_->runtime(), std::move(disk), std::move(index), *units_, options)));
  return {};
}

void Engine::open() {
  auto opened = try_open();
  INFO((opened ? "" : opened.error().message));
  REQUIRE(opened);
}

void Engine::close() {
  REQUIRE(run(target_->close()));
  machine_->end_process(std::move(units_), std::move(target_));
}

void Engine::crash(sim::Death death) {
  auto& machine = sim();
  if (units_) machine.node.hold(std::move(units_));
  if (target_) machine.node.hold(std::move(target_));
  machine.node.kill(death);
  machine.node.restart();
}

std::vector<ChunkId> Engine::list() {
  auto listed = run(chunks().list(std::nullopt, 1000));
  REQUIRE(listed);
  std::vector<ChunkId> out;
  for (auto& info : *listed) out.push_back(info.id);
  return out;
}

namespace {
Task<void> wait_a_little(rt::Loop& loop) {
  co_await loop.sleep(std::chrono::milliseconds(1));
  co_return {};
}
}  // namespace

bool Engine::eventually(const std::function<bool()>& done) {
  for (int i = 0; i < 20'000 && !done(); ++i) REQUIRE(run(wait_a_little(loop())));
  return done();
}

std::vector<std::string> machine_kinds() {
  std::vector<std::string> kinds{"sim", "threads"};
  if (has_uring()) kinds.emplace_back("uring");
  return kinds;
}

std::unique_ptr<Machine> make_machine(const std::string& kind) {
  if (kind == "sim") return std::make_unique<SimMachine>();
  return make_real_machine(kind == "uring" ? IoBackend::kUring : IoBackend::kThreads);
}

}  // namespace cairn::storage
