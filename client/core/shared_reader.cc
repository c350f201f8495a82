#include "client/core/shared_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>

#include "client/core/scatter.h"
#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr std::size_t kPiecesPerCall = 4;

/// Bytes of a chunk that somebody wants, and where they go.
struct Part {
  std::uint32_t offset = 0, length = 0;  // in the chunk
  ScatterCursor to;
  std::uint32_t end() const { return offset + length; }
};

/// What one unit of the window takes: blocks of one chunk, inside one unit of it.
struct Piece {
  ChunkId id;
  std::uint32_t begin = 0, end = 0;  // in the chunk; begin at a block
  std::vector<Part> parts;           // rising, apart from each other
};

/// Adds the next bytes of the request, [at, at + left) of a chunk.
void add_range(std::vector<Piece>& pieces, const ChunkId& id, std::uint32_t at, std::uint32_t left,
               std::uint32_t unit_bytes, ScatterCursor& to) {
  while (left > 0) {
    const auto size = std::min<std::uint32_t>(left, unit_bytes - at % unit_bytes);
    const auto begin = static_cast<std::uint32_t>(round_down(at, kBlockBytes));
    // Bytes that are wanted twice are read twice: the parts of a piece do not overlap.
    const bool same = !pieces.empty() && pieces.back().id == id &&
                      pieces.back().begin / unit_bytes == at / unit_bytes && pieces.back().parts.back().end() <= at;
    if (!same) pieces.push_back({.id = id, .begin = begin, .end = begin, .parts = {}});
    auto& piece = pieces.back();
    piece.end = std::max(piece.end, static_cast<std::uint32_t>(round_up(std::uint64_t{at} + size, kBlockBytes)));
    piece.parts.push_back({.offset = at, .length = size, .to = to});
    to.skip(size);
    at += size;
    left -= size;
  }
}

std::vector<Piece> pieces_of(const format::ReadRequest& request, const std::vector<std::span<std::byte>>& destinations,
                             std::uint32_t unit_bytes) {
  std::vector<Piece> pieces;
  ScatterCursor to(request, destinations);
  for (const auto& chunk : request.chunks) {
    for (std::size_t i = 0; i < chunk.offsets.size(); ++i)
      add_range(pieces, chunk.id, chunk.offsets[i], chunk.lengths[i], unit_bytes, to);
    for (const auto& strided : chunk.strided)
      for (format::RunCursor run(strided); !run.done(); run.take(run.left()))
        add_range(pieces, chunk.id, static_cast<std::uint32_t>(run.at()), static_cast<std::uint32_t>(run.left()),
                  unit_bytes, to);
  }
  return pieces;
}

/// Copies run on another thread, into memory of a caller who may give up: from then on not a byte is written.
class Gate {
 public:
  /// Runs `copy` unless the gate is shut. A block at a time, so that whoever shuts it hardly waits.
  template <class Copy>
  bool pass(Copy copy) {
    const std::lock_guard lock(mutex_);
    if (shut_) return false;
    copy();
    return true;
  }
  void shut() {
    const std::lock_guard lock(mutex_);
    shut_ = true;
  }

 private:
  std::mutex mutex_;
  bool shut_ = false;
};

/// Shuts the gate when the coroutine that owns it goes, however it goes.
struct Gatekeeper {
  std::shared_ptr<Gate> gate = std::make_shared<Gate>();
  Gatekeeper() = default;
  Gatekeeper(const Gatekeeper&) = delete;
  ~Gatekeeper() { gate->shut(); }
};

/// The pieces of one call: verified and put where they belong, away from the loop.
struct Placing {
  std::shared_ptr<Gate> gate;
  std::vector<Piece> pieces;             // the request and the destinations behind their cursors: inside the gate only
  std::vector<rt::MutableBuffer> units;  // as many
  wire::ReadSharedReply reply;
  bool unchecked = false;
  std::optional<Error> failure;

  void run() {
    for (std::size_t i = 0; i < pieces.size() && !failure; ++i)
      place(pieces[i], units[i].bytes, reply.pieces(static_cast<int>(i)));
  }

