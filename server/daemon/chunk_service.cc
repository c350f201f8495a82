#include "server/daemon/chunk_service.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/rt/mapped_pages.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {
namespace {

// Parts shorter than this are copied together: a unit of memory would be held, and a piece written, for each.
constexpr std::uint32_t kCopyBelow = 16 * kKiB;
constexpr int kSharedPiecesMax = 64;

Result<ChunkId> check_put(const wire::PutChunk& put) {
  TRY(const auto id, wire::from_wire(put.id()));
  const auto bad = [&](std::string why) { return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::move(why)); };
  if (put.length() == 0 || put.length() > kChunkBytesMax)
    return bad("length " + std::to_string(put.length()) + " is not within 1 .. 64 MiB");
  const auto blocks = (put.length() + kBlockBytes - 1) / kBlockBytes;
  if (static_cast<std::uint64_t>(put.block_crcs_size()) != blocks)
    return bad(std::to_string(put.block_crcs_size()) + " block CRCs for " + std::to_string(blocks) + " blocks");
  if (put.digest() != storage::chunk_digest({put.block_crcs().begin(), put.block_crcs().end()}))
    return bad("the digest is not that of its block CRCs");
  return id;
}

/// The next piece of a chunk that comes through the stream.
Task<rt::MutableBuffer> next_piece(const std::shared_ptr<rpc::ServerCall>& call, std::uint32_t at,
                                   std::uint32_t expected) {
  CO_TRY(auto data, co_await call->next_data());
  wire::DataHeader header;
  CO_CHECK_OK(wire::decode(data.message, header, "data header"));
  if (header.offset() != at || data.size != expected)
    co_return fail(Errc::kInvalid, "a piece of " + std::to_string(data.size) + " bytes at " +
                                       std::to_string(header.offset()) + " where " + std::to_string(expected) +
                                       " bytes at " + std::to_string(at) + " come next");
  co_return std::move(data.memory);
}

/// Bytes that the daemon may read or write in a client's memory.
Result<void> check_place(std::uint64_t memory_bytes, std::uint64_t at, std::uint64_t size) {
  if (at % kSectorBytes != 0 || at > memory_bytes || size > memory_bytes - at)
    return fail(Errc::kInvalid, std::to_string(size) + " bytes at " + std::to_string(at) +
                                    " of the client's shared memory, which has " + std::to_string(memory_bytes));
  return {};
}

Result<void> check_places(const ChunkId& id, const wire::PutChunk& put, std::uint32_t piece_bytes) {
  const auto pieces = (put.length() + piece_bytes - 1) / piece_bytes;
  if (static_cast<std::uint32_t>(put.shared_size()) != pieces)
    return fail(Errc::kInvalid, "chunk " + id.text() + ": " + std::to_string(put.shared_size()) +
                                    " places in shared memory for " + std::to_string(pieces) + " pieces");
  return {};
}

}  // namespace

Result<rt::MutableBuffer> ChunkService::shared_part(std::shared_ptr<rt::SharedMemory> memory, std::uint64_t at,
                                                    std::uint64_t size) {
  const auto all = memory ? memory->bytes() : std::span<std::byte>();
  CHECK_OK(check_place(all.size(), at, size));
  mapped_bytes_ += size;
  mapped_.insert(memory);
  if (mapped_bytes_ > options_.mapped_bytes_max) {
    for (const auto& weak : mapped_)
      if (auto* pages = dynamic_cast<rt::MappedPages*>(weak.lock().get())) pages->unmap_pages();
    mapped_.clear();
    mapped_bytes_ = 0;
  }
  return rt::MutableBuffer{.owner = std::move(memory), .bytes = all.subspan(at, size)};
}

// Of the memory readers have three quarters, which may be given back in a moment or not: a quarter is read straight
// into, one put together in frames, and one shared, which gives way. So readers who do not read cannot keep writers
// from being received. Nobody waits for memory that is read into while he has some of another kind.
ChunkService::ChunkService(rt::Runtime runtime, Chunks& chunks, Owners& owners, Usage& usage, rt::UnitPool& units,
                           Options options)
    : runtime_(runtime),
      chunks_(chunks),
      owners_(owners),
      usage_(usage),
      units_(units),
      options_(options),
      reads_(runtime.loop, std::max<std::size_t>(units.units() / 4, 1)),
      frames_(runtime.loop, std::max<std::size_t>(units.units() / 4, 1)),
      shared_writes_(runtime.loop, std::max<std::size_t>(options.shared_writes, 1)),
      shared_(runtime, chunks, units, options.shared) {
  if (options_.frame_bytes == 0) options_.frame_bytes = static_cast<std::uint32_t>(chunks_.unit_bytes());
}

