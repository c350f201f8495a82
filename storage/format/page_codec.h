#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "proto/common/ids.h"
#include "proto/common/units.h"
#include "storage/format/index_pages.h"

/// Bytes of index pages; private to storage/format. The tables stand in page_codec.cc.
namespace cairn::format::pages {

inline constexpr std::size_t kPageBytes = 16 * kKiB;      // a page ends before the entry that would make it longer
inline constexpr std::size_t kPageBytesMax = 64 * kKiB;   // of a page with several entries
inline constexpr std::size_t kEntryBytesMax = 101 << 20;  // of a page with one entry (metadata is the longest)
inline constexpr std::size_t kExtentsMax = 1 << 18;       // in one page
inline constexpr std::size_t kHeaderBytes = 20;
inline constexpr std::size_t kTrailerBytes = 8;
inline constexpr std::uint8_t kLevelsMax = 16;
inline constexpr std::uint32_t kFormatVersion = 1, kReaderVersionMin = 1;

enum class PageKind : std::uint8_t { kEntries = 1, kFences = 2, kRoot = 3 };

inline void put_u32(std::string& out, std::uint32_t value) {
  for (int i = 0; i < 4; ++i) out += static_cast<char>(value >> (8 * i));
}
inline void put_u64(std::string& out, std::uint64_t value) {
  for (int i = 0; i < 8; ++i) out += static_cast<char>(value >> (8 * i));
}
inline void put_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}
/// A name after `before`: length shared with it, length of the rest, the rest.
void put_name(std::string& out, std::string_view name, std::string_view before);

/// Takes bytes from the front; after the first thing that does not fit, everything is zero and failed() is true.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::uint64_t fixed(std::size_t size) {
    const auto bytes = raw(size);
    std::uint64_t value = 0;
    for (std::size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[i]);
    return value;
  }
  std::uint8_t u8() { return static_cast<std::uint8_t>(fixed(1)); }
  std::uint32_t u32() { return static_cast<std::uint32_t>(fixed(4)); }
  std::uint64_t u64() { return fixed(8); }
  std::uint64_t varint();
  std::uint32_t varint32();
  std::string_view raw(std::uint64_t size) {
    if (size > rest_.size()) failed_ = true;
    if (failed_) return {};
    const auto out = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return out;
  }
  std::string name(std::string_view before);

  std::size_t left() const { return rest_.size(); }
  bool failed() const { return failed_; }
  void fail() { failed_ = true; }

 private:
  std::string_view rest_;
  bool failed_ = false;
};

/// Header and body as they stand in the index; the fence gets size and CRC.
std::string seal(PageKind kind, std::uint8_t level, std::uint32_t count, std::string_view body, std::uint32_t& crc);

struct Page {
  PageKind kind = PageKind::kEntries;
  std::uint8_t level = 0;
  std::uint32_t count = 0;
  std::uint32_t crc = 0;
  std::string_view body;
};
/// Checks length, magic and CRC. errors: kDataLoss
Result<Page> open(std::string_view bytes, std::string_view what);

/// Entries of one page, taken one by one.
class EntriesBuilder {
 public:
  /// `last`: the entry added before (its key is enough), null in an empty page.
  /// False: the page is full; flush and add again. errors: kInvalid  too large for any page
  Result<bool> add(const Entry& entry, const Entry* last);
  bool empty() const { return count_ == 0; }
  std::uint32_t count() const { return count_; }
  std::string body() const;
  /// An empty page again, in the same memory.
  void clear();

 private:
  std::size_t writer_number(const ChunkId& chunk);
  void forget_writers(std::size_t first);
  /// The slot of the writer with this nonce for which `same` holds, or where it would stand.
  template <class Same>
  std::uint32_t* slot_of(std::uint64_t nonce, Same same) {
    for (auto at = nonce * 0x9e3779b97f4a7c15ull >> 20;; ++at)
      if (auto& slot = slots_[at & (slots_.size() - 1)]; slot == 0 || same(slot - 1)) return &slot;
  }
  void put_run(const Extent& first, std::uint32_t count, std::uint32_t last_length);
  void put_extents(const std::vector<Extent>& extents);
  void put(const ShardEntry& shard, const Entry* last);
  void put(const BlobEntry& blob, const Entry* last);
  void put(const TokenEntry& token, const Entry* last);
  void put(const MetaEntry& meta, const Entry* last);

  struct Writer {
    std::uint32_t owner = 0;  // in owners_
    std::uint64_t nonce = 0;
  };
  std::vector<OwnerId> owners_;
  std::vector<Writer> writers_;
  std::vector<std::uint32_t> slots_;  // writers_ by hash: number + 1, 0 is free; a power of two, at most half full
  std::string entries_, runs_;
  std::size_t extents_ = 0;
  std::uint32_t count_ = 0;
};

/// Entries of one page one after the other, each in the memory of the one before: an index has millions. Checks all
/// that one page can tell: bounds, each entry (check_entry), their order. `page` outlives it.
class EntriesReader {
 public:
  explicit EntriesReader(const Page& page) : reader_(page.body), left_(page.count) {}
  /// False: the page has ended. errors: kDataLoss
  Result<bool> next();
  /// What next() has found.
  const Entry& entry() const { return entry_; }
  Entry& entry() { return entry_; }

 private:
  void read_writers();
  bool read_shard(std::uint8_t tag);
  Entry read_other(std::uint8_t tag);
  std::string name() { return last_name_ = reader_.name(last_name_); }
  void read_extents(std::vector<Extent>& out);

  Reader reader_;
  std::uint32_t left_;
  bool begun_ = false, any_ = false;
  std::vector<ChunkId> writers_;
  std::string last_name_;
  Entry entry_;
  Box before_;  // of the shard before
  std::size_t extents_ = 0;
};

/// Appends a fence to a fence page's body. `before` is the one before it, with `end` where its page ended.
void put_fence(std::string& out, const Fence& fence, std::string_view name_before, std::uint64_t end);
/// `count` fences of pages of `level` that lie in [begin, end).
Result<std::vector<Fence>> fences_in(Reader& reader, std::uint32_t count, std::uint8_t level, std::uint64_t begin,
                                     std::uint64_t end, std::string_view what);

std::string_view name_in(const Entry& entry);

}  // namespace cairn::format::pages
