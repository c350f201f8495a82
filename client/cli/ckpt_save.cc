#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "client/cli/ckpt_names.h"
#include "client/cli/commands.h"
#include "client/cli/files.h"
#include "client/cli/output.h"
#include "proto/common/ids.h"

namespace cairn::cli {
namespace {

/// Read, checked and ready to be saved; nothing has been sent yet.
struct Plan {
  struct File {
    std::unique_ptr<FileSource> source;
    SavedFile saved;
    std::vector<safetensors::TensorInfo> tensors;  // of a safetensors file
    std::uint64_t data_offset = 0;
  };
  std::vector<File> files;
  std::map<std::string, std::string> file_of_tensor;
  std::uint64_t bytes = 0;
};

constexpr std::uint64_t kIndexBytesMax = 256ull << 20;

Result<void> add_tensors(Plan& plan, Plan::File& file) {
  TRY(file.saved.header, safetensors::read_header_text(*file.source));
  TRY(auto header, safetensors::parse_header(file.source->name(), file.saved.header,
                                             file.source->size() - 8 - file.saved.header.size()));
  file.data_offset = header.data_offset;
  for (const auto& tensor : header.tensors) {
    if (auto ok = check_free_name("tensor", tensor.name); !ok)
      return fail(std::move(ok).error().with(printable(file.source->name())));
    const auto [at, fresh] = plan.file_of_tensor.emplace(tensor.name, file.saved.name);
    if (!fresh)
      return fail(Errc::kInvalid, fmt::format("tensor '{}' is in both '{}' and '{}': one checkpoint holds a name once",
                                              printable(tensor.name), at->second, file.saved.name));
  }
  file.tensors = std::move(header.tensors);
  return {};
}

/// A folder's index that names tensors which are not there is a folder that was copied in part.
Result<void> check_folder_index(const Plan& plan, FileSource& source, const std::string& name) {
  if (source.size() > kIndexBytesMax)
    return fail(Errc::kInvalid, fmt::format("{}: {} bytes are too many for an index", printable(name), source.size()));
  std::string text(source.size(), '\0');
  CHECK_OK(source.read(0, std::as_writable_bytes(std::span(text.data(), text.size()))));
  TRY(const auto index, safetensors::parse_index(source.name(), text));
  const auto slash = name.rfind('/');
  const std::string folder = slash == name.npos ? "" : name.substr(0, slash + 1);
  std::set<std::string> named;  // files of which the index speaks
  for (const auto& [tensor, file] : index.weight_map) {
    const auto found = plan.file_of_tensor.find(tensor);
    if (found == plan.file_of_tensor.end())
      return fail(Errc::kInvalid, fmt::format("{}: tensor '{}' should be in '{}' and is not: is the folder complete?",
                                              printable(name), printable(tensor), printable(file)));
    if (found->second != folder + file)
      return fail(Errc::kInvalid,
                  fmt::format("{}: tensor '{}' should be in '{}' and is in '{}': the index belongs to other files",
                              printable(name), printable(tensor), printable(file), printable(found->second)));
    named.insert(found->second);
  }
  for (const auto& [tensor, file] : plan.file_of_tensor)
    if (named.contains(file) && file.starts_with(folder) && !index.weight_map.contains(tensor))
      return fail(Errc::kInvalid,
                  fmt::format("{}: tensor '{}' of '{}' is not in its weight_map: the index belongs to other files",
                              printable(name), printable(tensor), printable(file)));
  return {};
}

Result<Plan> make_plan(const std::vector<std::string>& paths) {
  TRY(const auto found, collect_files(paths));
  Plan plan;
  for (const auto& local : found) {
    Plan::File file;
    TRY(file.source, FileSource::open(local.path));
    file.saved = {.name = local.name,
                  .is_safetensors = local.name.ends_with(".safetensors"),
                  .size = file.source->size(),
                  .header = {}};
    if (file.saved.is_safetensors) CHECK_OK(add_tensors(plan, file));
    plan.bytes += file.saved.size;
    plan.files.push_back(std::move(file));
  }
  for (auto& file : plan.files)
    if (file.saved.name.ends_with(".safetensors.index.json"))
      CHECK_OK(check_folder_index(plan, *file.source, file.saved.name));
  return plan;
}

/// Gives pieces of files to a save and keeps their bytes until they are staged.
class Stager {
 public:
  Stager(Save& save, Progress& progress) : save_(save), progress_(progress) {}

  Result<void> add_file(const Plan::File& file) {
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
  Result<void> add_blob(const Plan::File& file) {
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

Result<SaveResult> send(Save& save, const Plan& plan) {
  Progress progress("save", plan.bytes);
  Stager stager(save, progress);
  for (const auto& file : plan.files) CHECK_OK(stager.add_file(file));
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
  TRY(const auto plan, make_plan(args.paths));
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
