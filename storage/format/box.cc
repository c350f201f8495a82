#include "storage/format/box.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace cairn::format {
namespace {

/// Bytes of elements [first, first + count) of a row-major array; false when they do not begin and end at whole bytes.
struct ByteRange {
  std::uint64_t offset = 0, length = 0;
  static bool make(std::uint32_t bits, std::uint64_t first, std::uint64_t count, ByteRange& out) {
    const auto begin = static_cast<unsigned __int128>(first) * bits,
               size = static_cast<unsigned __int128>(count) * bits;
    out = {.offset = static_cast<std::uint64_t>(begin / 8), .length = static_cast<std::uint64_t>(size / 8)};
    return begin % 8 == 0 && size % 8 == 0;
  }
};

/// The common box of `saved` and `wanted` as a sequence of runs: equally long, contiguous in both.
class RunWalk {
 public:
  RunWalk(const Box& saved, const Box& wanted, const Box& common) {
    const std::size_t n = common.shape.size();
    std::array<std::uint64_t, kDimensionsMax + 1> saved_stride, wanted_stride;
    saved_stride[n] = wanted_stride[n] = 1;
    for (std::size_t d = n; d-- > 0;) {
      saved_stride[d] = saved_stride[d + 1] * saved.shape[d];
      wanted_stride[d] = wanted_stride[d + 1] * wanted.shape[d];
    }
    for (std::size_t d = 0; d < n; ++d) {
      saved_origin_ += (common.offset[d] - saved.offset[d]) * saved_stride[d + 1];
      wanted_origin_ += (common.offset[d] - wanted.offset[d]) * wanted_stride[d + 1];
    }
    // Dimensions from `inner` on are whole in both, so one step of dimension inner - 1 begins where the last ended.
    std::size_t inner = n;
    while (inner > 0 && common.shape[inner - 1] == saved.shape[inner - 1] &&
           common.shape[inner - 1] == wanted.shape[inner - 1])
      --inner;
    if (inner > 0) --inner;
    for (std::size_t d = inner; d < n; ++d) run_elements_ *= common.shape[d];
    for (std::size_t d = 0; d < inner; ++d) {
      if (common.shape[d] == 1) continue;
      steps_[dimensions_++] = {common.shape[d], saved_stride[d + 1], wanted_stride[d + 1]};
      runs_ *= common.shape[d];
    }
  }

  std::uint64_t runs() const { return runs_; }
  std::uint64_t run_elements() const { return run_elements_; }

  /// First element of a run, in the saved and in the wanted box.
  struct Place {
    std::uint64_t saved, wanted;
  };
  Place place(std::uint64_t run) const {
    Place at{.saved = saved_origin_, .wanted = wanted_origin_};
    for (std::size_t d = dimensions_; d-- > 0;) {
      const std::uint64_t index = run % steps_[d].size;
      run /= steps_[d].size;
      at.saved += index * steps_[d].saved_stride;
      at.wanted += index * steps_[d].wanted_stride;
    }
    return at;
  }

 private:
  struct Step {
    std::uint64_t size, saved_stride, wanted_stride;
  };
  std::uint64_t saved_origin_ = 0, wanted_origin_ = 0, run_elements_ = 1, runs_ = 1;
  std::size_t dimensions_ = 0;
  std::array<Step, kDimensionsMax> steps_;
};

}  // namespace

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
                       std::vector<CopyRun>& out) {
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

  const RunWalk walk(saved, wanted, *common);
  const std::uint64_t length = walk.run_elements();
  // Runs rise in the saved order: find the first that reaches into the part.
  std::uint64_t low = 0, high = walk.runs();
  while (low < high) {
    const std::uint64_t middle = low + (high - low) / 2;
    if (walk.place(middle).saved + length > part.first)
      high = middle;
    else
      low = middle + 1;
  }
  const std::uint32_t bits = bits_of(dtype);
  for (std::uint64_t run = low; run < walk.runs(); ++run) {
    const auto at = walk.place(run);
    if (at.saved >= part.last) break;
    const std::uint64_t begin = std::max(at.saved, part.first), end = std::min(at.saved + length, part.last);
    ByteRange from, to;
    if (!ByteRange::make(bits, begin - part.first, end - begin, from) ||
        !ByteRange::make(bits, at.wanted + (begin - at.saved), end - begin, to))
      return fail(Errc::kInvalid, fmt::format("tensor '{}': {} of {} saved as {} does not begin and end at whole bytes",
                                              tensor, text(*common), name_of(dtype), text(saved)));
    out.push_back({.saved = from.offset, .wanted = to.offset, .length = from.length});
  }
  return {};
}

}  // namespace cairn::format
