#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/rt/unit_pool.h"
#include "server/chunks/chunks.h"

namespace cairn::server {

/// Blocks of which several readers want parts at about the same time, as ranks do that restore columns of what was
/// saved by rows: read from disk once, verified, and held for a moment. What is held is dropped when it was not used
/// for a while, when it must make room, or when somebody else needs the memory.
///
/// Readers that go through the same pieces keep pace: who is ahead waits, for a bounded time, rather than push out what
/// those behind him still want, who would have to read it again.
///
/// Chunks never change and their ids are never used again, so what is held is right; at worst it answers for a chunk
/// that was removed a moment ago.
///
/// Threads:  the loop.
/// Lifetime: what it is given outlives it; it outlives its readers.
class SharedBlocks {
 public:
  struct Options {
    std::size_t pieces_max = 0;                          // in memory; 0: a quarter of the pool
    rt::Duration hold = std::chrono::seconds(1);         // unused pieces are kept so long
    rt::Duration wait = std::chrono::milliseconds(500);  // a reader that does not move for so long is not waited for
  };
  /// A unit of a chunk, by its number.
  using Key = std::pair<ChunkId, std::uint32_t>;

  SharedBlocks(rt::Runtime runtime, Chunks& chunks, rt::UnitPool& units, Options options);
  ~SharedBlocks();
  SharedBlocks(const SharedBlocks&) = delete;

  /// One request, and the pieces that it will come for, in this order.
  class Reader;
  std::shared_ptr<Reader> reader(std::vector<Key> order);

  struct Blocks {
    Buffer piece;  // right where the blocks asked for are
    std::uint32_t chunk_length = 0;
  };
  /// Blocks (bit i: the i-th) of a piece. Do not hold them while waiting for a peer: it is the pool's memory.
  /// errors: as Chunks::read()
  Task<Blocks> get(std::shared_ptr<Reader> reader, DataGroup group, Key key, std::uint64_t blocks);
  /// Begins to read what get() will ask for, if there is room.
  void ahead(const std::shared_ptr<Reader>& reader, DataGroup group, const Key& key, std::uint64_t blocks);
  /// get() will have to wait until others have moved on.
  bool crowded(const Reader& reader, const Key& key);
  /// The reader has what it wanted of these blocks.
  void done_with(Reader& reader, const Key& key, std::uint64_t blocks);
  /// Bytes read from disk on behalf of a reader.
  static std::uint64_t from_disk(const Reader& reader);

  struct Stats {
    std::uint64_t read_bytes = 0;    // from disk
    std::uint64_t served_bytes = 0;  // of blocks, counted for every reader
    std::uint64_t waits = 0;         // for readers behind
    std::size_t pieces = 0;          // held now
  };
  Stats stats() const;

 private:
  struct Fetch;
  struct Piece;
  struct Want {
    Reader* reader;
    std::size_t index;  // in its order
  };
  using Pieces = std::map<Key, std::shared_ptr<Piece>>;

  bool drop_unwanted();
  bool make_room(const Reader& reader, const Key& key);
  bool moves(const Reader& reader) const;
  bool wanted(const Key& key) const;
  /// How far its next user is from it, if those who want it may lose it to `reader`, who needs `key` now; 0: they may
  /// not.
  std::size_t distance(const Key& victim, const Reader& reader, const Key& key) const;
  std::shared_ptr<Piece> add(const Key& key);
  /// Begins to read what is missing. Returns all that is under way for these blocks.
  std::vector<std::shared_ptr<Fetch>> fetch(const std::shared_ptr<Reader>& reader, DataGroup group,
                                            const std::shared_ptr<Piece>& piece, std::uint64_t blocks);
  static Task<void> run_fetch(SharedBlocks* self, std::shared_ptr<Reader> reader, DataGroup group,
                              std::shared_ptr<Piece> piece, std::shared_ptr<Fetch> fetch);
  Task<std::uint32_t> read(DataGroup group, std::shared_ptr<Piece> piece, std::uint64_t blocks);
  static Task<void> sweep(SharedBlocks* self);
  void give_way();

  rt::Runtime runtime_;
  Chunks& chunks_;
  rt::UnitPool& units_;
  Options options_;
  Pieces pieces_;
  std::map<Key, std::vector<Want>> wants_;
  std::size_t wants_count_ = 0;
  bool sweeping_ = false;
  Stats stats_;
  rt::Signal room_;
  rt::Scope scope_;  // last: its tasks use the rest
};

}  // namespace cairn::server