  void place(const Piece& piece, std::span<const std::byte> from, const wire::ReadSharedReply::Piece& read) {
    // The window may still be written by a read that was given up: what is verified must be a copy of our own.
    static thread_local std::array<std::byte, kBlockBytes> block_copy;
    const auto length = read.length();
    auto part = piece.parts.begin();
    for (std::uint32_t at = 0; at < length; at += kBlockBytes) {
      const auto size = std::min<std::uint32_t>(kBlockBytes, length - at);
      const auto begin = piece.begin + at, end = begin + size;
      while (part != piece.parts.end() && part->end() <= begin) ++part;
      if (part == piece.parts.end()) return;
      if (part->offset >= end) continue;
      const auto crc = read.block_crcs(static_cast<int>(at / kBlockBytes));
      const auto seed = block_seed(piece.id, begin / kBlockBytes);
      const auto block = from.subspan(at, size);
      bool right = true;
      const bool passed = gate->pass([&] {
        if (auto whole = destination_of(*part, begin, size)) {
          right = copy_with_crc32c(std::span(whole, size), block, seed) == crc;
          return;
        }
        std::memcpy(block_copy.data(), block.data(), size);
        right = crc32c(std::span<const std::byte>(block_copy).first(size), seed) == crc;
        for (auto p = part; (right || unchecked) && p != piece.parts.end() && p->offset < end; ++p)
          scatter(*p, begin, size, block_copy.data());
      });
      if (!passed) return;
      if (!right && !unchecked) {
        failure = Error{Errc::kDataLoss, "chunk " + piece.id.text() + " block " + std::to_string(begin / kBlockBytes) +
                                             ": what was read does not match its CRC"};
        return;
      }
    }
  }

  /// Where the whole block goes in one piece; null: it does not.
  std::byte* destination_of(const Part& part, std::uint32_t begin, std::uint32_t size) const {
    if (part.offset > begin || part.end() < begin + size) return nullptr;
    std::byte* out = nullptr;
    each(part, begin - part.offset, size, [&](std::byte* to, std::uint64_t n) {
      if (n == size) out = to;
    });
    return out;
  }
  void scatter(const Part& part, std::uint32_t begin, std::uint32_t size, const std::byte* block) const {
    const auto from = std::max(part.offset, begin), to = std::min(part.end(), begin + size);
    const auto* source = block + (from - begin);
    each(part, from - part.offset, to - from, [&](std::byte* out, std::uint64_t n) {
      std::memcpy(out, source, n);
      source += n;
    });
  }
  /// Calls with each run of the part's bytes [skip, skip + size) in the destinations.
  template <class Call>
  void each(const Part& part, std::uint64_t skip, std::uint64_t size, Call call) const {
    auto to = part.to;
    to.skip(skip);
    while (size > 0) {
      const auto run = to.take(size);
      call(run.data(), run.size());
      size -= run.size();
    }
  }
};

