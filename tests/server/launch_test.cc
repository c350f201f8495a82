#include "server/checkpoints/launch.h"

#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/records.pb.h"

using namespace cairn;
using namespace cairn::server;

namespace {
wire::Launch launch(const std::string& job, std::uint64_t restart) {
  wire::Launch out;
  out.set_job(job);
  out.set_restart(restart);
  return out;
}
}  // namespace

TEST_CASE("launch: who may open a run, as a table", "[server]") {
  struct Case {
    const char* what;
    std::vector<std::pair<const char*, int>> before;  // launches that had the run, in order
    std::pair<const char*, int> now;
    Verdict verdict;
  };
  const auto row = GENERATE(values<Case>({
      {"the current one", {{"a", 3}}, {"a", 3}, Verdict::kCurrent},
      {"the next restart", {{"a", 3}}, {"a", 4}, Verdict::kNew},
      {"a later restart", {{"a", 3}}, {"a", 9}, Verdict::kNew},
      {"an earlier restart that never had the run", {{"a", 3}}, {"a", 2}, Verdict::kFenced},
      {"an earlier restart that had it", {{"a", 2}, {"a", 3}}, {"a", 2}, Verdict::kFenced},
      {"another job", {{"a", 3}}, {"b", 0}, Verdict::kNew},
      {"a job that had it, the same restart", {{"a", 3}, {"b", 0}}, {"a", 3}, Verdict::kFenced},
      {"a job that had it, an earlier restart", {{"a", 3}, {"b", 0}}, {"a", 1}, Verdict::kFenced},
      {"a job that had it, a later restart", {{"a", 3}, {"b", 0}}, {"a", 4}, Verdict::kNew},
      {"its highest restart counts", {{"a", 1}, {"a", 5}, {"b", 0}}, {"a", 3}, Verdict::kFenced},
      {"also after it came back", {{"a", 1}, {"b", 0}, {"a", 2}, {"c", 0}}, {"a", 2}, Verdict::kFenced},
      {"long ago", {{"a", 1}, {"b", 0}, {"c", 0}, {"d", 0}}, {"b", 0}, Verdict::kFenced},
  }));
  INFO(row.what);
  records::Run run;
  for (const auto& [job, restart] : row.before) take_over(run, launch(job, static_cast<std::uint64_t>(restart)));
  CHECK(judge(run, launch(row.now.first, static_cast<std::uint64_t>(row.now.second))) == row.verdict);
}

TEST_CASE("launch: what a run remembers stays bounded", "[server]") {
  records::Run run;
  for (int i = 0; i < 2000; ++i) take_over(run, launch("job-" + std::to_string(i), 0));
  CHECK(run.past_size() == 256);
  CHECK(judge(run, launch("job-1990", 0)) == Verdict::kFenced);
  CHECK(run.ByteSizeLong() < 60'000);
}
