#include "server/checkpoints/launch.h"

#include <algorithm>

#include "proto/common/text.h"
#include "proto/wire/records.pb.h"

namespace cairn::server {
namespace {

constexpr int kPastMax = 256;  // of at most 128 bytes each: well inside a record

const wire::Launch* past_of(const records::Run& run, const std::string& job) {
  for (const auto& past : run.past())
    if (past.job() == job) return &past;
  return nullptr;
}

}  // namespace

bool same(const wire::Launch& a, const wire::Launch& b) {
  return a.job() == b.job() && a.restart() == b.restart();
}

std::string text(const wire::Launch& launch) {
  return printable(launch.job()) + "/" + std::to_string(launch.restart());
}

Verdict judge(const records::Run& run, const wire::Launch& launch) {
  if (same(run.launch(), launch)) return Verdict::kCurrent;
  if (run.launch().job() == launch.job())
    return launch.restart() < run.launch().restart() ? Verdict::kFenced : Verdict::kNew;
  const auto* past = past_of(run, launch.job());
  return past != nullptr && launch.restart() <= past->restart() ? Verdict::kFenced : Verdict::kNew;
}

void take_over(records::Run& run, const wire::Launch& launch) {
  if (run.has_launch()) {
    auto& past = *run.mutable_past();
    for (int i = 0; i < past.size(); ++i)
      if (past[i].job() == run.launch().job()) past.DeleteSubrange(i--, 1);
    *past.Add() = run.launch();
    if (past.size() > kPastMax) past.DeleteSubrange(0, past.size() - kPastMax);
  }
  *run.mutable_launch() = launch;
}

}  // namespace cairn::server
