#include "storage/format/restore_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "storage/format/box.h"

namespace cairn::format {
namespace {

/// Bytes of one extent that go to one place of one want.
struct Piece {
  const Extent* extent = nullptr;
  std::uint32_t offset = 0;  // in the chunk
  std::uint32_t length = 0;
  std::uint32_t want = 0;
  std::uint64_t to = 0;
};

using Shards = std::span<const ShardEntry* const>;

/// All entries of one box.
struct BoxGroup {
  const Box* box = nullptr;
  Shards shards;
};

Failure contradiction(const ShardEntry& shard, std::string_view what) {
  return fail(Errc::kDataLoss, fmt::format("tensor '{}' box {}: {}", shard.tensor, text(shard.box), what));
}

/// The boxes of one tensor, found by a wanted box.
class TensorBoxes {
 public:
  static Result<TensorBoxes> make(Shards shards) {
    TensorBoxes out;
    out.first_ = shards.front();
    for (std::size_t begin = 0; begin < shards.size();) {
      const auto& shard = *shards[begin];
      std::size_t end = begin;
      for (; end < shards.size() && shards[end]->box == shard.box; ++end) {
        const auto& one = *shards[end];
        if (one.dtype != out.first_->dtype || one.global_shape != out.first_->global_shape)
          return contradiction(one, "another dtype or shape than other shards of the tensor");
        if (auto ok = check_entry(one); !ok) return contradiction(one, ok.error().message);
      }
      if (!empty(shard.box)) out.groups_.push_back({.box = &shard.box, .shards = shards.subspan(begin, end - begin)});
      begin = end;
    }
    out.sort_for_sweep();
    return out;
  }

  const ShardEntry& first() const { return *first_; }

  /// Calls `visit(group, common box)` for each box that shares an element with `wanted`.
  template <class Visit>
  void overlapping(const Box& wanted, Visit visit) const {
    if (groups_.empty()) return;
    const auto begin_of = [this](const BoxGroup& group) { return sweep_ < 0 ? 0 : group.box->offset[axis()]; };
    const std::uint64_t begin = sweep_ < 0 ? 0 : wanted.offset[axis()];
    const std::uint64_t end = sweep_ < 0 ? 1 : begin + wanted.shape[axis()];
    auto i = static_cast<std::size_t>(std::ranges::lower_bound(groups_, end, {}, begin_of) - groups_.begin());
    // Boxes before i begin in time; going back, stop where none before reaches as far as `begin`.
    while (i-- > 0 && reach_[i] > begin)
      if (const auto common = intersect(*groups_[i].box, wanted)) visit(groups_[i], *common);
  }

 private:
  std::size_t axis() const { return static_cast<std::size_t>(sweep_); }

  void sort_for_sweep() {
    const std::size_t dimensions = first_->global_shape.size();
    for (std::size_t d = 0; d < dimensions && sweep_ < 0; ++d)
      if (std::ranges::any_of(groups_,
                              [&](const auto& g) { return g.box->offset[d] != groups_.front().box->offset[d]; }))
        sweep_ = static_cast<int>(d);
    if (sweep_ > 0)  // they are sorted by the first dimensions already, in which they do not differ
      std::ranges::sort(groups_, {}, [this](const BoxGroup& group) { return group.box->offset[axis()]; });
    std::uint64_t reach = 0;
    for (const auto& group : groups_) {
      reach = std::max(reach, sweep_ < 0 ? 1 : group.box->offset[axis()] + group.box->shape[axis()]);
      reach_.push_back(reach);
    }
  }

  const ShardEntry* first_ = nullptr;
  std::vector<BoxGroup> groups_;      // by offset in the sweep dimension
  std::vector<std::uint64_t> reach_;  // largest end of groups 0 .. i in it
  int sweep_ = -1;                    // first dimension in which the boxes' origins differ; -1: none
};

class Planner {
 public:
  explicit Planner(std::span<const Want> wants) : wants_(wants) {}

