#include "client/core/chunk_writer.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "proto/common/checksum.h"
#include "proto/common/crc_join.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr std::size_t kAlignFromBytes = kBlockBytes;
// Below this a copy is cheaper than waking another thread for it.
constexpr std::size_t kOffloadFromBytes = 256 * kKiB;

// Copied in one pass while chunks are held back. To wait for another thread costs 0.1 ms, and a chunk is copied in 2.
constexpr std::uint64_t kHeldPassBytes = 64 * kMiB;

}  // namespace

/// The one pass over source memory: copy, block CRCs, plain CRCs; piece by piece while it is in the cache. What it
/// needs of the chunks is its own, since it may outlive them.
struct ChunkWriter::CopyPass {
  struct Target {  // a chunk
    std::vector<rt::MutableBuffer> units;
    std::uint32_t at = 0;
    std::uint32_t block_crc = 0;
    std::vector<std::uint32_t> ended;  // CRCs of blocks filled up
  };
  struct Step {
    std::size_t target = 0, source = 0;
    std::span<const std::byte> from;
  };
  std::size_t unit_bytes = 0;
  std::vector<std::uint32_t> crcs;  // by source
  std::vector<Target> targets;
  std::vector<Step> steps;
  std::uint64_t bytes = 0;

  void run() {
    for (const auto& step : steps) run(targets[step.target], step.from, crcs[step.source]);
  }
  void run(Target& target, std::span<const std::byte> from, std::uint32_t& crc) const {
    while (!from.empty()) {
      const auto in_unit = target.at % unit_bytes;
      const auto size = std::min(
          {from.size(), static_cast<std::size_t>(kBlockBytes - target.at % kBlockBytes), unit_bytes - in_unit});
      if (target.at % kBlockBytes == 0) target.block_crc = 0;
      const auto to = target.units[target.at / unit_bytes].bytes.subspan(in_unit, size);
      const auto before = target.block_crc;
      target.block_crc = copy_with_crc32c(to, from.first(size), before);
      // The two differ only by what came before these bytes.
      crc = crc32c_join(crc ^ before, target.block_crc, size);
      target.at += static_cast<std::uint32_t>(size);
      from = from.subspan(size);
      if (target.at % kBlockBytes == 0) target.ended.push_back(target.block_crc);
    }
  }
};

ChunkWriter::ChunkWriter(std::shared_ptr<Session> session, Arena& arena, std::optional<OwnerId> owner, Options options)
    : session_(std::move(session)),
      arena_(arena),
      owner_(owner),
      options_(std::move(options)),
      writer_(session_->runtime().random.next()),
      in_flight_(session_->runtime().loop, std::max(1u, options_.chunks_in_flight)),
      sent_(session_->runtime().loop),
      sending_(session_->runtime().loop) {}

void ChunkWriter::start(OwnerId owner, std::vector<DataGroup> groups) {
  assert(!owner_);
  owner_ = owner;
  options_.groups = std::move(groups);
  early_.resize(next_index_);
  const auto begin = [this](Chunk& chunk) {
    chunk.id.owner = *owner_;
    if (auto chosen = choose_group(chunk); !chosen && !failure_) failure_ = std::move(chosen).error();
    early_[chunk.id.index] = chunk.group;
  };
  for (auto& chunk : waiting_) begin(chunk);
  for (auto& chunk : filled_) begin(*chunk);
  if (chunk_) begin(*chunk_);
  if (failure_) return stop(*failure_);
  if (!held_) release();
}

void ChunkWriter::release() {
  held_ = false;
  if (!owner_) return;
  for (auto& chunk : std::exchange(waiting_, {}))
    if (auto sent = dispatch(std::move(chunk)); !sent) return stop(std::move(sent).error());
}

void ChunkWriter::stop(Error why) {
  if (!failure_) failure_ = std::move(why);
  waiting_.clear();
  sent_.notify_all();
}

void ChunkWriter::place(std::vector<format::Extent>& extents) const {
  assert(owner_);
  for (auto& extent : extents) {
    if (extent.chunk.index >= early_.size()) continue;
    extent.chunk.owner = *owner_;
    extent.group = early_[extent.chunk.index];
  }
}

