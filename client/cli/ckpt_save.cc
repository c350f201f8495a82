#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>

#include "client/cli/ckpt_names.h"
#include "client/cli/commands.h"
#include "client/cli/output.h"
#include "client/cli/save_plan.h"

namespace cairn::cli {
namespace {

/// Gives pieces of files to a save and keeps their bytes until they are staged.
class Stager {
 public:
  Stager(Save& save, Progress& progress) : save_(save), progress_(progress) {}

  Result<void> add_file(const SavePlan::File& file) {
    for (auto& item : meta_of(file.saved)) CHECK_OK(save_.add_meta(std::move(item)));
    if (!file.saved.is_safetensors) return add_blob(file);
    for (const auto& tensor : file.tensors)
      for (const auto& piece : pieces_of(tensor, kPieceBytes)) {
        TRY(const auto bytes, read(*file.source, file.data_offset + tensor.begin + piece.offset, piece.length));
        TensorShard shard{.name = tensor.name,
                          .dtype = api_dtype(tensor.dtype),
                          .global_shape = tensor.shape,
                          .box = piece.box,
                          .holder = {}};
        CHECK_OK(save_.add_tensor(std::move(shard), bytes));
        CHECK_OK(stage_when_full());
      }
    return {};
  }

 private:
  Result<void> add_blob(const SavePlan::File& file) {
    for (std::uint64_t part = 0; part < blob_parts(file.saved.size); ++part) {
      const auto offset = part * kPieceBytes;
      TRY(const auto bytes, read(*file.source, offset, std::min(kPieceBytes, file.saved.size - offset)));
      CHECK_OK(save_.add_blob(blob_part_name(file.saved.name, part), bytes));
      CHECK_OK(stage_when_full());
    }
    return {};
  }

  Result<std::span<const std::byte>> read(FileSource& file, std::uint64_t offset, std::uint64_t length) {
    if (stop_requested) return fail(stopped());
    auto& buffer = buffers_.emplace_back(length);
    CHECK_OK(file.read(offset, buffer));
    held_ += length;
    return std::span<const std::byte>(buffer);
  }

  Result<void> stage_when_full() {
    if (held_ < kPieceBytes && buffers_.size() < 4096) return {};
    CHECK_OK(save_.stage_part());
    progress_.add(held_);
    buffers_.clear();
    held_ = 0;
    return {};
  }

  Save& save_;
  Progress& progress_;
  std::vector<std::vector<std::byte>> buffers_;
  std::uint64_t held_ = 0;
};

Result<LaunchId> launch_of(const std::string& given) {
  if (given.empty()) {
    std::random_device random;
    return LaunchId{.job = fmt::format("cairn-ckpt-save-{:08x}{:08x}", random(), random()), .restart = 0};
  }
  LaunchId out{.job = given, .restart = 0};
  if (const auto colon = given.rfind(':'); colon != given.npos) {
    const auto end = given.data() + given.size();
    const auto read = std::from_chars(given.data() + colon + 1, end, out.restart);
    if (read.ec != std::errc() || read.ptr != end || colon == 0)
      return fail(Errc::kInvalid, fmt::format("launch '{}' is not JOB or JOB:RESTART", given));
    out.job.resize(colon);
  }
  return out;
}

Result<SaveResult> send(Save& save, const SavePlan& plan) {
  Progress progress("save", plan.bytes);
  Stager stager(save, progress);
  for (const auto& file : plan.files) {
    CHECK_OK(stager.add_file(file));
    file.source->close();
  }
  // Before the seal: a step never holds half of what a file was and half of what it became.
  for (const auto& file : plan.files) CHECK_OK(file.source->check_unchanged());
  TRY(auto ticket, save.stage());
  progress.set(plan.bytes);
  for (;;) {
    auto saved = ticket.wait_for(std::chrono::milliseconds(250));
    if (saved || saved.error().code != Errc::kDeadline) return saved;
    if (ticket.ready()) return ticket.wait();  // the deadline was the attempt's, not that of this look
    if (stop_requested) return fail(stopped());
  }
}

}  // namespace

Result<void> ckpt_save(Context& context, const CkptSave& args) {
  CHECK_OK(check_run(args.run));
  TRY(const auto launch, launch_of(args.launch));
  TRY(const auto plan, plan_save(args.paths));
  for (const auto& warning : plan.warnings) print_error("cairn: warning: " + warning);
  TRY(auto client, context.client());
  if (!args.force) {
    TRY(const auto activity, client.activity(args.run));
    if (activity.active && (activity.launch.job != launch.job || activity.launch.restart != launch.restart))
      return fail(
          Errc::kConflict,
          fmt::format("{} ranks of launch '{}:{}' are saving step {} right now, and a save here would fence them: "
                      "wait, or use --force",
                      activity.ranks, activity.launch.job, activity.launch.restart, activity.step));
  }
  TRY(auto run, client.open_run({.name = args.run, .launch = launch, .resume = {}}));
  TRY(auto save, run.begin_save({.step = args.step,
                                 .rank = 0,
                                 .world_size = 1,
                                 .overwrite = args.overwrite,
                                 .explicit_commit = false,
                                 .declared_bytes = plan.bytes}));
  auto saved = send(save, plan);
  if (!saved) {
    // Best effort: without it the attempt ends by its silence. It fails too when the step was committed just now.
    const auto aborted = save.abort(saved.error().message);
    if (saved.error().code == Errc::kCancelled && !aborted)
      return fail(Errc::kUnknown, fmt::format("stopped by a signal, and step {} may be committed or not ({})",
                                              args.step, aborted.error().message));
    return fail(std::move(saved).error());
  }
  if (context.json) {
    print_json({{"run", args.run},
                {"step", saved->step},
                {"files", plan.files.size()},
                {"tensors", plan.file_of_tensor.size()},
                {"bytes", plan.bytes}});
  } else {
    print_line(fmt::format("saved {} step {}: {} files, {} tensors, {}", args.run, saved->step, plan.files.size(),
                           plan.file_of_tensor.size(), size_text(plan.bytes)));
  }
  return {};
}

}  // namespace cairn::cli