  Result<void> add(std::uint32_t want_index, const TensorBoxes& tensor) {
    const auto& want = wants_[want_index];
    const auto& saved = tensor.first();
    const auto where = [&] { return fmt::format("tensor '{}'", want.tensor); };
    if (auto ok = check_box(want.box, saved.global_shape); !ok) return fail(std::move(ok.error()).with(where()));
    if (want.dtype && *want.dtype != saved.dtype)
      return fail(Errc::kInvalid,
                  fmt::format("{}: saved as {}, wanted as {}", where(), name_of(saved.dtype), name_of(*want.dtype)));
    TRY(const auto count, elements(want.box.shape));
    const auto bytes = bytes_of(saved.dtype, count);
    if (!bytes) return fail(Error(bytes.error()).with(fmt::format("{} box {}", where(), text(want.box))));
    if (want.size_bytes && *want.size_bytes != *bytes)
      return fail(Errc::kInvalid, fmt::format("{}: box {} of {} is {} bytes, the buffer {}", where(), text(want.box),
                                              name_of(saved.dtype), *bytes, *want.size_bytes));
    if (count == 0) return {};

    std::vector<BoxGroup> found;
    std::vector<Box> parts;
    tensor.overlapping(want.box, [&](const BoxGroup& group, const Box& common) {
      found.push_back(group);
      parts.push_back(common);
    });
    std::vector<const Box*> pointers;
    for (const auto& part : parts) pointers.push_back(&part);
    if (const auto flaw = find_flaw(std::move(pointers), want.box)) {
      if (flaw->covered == 0)
        return fail(Errc::kNotFound, fmt::format("{}: no saved bytes for {}", where(), text(flaw->box)));
      return fail(Errc::kDataLoss, fmt::format("{}: {} was saved {} times", where(), text(flaw->box), flaw->covered));
    }
    for (const auto& group : found) CHECK_OK(add_group(want_index, group));
    return {};
  }

  std::vector<Piece> take() { return std::move(pieces_); }

 private:
  Result<void> add_group(std::uint32_t want_index, const BoxGroup& group) {
    const auto& first = *group.shards.front();
    if (!first.holder) {
      for (const auto* shard : group.shards)
        if (shard->holder || shard->crc != first.crc) return contradiction(first, "saved twice with different bytes");
      return add_shard(want_index, first);
    }
    for (std::size_t i = 0; i < first.holder->count; ++i) {
      if (i < group.shards.size() &&
          *group.shards[i]->holder == Holder{static_cast<std::uint32_t>(i), first.holder->count}) {
        CHECK_OK(add_shard(want_index, *group.shards[i]));
        continue;
      }
      return fail(Errc::kNotFound, fmt::format("tensor '{}': no saved bytes of holder {} of {} for {}", first.tensor, i,
                                               first.holder->count, text(first.box)));
    }
    if (group.shards.size() != first.holder->count) return contradiction(first, "more holders than they say");
    return {};
  }

  /// Both runs and extents rise in the shard's bytes, so one pass over each is enough.
  Result<void> add_shard(std::uint32_t want_index, const ShardEntry& shard) {
    TRY(const auto part, saved_range(shard));
    runs_.clear();
    CHECK_OK(copy_runs(shard.tensor, shard.dtype, shard.box, part, wants_[want_index].box, runs_));
    std::size_t extent = 0;
    std::uint64_t extent_begin = 0;  // of that extent, in the shard's bytes
    for (auto run : runs_) {
      while (run.length != 0) {
        // check_entry proved that the extents hold all of the shard's bytes.
        while (run.saved - extent_begin >= shard.extents[extent].length) extent_begin += shard.extents[extent++].length;
        const auto& at = shard.extents[extent];
        const std::uint64_t inner = run.saved - extent_begin, length = std::min(run.length, at.length - inner);
        pieces_.push_back({.extent = &at,
                           .offset = static_cast<std::uint32_t>(at.offset + inner),
                           .length = static_cast<std::uint32_t>(length),
                           .want = want_index,
                           .to = run.wanted});
        run.saved += length, run.wanted += length, run.length -= length;
      }
    }
    return {};
  }

  std::span<const Want> wants_;
  std::vector<Piece> pieces_;
  std::vector<CopyRun> runs_;
};

/// Packs sorted pieces into requests.
class Packer {
 public:
  explicit Packer(const PlanLimits& limits) : limits_(limits) {}