Result<void> ChunkWriter::choose_group(Chunk& chunk) {
  // Writers begin at different groups, and each goes round: all disks share the load. A few chunks at a time, so that
  // what belongs together stays in few runs.
  constexpr std::uint32_t kChunksInARow = 4;
  TRY(chunk.group, session_->choose_data_group(options_.groups, writer_ % 1024 + chunk.id.index / kChunksInARow));
  if (std::find(groups_.begin(), groups_.end(), chunk.group) == groups_.end()) groups_.push_back(chunk.group);
  return {};
}

std::uint64_t ChunkWriter::next_chunk_bytes() const {
  const std::uint64_t size = arena_.chunk_bytes();
  return expected_ ? std::min(size, std::max<std::uint64_t>(*expected_, 1)) : size;
}

Task<void> ChunkWriter::open_chunk() {
  // Whoever waits for memory holds no chunk back: what is in flight, or soon will be, frees some.
  const auto size = next_chunk_bytes();
  if (held_ && arena_.free_bytes() < size) release();
  CO_TRY(auto units, co_await arena_.take(size));
  if (failure_) co_return fail(*failure_);
  co_return open_chunk_in(std::move(units));
}

Result<void> ChunkWriter::open_chunk_in(std::vector<rt::MutableBuffer> units) {
  auto chunk = std::make_unique<Chunk>();
  chunk->id = {.owner = owner_.value_or(OwnerId()), .writer = writer_, .index = next_index_};
  if (owner_) CHECK_OK(choose_group(*chunk));
  ++next_index_;
  chunk->capacity =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(units.size() * arena_.unit_bytes(), arena_.chunk_bytes()));
  chunk->units = std::move(units);
  chunk_ = std::move(chunk);
  return {};
}

void ChunkWriter::fill(CopyPass& pass, std::size_t source, std::span<const std::byte>& from) {
  const auto target = filled_.size();
  if (pass.targets.size() == target)
    pass.targets.push_back({.units = chunk_->units, .at = chunk_->length, .block_crc = chunk_->block_crc, .ended = {}});
  const auto size = std::min<std::size_t>(from.size(), chunk_->capacity - chunk_->length);
  pass.steps.push_back({.target = target, .source = source, .from = from.first(size)});
  pass.bytes += size;
  chunk_->length += static_cast<std::uint32_t>(size);
  from = from.subspan(size);
}

Task<void> ChunkWriter::copy(std::shared_ptr<CopyPass> pass) {
  copying_ = true;
  if (pass->bytes < kOffloadFromBytes) {
    pass->run();
  } else {
    auto& runtime = session_->runtime();
    rt::OneShot<bool> copied(runtime.loop);
    // The units go home on the loop: the closure that is destroyed elsewhere holds only a pointer that `done` shares.
    runtime.offload.submit([pass] { pass->run(); }, [pass, setter = copied.setter()] { setter.set(true); });
    co_await copied;
  }
  copying_ = false;
  for (std::size_t i = 0; i < pass->targets.size(); ++i) {
    auto& chunk = i < filled_.size() ? *filled_[i] : *chunk_;
    const auto& target = pass->targets[i];
    chunk.block_crc = target.block_crc;
    chunk.block_crcs.insert(chunk.block_crcs.end(), target.ended.begin(), target.ended.end());
  }
  for (auto& chunk : std::exchange(filled_, {})) CO_CHECK_OK(close_chunk(std::move(chunk)));
  co_return {};
}

