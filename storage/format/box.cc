#include "storage/format/box.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace cairn::format {
namespace {

/// The common box of `saved` and `wanted` as runs, in elements: equally long, contiguous in both.
CopyRuns element_runs(const Box& saved, const Box& wanted, const Box& common) {
  const std::size_t n = common.shape.size();
  std::array<std::uint64_t, kDimensionsMax + 1> saved_stride, wanted_stride;
  saved_stride[n] = wanted_stride[n] = 1;
  for (std::size_t d = n; d-- > 0;) {
    saved_stride[d] = saved_stride[d + 1] * saved.shape[d];
    wanted_stride[d] = wanted_stride[d + 1] * wanted.shape[d];
  }
  CopyRuns out{.saved = 0, .wanted = 0, .length = 1};
  for (std::size_t d = 0; d < n; ++d) {
    out.saved += (common.offset[d] - saved.offset[d]) * saved_stride[d + 1];
    out.wanted += (common.offset[d] - wanted.offset[d]) * wanted_stride[d + 1];
  }
  for (std::size_t d = n; d-- > 0;) {
    const CopyRuns::Step step{.count = common.shape[d], .saved = saved_stride[d + 1], .wanted = wanted_stride[d + 1]};
    if (step.count == 1) continue;
    auto* inner = out.steps.empty() ? nullptr : &out.steps.back();
    // What continues the runs, or the step inside of it, in both is no step of its own.
    if (inner == nullptr && step.saved == out.length && step.wanted == out.length)
      out.length *= step.count;
    else if (inner != nullptr && step.saved == inner->count * inner->saved &&
             step.wanted == inner->count * inner->wanted)
      inner->count *= step.count;
    else
      out.steps.push_back(step);
  }
  std::ranges::reverse(out.steps);
  return out;
}

/// From elements to bytes; false when a run does not begin and end at whole bytes.
bool to_bytes(std::uint32_t bits, CopyRuns& runs) {
  bool whole = true;
  const auto scale = [&](std::uint64_t& elements) {
    const auto size = static_cast<unsigned __int128>(elements) * bits;
    elements = static_cast<std::uint64_t>(size / 8);
    if (size % 8 != 0) whole = false;
  };
  scale(runs.saved);
  scale(runs.wanted);
  scale(runs.length);
  for (auto& step : runs.steps) {
    scale(step.saved);
    scale(step.wanted);
  }
  return whole;
}

Strided joined(std::uint64_t offset, std::uint64_t length, const std::vector<CopyRuns::Step>& steps,
               std::uint64_t CopyRuns::Step::* stride) {
  Strided out{.offset = offset, .length = length};
  for (const auto& step : steps) out.steps.push_back({.count = step.count, .stride = step.*stride});
  join_neighbours(out);
  return out;
}

/// What of the runs that step `d` and those inside it make lies in [begin, end); `at` is the first of them.
void cut_from(const CopyRuns& all, std::size_t d, CopyRuns at, std::uint64_t begin, std::uint64_t end,
              std::vector<CopyRuns>& out) {
  if (d == all.steps.size()) {
    const auto from = std::max(at.saved, begin), to = std::min(at.saved + all.length, end);
    if (from < to) out.push_back({.saved = from, .wanted = at.wanted + (from - at.saved), .length = to - from});
    return;
  }
  const auto& step = all.steps[d];
  auto span = all.length;
  for (std::size_t i = d + 1; i < all.steps.size(); ++i) span += (all.steps[i].count - 1) * all.steps[i].saved;
  const auto at_index = [&](std::uint64_t i) {
    return CopyRuns{.saved = at.saved + i * step.saved, .wanted = at.wanted + i * step.wanted, .length = all.length};
  };
  /// How many of the step's places begin before `limit` with their byte `inner`.
  const auto before = [&](std::uint64_t limit, std::uint64_t inner) {
    return limit <= at.saved + inner ? 0 : std::min(step.count, (limit - at.saved - inner - 1) / step.saved + 1);
  };
  const auto first = before(begin, span - 1), last = before(end, 0);              // that have a byte inside
  const auto whole_first = before(begin, 0), whole_last = before(end, span - 1);  // that lie inside
  auto i = first;
  for (; i < std::min(whole_first, last); ++i) cut_from(all, d + 1, at_index(i), begin, end, out);
  if (i < whole_last) {
    auto whole = at_index(i);
    if (whole_last - i > 1)
      whole.steps.push_back({.count = whole_last - i, .saved = step.saved, .wanted = step.wanted});
    whole.steps.insert(whole.steps.end(), all.steps.begin() + static_cast<std::ptrdiff_t>(d) + 1, all.steps.end());
    out.push_back(std::move(whole));
    i = whole_last;
  }
  for (; i < last; ++i) cut_from(all, d + 1, at_index(i), begin, end, out);
}

}  // namespace

