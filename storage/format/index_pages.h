#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"
#include "storage/format/coverage.h"
#include "storage/format/manifest.h"

/// The paged format of rank manifests and of the merged index: entry pages, fence pages above them in levels, one root
/// page at the end. Byte tables stand in index_pages.cc. A root names everything below it by checksum; whoever keeps
/// the root's SHA-256 (the step record) can trust all of it. Every decoder is total: garbage is kDataLoss.
namespace cairn::format {

enum class Kind : std::uint8_t { kShard = 1, kBlob = 2, kToken = 3, kMeta = 4 };
Kind kind_of(const Entry& entry);

/// A page, and what lies in or below it.
struct Fence {
  std::uint64_t begin = 0;   // all pages below lie in [begin, offset) of the index
  std::uint64_t offset = 0;  // of the page
  std::uint32_t size = 0;
  std::uint32_t crc = 0;                               // CRC32C of the page
  std::uint8_t level = 0;                              // 0: entries; else fences of pages of level - 1
  Kind kind = Kind::kShard, last_kind = Kind::kShard;  // of the first and last entry below
  std::string name, last_name;                         // tensor, blob, stream or scope of them
  std::uint64_t entries = 0;                           // below
  std::uint64_t tensors = 0;                           // that begin below
  std::optional<Box> bounds;                           // holds all boxes below; only when all are of one tensor
};

struct Root {
  std::uint64_t index_bytes = 0;  // the root included
  std::uint8_t levels = 0;        // level of the pages that `fences` name, + 1
  Totals totals;
  std::vector<Fence> fences;
};

/// What to look for: entries of one kind by name.
struct Query {
  Kind kind = Kind::kShard;
  std::string name;
  bool prefix = false;     // all names that begin with `name`
  std::optional<Box> box;  // shards only: those that share an element with it, and maybe empty ones; empty: any
};

/// Writes an index, entry by entry in the order of order(). Holds about one page a level.
class IndexWriter {
 public:
  /// `out` takes the next bytes of the index; an error from it comes back from add() or finish().
  using Out = std::function<Result<void>(std::string_view)>;
  explicit IndexWriter(Out out);
  IndexWriter(IndexWriter&&) noexcept;
  IndexWriter& operator=(IndexWriter&&) noexcept;
  ~IndexWriter();

  /// errors: kInvalid  not after the entry before, wrong in itself, or larger than a page may be
  Result<void> add(const Entry& entry);
  /// Of an entry that check_entry() has passed.
  Result<void> add_checked(const Entry& entry);

  struct Written {
    std::uint64_t index_bytes = 0;
    std::uint32_t root_bytes = 0;  // the last bytes of the index
    std::string root_digest;       // SHA-256 of them
    Totals totals;
  };
  Result<Written> finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// errors: kDataLoss  not a root, or damaged;  kInvalid  written by a newer program: which version can read it
Result<Root> decode_root(std::string_view page, std::uint64_t index_bytes);
/// `ref` is the fence that led here; the page must have its size and checksum. errors: kDataLoss
Result<std::vector<Fence>> decode_fences(std::string_view page, const Fence& ref);
Result<Contents> decode_entries(std::string_view page, const Fence& ref);

/// All kinds in one list, in order. And back.
std::vector<Entry> entries_of(Contents contents);
void append(Contents& to, Entry entry);

/// Finds entries in an index whose pages come from elsewhere: fetch what wanted() names, hand it to supply(), until
/// wanted() is empty. Reads the pages that can hold a match and no others.
class IndexSearch {
 public:
  /// No queries: everything.
  IndexSearch(Root root, std::vector<Query> queries);

  /// Pages to fetch now, in rising order of offset; each is asked for once.
  std::vector<Fence> wanted();
  /// errors: kDataLoss
  Result<void> supply(const Fence& page, std::string_view bytes);
  /// Matches so far, and forgets them. In index order once all pages are in.
  Contents take();

 private:
  bool may_hold(const Fence& fence) const;
  bool is_wanted(const Entry& entry) const;

  std::vector<Query> queries_;  // sorted by (kind, name)
  bool everything_ = false, prefixes_ = false;
  std::vector<Fence> wanted_;
  Contents found_;
};

/// A whole index in memory.
/// errors: kInvalid  entries that check_entry refuses or that repeat; sorts by itself
Result<std::string> encode(Contents contents);
/// errors: kDataLoss, kInvalid as decode_root
Result<Contents> decode(std::string_view whole);
/// The root page, which ends the index, found by the length in its last bytes. errors: kDataLoss
Result<std::string_view> root_of(std::string_view whole);

}  // namespace cairn::format
