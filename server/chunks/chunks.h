#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/membership/membership.h"
#include "storage/chunk_store/chunk_store.h"

namespace cairn::server {

/// What any of these targets has, each chunk once; as ChunkStore::list().
Task<std::vector<storage::ChunkInfo>> list_of(std::vector<storage::Target*> targets, std::optional<ChunkId> after,
                                              std::size_t limit);

/// Chunks on every member of their data group. A chunk is written to all members at once, serving and syncing, from the
/// memory into which it was received, and acknowledged when every member has it durably; one that fails is taken from
/// its groups first. Any serving member answers reads; one that has lost a chunk, or bytes of it, is read around.
///
/// Threads:  the loop.
/// Lifetime: `members` outlives it.
/// source:   protocol.md 3; ARCHITECTURE.md, "Several data directories"
class Chunks {
 public:
  Chunks(rt::Runtime runtime, Membership& members) : runtime_(runtime), members_(members) {}

  /// One chunk on its way in; as storage::ChunkStore::Upload.
  class Upload {
   public:
    Task<void> write(std::uint32_t offset, rt::MutableBuffer memory, std::uint32_t size);
    /// Durable on every member when it returns ok.
    Task<void> finish();

   private:
    friend class Chunks;
    struct Part {
      storage::Target* target;
      std::unique_ptr<storage::ChunkStore::Upload> upload;  // nullptr: nothing to write
      bool has = false;                                     // the whole chunk, durably
      bool failed = false;
      bool writing() const { return upload != nullptr && !failed; }
    };
    Upload(rt::Runtime runtime, Membership& members, DataGroup group)
        : runtime_(runtime), members_(members), group_(group) {}
    /// A part of the chunk could not be written: goes on without a target that has failed.
    Result<void> failed(Part& part, Error why);
    Task<void> acknowledge();

    rt::Runtime runtime_;
    Membership& members_;
    DataGroup group_;
    std::vector<Part> parts_;
  };

  /// returns nullptr when the same chunk is durable on every member: nothing to do
  /// errors: kUnavailable  no member is here;  and as ChunkStore::start()
  Task<std::unique_ptr<Upload>> start(DataGroup group, ChunkId id, std::uint32_t length,
                                      std::vector<std::uint32_t> block_crcs);

  /// As ChunkStore::read(), from the first member that has good bytes.
  /// errors: kUnavailable  no member is here;  else what the member says that should have served
  Task<storage::CheckedBytes> read(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                   storage::Verify verify = storage::Verify::kAll);
  /// As ChunkStore::read_into(), likewise.
  Task<std::uint32_t> read_into(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                rt::MutableBuffer into);
  /// As ChunkStore::read_raw(), from the first member that can read it.
  Task<storage::ChunkStore::Raw> read_raw(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                          rt::MutableBuffer into);
  /// Chunks of all targets, each once; as ChunkStore::list().
  Task<std::vector<storage::ChunkInfo>> list(std::optional<ChunkId> after, std::size_t limit);
  /// Whether any target has it; as ChunkStore::find().
  Task<std::optional<storage::ChunkInfo>> find(ChunkId id);
  /// From all targets; as ChunkStore::remove(). One that has failed keeps its copies until it is back.
  Task<void> remove(std::vector<ChunkId> ids);
  /// As ChunkStore::look(), of every target.
  Task<void> look();
  /// All targets together.
  storage::ChunkStore::Room room() const;
  std::size_t unit_bytes() const { return members_.targets().all().front().target->chunks().unit_bytes(); }

  /// Told of a member's copy that a read found bad, or missing where another member has it.
  std::function<void(storage::Target&, const ChunkId&)> on_bad_copy;
  /// Reads that another member had to answer, since start.
  std::uint64_t reads_elsewhere() const { return reads_elsewhere_; }

 private:
  /// `read` of the first readable member that can; what the most telling member says when none can.
  template <class T, class Read>
  Task<T> from_any(DataGroup group, ChunkId id, Read read);
  /// Targets that have not failed.
  std::vector<storage::Target*> usable() const;
  std::vector<storage::Target*> readable(DataGroup group, const ChunkId& id) const;

  rt::Runtime runtime_;
  Membership& members_;
  std::uint64_t reads_elsewhere_ = 0;
};

}  // namespace cairn::server