Task<void> ChunkService::write_piece(Chunks::Upload& upload, std::uint32_t at, rt::MutableBuffer piece,
                                     std::uint32_t size, rt::Semaphore::Lease /*turn*/) {
  co_return co_await upload.write(at, std::move(piece), size);
}

Task<void> ChunkService::put(std::shared_ptr<rpc::ServerCall> call, wire::PutChunk request) {
  auto memory = call->memory();
  return store(std::move(call), std::move(memory), std::move(request), {});
}

Task<void> ChunkService::put_shared(std::shared_ptr<rt::SharedMemory> memory, wire::PutChunk request,
                                    std::function<void()> progress) {
  return store(nullptr, std::move(memory), std::move(request), std::move(progress));
}

Result<ChunkId> ChunkService::check_shared(const rt::SharedMemory& memory, const wire::PutChunk& request) const {
  TRY(const auto id, check_put(request));
  const auto piece_bytes = static_cast<std::uint32_t>(chunks_.unit_bytes());
  CHECK_OK(check_places(id, request, piece_bytes));
  for (int i = 0; i < request.shared_size(); ++i) {
    const auto size = std::min(piece_bytes, request.length() - static_cast<std::uint32_t>(i) * piece_bytes);
    if (auto ok = check_place(memory.bytes().size(), request.shared(i), round_up(size, kSectorBytes)); !ok)
      return fail(std::move(ok).error().with("chunk " + id.text()));
  }
  return id;
}

Task<void> ChunkService::store(std::shared_ptr<rpc::ServerCall> call, std::shared_ptr<rt::SharedMemory> memory,
                               wire::PutChunk request, std::function<void()> progress) {
  CO_TRY(const auto id, check_put(request));
  CO_CHECK_OK(co_await owners_.check_open(id.owner));
  if (options_.existing_unseen && !seen_.insert(id).second) co_return {};
  CO_CHECK_OK(co_await usage_.look());
  auto charge = usage_.charge(id.owner, request.length());
  if (!charge) co_return fail(std::move(charge).error().with("chunk " + id.text()));
  CO_TRY(const auto upload, co_await chunks_.start(request.stamp().group(), id, request.length(),
                                                   {request.block_crcs().begin(), request.block_crcs().end()}));
  if (!upload) co_return {};

  const auto piece_bytes = static_cast<std::uint32_t>(chunks_.unit_bytes());
  if (request.shared_size() > 0 || !call) CO_CHECK_OK(check_places(id, request, piece_bytes));
  std::optional<Error> failure;
  rt::Scope writes(runtime_.loop);  // after what its tasks use
  for (std::uint32_t at = 0; at < request.length();) {
    if (failure) co_return fail(*std::move(failure));
    const auto expected = std::min(piece_bytes, request.length() - at);
    rt::Semaphore::Lease turn;
    Result<rt::MutableBuffer> piece = fail(Errc::kFailed, "");
    if (request.shared_size() > 0) {
      // No memory of ours bounds how much is under way: this does.
      CO_TRY(turn, co_await shared_writes_.acquire(1));
      piece = shared_part(memory, request.shared(static_cast<int>(at / piece_bytes)), round_up(expected, kSectorBytes));
    } else {
      piece = co_await next_piece(call, at, expected);
    }
    if (!piece) co_return fail(std::move(piece).error().with("chunk " + id.text()));
    owners_.touch(id.owner);
    if (progress) progress();
    writes.spawn(write_piece(*upload, at, *std::move(piece), expected, std::move(turn)),
                 [&failure](Result<void> written) {
                   if (!written && !failure) failure = std::move(written).error();
                 });
    at += expected;
  }
  CO_CHECK_OK(co_await writes.join());
  if (failure) co_return fail(*std::move(failure));
  CO_CHECK_OK(co_await upload->finish());
  charge->keep();
  co_return {};
}

