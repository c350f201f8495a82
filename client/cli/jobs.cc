#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "client/cli/commands.h"
#include "client/cli/output.h"

namespace cairn::cli {
namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(100);

std::string_view name_of(JobState state) {
  static constexpr std::string_view kNames[] = {"unknown", "running", "paused", "done", "cancelled", "failed"};
  return kNames[static_cast<std::size_t>(state)];
}

bool ended(const JobInfo& job) {
  return job.state == JobState::done || job.state == JobState::cancelled || job.state == JobState::failed;
}

nlohmann::ordered_json json_of(const JobInfo& job) {
  nlohmann::ordered_json out{{"id", job.id},
                             {"state", name_of(job.state)},
                             {"target", job.target},
                             {"directory", job.directory},
                             {"chunks", job.chunks},
                             {"bytes", job.bytes},
                             {"chunks_total", job.chunks_total},
                             {"bytes_total", job.bytes_total},
                             {"damaged", job.damaged},
                             {"repaired", job.repaired},
                             {"left", job.left},
                             {"errors", job.errors}};
  if (job.started_unix_nanos != 0) out["started"] = time_iso(job.started_unix_nanos);
  if (job.ended_unix_nanos != 0) out["ended"] = time_iso(job.ended_unix_nanos);
  return out;
}

std::string progress_text(const JobInfo& job) {
  if (job.bytes_total == 0) return size_text(job.bytes);
  return fmt::format("{} of {}", size_text(job.bytes), size_text(job.bytes_total));
}

void print_job(const JobInfo& job) {
  print_line(fmt::format("job        {}", job.id));
  print_line(fmt::format("state      {}", name_of(job.state)));
  print_line(fmt::format("directory  {} (target {})", job.directory, job.target));
  print_line(fmt::format("progress   {} {}, {}", job.chunks, job.chunks == 1 ? "chunk" : "chunks", progress_text(job)));
  print_line(fmt::format("damaged    {} found, {} repaired, {} left there now", job.damaged, job.repaired, job.left));
  if (job.started_unix_nanos != 0) print_line(fmt::format("started    {}", time_text(job.started_unix_nanos)));
  if (job.ended_unix_nanos != 0) print_line(fmt::format("ended      {}", time_text(job.ended_unix_nanos)));
  for (const auto& error : job.errors) print_line(fmt::format("error      {}", error));
}

std::string_view name_of(DamageInfo::Kind kind) {
  static constexpr std::string_view kNames[] = {"unknown", "object", "step", "open"};
  return kNames[static_cast<std::size_t>(kind)];
}

nlohmann::ordered_json json_of(const DamageInfo& damage, const JobInfo& job) {
  nlohmann::ordered_json out{{"target", job.target}, {"directory", job.directory}, {"kind", name_of(damage.kind)}};
  if (damage.kind == DamageInfo::Kind::object) {
    out["bucket"] = damage.bucket;
    out["key"] = damage.name;
  } else if (damage.kind != DamageInfo::Kind::unknown) {
    out["run"] = fmt::format("{}/{}", damage.bucket, damage.name);
    out["step"] = damage.step;
    out["parts"] = damage.parts;
    out["in_index"] = damage.in_index;
  }
  out["chunk"] = damage.chunk;
  out["chunk_bytes"] = damage.chunk_bytes;
  out["missing"] = damage.offsets.empty();
  out["offsets"] = damage.offsets;
  out["reason"] = damage.reason;
  out["found"] = time_iso(damage.found_unix_nanos);
  out["repaired"] = damage.repaired;
  if (damage.repaired)
    out["repaired_at"] = time_iso(damage.repaired_unix_nanos);
  else
    out["unrepaired"] = damage.unrepaired;
  return out;
}

/// What it belongs to, for people.
std::string belongs_text(const DamageInfo& damage) {
  switch (damage.kind) {
    case DamageInfo::Kind::object:
      return fmt::format("cairn://{}/{}", damage.bucket, damage.name);
    case DamageInfo::Kind::step:
      return damage.parts.empty() ? fmt::format("{}/{} step {}{}", damage.bucket, damage.name, damage.step,
                                                damage.in_index ? " (its index)" : "")
                                  : fmt::format("{}/{} step {} ({})", damage.bucket, damage.name, damage.step,
                                                fmt::join(damage.parts, ", "));
    case DamageInfo::Kind::open:
      return fmt::format("{}/{}, not committed yet", damage.bucket, damage.name);
    case DamageInfo::Kind::unknown:
      break;
  }
  return "something without a name";
}

std::string damage_text(const DamageInfo& damage, const JobInfo& job) {
  const auto where = damage.offsets.empty() ? std::string("missing")
                                            : fmt::format("offset{} {}", damage.offsets.size() == 1 ? "" : "s",
                                                          fmt::join(damage.offsets, ", "));
  return fmt::format("{}  {}: chunk {} {} in {}: {}{}", damage.repaired ? "repaired" : "DAMAGED ", belongs_text(damage),
                     damage.chunk, where, job.directory, damage.reason,
                     damage.repaired ? "" : fmt::format("; {}", damage.unrepaired));
}

/// The ids of targets that are meant: ids, or directories as the daemon was given them.
Result<std::vector<std::string>> targets_of(Client& client, const std::vector<std::string>& names) {
  std::vector<std::string> out;
  if (names.empty()) return out;
  TRY(const auto targets, client.targets());
  for (const auto& name : names) {
    const auto found = std::ranges::find_if(
        targets, [&](const TargetInfo& target) { return target.id == name || target.directory == name; });
    if (found == targets.end()) {
      std::vector<std::string> known;
      for (const auto& target : targets) known.push_back(target.directory);
      return fail(Errc::kNotFound,
                  fmt::format("target '{}': neither a directory of the daemon nor its id; there are {}", name,
                              fmt::join(known, ", ")));
    }
    out.push_back(found->id);
  }
  return out;
}

/// Waits until the jobs have ended.
Result<std::vector<JobInfo>> follow(Client& client, std::vector<JobInfo> jobs) {
  std::uint64_t total = 0;
  for (const auto& job : jobs) total += job.bytes_total;
  Progress progress("verify", total);
  bool told_paused = false;
  for (;;) {
    std::uint64_t done = 0;
    for (const auto& job : jobs) done += job.bytes;
    progress.set(done);
    if (std::ranges::all_of(jobs, ended)) return jobs;
    const auto paused = std::ranges::find_if(jobs, [](const JobInfo& job) { return job.state == JobState::paused; });
    if (paused != jobs.end() && !std::exchange(told_paused, true))
      print_error(fmt::format("cairn verify: job {} is paused; 'cairn job resume {}' goes on", paused->id, paused->id));
    if (stop_requested)
      return fail(Errc::kCancelled,
                  fmt::format("stopped by a signal; the daemon goes on: see 'cairn job ls', end it with 'cairn job "
                              "cancel {}'",
                              jobs.front().id));
    std::this_thread::sleep_for(kLookEvery);
    TRY(const auto now, client.jobs());
    for (auto& job : jobs) {
      const auto found = std::ranges::find(now, job.id, &JobInfo::id);
      if (found == now.end()) return fail(Errc::kUnavailable, fmt::format("job {} is not there any more", job.id));
      job = *found;
    }
  }
}

Result<JobInfo> find_job(Client& client, const std::string& id) {
  TRY(const auto jobs, client.jobs());
  const auto found = std::ranges::find(jobs, id, &JobInfo::id);
  if (found == jobs.end()) return fail(Errc::kNotFound, fmt::format("there is no such job; 'cairn job ls' lists them"));
  return *found;
}

}  // namespace

