#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"
#include "storage/chunk_store/checked_bytes.h"
#include "storage/committer/committer.h"
#include "storage/disk/disk.h"
#include "storage/index/index.h"

namespace cairn::storage {

/// What an index entry says of a chunk.
struct ChunkInfo {
  ChunkId id;
  std::uint32_t length = 0;  // bytes, 1 .. 64 MiB
  std::uint32_t digest = 0;  // crc32c over the little-endian block CRCs
  DataGroup group = 0;       // whose members all have it
};

std::uint32_t chunk_digest(const std::vector<std::uint32_t>& block_crcs);

/// Chunks on one local disk, written once, addressed by id: appended to preallocated segment files, each block of 64
/// KiB with a CRC32C seeded by id and block number (proto/common/checksum.h).
///
/// Threads:  call from the loop; calls may overlap.
/// Lifetime: await close() before destroying.
/// source:   ARCHITECTURE.md, "On disk", "A write"; protocol.md 6
class ChunkStore {
 public:
  struct Options {
    std::uint64_t segment_bytes = 1 * kGiB;   // 64 KiB .. 4 GiB, multiple of 4096; smaller is chosen on small disks
    std::uint64_t ballast_bytes = 64 * kMiB;  // free space kept for deletes and the index; NO_SPACE below it
    /// Space of dead chunks that is kept allocated in whole segments, to be written again, instead of being given back
    /// to the file system; 0: none. Counted as free.
    std::uint64_t recycle_bytes = 0;
    std::size_t deletes_per_batch = 1000;
  };

  /// Loads locations and space accounting; closes all old segments for good and punches their unindexed ranges in the
  /// background. `incarnation` names this process's segments.
  /// errors: kDataLoss  index entries that contradict the segment files
  static Task<std::unique_ptr<ChunkStore>> open(rt::Runtime runtime, Disk& disk, Index& index, Committer& committer,
                                                rt::UnitPool& units, std::uint64_t incarnation, Options options,
                                                PlantedBugs bugs);
  virtual ~ChunkStore() = default;

  /// One chunk on its way in. Dropping it before finish() abandons it and gives its space back.
  class Upload {
   public:
    virtual ~Upload() = default;
    /// Bytes that are to be written at `offset`, verified against the CRCs given to start() and padded to 4096: they
    /// may be written by this upload, and by others of the same chunk. errors: kDataLoss  bytes do not match their CRC;
    /// kInvalid  outside the chunk
    virtual Result<Buffer> check(std::uint32_t offset, rt::MutableBuffer memory, std::uint32_t size) = 0;
    /// The next bytes, at multiples of the pool's unit size (only the last piece may be shorter), any order, several at
    /// once; `checked` by check(). errors: kInvalid  outside the chunk or written twice
    virtual Task<void> write_checked(std::uint32_t offset, Buffer checked) = 0;
    /// Both.
    Task<void> write(std::uint32_t offset, rt::MutableBuffer memory, std::uint32_t size) {
      auto checked = check(offset, std::move(memory), size);
      if (!checked) co_return fail(std::move(checked).error());
      co_return co_await write_checked(offset, *std::move(checked));
    }
    /// After all pieces: durable and indexed when it returns ok.
    virtual Task<void> finish() = 0;
  };

  /// `group`: the data group that the chunk belongs to, remembered with it.
  /// sizes:  length 1 .. 64 MiB; block_crcs one per 64 KiB
  /// returns nullptr when the same chunk (length, digest) is already durable: nothing to do
  /// errors: kConflict  other bytes under this id;  kNoSpace;  kInvalid;  kFailed  target fail-stop
  virtual Task<std::unique_ptr<Upload>> start(ChunkId id, std::uint32_t length, std::vector<std::uint32_t> block_crcs,
                                              DataGroup group = 0) = 0;

  virtual Task<std::optional<ChunkInfo>> find(ChunkId id) = 0;