/// One read under way. Shared with its task, which may outlive the wait for it.
struct ChunkService::Ahead {
  Ahead(rt::Loop& loop, PieceRead p, rt::Semaphore::Lease l) : piece(std::move(p)), lease(std::move(l)), done(loop) {}
  PieceRead piece;
  rt::Semaphore::Lease lease;
  rt::OneShot<Result<storage::CheckedBytes>> done;
  bool shared = false;  // its blocks come from those that readers share
  storage::Verify verify = storage::Verify::kAll;
};

/// The data frame being put together: bytes that are copied into a unit of its own, and others as they lie. Its CRC
/// grows with it.
class ChunkService::Frame {
 public:
  explicit Frame(ChunkService& service) : service_(service) {}

  std::uint32_t room() const { return service_.options_.frame_bytes - size_; }
  /// There is memory to copy into.
  bool open() const { return unit_ != nullptr && filled_ < unit_->memory.bytes.size(); }
  std::uint32_t copy_room() const {
    return open() ? static_cast<std::uint32_t>(std::min<std::size_t>(room(), unit_->memory.bytes.size() - filled_)) : 0;
  }
  /// Waits for that, and for the peer when the frame is full.
  Task<void> make_copy_room(rpc::ServerCall& call) {
    if (room() == 0 || (unit_ && !open())) CO_CHECK_OK(co_await send(call));
    if (unit_) co_return {};
    CO_TRY(auto lease, co_await service_.frames_.acquire(1));
    CO_TRY(auto memory, co_await service_.units_.acquire());
    unit_ = std::make_shared<Unit>(Unit{std::move(memory), std::move(lease)});
    filled_ = copied_ = 0;
    co_return {};
  }
  void copy(std::span<const std::byte> bytes) {
    crc_ = crc32c(bytes, crc_);
    std::memcpy(unit_->memory.bytes.data() + filled_, bytes.data(), bytes.size());
    filled_ += bytes.size();
    size_ += static_cast<std::uint32_t>(bytes.size());
  }
  void add(const storage::CheckedBytes& from, std::uint32_t at, std::uint32_t size) {
    end_copy();
    crc_ = from.crc_of(at, size, crc_);
    payload_.push_back(from.bytes.slice(at, size));
    size_ += size;
  }
  Task<void> send(rpc::ServerCall& call) {
    if (size_ == 0) co_return {};
    end_copy();
    unit_.reset();
    wire::DataHeader header;
    header.set_offset(static_cast<std::uint32_t>(sent_));  // modulo 2^32
    header.set_crc(std::exchange(crc_, 0));
    sent_ += std::exchange(size_, 0);
    co_return co_await call.send_data(wire::encode(header), std::exchange(payload_, {}));
  }

 private:
  /// The lease goes back together with the memory that it stands for.
  struct Unit {
    rt::MutableBuffer memory;
    rt::Semaphore::Lease lease;
  };
  void end_copy() {
    if (filled_ == copied_ || !unit_) return;
    payload_.emplace_back(unit_, unit_->memory.bytes.subspan(copied_, filled_ - copied_));
    copied_ = filled_;
  }

  ChunkService& service_;
  std::vector<Buffer> payload_;
  std::shared_ptr<Unit> unit_;
  std::size_t filled_ = 0, copied_ = 0;  // of the unit; what is between them is not yet in the payload
  std::uint32_t size_ = 0, crc_ = 0;     // of all so far
  std::uint64_t sent_ = 0;               // bytes of the frames before
};

Task<void> ChunkService::read_piece(DataGroup group, std::shared_ptr<Ahead> ahead) {
  const auto& piece = ahead->piece;
  auto read = co_await chunks_.read(group, piece.id, piece.begin, piece.end - piece.begin, ahead->verify);
  if (!read) {
    auto error = std::move(read).error();
    if (error.code == Errc::kNotFound) {
      auto why = co_await absent(piece.id, std::move(error).message);
      error = std::move(why).error();
    }
    ahead->done.setter().set(fail(std::move(error)));
    co_return {};
  }
  // The turn goes back together with the memory that it stands for.
  struct Held {
    Buffer bytes;
    rt::Semaphore::Lease lease;
  };
  const auto view = read->bytes.bytes();
  auto held = std::make_shared<Held>(Held{std::move(read->bytes), std::move(ahead->lease)});
  read->bytes = Buffer(std::move(held), view);
  ahead->done.setter().set(std::move(read));
  co_return {};
}