  void add(Piece piece) {
    plan_.bytes += piece.length;
    while (piece.length != 0) {
      if (plan_.requests.empty() || current().group != piece.extent->group || full(piece)) {
        plan_.requests.push_back({.group = piece.extent->group, .chunks = {}, .scatter = {}, .bytes = 0});
        ranges_ = 0;
      }
      const auto room = limits_.request_bytes_max - current().bytes;
      const auto length = static_cast<std::uint32_t>(std::min<std::uint64_t>(piece.length, room));
      put(piece, length);
      piece.offset += length, piece.to += length, piece.length -= length;
    }
  }

  RestorePlan take() { return std::move(plan_); }

 private:
  ReadRequest& current() { return plan_.requests.back(); }

  bool continues_range(const Piece& piece) {
    if (current().chunks.empty()) return false;
    const auto& chunk = current().chunks.back();
    return chunk.id == piece.extent->chunk && chunk.offsets.back() + chunk.lengths.back() == piece.offset;
  }
  bool full(const Piece& piece) {
    return current().bytes >= limits_.request_bytes_max ||
           (ranges_ >= limits_.request_ranges_max && !continues_range(piece));
  }

  void put(const Piece& piece, std::uint32_t length) {
    auto& request = current();
    if (continues_range(piece)) {
      request.chunks.back().lengths.back() += length;
    } else {
      if (request.chunks.empty() || request.chunks.back().id != piece.extent->chunk)
        request.chunks.push_back({.id = piece.extent->chunk, .offsets = {}, .lengths = {}});
      request.chunks.back().offsets.push_back(piece.offset);
      request.chunks.back().lengths.push_back(length);
      ++ranges_;
    }
    auto* last = request.scatter.empty() ? nullptr : &request.scatter.back();
    if (last != nullptr && last->want == piece.want && last->offset + last->length == piece.to)
      last->length += length;  // fits: a request's bytes do
    else
      request.scatter.push_back({.length = length, .want = piece.want, .offset = piece.to});
    request.bytes += length;
  }

  const PlanLimits& limits_;
  RestorePlan plan_;
  std::uint32_t ranges_ = 0;
};

}  // namespace

Result<RestorePlan> plan(std::span<const Want> wants, std::span<const ShardEntry> shards, const PlanLimits& limits) {
  if (limits.request_bytes_max == 0 || limits.request_bytes_max > ~std::uint32_t{0} || limits.request_ranges_max == 0)
    return fail(Errc::kInvalid, "plan limits: request_bytes_max 1 .. 2^32 - 1, request_ranges_max at least 1");
  std::vector<const ShardEntry*> sorted;
  for (const auto& shard : shards) sorted.push_back(&shard);
  const auto before = [](const ShardEntry* a, const ShardEntry* b) { return order(*a, *b) < 0; };
  if (!std::ranges::is_sorted(sorted, before)) std::ranges::sort(sorted, before);
  std::vector<std::uint32_t> by_name;
  for (std::uint32_t i = 0; i < wants.size(); ++i) by_name.push_back(i);
  std::ranges::sort(by_name, {}, [&](std::uint32_t i) -> const std::string& { return wants[i].tensor; });

  Planner planner(wants);
  std::optional<TensorBoxes> tensor;
  for (const auto want : by_name) {
    const auto& name = wants[want].tensor;
    if (!tensor || tensor->first().tensor != name) {
      const auto range = std::ranges::equal_range(sorted, name, {}, &ShardEntry::tensor);
      if (range.empty()) return fail(Errc::kNotFound, fmt::format("tensor '{}': nothing saved under this name", name));
      TRY(tensor, TensorBoxes::make(Shards(range.begin(), range.end())));
    }
    CHECK_OK(planner.add(want, *tensor));
  }
  auto pieces = planner.take();
  std::ranges::sort(pieces, [](const Piece& a, const Piece& b) {
    if (a.extent->group != b.extent->group) return a.extent->group < b.extent->group;
    if (const auto c = a.extent->chunk <=> b.extent->chunk; c != 0) return c < 0;
    return std::tie(a.offset, a.want, a.to) < std::tie(b.offset, b.want, b.to);
  });
  Packer packer(limits);
  for (const auto& piece : pieces) packer.add(piece);
  return packer.take();
}

}  // namespace cairn::format