  /// [offset, offset + size) of a chunk, from blocks that matched their CRCs, as `verify` says. The range must not span
  /// more than one aligned piece of unit_bytes(): callers split. One unit is held by the returned bytes. errors:
  /// kNotFound;  kDataLoss  damaged or unreadable: chunk, block, segment, offset;  kInvalid  outside the chunk
  virtual Task<CheckedBytes> read(ChunkId id, std::uint32_t offset, std::uint32_t size,
                                  Verify verify = Verify::kAll) = 0;
  /// Whole blocks into the caller's memory, all of which matched their CRCs; less than `size` where the chunk ends.
  /// sizes:   as read_raw()
  /// returns the chunk's length
  /// errors:  as read(); then parts of `into` may have been written
  virtual Task<std::uint32_t> read_into(ChunkId id, std::uint32_t offset, std::uint32_t size,
                                        rt::MutableBuffer into) = 0;
  /// Blocks straight from the disk into the caller's memory, *not verified*, with the CRCs that they must have (seeded
  /// by chunk and block, proto/common/checksum.h) for whoever looks at them.
  struct Raw {
    std::uint32_t size = 0;  // what the chunk has of the bytes asked for
    std::vector<std::uint32_t> block_crcs;
  };
  /// sizes:  offset a multiple of 64 KiB, in one aligned piece of unit_bytes(); `into` aligned to 4096, with room for
  ///         `size` rounded up to 4096
  /// errors: kNotFound;  kDataLoss  the disk cannot read it;  kInvalid  outside the chunk
  virtual Task<Raw> read_raw(ChunkId id, std::uint32_t offset, std::uint32_t size, rt::MutableBuffer into) = 0;
  virtual std::size_t unit_bytes() const = 0;

  // ---- Looking after copies

  /// A chunk as the index has it now, past all caches.
  struct Entry {
    ChunkInfo info;
    std::string place;                      // where its bytes lie; another one once it has been repaired
    std::vector<std::uint32_t> block_crcs;  // empty: they are damaged
  };
  virtual Task<std::optional<Entry>> entry(ChunkId id) = 0;

  struct BadBlock {
    std::uint32_t offset = 0;  // in the chunk
    std::string reason;        // with segment and offset there
  };
  struct Scan {
    std::string place;
    std::uint32_t size = 0;  // bytes looked at
    std::vector<BadBlock> bad;
  };
  /// Reads the piece of a chunk at `offset`, up to unit_bytes(), from the disk, and tells every block of it that is
  /// bad: cannot be read, or does not match its CRC. A chunk that is removed meanwhile may look bad: see entry().
  /// sizes:  offset a multiple of unit_bytes()
  /// errors: kNotFound;  kInvalid  outside the chunk;  kDataLoss  the index cannot say where it lies
  virtual Task<Scan> scan(ChunkId id, std::uint32_t offset) = 0;

  /// Good bytes for a chunk that is damaged at `place`; as start(). They are written elsewhere, and take the place of
  /// the damaged ones at finish(), in one index batch, unless the chunk has been removed or repaired meanwhile: then
  /// nothing changes.
  /// errors: kNotFound  it does not lie there any more; also of finish();  kConflict  CRCs of another chunk's bytes
  virtual Task<std::unique_ptr<Upload>> start_repair(ChunkId id, std::string place,
                                                     std::vector<std::uint32_t> block_crcs) = 0;

  /// Erases index entries (synced), then, when no read of an extent is left, punches it or unlinks the empty segment.
  /// Unknown ids are skipped.
  virtual Task<void> remove(std::vector<ChunkId> ids) = 0;

  /// Chunks with key > after (nullopt: from the start), at most `limit`, in key order.
  virtual Task<std::vector<ChunkInfo>> list(std::optional<ChunkId> after, std::size_t limit) = 0;

  struct Stats {
    std::uint64_t chunks = 0;
    std::uint64_t live_bytes = 0;       // bytes of chunks in the index, padded
    std::uint64_t uploading_bytes = 0;  // reserved by uploads not yet finished
    std::uint64_t segments = 0;
    std::uint64_t free_bytes = 0;  // of the disk, and of it what is kept to be written again:
    std::uint64_t kept_bytes = 0;
    std::uint64_t total_bytes = 0;
    std::uint64_t bytes_written = 0, bytes_read = 0, blocks_bad = 0, segments_recycled = 0;  // since open
  };
  virtual Stats stats() const = 0;

  /// Where new chunks have room. What is free is as old as the last look; what this process has taken since is not in
  /// it any more.
  struct Room {
    std::uint64_t total_bytes = 0;
    std::uint64_t free_bytes = 0;     // of the disk, and kept to be written again
    std::uint64_t open_bytes = 0;     // allocated in segments, not yet handed out
    std::uint64_t ballast_bytes = 0;  // of the free ones, kept for deletes and the index
  };
  virtual Room room() const = 0;
  /// Asks the disk, unless that was done within a second.
  virtual Task<void> look() = 0;
  virtual Task<void> close() = 0;
};

}  // namespace cairn::storage
