#include "storage/format/restore_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "storage/format/box.h"

namespace cairn::format {
namespace {

/// Bytes of one extent that go to one want.
struct Piece {
  const Extent* extent = nullptr;
  std::uint32_t want = 0;
  CopyRuns runs;  // `saved`: in the chunk
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

  Result<void> add_shard(std::uint32_t want_index, const ShardEntry& shard) {
    TRY(const auto part, saved_range(shard));
    runs_.clear();
    CHECK_OK(copy_runs(shard.tensor, shard.dtype, shard.box, part, wants_[want_index].box, runs_));
    // Both runs and extents rise in the shard's bytes, and check_entry proved that the extents hold all of them.
    std::size_t extent = 0;
    std::uint64_t extent_begin = 0;  // of that extent, in the shard's bytes
    for (const auto& runs : runs_) {
      const auto end = runs.from().end();
      while (runs.saved - extent_begin >= shard.extents[extent].length) extent_begin += shard.extents[extent++].length;
      auto at = extent;
      for (auto begin = extent_begin; begin < end; begin += shard.extents[at++].length) {
        const auto& one = shard.extents[at];
        parts_.clear();
        cut(runs, begin, begin + one.length, parts_);
        for (auto& inside : parts_) {
          inside.saved = one.offset + (inside.saved - begin);
          pieces_.push_back({.extent = &one, .want = want_index, .runs = std::move(inside)});
        }
      }
    }
    return {};
  }

  std::span<const Want> wants_;
  std::vector<Piece> pieces_;
  std::vector<CopyRuns> runs_, parts_;
};

/// Packs sorted pieces into requests.
class Packer {
 public:
  explicit Packer(const PlanLimits& limits) : limits_(limits) {}

  void add(const Piece& piece) {
    plan_.bytes += piece.runs.bytes();
    std::vector<CopyRuns> left{piece.runs};  // the next one last
    while (!left.empty()) {
      const auto runs = std::move(left.back());
      left.pop_back();
      const auto from = runs.from();
      if (plan_.requests.empty() || current().group != piece.extent->group || full(piece, from)) {
        plan_.requests.push_back({.group = piece.extent->group, .chunks = {}, .scatter = {}, .bytes = 0});
        ranges_ = 0;
        runs_ = 0;
      }
      auto room = limits_.request_bytes_max - current().bytes;
      if (!from.steps.empty()) room = std::min(room, (limits_.request_runs_max - runs_) * from.length);
      if (runs.bytes() <= room) {
        put(piece, from, runs.to());
        continue;
      }
      RunCursor end(from);
      end.skip(room);
      cut_.clear();
      cut(runs, end.at(), from.end(), cut_);
      left.insert(left.end(), cut_.rbegin(), cut_.rend());
      cut_.clear();
      cut(runs, 0, end.at(), cut_);
      left.insert(left.end(), cut_.rbegin(), cut_.rend());
    }
  }

  RestorePlan take() { return std::move(plan_); }

 private:
  ReadRequest& current() { return plan_.requests.back(); }

  bool continues_range(const Piece& piece, const Strided& from) {
    if (current().chunks.empty() || !from.steps.empty()) return false;
    const auto& chunk = current().chunks.back();
    return chunk.id == piece.extent->chunk && chunk.strided.empty() &&
           chunk.offsets.back() + chunk.lengths.back() == from.offset;
  }
  bool full(const Piece& piece, const Strided& from) {
    return current().bytes >= limits_.request_bytes_max || (!from.steps.empty() && runs_ >= limits_.request_runs_max) ||
           (ranges_ >= limits_.request_ranges_max && !continues_range(piece, from));
  }

  void put(const Piece& piece, const Strided& from, Strided to) {
    auto& request = current();
    const auto bytes = from.bytes();
    if (continues_range(piece, from)) {
      request.chunks.back().lengths.back() += static_cast<std::uint32_t>(bytes);
    } else {
      const bool range = from.steps.empty();
      // The ranges of a chunk come before its strided runs: what is in another order names the chunk again.
      if (request.chunks.empty() || request.chunks.back().id != piece.extent->chunk ||
          (range && !request.chunks.back().strided.empty()))
        request.chunks.push_back({.id = piece.extent->chunk, .offsets = {}, .lengths = {}});
      if (range) {
        request.chunks.back().offsets.push_back(static_cast<std::uint32_t>(from.offset));
        request.chunks.back().lengths.push_back(static_cast<std::uint32_t>(bytes));
      } else {
        request.chunks.back().strided.push_back(from);
        runs_ += from.runs();
      }
      ++ranges_;
    }
    auto* last = request.scatter.empty() ? nullptr : &request.scatter.back();
    if (last != nullptr && last->want == piece.want && last->to.steps.empty() && to.steps.empty() &&
        last->to.offset + last->to.length == to.offset)
      last->to.length += bytes;
    else
      request.scatter.push_back({.want = piece.want, .to = std::move(to)});
    request.bytes += bytes;
  }

  const PlanLimits& limits_;
  RestorePlan plan_;
  std::uint32_t ranges_ = 0;
  std::uint64_t runs_ = 0;
  std::vector<CopyRuns> cut_;
};

}  // namespace

Result<RestorePlan> plan(std::span<const Want> wants, std::span<const ShardEntry> shards, const PlanLimits& limits) {
  if (limits.request_bytes_max == 0 || limits.request_bytes_max > ~std::uint32_t{0} || limits.request_ranges_max == 0 ||
      limits.request_runs_max == 0)
    return fail(Errc::kInvalid, "plan limits: request_bytes_max 1 .. 2^32 - 1, ranges and runs at least 1");
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
    return std::tie(a.runs.saved, a.want, a.runs.wanted) < std::tie(b.runs.saved, b.want, b.runs.wanted);
  });
  Packer packer(limits);
  for (const auto& piece : pieces) packer.add(piece);
  return packer.take();
}

}  // namespace cairn::format