Result<void> verify(Context& context, const Verify& args) {
  std::optional<std::uint64_t> pace = 0;
  if (args.pace == "configured") {
    pace.reset();
  } else if (!args.pace.empty() && args.pace != "none") {
    TRY(pace, size_of(args.pace));
    if (*pace == 0) return fail(Errc::kInvalid, "--pace 0 would never end: give a size a second, none or configured");
  }
  TRY(auto client, context.client());
  TRY(const auto targets, targets_of(client, args.targets));
  TRY(auto started, client.start_scrub(targets, pace));
  TRY(const auto jobs, follow(client, std::move(started)));

  std::uint64_t repaired = 0, left = 0, chunks = 0, bytes = 0;
  std::vector<std::string> errors;
  nlohmann::ordered_json out{{"ok", true}, {"jobs", nlohmann::ordered_json::array()}};
  auto& list = out["damage"] = nlohmann::ordered_json::array();
  for (const auto& job : jobs) {
    chunks += job.chunks;
    bytes += job.bytes;
    out["jobs"].push_back(json_of(job));
    for (const auto& error : job.errors) {
      errors.push_back(fmt::format("{}: {}", job.directory, error));
      if (!context.json) print_line(fmt::format("DAMAGED   {}", errors.back()));
    }
    if (job.state == JobState::cancelled)
      errors.push_back(fmt::format("{}: job {} was cancelled", job.directory, job.id));
    if (job.state == JobState::failed) continue;
    TRY(const auto damage, client.damage(job.target));
    for (const auto& one : damage) {
      ++(one.repaired ? repaired : left);
      if (context.json)
        list.push_back(json_of(one, job));
      else
        print_line(damage_text(one, job));
    }
  }
  const bool ok = left == 0 && errors.empty();
  if (context.json) {
    out["ok"] = ok;
    out["repaired"] = repaired;
    out["left"] = left;
    print_json(out);
  } else {
    print_line(fmt::format("{} {}, {}, in {} {}: {} repaired, {} left damaged", chunks,
                           chunks == 1 ? "chunk" : "chunks", size_text(bytes), jobs.size(),
                           jobs.size() == 1 ? "directory" : "directories", repaired, left));
  }
  if (left > 0)
    return fail(Errc::kDataLoss,
                fmt::format("{} damaged {} without a good copy", left, left == 1 ? "chunk" : "chunks"));
  for (const auto& job : jobs) {
    if (job.state == JobState::failed) return fail(Errc::kFailed, errors.front());
    if (job.state == JobState::cancelled) return fail(Errc::kCancelled, errors.front());
  }
  if (!errors.empty()) return fail(Errc::kDataLoss, errors.front());
  return {};
}

Result<void> job_list(Context& context) {
  TRY(auto client, context.client());
  TRY(const auto jobs, client.jobs());
  if (context.json) {
    for (const auto& job : jobs) print_json(json_of(job));
    return {};
  }
  Table table({"JOB", "STATE", "DIRECTORY", "PROGRESS", "DAMAGED", "REPAIRED", "LEFT", "STARTED"});
  for (const auto& job : jobs)
    table.add({job.id, std::string(name_of(job.state)), job.directory, progress_text(job), std::to_string(job.damaged),
               std::to_string(job.repaired), std::to_string(job.left),
               job.started_unix_nanos == 0 ? "" : time_text(job.started_unix_nanos)});
  table.print();
  return {};
}

Result<void> job_show(Context& context, const std::string& id) {
  TRY(auto client, context.client());
  TRY(const auto job, find_job(client, id));
  if (context.json)
    print_json(json_of(job));
  else
    print_job(job);
  return {};
}

Result<void> job_control(Context& context, const std::string& id, JobAction action) {
  TRY(auto client, context.client());
  TRY(const auto job, client.control_job(id, action));
  if (context.json)
    print_json(json_of(job));
  else
    print_job(job);
  return {};
}

}  // namespace cairn::cli
