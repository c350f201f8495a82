#include <algorithm>
#include <map>
#include <set>

#include "proto/common/checksum.h"
#include "proto/rt/unit_pool.h"
#include "storage/target/target.h"
#include "tests/sim/bugs.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/payload.h"
#include "tests/sim/swarm.h"
#include "tests/sim/workload.h"

namespace cairn::sim {

namespace {

using namespace std::chrono_literals;

constexpr std::size_t kUnitBytes = 64 * kKiB;
constexpr HomeGroup kGroup = 7;

/// What the writers were told of one chunk.
struct ChunkState {
  enum { kTrying, kThere, kRemoving, kGone } state = kTrying;
  std::uint32_t length = 0;
  int busy = 0;  // writers at it: its state may change meanwhile
};

/// What they were told of one record: its value is `known` or one of those whose outcome nobody knows.
struct RecordState {
  std::string known;
  std::set<std::string> possible;
};

class StorageWorkload {
 public:
  explicit StorageWorkload(WorkloadOptions options)
      : options_(std::move(options)),
        swarm_(draw_swarm(options_.seed)),
        world_(options_.seed),
        draw_(options_.seed, "storage workload"),
        node_(world_.make_node("target")),
        disk_(world_.make_disk("d0", {.capacity_bytes = 64 * kMiB})),
        index_(world_.make_index("i0")) {
    world_.on_trace = options_.trace;
    Prng recycling(options_.seed, "recycling");
    if (recycling.chance(0.6)) {
      recycle_bytes_ = 512 * kKiB << recycling.below(5);
      segment_bytes_ = 64 * kKiB << recycling.below(4);
      clearances_ = 0.5;
      readers_ = recycling.between(1, 3);
      swarm_.disk.slow = std::max(swarm_.disk.slow, 0.02);
    }
  }
  ~StorageWorkload() {
    if (node_.alive()) node_.kill(Death::kProcess);
  }
  WorkloadResult run();

 private:
  void broken(const std::string& promise, const std::string& what) {
    violations_.push_back(promise + ": " + what);
    if (world_.tracing()) world_.trace("checker", "BROKEN " + violations_.back());
  }
  static std::string bytes_of_chunk(const ChunkId& id, std::uint32_t length) {
    std::string out(length, '\0');
    Payload("chunk", id.writer, {}, id.text()).fill(0, std::as_writable_bytes(std::span(out)));
    return out;
  }
  static std::vector<std::uint32_t> crcs_of(const ChunkId& id, const std::string& bytes) {
    std::vector<std::uint32_t> crcs;
    for (std::size_t at = 0; at < bytes.size(); at += kBlockBytes)
      crcs.push_back(crc32c(std::string_view(bytes).substr(at, kBlockBytes),
                            block_seed(id, static_cast<std::uint32_t>(at / kBlockBytes))));
    return crcs;
  }
  bool damage(const Error& error) const { return error.code == Errc::kDataLoss && swarm_.excuses(error); }

  bool open();
  void verify(const char* when);
  void kill(Death death);

  static Task<void> open_target(StorageWorkload* w);
  static Task<void> write(StorageWorkload* w, std::uint32_t writer);
  static Task<void> put(StorageWorkload* w, ChunkId id, bool abandon);
  static Task<void> read_one(StorageWorkload* w, ChunkId id);
  static Task<void> read_on(StorageWorkload* w);
  static Task<Buffer> read_all(StorageWorkload* w, ChunkId id, std::uint32_t length);
  static Task<void> repair(StorageWorkload* w, ChunkId id);
  static Task<void> remove(StorageWorkload* w, std::vector<ChunkId> ids);
  static Task<void> list(StorageWorkload* w);
  static Task<void> change(StorageWorkload* w, std::string key);
  static Task<void> verify_all(StorageWorkload* w, std::string when);

  std::optional<ChunkId> pick(int state) {
    std::vector<ChunkId> fits;
    for (const auto& [id, c] : chunks_)
      if (c.state == state && c.busy == 0) fits.push_back(id);
    if (fits.empty()) return std::nullopt;
    return fits[draw_.below(fits.size())];
  }

