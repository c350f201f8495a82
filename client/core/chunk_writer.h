#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/arena.h"
#include "client/core/session.h"
#include "storage/format/manifest.h"

namespace cairn::wire {
class ExtentRun;
}

namespace cairn::client {

/// Packs bytes into chunks of one owner and sends them, several at once. Bytes are copied once, into the arena, with
/// the block checksums computed in the same pass. That may begin before the owner is known: chunks then wait for it.
/// They can also be held back, so that the copy has processor and memory for itself.
///
/// Threads:  the loop; the copy itself runs on the offload threads when it is large.
/// Lifetime: destroying it drops what is not yet durable.
class ChunkWriter {
 public:
  struct Options {
    std::uint32_t chunks_in_flight = 4;
    rt::Duration timeout = std::chrono::seconds(60);  // for one chunk to become durable
    std::vector<DataGroup> groups;                    // where chunks may go, as the daemon says
  };
  /// Without an owner nothing is sent until start().
  ChunkWriter(std::shared_ptr<Session> session, Arena& arena, std::optional<OwnerId> owner, Options options);
  /// The owner is known now, and where its chunks may go: those that waited for it are sent. Once, and only when it was
  /// made without one.
  void start(OwnerId owner, std::vector<DataGroup> groups);
  /// Holds chunks back until release(), or until there is no memory left for another one.
  void hold() { held_ = true; }
  void release();
  /// No chunk is sent any more, and what comes after fails with this.
  void stop(Error why);
  /// Fills in what was not known when append() returned these: owner and group. After start().
  void place(std::vector<format::Extent>& extents) const;

  struct Appended {
    std::vector<format::Extent> extents;
    std::uint32_t crc = 0;  // plain CRC32C of the bytes
  };
  /// kSector: bytes of 64 KiB and more begin at a sector, so that a slice of one tensor does not read a neighbour's.
  /// kNone: right behind what came before, so that all together fill whole chunks.
  enum class Align { kNone, kSector };
  struct Source {
    std::span<const std::byte> bytes;
    Align align = Align::kNone;
    std::uint32_t crc = 0;  // is continued
  };
  /// Copies the bytes of `sources`, one behind the other; they must stay valid until the Task ends or the runtime's
  /// Offload is gone. One call at a time; after one whose Task was dropped nothing can be appended any more.
  /// errors: the first failure of a chunk sent before;  kUnavailable  no data group
  Task<std::vector<Appended>> append(std::vector<Source> sources);
  Task<Appended> append(std::span<const std::byte> bytes, Align align, std::uint32_t crc = 0);
  /// How many bytes will be appended before the next cut(): sizes the last chunk's memory. Unknown: whole chunks.
  void expect(std::uint64_t bytes) { expected_ = bytes; }
  /// Sends the chunk being filled; the next append starts a new one.
  Task<void> cut();
  /// cut(), then all chunks are durable, or the first failure.
  Task<void> drain();

  /// All chunks that are not acknowledged, as PutChunk messages that say where in the shared memory they lie; of their
  /// stamps only the group. Nothing when one has failed, is being filled, or lies elsewhere.
  std::optional<std::vector<std::string>> unacknowledged() const;

  std::uint64_t writer() const { return writer_; }
  std::vector<DataGroup> groups() const { return {groups_.begin(), groups_.end()}; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  struct Chunk {
    ChunkId id;
    DataGroup group = 0;
    std::vector<rt::MutableBuffer> units;
    std::uint32_t capacity = 0, length = 0;
    std::uint32_t block_crc = 0;            // of the block being filled
    std::vector<std::uint32_t> block_crcs;  // plain: the seed takes the owner
  };
  struct CopyPass;
  std::uint64_t next_chunk_bytes() const;
  Task<void> open_chunk();
  Result<void> open_chunk_in(std::vector<rt::MutableBuffer> units);
  Result<void> choose_group(Chunk& chunk);
  /// Gives the chunk being filled the next bytes of `from`, and takes them off it.
  void fill(CopyPass& pass, std::size_t source, std::span<const std::byte>& from);
  Task<void> copy(std::shared_ptr<CopyPass> pass);
  Result<void> close_chunk(std::unique_ptr<Chunk> chunk);
  Result<void> dispatch(Chunk chunk);
  /// A chunk as it travels.
  struct Parcel {
    std::uint32_t index = 0;
    DataGroup group = 0;
    std::string put;  // PutChunk, without its stamp
    std::vector<rpc::Piece> pieces;
  };
  Result<Parcel> pack(Chunk chunk);
  Task<void> send(Parcel parcel);

  std::shared_ptr<Session> session_;
  Arena& arena_;
  std::optional<OwnerId> owner_;
  Options options_;
  std::uint64_t writer_;
  std::uint32_t next_index_ = 0;
  std::optional<std::uint64_t> expected_;
  std::unique_ptr<Chunk> chunk_;                // being filled
  std::vector<std::unique_ptr<Chunk>> filled_;  // those before it of the same pass, which are being copied
  bool copying_ = false;                        // a pass is under way, or was dropped
  bool held_ = false;
  std::vector<Chunk> waiting_;    // full, but without owner, or held back
  std::vector<DataGroup> early_;  // by index: the groups of chunks that were opened before start()
  std::vector<DataGroup> groups_;
  std::map<std::uint32_t, std::string> unacknowledged_;  // by index; empty: not in shared memory
  std::uint64_t bytes_ = 0;
  std::optional<Error> failure_;
  rt::Semaphore in_flight_;
  rt::Signal sent_;
  rt::Scope sending_;
};

/// The groups that a begin reply names.
template <class Reply>
std::vector<DataGroup> groups_in(const Reply& reply) {
  std::vector<DataGroup> out;
  for (const auto& stamp : reply.data_groups()) out.push_back(stamp.group());
  return out;
}

/// Adds one whole chunk to runs of consecutive indices.
void add_run(const format::Extent& extent, const OwnerId& owner, std::vector<wire::ExtentRun>& out);
/// Whole chunks, in order, as runs of consecutive indices.
void to_runs(const std::vector<format::Extent>& extents, const OwnerId& owner, std::vector<wire::ExtentRun>& out);
/// Bytes [offset, offset + length) of what `runs` hold. errors: kDataLoss  the runs are shorter or malformed
Result<std::vector<format::Extent>> extents_in(std::span<const wire::ExtentRun> runs, const OwnerId& owner,
                                               std::uint64_t offset, std::uint64_t length);

}  // namespace cairn::client
