#include "storage/format/strided.h"

#include <fmt/format.h>

namespace cairn::format {

std::uint64_t Strided::runs() const {
  std::uint64_t n = 1;
  for (const auto& step : steps) n *= step.count;
  return n;
}

std::uint64_t Strided::end() const {
  std::uint64_t last = offset + length;
  for (const auto& step : steps) last += (step.count - 1) * step.stride;
  return last;
}

Result<void> check_strided(const Strided& runs, std::uint64_t end_max, std::uint64_t runs_max) {
  const auto refuse = [&](std::string_view why) {
    return fail(Errc::kInvalid, fmt::format("strided runs of {} bytes at {}: {}", runs.length, runs.offset, why));
  };
  if (runs.length == 0) return refuse("empty");
  if (runs.length > end_max) return refuse("they lie outside");
  std::uint64_t span = runs.length, count = 1;
  for (auto step = runs.steps.rbegin(); step != runs.steps.rend(); ++step) {
    if (step->count < 2) return refuse("a step of less than two");
    if (step->count > runs_max || count > runs_max / step->count)
      return refuse(fmt::format("more than {} runs", runs_max));
    count *= step->count;
    if (step->stride < span) return refuse("they overlap or fall");
    // Inside the limits before it is added: nothing below can overflow.
    if (step->stride > end_max || step->count - 1 > (end_max - span) / step->stride) return refuse("they lie outside");
    span += (step->count - 1) * step->stride;
  }
  if (span > end_max || runs.offset > end_max - span) return refuse("they lie outside");
  return {};
}

void join_neighbours(Strided& runs) {
  std::vector<Strided::Step> out;  // the innermost first
  for (auto step = runs.steps.rbegin(); step != runs.steps.rend(); ++step) {
    if (step->count == 1) continue;
    if (out.empty() && step->stride == runs.length)
      runs.length *= step->count;
    else if (!out.empty() && step->stride == out.back().count * out.back().stride)
      out.back().count *= step->count;
    else
      out.push_back(*step);
  }
  runs.steps.assign(out.rbegin(), out.rend());
}

void RunCursor::enter(std::uint64_t run) {
  run_ = run;
  at_ = runs_->offset;
  inner_left_ = 0;
  left_ = 0;
  for (std::size_t d = runs_->steps.size(); d-- > 0;) {
    const auto& step = runs_->steps[d];
    const auto index = run % step.count;
    run /= step.count;
    at_ += index * step.stride;
    if (d + 1 == runs_->steps.size()) inner_left_ = step.count - 1 - index;
  }
  if (run == 0)  // else it is behind the last
    left_ = runs_->length;
  else
    inner_left_ = 0;
}

void RunCursor::skip(std::uint64_t bytes) {
  if (bytes < left_) return take(bytes);
  const auto in_runs = run_ * runs_->length + (runs_->length - left_) + bytes;
  enter(in_runs / runs_->length);
  if (const auto rest = in_runs % runs_->length; rest > 0) take(rest);
}

}  // namespace cairn::format
