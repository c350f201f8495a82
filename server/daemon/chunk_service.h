#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>

#include "proto/rpc/rpc.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/chunks/chunks.h"
#include "server/chunks/shared_blocks.h"
#include "server/daemon/read_plan.h"
#include "server/records/owners.h"
#include "server/usage/usage.h"

namespace cairn::wire {
class PutChunk;
class ReadRanges;
class ReadReply;
class ReadShared;
class ReadSharedReply;
class ReadSharedReply_Piece;
class ReadShared_Piece;
}  // namespace cairn::wire

namespace cairn::server {

/// The bytes of chunks, in and out of calls.
///
/// Threads:  the loop; calls overlap. A dropped call abandons what it did.
/// Lifetime: what it is given outlives it.
/// source:   protocol.md 3; ARCHITECTURE.md, "A write", "A read"
class ChunkService {
 public:
  struct Options {
    ReadPlan::Limits read;
    SharedBlocks::Options shared;
    std::size_t expected_max = 1024;  // pieces of one request that are known beforehand to be shared
    std::size_t read_ahead = 4;       // pieces of one request read at once
    std::uint32_t frame_bytes = 0;    // largest payload; 0: the store's unit
    std::size_t shared_writes = 32;   // pieces on their way from clients' memory to the disk
    // Of clients' memory that this process has in its page tables: it counts in its resident size.
    std::uint64_t mapped_bytes_max = 8 * kMiB;
    bool existing_unseen = false;  // planted bug: an id that came before is accepted without looking at what is stored
  };
  ChunkService(rt::Runtime runtime, Chunks& chunks, Owners& owners, Usage& usage, rt::UnitPool& units, Options options);

  /// Stores what the call's data frames bring; durable when it returns ok. The same chunk again is done at once.
  /// errors: kFenced    the owner has ended: its record must precede the first chunk
  ///         kInvalid   sizes, CRCs and pieces that do not fit together
  ///         kDataLoss  bytes that do not match their CRC;  kConflict  other bytes under this id;  kNoSpace
  Task<void> put(std::shared_ptr<rpc::ServerCall> call, wire::PutChunk request);
  /// The same of a chunk that lies in a client's memory, without a call. `progress` is told of each piece.
  Task<void> put_shared(std::shared_ptr<rt::SharedMemory> memory, wire::PutChunk request,
                        std::function<void()> progress);
  /// What can be said of such a chunk without looking at its bytes. errors: kInvalid
  Result<ChunkId> check_shared(const rt::SharedMemory& memory, const wire::PutChunk& request) const;

  /// Sends the ranges' bytes, verified against the stored CRCs, in frames with a CRC each.
  /// errors: kInvalid   limits, ranges outside their chunk
  ///         kDataLoss  names chunk and block; also a chunk that is absent although its owner lives
  ///         kDeleted   a chunk whose owner has been removed
  Task<wire::ReadReply> read(std::shared_ptr<rpc::ServerCall> call, wire::ReadRanges request);

  /// Whole blocks into the memory that the client shares, unverified, with their CRCs.
  /// errors: kInvalid  places outside that memory, sizes;  kDataLoss, kDeleted  as read()
  Task<wire::ReadSharedReply> read_shared(std::shared_ptr<rpc::ServerCall> call, wire::ReadShared request);

  SharedBlocks::Stats shared_blocks() const { return shared_.stats(); }

 private:
  class Frame;
  struct Ahead;
  /// Copies what is wanted of a piece from the blocks that readers share into the frame; sends frames that are full.
  Task<void> add_shared(std::shared_ptr<rpc::ServerCall> call, Frame& frame,
                        std::shared_ptr<SharedBlocks::Reader> reader, DataGroup group, const PieceRead& piece);
  /// The same from a read of its own.
  Task<void> add_read(std::shared_ptr<rpc::ServerCall> call, Frame& frame, std::shared_ptr<Ahead> read);
  Task<void> read_piece(DataGroup group, std::shared_ptr<Ahead> ahead);
  Task<void> read_shared_piece(DataGroup group, std::shared_ptr<rpc::ServerCall> call, wire::ReadShared_Piece piece,
                               wire::ReadSharedReply_Piece* out);
  static Task<void> write_piece(Chunks::Upload& upload, std::uint32_t at, rt::MutableBuffer piece, std::uint32_t size,
                                rt::Semaphore::Lease turn);
  /// `call`: whose data frames bring the bytes, if they do not lie in `memory`. Each may be null.
  Task<void> store(std::shared_ptr<rpc::ServerCall> call, std::shared_ptr<rt::SharedMemory> memory,
                   wire::PutChunk request, std::function<void()> progress);
  /// Bytes [at, at + size) of the client's memory, which may be null. errors: kInvalid
  Result<rt::MutableBuffer> shared_part(std::shared_ptr<rt::SharedMemory> memory, std::uint64_t at, std::uint64_t size);
  /// Always an error: why a chunk is not there.
  Task<void> absent(ChunkId id, std::string message);

  rt::Runtime runtime_;
  Chunks& chunks_;
  Owners& owners_;
  Usage& usage_;
  rt::UnitPool& units_;
  Options options_;
  rt::Semaphore reads_, frames_;  // units
  rt::Semaphore shared_writes_;
  SharedBlocks shared_;
  // Clients' memory used since it was unmapped last, and how much of it.
  std::set<std::weak_ptr<rt::SharedMemory>, std::owner_less<>> mapped_;
  std::uint64_t mapped_bytes_ = 0;
  std::set<ChunkId> seen_;  // only for the planted bug
};

}  // namespace cairn::server
