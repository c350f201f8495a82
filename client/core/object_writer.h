#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/arena.h"
#include "client/core/chunk_writer.h"
#include "client/core/extent_list.h"
#include "client/core/objects.h"
#include "client/core/session.h"

namespace cairn::client {

struct PutTerms {
  bool if_absent = false;
  std::optional<OwnerId> if_version{};        // only in place of this version
  std::optional<std::uint64_t> size_bytes{};  // when known: refused early for lack of space, and memory to measure
};

/// One object on its way in: any number of write()s, then seal() or abort(). Nothing is visible before seal(). Memory
/// is that of the chunks on their way, whatever the size.
///
/// Threads:  the loop; calls that overlap are carried out one after the other.
/// Lifetime: destroying it drops what is not yet durable; the daemon drops the rest when nobody touches it.
class ObjectWriter {
 public:
  /// errors: kExists, kConflict  see PutTerms;  kNoSpace  quota or disk;  kNotFound  no such bucket
  static Task<std::shared_ptr<ObjectWriter>> begin(std::shared_ptr<Session> session, Arena& arena, std::string bucket,
                                                   std::string key, PutTerms terms, ChunkWriter::Options options,
                                                   ExtentList::Limits limits = {});
  /// `bytes` stay valid until the Task ends.
  Task<void> write(std::span<const std::byte> bytes);
  /// What has been written is durable, though not visible.
  Task<void> flush();
  /// errors: as begin(), and kConflict  it was given up, also by the daemon when idle;  kInvalid  not the size
  /// announced
  Task<ObjectSummary> seal();
  /// The upload ends and its bytes are freed. May be repeated.
  Task<void> abort(rt::TimePoint deadline);
  /// Unless it is sealed: abort() in the background, best effort.
  static void give_up(std::shared_ptr<ObjectWriter> writer);

 private:
  ObjectWriter(std::shared_ptr<Session> session, Arena& arena, OwnerId owner, ChunkWriter::Options options,
               ExtentList::Limits limits);
  Task<void> add(std::span<const std::byte> bytes);
  /// Stores pages of extents that are ready, in whole pieces; with `all`, to the end.
  Task<void> store_list(bool all);
  Task<ObjectSummary> send_seal();
  std::string what() const;

  std::shared_ptr<Session> session_;
  Arena& arena_;
  ChunkWriter::Options options_;
  ChunkWriter writer_;
  std::string bucket_, key_;
  PutTerms terms_;
  OwnerId owner_;
  ExtentList list_;
  std::unique_ptr<ChunkWriter> list_writer_;
  std::vector<format::Extent> list_extents_;
  std::uint64_t size_ = 0;
  std::uint32_t crc_ = 0;
  bool sealed_ = false;
  rt::Semaphore turn_;
};

}  // namespace cairn::client
