#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/core/session.h"
#include "storage/format/manifest.h"

namespace cairn::wire {
class ExtentPages;
class ExtentRoot;
class ExtentRun;
class ObjectInfo;
class ObjectSeal;
}  // namespace cairn::wire

namespace cairn::client {

/// The extents of an object being written: few go into its record, many into pages that are stored beside it, so that
/// memory holds one page and a few bytes for each one before.
///
/// source: ExtentPages in proto/wire/wire.proto
class ExtentList {
 public:
  struct Limits {
    std::size_t inline_runs = 300;  // of 45 bytes; a record holds 64 KiB
    std::size_t page_runs = 1000;
  };
  ExtentList(OwnerId owner, Limits limits);
  ~ExtentList();

  /// The next bytes of the object. Parts of one chunk may come one by one.
  void add(const format::Extent& extent);
  /// Bytes of pages that are ready to be stored, one behind the other.
  std::string& ready() { return ready_; }
  /// No more comes. True: they are too many for the record, and the rest of the list is in ready().
  bool finish();
  /// What finish() decided, into the request; for pages also where `stored` has put them, and the writers.
  void fill(wire::ObjectSeal& seal, const std::vector<format::Extent>& stored,
            const std::vector<std::uint64_t>& writers) const;

 private:
  void close();
  void end_page(std::size_t runs);

  OwnerId owner_;
  Limits limits_;
  std::optional<format::Extent> open_;  // of the chunk that goes on
  std::vector<wire::ExtentRun> runs_;   // not yet in a page
  std::uint64_t first_ = 0;             // byte of the object with which they begin
  std::unique_ptr<wire::ExtentRoot> root_;
  std::string ready_;
  std::uint64_t list_bytes_ = 0;  // of all pages so far
  std::uint32_t root_bytes_ = 0;
  std::string root_digest_;
};

/// The extents of one version of an object, as its record and pages tell them; pages are read when they are needed.
///
/// Threads: the loop; calls overlap.
class ExtentMap {
 public:
  /// errors: kDataLoss  malformed
  static Result<std::shared_ptr<ExtentMap>> from(const wire::ObjectInfo& info);
  ~ExtentMap();
  /// Bytes [offset, offset + length), which lie inside. errors: kDataLoss;  as read_extents()
  static Task<std::vector<format::Extent>> find(std::shared_ptr<ExtentMap> self, std::shared_ptr<Session> session,
                                                std::uint64_t offset, std::uint64_t length, rt::Duration timeout);

 private:
  struct Page {
    std::uint64_t first = 0;
    std::vector<wire::ExtentRun> runs;
  };
  ExtentMap();
  Task<std::string> read(std::shared_ptr<Session> session, std::uint64_t offset, std::uint64_t length,
                         rt::Duration timeout) const;
  Task<void> load_root(std::shared_ptr<Session> session, rt::Duration timeout);
  Task<std::shared_ptr<const Page>> page(std::shared_ptr<Session> session, std::size_t number, rt::Duration timeout);

  OwnerId owner_;
  std::uint64_t size_ = 0;
  std::vector<wire::ExtentRun> runs_;         // of the object, when it has no pages
  std::unique_ptr<wire::ExtentPages> pages_;  //
  std::shared_ptr<const wire::ExtentRoot> root_;
  static constexpr std::size_t kKept = 4;
  std::vector<std::pair<std::size_t, std::shared_ptr<const Page>>> kept_;  // read last, oldest first
};

}  // namespace cairn::client
