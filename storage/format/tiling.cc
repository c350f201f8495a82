#include <algorithm>
#include <cstddef>
#include <tuple>
#include <utility>

#include "storage/format/box.h"

// Boxes tile a whole when the sum of their indicator functions, less that of the whole, is zero everywhere. Along one
// dimension that sum changes only where a box begins or ends, by the box's section (its other dimensions). So it is
// zero exactly when at each such coordinate the sections that begin, less those that end, sum to zero: the same
// question with one dimension less. Equal sections cancel at once, so layouts made by cutting end after a dimension or
// two. All changes together sum to zero, so one group, the largest, needs no look: that keeps the work from doubling
// with each dimension.
//
// Turned down: painting (memory of the tensor's size), comparing all pairs (quadratic), comparing volumes (an overlap
// can hide a gap).
namespace cairn::format {
namespace {

struct Item {
  const Box* box;
  std::int64_t weight;
};

struct Change {
  std::uint64_t at;            // coordinate in the dimension being swept
  std::uint64_t section_hash;  // equal sections have equal hashes; unequal ones seldom have
  Item item;
};

struct Group {
  std::uint64_t at;
  std::vector<Item> items;  // their sections, weighted, are the change here
};

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
  return hash ^ (hash >> 29);
}

std::uint64_t hash_section(const Box& box, std::size_t from) {
  std::uint64_t hash = 0;
  for (std::size_t d = from; d < box.shape.size(); ++d) hash = mix(mix(hash, box.offset[d]), box.shape[d]);
  return hash;
}

bool same_section(const Box& a, const Box& b, std::size_t from) {
  for (std::size_t d = from; d < a.shape.size(); ++d)
    if (a.offset[d] != b.offset[d] || a.shape[d] != b.shape[d]) return false;
  return true;
}

/// The changes along `dimension` by rising coordinate, with equal sections summed and zeros dropped.
std::vector<Group> changes(const std::vector<Item>& items, std::size_t dimension) {
  std::vector<Change> all;
  all.reserve(items.size() * 2);
  for (const auto& item : items) {
    const auto hash = hash_section(*item.box, dimension + 1);
    const auto begin = item.box->offset[dimension], end = begin + item.box->shape[dimension];
    all.push_back({begin, hash, item});
    all.push_back({end, hash, {item.box, -item.weight}});
  }
  std::ranges::sort(all, [](const Change& a, const Change& b) {
    return std::tie(a.at, a.section_hash) < std::tie(b.at, b.section_hash);
  });
  std::vector<Group> groups;
  for (std::size_t i = 0; i < all.size();) {
    Item sum = all[i].item;
    std::size_t next = i + 1;
    while (next < all.size() && all[next].at == all[i].at && all[next].section_hash == all[i].section_hash &&
           same_section(*all[next].item.box, *sum.box, dimension + 1))
      sum.weight += all[next++].item.weight;
    if (sum.weight != 0) {
      if (groups.empty() || groups.back().at != all[i].at) groups.push_back({.at = all[i].at, .items = {}});
      groups.back().items.push_back(sum);
    }
    i = next;
  }
  return groups;
}

std::int64_t total_weight(const std::vector<Item>& items) {
  std::int64_t sum = 0;
  for (const auto& item : items) sum += item.weight;
  return sum;
}

/// Is the weighted sum of the items' sections (dimensions `dimension` and up) zero everywhere? The depth is at most the
/// number of dimensions.
bool is_zero(const std::vector<Item>& items, std::size_t dimension) {
  if (items.empty()) return true;
  if (dimension == items.front().box->shape.size()) return total_weight(items) == 0;
  if (items.size() == 1) return false;
  auto groups = changes(items, dimension);
  if (groups.empty()) return true;
  const auto largest = std::ranges::max_element(groups, {}, [](const Group& group) { return group.items.size(); });
  return std::ranges::all_of(
      groups, [&](const Group& group) { return &group == &*largest || is_zero(group.items, dimension + 1); });
}

struct Point {
  std::vector<std::uint64_t> at;
  std::int64_t weight = 0;
};

/// The lexicographically first point where the sum is not zero, and the sum there. There is one.
Point first_nonzero(std::vector<Item> items, std::size_t dimensions) {
  Point point;
  for (std::size_t d = 0; d < dimensions; ++d) {
    auto groups = changes(items, d);
    const auto found = std::ranges::find_if(groups, [&](const Group& group) { return !is_zero(group.items, d + 1); });
    point.at.push_back(found->at);
    items = std::move(found->items);
  }
  point.weight = total_weight(items);
  return point;
}

/// A large box that begins at `point` and that no box touches.
Box gap_at(const std::vector<std::uint64_t>& point, const std::vector<const Box*>& boxes, const Box& whole) {
  Box gap{.offset = point, .shape = whole.shape};
  for (std::size_t d = 0; d < point.size(); ++d) gap.shape[d] = whole.offset[d] + whole.shape[d] - point[d];
  for (const Box* box : boxes) {
    const auto common = intersect(gap, *box);
    if (!common) continue;
    // The box does not hold the point, so in some dimension it begins after it: cut there, where most is left.
    std::size_t best = 0;
    double best_share = -1;
    for (std::size_t d = 0; d < point.size(); ++d) {
      const double share = static_cast<double>(common->offset[d] - point[d]) / static_cast<double>(gap.shape[d]);
      if (common->offset[d] > point[d] && share > best_share) best_share = share, best = d;
    }
    gap.shape[best] = common->offset[best] - point[best];
  }
  return gap;
}

/// What all boxes that hold `point` share, from the point on.
Box overlap_at(const std::vector<std::uint64_t>& point, const std::vector<const Box*>& boxes, const Box& whole) {
  const Box one{.offset = point, .shape = Shape(point.size(), 1)};
  Box out{.offset = point, .shape = whole.shape};
  for (std::size_t d = 0; d < point.size(); ++d) out.shape[d] = whole.offset[d] + whole.shape[d] - point[d];
  for (const Box* box : boxes)
    if (intersect(one, *box)) out = *intersect(out, *box);
  return out;
}

/// Boxes cut along one dimension only, whole in the others: does each begin where the last ended?
bool is_chain(std::vector<const Box*>& boxes, const Box& whole) {
  std::size_t cut = whole.shape.size();
  for (const Box* box : boxes)
    for (std::size_t d = 0; d < whole.shape.size(); ++d) {
      if (d == cut || (box->offset[d] == whole.offset[d] && box->shape[d] == whole.shape[d])) continue;
      if (cut != whole.shape.size()) return false;
      cut = d;
    }
  if (cut == whole.shape.size()) return boxes.size() == 1;
  const auto before = [cut](const Box* a, const Box* b) { return a->offset[cut] < b->offset[cut]; };
  if (!std::ranges::is_sorted(boxes, before)) std::ranges::sort(boxes, before);
  std::uint64_t next = whole.offset[cut];
  for (const Box* box : boxes) {
    if (box->offset[cut] != next) return false;
    next += box->shape[cut];
  }
  return next == whole.offset[cut] + whole.shape[cut];
}

}  // namespace

std::optional<Flaw> find_flaw(std::vector<const Box*> boxes, const Box& whole) {
  std::erase_if(boxes, [](const Box* box) { return empty(*box); });
  if (empty(whole) || is_chain(boxes, whole)) return std::nullopt;
  std::vector<Item> items;
  items.reserve(boxes.size() + 1);
  for (const Box* box : boxes) items.push_back({box, 1});
  items.push_back({&whole, -1});
  if (is_zero(items, 0)) return std::nullopt;

  const auto point = first_nonzero(std::move(items), whole.shape.size());
  const auto covered = static_cast<std::uint64_t>(point.weight + 1);
  return Flaw{.covered = covered,
              .box = covered == 0 ? gap_at(point.at, boxes, whole) : overlap_at(point.at, boxes, whole)};
}

}  // namespace cairn::format
