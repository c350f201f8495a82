#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "storage/format/index_pages.h"

/// Merging indexes (rank manifests are such) that are longer than memory: their bytes come front to back, in pieces of
/// any size, and each holds one page.
namespace cairn::format {

/// The entries of one index in order. Every page is checked against its own checksum and all together against what the
/// root counts; who made them, the caller must know (by a digest, or because it wrote them itself).
class EntryStream {
 public:
  explicit EntryStream(std::uint64_t index_bytes);
  EntryStream(EntryStream&&) noexcept;
  EntryStream& operator=(EntryStream&&) noexcept;
  ~EntryStream();

  /// The next bytes of the index.
  void supply(std::string_view bytes);
  /// Supplied and not read yet.
  std::uint64_t buffered() const;
  /// How many bytes must be buffered before next() can go on after kHungry; at most index_bytes.
  std::uint64_t wanted() const;

  enum class Next { kEntry, kHungry, kEnd };
  /// errors: kDataLoss
  Result<Next> next();
  /// What next() has found, until it is called again.
  const Entry& entry() const;
  Entry& entry();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Merges the entries of several indexes into their common order. Equal entries: the lower source first.
class IndexMerge {
 public:
  /// Sees every entry of a source before it takes part, and may change what does not count for the order of its source.
  using Check = std::function<Result<void>(std::size_t source, Entry& entry)>;
  IndexMerge(const std::vector<std::uint64_t>& index_bytes, Check check);

  void supply(std::size_t source, std::string_view bytes) { streams_[source].supply(bytes); }
  const EntryStream& stream(std::size_t source) const { return streams_[source]; }
  /// The source that must be supplied before next() can go on.
  std::optional<std::size_t> hungry() const { return hungry_; }

  /// The least entry of all, until the next call; null when a source is hungry, or at the end.
  /// errors: kDataLoss;  what the check says. With the number of its source in failed().
  Result<const Entry*> next();
  bool ended() const { return ended_ == streams_.size(); }
  std::optional<std::size_t> failed() const { return failed_; }

 private:
  /// To the source's next entry. False: it is hungry.
  Result<bool> advance(std::size_t source);
  bool before(std::uint32_t a, std::uint32_t b) const;
  std::uint32_t build(std::size_t node);
  void replay(std::uint32_t source);

  std::vector<EntryStream> streams_;
  Check check_;
  // A tree of losers: each inner node keeps the source that lost there, the winner of all stands apart. Taking one
  // costs a comparison a level.
  std::vector<std::uint32_t> losers_;
  std::vector<bool> over_;  // sources that have ended
  std::uint32_t winner_ = 0;
  std::size_t begun_ = 0;  // sources that have their first entry, in order
  bool built_ = false, taken_ = false;
  std::size_t ended_ = 0;
  std::optional<std::size_t> hungry_, failed_;
};

}  // namespace cairn::format