Task<void> ChunkService::absent(ChunkId id, std::string message) {
  CO_TRY(const auto named, co_await owners_.named(id.owner));
  // A chunk that is not there although a record names its owner is damage, unless that has been removed meanwhile.
  if (named) co_return fail(Errc::kDataLoss, std::move(message));
  co_return fail(Errc::kDeleted, std::move(message) + ": what it belonged to has been removed");
}

Task<void> ChunkService::read_shared_piece(DataGroup group, std::shared_ptr<rpc::ServerCall> call,
                                           wire::ReadShared::Piece piece, wire::ReadSharedReply::Piece* out) {
  CO_TRY(const auto id, wire::from_wire(piece.id()));
  if (piece.length() > chunks_.unit_bytes())
    co_return fail(Errc::kInvalid, "a read of " + std::to_string(piece.length()) + " bytes in one piece");
  CO_TRY(auto into, shared_part(call->memory(), piece.to(), round_up(piece.length(), kSectorBytes)));
  auto read = co_await chunks_.read_raw(group, id, piece.offset(), piece.length(), std::move(into));
  if (!read && read.error().code == Errc::kNotFound) {
    auto why = co_await absent(id, std::move(read).error().message);
    co_return fail(std::move(why).error());
  }
  if (!read) co_return fail(std::move(read).error());
  out->set_length(read->size);
  out->mutable_block_crcs()->Add(read->block_crcs.begin(), read->block_crcs.end());
  co_return {};
}

Task<wire::ReadSharedReply> ChunkService::read_shared(std::shared_ptr<rpc::ServerCall> call, wire::ReadShared request) {
  if (request.pieces_size() == 0 || request.pieces_size() > kSharedPiecesMax)
    co_return fail(Errc::kInvalid, "read into shared memory: " + std::to_string(request.pieces_size()) +
                                       " pieces, allowed are 1 to " + std::to_string(kSharedPiecesMax));
  wire::ReadSharedReply reply;
  for (int i = 0; i < request.pieces_size(); ++i) reply.add_pieces();
  std::vector<Task<void>> reads;
  for (int i = 0; i < request.pieces_size(); ++i)
    reads.push_back(read_shared_piece(request.stamp().group(), call, request.pieces(i), reply.mutable_pieces(i)));
  CO_CHECK_OK(co_await rt::all(runtime_.loop, std::move(reads)));
  std::uint64_t from_disk = 0;
  for (const auto& piece : reply.pieces()) from_disk += piece.length();
  reply.set_bytes_from_disk(from_disk);
  co_return std::move(reply);
}

Task<void> ChunkService::add_shared(std::shared_ptr<rpc::ServerCall> call, Frame& frame,
                                    std::shared_ptr<SharedBlocks::Reader> reader, DataGroup group,
                                    const PieceRead& piece) {
  const SharedBlocks::Key key{piece.id, piece.piece};
  const auto base = std::uint64_t{piece.piece} * chunks_.unit_bytes();
  for (PartWalk walk(piece); !walk.done();) {
    if (shared_.crowded(*reader, key)) {
      // Those it will wait for may wait for the memory of a frame. What comes of it is asked for again below.
      CO_CHECK_OK(co_await frame.send(*call));
      (void)co_await shared_.get(reader, group, key, piece.blocks);
    }
    if (frame.copy_room() == 0) CO_CHECK_OK(co_await frame.make_copy_room(*call));
    auto got = co_await shared_.get(reader, group, key, piece.blocks);
    if (!got && got.error().code == Errc::kNotFound) {
      auto why = co_await absent(piece.id, std::move(got).error().message);
      co_return fail(std::move(why).error());
    }
    if (!got) co_return fail(std::move(got).error());
    if (piece.end > got->chunk_length)
      co_return fail(Errc::kInvalid, "chunk " + piece.id.text() + ": bytes up to " + std::to_string(piece.end) +
                                         " of " + std::to_string(got->chunk_length));
    // From here to the next turn of the loop nothing waits while the blocks are held.
    while (!walk.done() && frame.copy_room() > 0) {
      const auto size = std::min(walk.left(), frame.copy_room());
      frame.copy(got->piece.bytes().subspan(walk.at() - base, size));
      walk.take(size);
    }
  }
  shared_.done_with(*reader, key, piece.blocks);
  co_await runtime_.loop.sleep({});
  co_return {};
}