Task<std::vector<ChunkWriter::Appended>> ChunkWriter::append(std::vector<Source> sources) {
  static constexpr std::array<std::byte, kSectorBytes> kZeros{};
  if (copying_) co_return fail(Errc::kInvalid, "append: the one before was given up, or has not ended");
  std::vector<Appended> done(sources.size());
  std::vector<std::uint32_t> crcs;
  for (const auto& source : sources) crcs.push_back(source.crc);
  crcs.push_back(0);  // of what lies between them
  std::size_t next = 0;
  bool begins = true;  // nothing of the next source has been taken yet
  while (next < sources.size()) {
    if (sources[next].bytes.empty()) {
      ++next;
      begins = true;
      continue;
    }
    if (failure_) co_return fail(*failure_);
    if (chunk_ && chunk_->length == chunk_->capacity) CO_CHECK_OK(co_await cut());
    if (!chunk_) CO_CHECK_OK(co_await open_chunk());
    auto pass = std::make_shared<CopyPass>();
    pass->unit_bytes = arena_.unit_bytes();
    pass->crcs = std::move(crcs);
    for (; next < sources.size(); ++next, begins = true) {
      auto& [from, align, crc] = sources[next];
      if (std::exchange(begins, false) && align == Align::kSector && from.size() >= kAlignFromBytes) {
        auto gap = std::span(kZeros).first(round_up(chunk_->length, kSectorBytes) - chunk_->length);
        if (!gap.empty()) fill(*pass, sources.size(), gap);
      }
      while (!from.empty()) {
        if (chunk_->length == chunk_->capacity) {
          if (!held_ || pass->bytes >= kHeldPassBytes) break;
          auto units = arena_.try_take(next_chunk_bytes());
          if (!units) break;
          filled_.push_back(std::move(chunk_));
          if (auto opened = open_chunk_in(*std::move(units)); !opened) {
            filled_.clear();  // without their bytes
            stop(opened.error());
            co_return fail(*failure_);
          }
        }
        const auto at = chunk_->length;
        fill(*pass, next, from);
        const auto size = chunk_->length - at;
        done[next].extents.push_back({chunk_->group, chunk_->id, at, size});
        bytes_ += size;
        if (expected_) *expected_ -= std::min<std::uint64_t>(*expected_, size);
      }
      if (!from.empty()) break;
    }
    CO_CHECK_OK(co_await copy(pass));
    crcs = std::move(pass->crcs);
  }
  for (std::size_t i = 0; i < sources.size(); ++i) done[i].crc = crcs[i];
  co_return done;
}

Task<ChunkWriter::Appended> ChunkWriter::append(std::span<const std::byte> bytes, Align align, std::uint32_t crc) {
  std::vector<Source> sources;
  sources.push_back({.bytes = bytes, .align = align, .crc = crc});
  CO_TRY(auto done, co_await append(std::move(sources)));
  co_return std::move(done.front());
}

Task<void> ChunkWriter::cut() {
  if (copying_) co_return fail(Errc::kInvalid, "cut: an append was given up, or has not ended");
  if (chunk_) co_return close_chunk(std::move(chunk_));
  co_return {};
}

Result<void> ChunkWriter::close_chunk(std::unique_ptr<Chunk> chunk) {
  if (chunk->length % kBlockBytes != 0) chunk->block_crcs.push_back(chunk->block_crc);
  if (owner_ && !held_) return dispatch(std::move(*chunk));
  waiting_.push_back(std::move(*chunk));
  return {};
}

Result<void> ChunkWriter::dispatch(Chunk chunk) {
  TRY(auto parcel, pack(std::move(chunk)));
  sending_.spawn(send(std::move(parcel)), [this](Result<void> sent) {
    if (!sent && !failure_) failure_ = std::move(sent).error();
    sent_.notify_all();
  });
  return {};
}

Result<ChunkWriter::Parcel> ChunkWriter::pack(Chunk chunk) {
  Parcel out{.index = chunk.id.index, .group = chunk.group, .put = {}, .pieces = {}};
  wire::PutChunk put;
  wire::to_wire(chunk.id, *put.mutable_id());
  put.set_length(chunk.length);
  std::string crcs;
  for (std::uint32_t block = 0; block < chunk.block_crcs.size(); ++block) {
    const auto bytes = std::min<std::uint64_t>(kBlockBytes, chunk.length - std::uint64_t{block} * kBlockBytes);
    const auto crc = crc32c_join(block_seed(chunk.id, block), chunk.block_crcs[block], bytes);
    put.add_block_crcs(crc);
    crcs.append(reinterpret_cast<const char*>(&crc), sizeof crc);
  }
  put.set_digest(crc32c(crcs));

  const auto piece_bytes = std::min<std::uint32_t>(session_->unit_bytes(), arena_.unit_bytes());
  if (piece_bytes == 0 || session_->unit_bytes() != piece_bytes || arena_.unit_bytes() % piece_bytes != 0)
    return fail(Errc::kInvalid, "the daemon's buffers of " + std::to_string(session_->unit_bytes()) +
                                    " bytes do not divide this client's of " + std::to_string(arena_.unit_bytes()));
  for (std::uint32_t at = 0; at < chunk.length; at += piece_bytes) {
    auto& unit = chunk.units[at / arena_.unit_bytes()];
    wire::DataHeader header;
    header.set_offset(at);
    const auto size = std::min(piece_bytes, chunk.length - at);
    const auto in_unit = at % arena_.unit_bytes();
    out.pieces.push_back(
        {wire::encode(header), Buffer(unit.owner, std::span<const std::byte>(unit.bytes.subspan(in_unit, size)))});
  }
  out.put = wire::encode(put);
  put.mutable_stamp()->set_group(chunk.group);
  for (const auto& piece : out.pieces)
    if (const auto place = session_->place_of(piece.payload.bytes())) put.add_shared(*place);
  const bool shared = static_cast<std::size_t>(put.shared_size()) == out.pieces.size();
  unacknowledged_[out.index] = shared ? wire::encode(put) : std::string();
  return out;
}