  WorkloadOptions options_;
  Swarm swarm_;
  World world_;
  Prng draw_;
  Node& node_;
  DiskImage& disk_;
  IndexImage& index_;
  std::uint64_t segment_bytes_ = 4 * kMiB, recycle_bytes_ = 0;
  std::uint64_t readers_ = 0;          // that do nothing else
  double clearances_ = 0;              // of removals: all that is there goes, as a step's chunks do
  rt::UnitPool* units_ = nullptr;      // held by the node
  storage::Target* target_ = nullptr;  // held by the node
  std::optional<Error> refused_;
  std::map<ChunkId, ChunkState> chunks_;
  std::map<std::string, RecordState> records_;
  std::uint32_t next_index_ = 0, next_value_ = 0;
  std::vector<std::string> violations_;
  WorkloadResult result_;
};

Task<void> StorageWorkload::open_target(StorageWorkload* w) {
  auto pool = rt::UnitPool::create(w->node_, 24, kUnitBytes);
  if (!pool) co_return fail(std::move(pool).error());
  w->units_ = &w->node_.hold(*std::move(pool));
  storage::Target::Options options;
  options.chunks.segment_bytes = w->segment_bytes_;
  options.chunks.ballast_bytes = 1 * kMiB;
  options.chunks.recycle_bytes = w->recycle_bytes_;
  options.bugs = storage_bugs(w->options_.bug);
  CO_TRY(auto target, co_await storage::Target::open(w->node_.runtime(), w->disk_.attach(w->node_),
                                                     w->index_.attach(w->node_), *w->units_, options));
  target->records().set_epoch(0, 1);
  w->target_ = &w->node_.hold(std::move(target));
  co_return {};
}

/// Opens, trying again while faults of the medium make it fail.
bool StorageWorkload::open() {
  for (int tries = 0; tries < 20; ++tries) {
    auto opened = world_.run(node_, open_target(this), 2min);
    if (opened) return true;
    if (world_.tracing()) world_.trace("target", "open: " + opened.error().message);
    if (opened.error().code == Errc::kDataLoss) {
      if (!swarm_.damages())
        broken("P1", "the target refuses to open, and nothing damaged it: " + opened.error().message);
      refused_ = opened.error();
      return false;
    }
    const bool excused = swarm_.disk.read_error > 0 || swarm_.disk.write_error > 0 || swarm_.disk.flush_error > 0 ||
                         swarm_.index.commit_error > 0 || swarm_.small_disk;
    if (!excused) {
      broken("P7", "the target does not open: " + opened.error().message);
      return false;
    }
    kill(Death::kProcess);
  }
  // Errors at every try: an operator would change the disk. Here it heals.
  disk_.faults = {};
  index_.faults = {};
  return world_.run(node_, open_target(this), 2min).has_value();
}

void StorageWorkload::kill(Death death) {
  target_ = nullptr;
  node_.kill(death);
  for (auto& [_, chunk] : chunks_) chunk.busy = 0;
  if (draw_.chance(0.3)) world_.run_for(draw_.between(rt::Duration(0), rt::Duration(500ms)));
  node_.restart();
}

// ---- Writers

Task<void> StorageWorkload::put(StorageWorkload* w, ChunkId id, bool abandon) {
  auto& chunk = w->chunks_[id];
  ++chunk.busy;
  const auto bytes = bytes_of_chunk(id, chunk.length);
  auto& store = w->target_->chunks();
  auto started = co_await store.start(id, chunk.length, crcs_of(id, bytes));
  if (!started) {
    --chunk.busy;
    if (started.error().code == Errc::kNoSpace) w->world_.injected(Fault::kDiskFull, "told by the store");
    if (started.error().code == Errc::kConflict)
      w->broken("P3", "start of " + id.text() + ": " + started.error().message);
    co_return {};
  }
  if (*started == nullptr) {  // durable already, says the store
    --chunk.busy;
    if (chunk.state == ChunkState::kTrying) chunk.state = ChunkState::kThere;
    co_return {};
  }
  auto upload = std::move(*started);
  std::vector<Task<void>> pieces;
  struct Piece {
    static Task<void> write(storage::ChunkStore::Upload* upload, rt::UnitPool* units, const std::string* bytes,
                            std::size_t at) {
      CO_TRY(auto unit, co_await units->acquire());
      const auto size = std::min(kUnitBytes, bytes->size() - at);
      std::memcpy(unit.bytes.data(), bytes->data() + at, size);
      co_return co_await upload->write(static_cast<std::uint32_t>(at), std::move(unit),
                                       static_cast<std::uint32_t>(size));
    }
  };
  for (std::size_t at = 0; at < bytes.size(); at += kUnitBytes) {
    if (abandon && at > 0) break;
    pieces.push_back(Piece::write(upload.get(), w->units_, &bytes, at));
  }
  auto written = co_await rt::all(w->node_, std::move(pieces));
  Result<void> finished;
  if (written && !abandon) finished = co_await upload->finish();
  --chunk.busy;
  if (written && !abandon && finished) {
    chunk.state = ChunkState::kThere;
    ++w->result_.commits;
  }
  co_return {};
}

Task<Buffer> StorageWorkload::read_all(StorageWorkload* w, ChunkId id, std::uint32_t length) {
  std::string out;
  for (std::uint32_t at = 0; at < length;) {
    const auto size = static_cast<std::uint32_t>(std::min<std::uint64_t>(kUnitBytes - at % kUnitBytes, length - at));
    CO_TRY(auto piece, co_await w->target_->chunks().read(id, at, size));
    out += piece.bytes.text();
    at += size;
  }
  co_return Buffer::from(std::move(out));
}

Task<void> StorageWorkload::read_one(StorageWorkload* w, ChunkId id) {
  auto& chunk = w->chunks_[id];
  ++chunk.busy;
  const bool there = chunk.state == ChunkState::kThere;
  auto got = co_await read_all(w, id, chunk.length);
  --chunk.busy;
  if (got) {
    ++w->result_.restores;
    if (got->text() != bytes_of_chunk(id, chunk.length)) w->broken("P3", "wrong bytes of " + id.text());
  } else if (got.error().code == Errc::kNotFound) {
    if (there && chunk.state == ChunkState::kThere) w->broken("P1", id.text() + " was acknowledged and is absent");
  } else if (got.error().code == Errc::kDataLoss && !w->swarm_.excuses(got.error())) {
    w->broken("P3", got.error().message);
  }
  co_return {};
}

/// Writes a chunk anew, damaged or not, while others do with it what they like.
Task<void> StorageWorkload::repair(StorageWorkload* w, ChunkId id) {
  const auto bytes = bytes_of_chunk(id, w->chunks_[id].length);
  auto& store = w->target_->chunks();
  CO_TRY(const auto entry, co_await store.entry(id));
  if (!entry) co_return {};
  CO_TRY(auto upload, co_await store.start_repair(id, entry->place, crcs_of(id, bytes)));
  for (std::size_t at = 0; at < bytes.size(); at += kUnitBytes) {
    CO_TRY(auto unit, co_await w->units_->acquire());
    const auto size = std::min(kUnitBytes, bytes.size() - at);
    std::memcpy(unit.bytes.data(), bytes.data() + at, size);
    CO_CHECK_OK(
        co_await upload->write(static_cast<std::uint32_t>(at), std::move(unit), static_cast<std::uint32_t>(size)));
  }
  co_await w->node_.sleep(w->draw_.between(rt::Duration(0), rt::Duration(2ms)));
  co_return co_await upload->finish();
}

Task<void> StorageWorkload::read_on(StorageWorkload* w) {
  for (;;) {
    co_await w->node_.sleep(w->draw_.between(rt::Duration(0), rt::Duration(500us)));
    if (auto id = w->pick(ChunkState::kThere)) CO_CHECK_OK(co_await read_one(w, *id));
  }
}

Task<void> StorageWorkload::remove(StorageWorkload* w, std::vector<ChunkId> ids) {
  for (const auto& id : ids) {
    ++w->chunks_[id].busy;
    w->chunks_[id].state = ChunkState::kRemoving;
  }
  auto removed = co_await w->target_->chunks().remove(ids);
  for (const auto& id : ids) {
    --w->chunks_[id].busy;
    if (removed) w->chunks_[id].state = ChunkState::kGone;
  }
  co_return {};
}

Task<void> StorageWorkload::list(StorageWorkload* w) {
  std::map<ChunkId, int> before;
  for (const auto& [id, c] : w->chunks_)
    if (c.busy == 0) before[id] = c.state;
  std::map<ChunkId, std::uint32_t> listed;
  std::optional<ChunkId> after;
  for (;;) {
    CO_TRY(auto page, co_await w->target_->chunks().list(after, 3));
    for (const auto& info : page) listed[info.id] = info.length;
    if (page.size() < 3) break;
    after = page.back().id;
  }
  for (const auto& [id, state] : before) {
    const auto& now = w->chunks_[id];
    if (now.state != state || now.busy != 0) continue;
    if (state == ChunkState::kThere && !listed.contains(id)) w->broken("P1", id.text() + " is not listed");
    if (state == ChunkState::kGone && listed.contains(id)) w->broken("P2", id.text() + " was removed and is listed");
  }
  for (const auto& [id, length] : listed)
    if (!w->chunks_.contains(id) || w->chunks_[id].length != length)
      w->broken("P3", id.text() + " is listed and was never put");
  co_return {};
}

Task<void> StorageWorkload::change(StorageWorkload* w, std::string key) {
  auto& model = w->records_[key];
  auto& records = w->target_->records();
  CO_TRY(auto now, co_await records.get(kGroup, key));
  const auto value = now ? now->value : std::string();
  if (value != model.known && !model.possible.contains(value))
    w->broken("P1", "record " + key + " is '" + value + "', acknowledged was '" + model.known + "'");
  storage::Transaction t;
  t.group = kGroup;
  t.compares.push_back({key, now ? now->version : Version{}});
  const auto next = std::to_string(++w->next_value_);
  t.puts.emplace_back(key, next);
  t.puts.emplace_back(key + ".twin", next);
  model.possible.insert(next);
  auto done = co_await records.apply(std::move(t));
  if (done) {
    // Whoever read an older version got a conflict: this is the value now, unless a later one is under way.
    model.known = next;
    std::erase_if(model.possible, [&](const auto& v) { return std::stoull(v) <= std::stoull(next); });
  } else if (done.error().code == Errc::kConflict) {
    model.possible.erase(next);
  }
  co_return {};
}

Task<void> StorageWorkload::write(StorageWorkload* w, std::uint32_t writer) {
  auto& draw = w->draw_;
  for (;;) {
    if (w->target_->committer().failure()) co_await w->node_.sleep(1s);
    co_await w->node_.sleep(draw.between(rt::Duration(0), rt::Duration(draw.chance(0.5) ? 50us : 3ms)));
    const auto dice = draw.below(100);
    if (dice < 45) {
      const ChunkId id{
          .owner = OwnerId::make(kGroup, 0, 1, draw.below(3)), .writer = writer, .index = ++w->next_index_};
      w->chunks_[id].length =
          static_cast<std::uint32_t>(draw.chance(0.1) ? draw.between(1, 200'000) : draw.between(1, 12'000));
      CO_CHECK_OK(co_await put(w, id, draw.chance(0.1)));
    } else if (dice < 52) {
      if (auto id = w->pick(ChunkState::kTrying)) CO_CHECK_OK(co_await put(w, *id, false));
    } else if (dice < 55) {
      if (auto id = w->pick(ChunkState::kThere)) CO_CHECK_OK(co_await put(w, *id, false));
    } else if (dice < 67) {
      if (auto id = w->pick(ChunkState::kThere)) CO_CHECK_OK(co_await read_one(w, *id));
    } else if (dice < 70) {
      if (auto id = w->pick(ChunkState::kThere)) (void)co_await repair(w, *id);
    } else if (dice < 82) {
      std::vector<ChunkId> ids;
      if (auto id = w->pick(ChunkState::kThere)) ids.push_back(*id);
      if (auto id = w->pick(ChunkState::kThere); id && *id != ids.front() && draw.chance(0.5)) ids.push_back(*id);
      if (!ids.empty() && w->clearances_ > 0 && draw.chance(w->clearances_)) {
        ids.clear();
        for (const auto& [id, chunk] : w->chunks_)
          if (chunk.state == ChunkState::kThere) ids.push_back(id);
      }
      if (!ids.empty()) CO_CHECK_OK(co_await remove(w, std::move(ids)));
    } else if (dice < 85) {
      (void)co_await list(w);
    } else {
      (void)co_await change(w, "r" + std::to_string(draw.below(4)));
    }
  }
}

// ---- After a restart

Task<void> StorageWorkload::verify_all(StorageWorkload* w, std::string when) {
  for (auto& [id, chunk] : w->chunks_) {
    auto found = co_await w->target_->chunks().find(id);
    auto got = co_await read_all(w, id, chunk.length);
    const bool absent = !got && got.error().code == Errc::kNotFound;
    if (found && found->has_value() == absent) w->broken("P3", when + ": find and read of " + id.text() + " disagree");
    if (got && got->text() != bytes_of_chunk(id, chunk.length)) w->broken("P3", when + ": wrong bytes of " + id.text());
    if (!got && !absent && !w->damage(got.error()))
      w->broken("P3", when + ": " + id.text() + ": " + got.error().message);
    if (absent && chunk.state == ChunkState::kThere)
      w->broken("P1", when + ": " + id.text() + " was acknowledged and is absent");
    if (!absent && chunk.state == ChunkState::kGone)
      w->broken("P2", when + ": " + id.text() + " was removed and is there");
    if (absent) {
      chunk.state = chunk.state == ChunkState::kTrying ? ChunkState::kTrying : ChunkState::kGone;
    } else {
      chunk.state = ChunkState::kThere;  // seen: it must stay
    }
    ++w->result_.restores;
  }
  for (auto& [key, model] : w->records_) {
    CO_TRY(auto now, co_await w->target_->records().get(kGroup, key));
    CO_TRY(auto twin, co_await w->target_->records().get(kGroup, key + ".twin"));
    const auto value = now ? now->value : std::string();
    if (value != (twin ? twin->value : std::string()))
      w->broken("P2", when + ": half a transaction: " + key + " is '" + value + "'");
    if (value != model.known && !model.possible.contains(value))
      w->broken("P1", when + ": record " + key + " is '" + value + "', acknowledged was '" + model.known + "'");
    model.known = value;
    model.possible.clear();
  }
  CO_CHECK_OK(co_await list(w));
  co_return {};
}

void StorageWorkload::verify(const char* when) {
  const auto disk_faults = std::exchange(disk_.faults, {});
  const auto index_faults = std::exchange(index_.faults, {});
  if (auto done = world_.run(node_, verify_all(this, when), 10min); !done)
    broken("P7", std::string(when) + ": " + done.error().message);
  disk_.faults = disk_faults;
  index_.faults = index_faults;
}

WorkloadResult StorageWorkload::run() {
  result_.seed = options_.seed;
  result_.configuration = swarm_.text();
  if (recycle_bytes_ > 0)
    result_.configuration += " recycle=" + std::to_string(recycle_bytes_) + " of " + std::to_string(segment_bytes_);
  const auto began = world_.now();
  const auto lives = draw_.between(2, 6);
  for (std::uint64_t life = 0; life < lives && violations_.empty() && !refused_; ++life) {
    if (!open()) break;
    if (life == 0) {
      enable_storage(swarm_, world_.faults);
      disk_.faults = swarm_.disk;
      index_.faults = swarm_.index;
      if (swarm_.small_disk) disk_.set_capacity(disk_.used_bytes() + 1 * kMiB + draw_.below(kMiB));
    } else {
      verify("after a restart");
    }
    for (std::uint32_t writer = 1; writer <= 1 + draw_.below(6); ++writer)
      node_.spawn(write(this, writer), [this](Result<void> result) {
        if (!result && world_.tracing()) world_.trace("writer", result.error().message);
      });
    for (std::uint64_t i = 0; i < readers_; ++i) node_.spawn(read_on(this), [](const Result<void>&) {});
    // The end: at the n-th operation of disk or index, or at a time.
    const auto count = [&] { return disk_.counts.writes + disk_.counts.flushes + index_.counts.commits; };
    const auto at = count() + draw_.between(1, 400);
    const auto limit = world_.now() + draw_.between(rt::Duration(100us), rt::Duration(2s));
    world_.run_until([&] { return count() >= at || !violations_.empty(); }, limit);
    for (std::uint32_t i = 0; i < swarm_.rot; ++i) disk_.rot("seg");
    kill(swarm_.power_loss && draw_.chance(0.8) ? Death::kPowerLoss : Death::kProcess);
    if (swarm_.index_older && life + 2 == lives) index_.come_back_older(draw_.between(1, 3));
  }

  if (violations_.empty() && !refused_) {
    disk_.faults = {};
    index_.faults = {};
    disk_.set_capacity(64 * kMiB);
    if (open()) {
      verify("after healing");
      // No space is lost: when the last chunk is removed and the cleaner has run, only small files are left.
      std::vector<ChunkId> all;
      for (auto& [id, c] : chunks_) all.push_back(id);
      if (auto removed = world_.run(node_, target_->chunks().remove(all), 5min); !removed)
        broken("P7", "removing everything: " + removed.error().message);
      world_.run_for(30s);
      const auto stats = target_->chunks().stats();
      if (stats.chunks != 0 || stats.live_bytes != 0 || stats.uploading_bytes != 0)
        broken("P6", "after removing everything " + std::to_string(stats.live_bytes) + " live and " +
                         std::to_string(stats.uploading_bytes) + " uploading bytes are counted");
      if (auto closed = world_.run(node_, target_->close(), 5min); !closed)
        broken("P7", "close: " + closed.error().message);
      if (disk_.used_bytes() > 2 * 4 * kMiB + 64 * kKiB)
        broken("P6", std::to_string(disk_.used_bytes()) + " bytes of the disk are used by nothing");
    }
  }
  conclude(result_, world_, began, violations_);
  return result_;
}

}  // namespace

WorkloadResult run_storage_workload(WorkloadOptions options) {
  return StorageWorkload(std::move(options)).run();
}

}  // namespace cairn::sim