Strided CopyRuns::from() const {
  return joined(saved, length, steps, &Step::saved);
}
Strided CopyRuns::to() const {
  return joined(wanted, length, steps, &Step::wanted);
}
std::uint64_t CopyRuns::bytes() const {
  auto n = length;
  for (const auto& step : steps) n *= step.count;
  return n;
}

void cut(const CopyRuns& all, std::uint64_t begin, std::uint64_t end, std::vector<CopyRuns>& out) {
  cut_from(all, 0, {.saved = all.saved, .wanted = all.wanted, .length = all.length}, begin, end, out);
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  Box out{.offset = std::vector<std::uint64_t>(a.shape.size()), .shape = Shape(a.shape.size())};
  for (std::size_t d = 0; d < a.shape.size(); ++d) {
    const auto begin = std::max(a.offset[d], b.offset[d]);
    const auto end = std::min(a.offset[d] + a.shape[d], b.offset[d] + b.shape[d]);
    if (begin >= end) return std::nullopt;
    out.offset[d] = begin;
    out.shape[d] = end - begin;
  }
  return out;
}

bool empty(const Box& box) {
  return std::ranges::find(box.shape, 0u) != box.shape.end();
}

bool inside(const Box& inner, const Box& outer) {
  for (std::size_t d = 0; d < inner.shape.size(); ++d)
    if (inner.offset[d] < outer.offset[d] || inner.offset[d] + inner.shape[d] > outer.offset[d] + outer.shape[d])
      return false;
  return true;
}

Result<void> copy_runs(std::string_view tensor, DType dtype, const Box& saved, LinearRange part, const Box& wanted,
                       std::vector<CopyRuns>& out) {
  const auto context = [&](Error error) { return fail(std::move(error).with(fmt::format("tensor '{}'", tensor))); };
  if (saved.shape.size() != wanted.shape.size())
    return fail(Errc::kInvalid, fmt::format("tensor '{}': box {} wanted of one with {} dimensions", tensor,
                                            text(wanted), saved.shape.size()));
  for (const auto* box : {&saved, &wanted}) {
    // With all dimensions checked against the largest shape, no offset or stride below can overflow.
    if (auto ok = check_box(*box, Shape(box->shape.size(), ~std::uint64_t{0})); !ok) return context(ok.error());
    const auto count = elements(box->shape);
    if (!count) return context(count.error());
    if (static_cast<unsigned __int128>(*count) * bits_of(dtype) / 8 > ~std::uint64_t{0})
      return fail(Errc::kInvalid,
                  fmt::format("tensor '{}': box {} of {}: more than 2^64 bytes", tensor, text(*box), name_of(dtype)));
  }
  const auto common = intersect(saved, wanted);
  if (!common || part.first >= part.last) return {};

  std::vector<CopyRuns> inside;
  cut(element_runs(saved, wanted, *common), part.first, part.last, inside);
  for (auto& runs : inside) {
    runs.saved -= part.first;
    if (!to_bytes(bits_of(dtype), runs))
      return fail(Errc::kInvalid, fmt::format("tensor '{}': {} of {} saved as {} does not begin and end at whole bytes",
                                              tensor, text(*common), name_of(dtype), text(saved)));
    out.push_back(std::move(runs));
  }
  return {};
}

}  // namespace cairn::format