Task<void> ChunkService::add_read(std::shared_ptr<rpc::ServerCall> call, Frame& frame, std::shared_ptr<Ahead> read) {
  CO_TRY(const auto checked, co_await read->done);
  const bool whole_blocks = read->verify == storage::Verify::kPartlyWanted;
  for (PartWalk walk(read->piece); !walk.done();) {
    if (frame.room() == 0) CO_CHECK_OK(co_await frame.send(*call));
    auto size = std::min(walk.left(), frame.room());
    if (whole_blocks && size < walk.left()) {
      // Nobody has verified the block that the frame's end would cut.
      const auto cut = round_down(walk.at() + size, kBlockBytes);
      if (cut <= walk.at()) {
        CO_CHECK_OK(co_await frame.send(*call));
        continue;
      }
      size = static_cast<std::uint32_t>(cut - walk.at());
    }
    const auto at = walk.at() - read->piece.begin;
    // A copy is summed from its bytes, which need not be verified; what is added, from what was stored.
    if (walk.left() >= kCopyBelow || whole_blocks) {
      frame.add(checked, at, size);
    } else {
      if (frame.copy_room() == 0) CO_CHECK_OK(co_await frame.make_copy_room(*call));
      size = std::min(size, frame.copy_room());
      frame.copy(checked.bytes.bytes().subspan(at, size));
    }
    walk.take(size);
  }
  co_return {};
}

Task<wire::ReadReply> ChunkService::read(std::shared_ptr<rpc::ServerCall> call, wire::ReadRanges request) {
  CO_TRY(auto plan, ReadPlan::make(request, static_cast<std::uint32_t>(chunks_.unit_bytes()), options_.read));
  wire::ReadReply reply;
  reply.set_bytes(plan.bytes());
  const auto group = request.stamp().group();
  const auto reader =
      shared_.reader(request.fresh() ? std::vector<SharedBlocks::Key>() : plan.partly_wanted(options_.expected_max));
  // A frame must have room for a block, so that none is cut.
  const bool trusts = request.client_verifies() && options_.frame_bytes >= kBlockBytes;
  Frame frame(*this);
  std::uint64_t from_disk = 0;
  std::deque<std::shared_ptr<Ahead>> ahead;
  rt::Scope reads(runtime_.loop);
  for (auto next = plan.next(); next || !ahead.empty();) {
    while (next && ahead.size() < options_.read_ahead) {
      if (next->sparse() && !request.fresh()) {
        shared_.ahead(reader, group, {next->id, next->piece}, next->blocks);
        ahead.push_back(std::make_shared<Ahead>(runtime_.loop, *std::move(next), rt::Semaphore::Lease()));
        ahead.back()->shared = true;
      } else {
        auto lease = reads_.try_acquire(1);
        if (!lease) {
          if (!ahead.empty()) break;
          // Never wait for memory while holding some: others may wait for that.
          CO_CHECK_OK(co_await frame.send(*call));
          CO_TRY(lease, co_await reads_.acquire(1));
        }
        from_disk += next->block_bytes();
        ahead.push_back(std::make_shared<Ahead>(runtime_.loop, *std::move(next), *std::move(lease)));
        if (trusts && ahead.back()->piece.one_run()) ahead.back()->verify = storage::Verify::kPartlyWanted;
        reads.spawn(read_piece(group, ahead.back()));
      }
      next = plan.next();
    }
    const auto first = std::move(ahead.front());
    ahead.pop_front();
    if (first->shared) {
      CO_CHECK_OK(co_await add_shared(call, frame, reader, group, first->piece));
    } else {
      CO_CHECK_OK(co_await add_read(call, frame, first));
    }
  }
  CO_CHECK_OK(co_await frame.send(*call));
  reply.set_bytes_from_disk(from_disk + SharedBlocks::from_disk(*reader));
  co_return std::move(reply);
}

}  // namespace cairn::server