std::optional<std::vector<std::string>> ChunkWriter::unacknowledged() const {
  if (chunk_ || failure_) return std::nullopt;
  std::vector<std::string> out;
  for (const auto& [index, put] : unacknowledged_) {
    if (put.empty()) return std::nullopt;
    out.push_back(put);
  }
  return out;
}

Task<void> ChunkWriter::send(Parcel parcel) {
  CO_TRY(auto turn, co_await in_flight_.acquire(1));
  if (failure_) co_return fail(*failure_);
  const auto deadline = session_->runtime().loop.now() + options_.timeout;
  CO_CHECK_OK(co_await session_->put_chunk(parcel.group, std::move(parcel.put), std::move(parcel.pieces), deadline));
  unacknowledged_.erase(parcel.index);
  co_return {};
}

Task<void> ChunkWriter::drain() {
  CO_CHECK_OK(co_await cut());
  while (sending_.running() > 0 && !failure_) co_await sent_.wait();
  if (failure_) co_return fail(*failure_);
  co_return {};
}

void add_run(const format::Extent& e, const OwnerId& owner, std::vector<wire::ExtentRun>& out) {
  assert(e.offset == 0);
  wire::ExtentRun* last = out.empty() ? nullptr : &out.back();
  // Only the last chunk of a run may be short.
  const bool joins = last != nullptr && last->group() == e.group && last->writer() == e.chunk.writer &&
                     last->first_index() + last->count() == e.chunk.index &&
                     last->last_bytes() == last->chunk_bytes() && e.length <= last->chunk_bytes();
  if (!joins) {
    out.emplace_back();
    last = &out.back();
    last->set_group(e.group);
    if (e.chunk.owner != owner) last->set_owner(std::string(e.chunk.owner.view()));
    last->set_writer(e.chunk.writer);
    last->set_first_index(e.chunk.index);
    last->set_chunk_bytes(e.length);
  }
  last->set_count(last->count() + 1);
  last->set_last_bytes(e.length);
}

void to_runs(const std::vector<format::Extent>& extents, const OwnerId& owner, std::vector<wire::ExtentRun>& out) {
  for (const auto& e : extents) add_run(e, owner, out);
}

Result<std::vector<format::Extent>> extents_in(std::span<const wire::ExtentRun> runs, const OwnerId& owner,
                                               std::uint64_t offset, std::uint64_t length) {
  std::vector<format::Extent> out;
  std::uint64_t run_start = 0;
  for (const auto& run : runs) {
    if (length == 0) break;
    if (run.count() == 0 || run.chunk_bytes() == 0 || run.chunk_bytes() > kChunkBytesMax || run.last_bytes() == 0 ||
        run.last_bytes() > run.chunk_bytes())
      return fail(Errc::kDataLoss, "malformed extent run");
    const std::uint64_t run_bytes = static_cast<std::uint64_t>(run.count() - 1) * run.chunk_bytes() + run.last_bytes();
    auto run_owner = owner;
    if (!run.owner().empty()) {
      TRY(run_owner, OwnerId::from_bytes(run.owner()));
    }
    while (length > 0 && offset < run_start + run_bytes) {
      const auto in_run = offset - run_start;
      const auto number = static_cast<std::uint32_t>(in_run / run.chunk_bytes());
      const auto in_chunk = static_cast<std::uint32_t>(in_run % run.chunk_bytes());
      const auto chunk_bytes = number + 1 == run.count() ? run.last_bytes() : run.chunk_bytes();
      const auto size = static_cast<std::uint32_t>(std::min<std::uint64_t>(length, chunk_bytes - in_chunk));
      out.push_back({run.group(),
                     {.owner = run_owner, .writer = run.writer(), .index = run.first_index() + number},
                     in_chunk,
                     size});
      offset += size;
      length -= size;
    }
    run_start += run_bytes;
  }
  if (length > 0) return fail(Errc::kDataLoss, "extent runs end " + std::to_string(length) + " bytes early");
  return out;
}

}  // namespace cairn::client