Task<void> read_pieces(std::shared_ptr<Session> session, DataGroup group, std::shared_ptr<Placing> placing,
                       rt::TimePoint deadline, ReadStats* stats) {
  wire::ReadShared read;
  for (std::size_t i = 0; i < placing->pieces.size(); ++i) {
    const auto& piece = placing->pieces[i];
    const auto place = session->place_of(placing->units[i].bytes);
    if (!place) co_return fail(Errc::kFailed, "a unit of the window outside the shared memory");
    auto& to = *read.add_pieces();
    wire::to_wire(piece.id, *to.mutable_id());
    to.set_offset(piece.begin);
    to.set_length(piece.end - piece.begin);
    to.set_to(*place);
  }
  auto message = wire::encode(read);
  stats->bytes_moved += 2 * wire::FrameHeader::kBytes + message.size();
  CO_TRY(const auto reply, co_await session->read_shared(group, std::move(message), deadline));
  stats->bytes_moved += reply.size();
  CO_CHECK_OK(wire::decode(reply, placing->reply, "read into shared memory"));
  if (static_cast<std::size_t>(placing->reply.pieces_size()) != placing->pieces.size())
    co_return fail(Errc::kProtocol, "read into shared memory: an answer for " +
                                        std::to_string(placing->reply.pieces_size()) + " pieces");
  for (std::size_t i = 0; i < placing->pieces.size(); ++i) {
    const auto& piece = placing->pieces[i];
    const auto& last = piece.parts.back();
    const auto& got = placing->reply.pieces(static_cast<int>(i));
    if (got.length() > piece.end - piece.begin || last.end() > piece.begin + got.length() ||
        static_cast<std::uint64_t>(got.block_crcs_size()) != (got.length() + kBlockBytes - 1) / kBlockBytes)
      co_return fail(Errc::kProtocol, "chunk " + piece.id.text() + ": " + std::to_string(got.length()) +
                                          " bytes were read, with " + std::to_string(got.block_crcs_size()) + " CRCs");
  }
  auto& runtime = session->runtime();
  rt::OneShot<bool> placed(runtime.loop);
  // The units go home on the loop: the closure that is destroyed elsewhere holds only a pointer that `done` shares.
  runtime.offload.submit([placing] { placing->run(); }, [placing, setter = placed.setter()] { setter.set(true); });
  co_await placed;
  if (placing->failure) co_return fail(*placing->failure);
  for (const auto& piece : placing->reply.pieces()) stats->bytes_moved += piece.length();
  stats->bytes_from_disk += placing->reply.bytes_from_disk();
  co_return {};
}

}  // namespace

bool fits_shared(const Session& session, const format::ReadRequest& request) {
  if (session.window() == nullptr) return false;
  // The blocks at both ends of a strided run are wanted by other ranks too, and here nobody shares them: only long
  // ones.
  constexpr std::uint64_t kStridedFactor = 4;
  std::uint64_t ranges = 0;
  for (const auto& chunk : request.chunks) {
    ranges += chunk.offsets.size();
    for (const auto& strided : chunk.strided) ranges += kStridedFactor * strided.runs();
  }
  return request.bytes >= ranges * session.shared_range_bytes_min();
}

Task<ReadStats> read_shared(std::shared_ptr<Session> session, const format::ReadRequest* request,
                            const std::vector<std::span<std::byte>>* destinations, rt::TimePoint deadline) {
  auto& loop = session->runtime().loop;
  auto* window = session->window();
  const auto unit_bytes = session->unit_bytes();
  if (window == nullptr || unit_bytes > window->unit_bytes() || unit_bytes % kBlockBytes != 0)
    co_return fail(Errc::kUnavailable, "no memory is shared");
  ReadStats stats{.bytes_wanted = request->bytes, .bytes_moved = 0, .bytes_from_disk = 0};
  auto pieces = pieces_of(*request, *destinations, unit_bytes);
  std::optional<Error> failure;
  const Gatekeeper keeper;
  rt::Scope calls(loop);
  for (std::size_t next = 0; next < pieces.size() && !failure;) {
    auto placing = std::make_shared<Placing>();
    placing->gate = keeper.gate;
    placing->unchecked = session->shared_unchecked();
    CO_TRY(auto unit, co_await window->acquire());
    // One that is waited for, and what else is free: nobody waits for units while holding some.
    for (std::optional<rt::MutableBuffer> free = std::move(unit); free; free = window->try_acquire()) {
      placing->units.push_back(*std::move(free));
      placing->pieces.push_back(std::move(pieces[next++]));
      if (next == pieces.size() || placing->units.size() == kPiecesPerCall) break;
    }
    calls.spawn(read_pieces(session, request->group, std::move(placing), deadline, &stats),
                [&failure](Result<void> end) {
                  if (!end && !failure) failure = std::move(end).error();
                });
  }
  CO_CHECK_OK(co_await calls.join());
  if (failure) co_return fail(*std::move(failure));
  co_return stats;
}

}  // namespace cairn::client
