#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "client/cli/ckpt_names.h"
#include "client/cli/commands.h"
#include "client/cli/output.h"
#include "proto/common/ids.h"

namespace cairn::cli {
namespace {

nlohmann::ordered_json json_of(const std::string& run, const StepInfo& info) {
  return {{"run", run},
          {"step", info.step},
          {"world_size", info.world_size},
          {"tensors", info.tensors},
          {"blobs", info.blobs},
          {"bytes", info.bytes},
          {"committed", time_iso(info.committed_unix_nanos)},
          {"pinned", info.pinned},
          {"launch", fmt::format("{}:{}", info.launch.job, info.launch.restart)}};
}

std::string shape_text(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Calls `visit` for every step of a run, by rising step.
template <class Visit>
Result<void> each_step(Client& client, const std::string& run, Visit visit) {
  std::optional<std::uint64_t> after;
  for (bool more = true; more;) {
    TRY(const auto page, client.steps(run, after));
    for (const auto& info : page.items) {
      CHECK_OK(visit(info));
      after = info.step;
    }
    more = page.more && !page.items.empty();
  }
  return {};
}

}  // namespace

Result<void> ckpt_list(Context& context, const std::string& bucket_or_run) {
  const bool one_run = bucket_or_run.find('/') != bucket_or_run.npos;
  CHECK_OK(one_run ? check_run(bucket_or_run) : check_bucket_name(bucket_or_run));
  TRY(auto client, context.client());
  Table table({"RUN", "STEP", "RANKS", "TENSORS", "BLOBS", "SIZE", "COMMITTED", "PINNED"});
  const auto list_run = [&](const std::string& run) {
    return each_step(client, run, [&](const StepInfo& info) -> Result<void> {
      if (context.json)
        print_json(json_of(run, info));
      else
        table.add({run, std::to_string(info.step), std::to_string(info.world_size), std::to_string(info.tensors),
                   std::to_string(info.blobs), size_text(info.bytes), time_text(info.committed_unix_nanos),
                   info.pinned ? "yes" : ""});
      return {};
    });
  };
  if (one_run) {
    CHECK_OK(list_run(bucket_or_run));
  } else {
    std::string after;
    for (bool more = true; more;) {
      TRY(const auto page, client.runs(bucket_or_run, after));
      for (const auto& run : page.items) {
        CHECK_OK(list_run(fmt::format("{}/{}", bucket_or_run, run)));
        after = run;
      }
      more = page.more && !page.items.empty();
    }
  }
  if (!context.json) table.print();
  return {};
}

Result<void> ckpt_show(Context& context, const CkptStep& args) {
  CHECK_OK(check_run(args.run));
  TRY(auto client, context.client());
  TRY(auto step, client.open_step(args.run, args.step));
  TRY(const auto tensors, step.tensors());
  TRY(const auto blobs, step.blobs());
  TRY(const auto meta, step.meta());
  TRY(const auto files, saved_files(meta));
  const auto& info = step.info();
  if (context.json) {
    auto out = json_of(args.run, info);
    auto& file_list = out["file_list"] = nlohmann::ordered_json::array();
    for (const auto& file : files)
      file_list.push_back(
          {{"name", file.name}, {"kind", file.is_safetensors ? "safetensors" : "blob"}, {"bytes", file.size}});
    auto& tensor_list = out["tensor_list"] = nlohmann::ordered_json::array();
    for (const auto& tensor : tensors) {
      nlohmann::ordered_json boxes = nlohmann::ordered_json::array();
      for (const auto& box : tensor.boxes) boxes.push_back({{"offset", box.offset}, {"shape", box.shape}});
      tensor_list.push_back({{"name", tensor.name},
                             {"dtype", format::name_of(format_dtype(tensor.dtype))},
                             {"shape", tensor.global_shape},
                             {"bytes", tensor.bytes},
                             {"boxes", boxes}});
    }
    auto& blob_list = out["blob_list"] = nlohmann::ordered_json::array();
    for (const auto& blob : blobs)
      blob_list.push_back({{"name", blob.name}, {"rank", blob.rank}, {"bytes", blob.size_bytes}});
    print_json(out);
    return {};
  }
  print_line(fmt::format("run        {}", args.run));
  print_line(fmt::format("step       {}", info.step));
  print_line(fmt::format("committed  {}", time_text(info.committed_unix_nanos)));
  print_line(fmt::format("pinned     {}", info.pinned ? "yes" : "no"));
  print_line(fmt::format("launch     {}:{}", info.launch.job, info.launch.restart));
  print_line(fmt::format("ranks      {}", info.world_size));
  print_line(fmt::format("size       {} ({} bytes)", size_text(info.bytes), info.bytes));
  if (!files.empty()) {
    print_line("");
    Table table({"FILE", "KIND", "SIZE"});
    for (const auto& file : files)
      table.add({file.name, file.is_safetensors ? "safetensors" : "blob", size_text(file.size)});
    table.print();
  }
  if (!tensors.empty()) {
    print_line("");
    Table table({"TENSOR", "DTYPE", "SHAPE", "SIZE", "BOXES"});
    for (const auto& tensor : tensors)
      table.add({tensor.name, std::string(format::name_of(format_dtype(tensor.dtype))), shape_text(tensor.global_shape),
                 size_text(tensor.bytes), std::to_string(tensor.boxes.size())});
    table.print();
  }
  if (!blobs.empty()) {
    print_line("");
    Table table({"BLOB", "RANK", "SIZE"});
    for (const auto& blob : blobs) table.add({blob.name, std::to_string(blob.rank), size_text(blob.size_bytes)});
    table.print();
  }
  return {};
}

Result<void> ckpt_verify(Context& context, const CkptStep& args) {
  CHECK_OK(check_run(args.run));
  TRY(auto client, context.client());
  std::optional<Error> first;
  std::size_t damaged = 0, checked = 0;
  const auto verify_one = [&](std::uint64_t number) -> Result<void> {
    if (stop_requested) return fail(stopped());
    TRY(auto step, client.open_step(args.run, number));
    Progress progress(fmt::format("verify step {}", number), step.info().bytes);
    const auto result = step.verify([&](std::uint64_t done, std::uint64_t) { progress.set(done); });
    // Damage in one step is told, and the others are still looked at; everything else ends the command.
    if (!result && result.error().code != Errc::kDataLoss) return fail(result.error());
    ++checked;
    if (!result) {
      ++damaged;
      if (!first) first = Error(result.error()).with(fmt::format("step {}", number));
    }
    if (context.json) {
      nlohmann::ordered_json out{
          {"run", args.run}, {"step", number}, {"bytes", step.info().bytes}, {"ok", result.has_value()}};
      if (!result) out["error"] = result.error().message;
      print_json(out);
    } else {
      print_line(fmt::format("step {}: {}", number,
                             result ? fmt::format("ok, {}", size_text(step.info().bytes)) : result.error().message));
    }
    return {};
  };
  if (args.step) {
    CHECK_OK(verify_one(*args.step));
  } else {
    CHECK_OK(each_step(client, args.run, [&](const StepInfo& info) { return verify_one(info.step); }));
    if (checked == 0) return fail(Errc::kNotFound, fmt::format("run '{}' has no committed step", args.run));
  }
  if (first) return fail(std::move(*first).with(fmt::format("{} of {} steps are damaged", damaged, checked)));
  return {};
}

Result<void> ckpt_pin(Context& context, const CkptPin& args) {
  CHECK_OK(check_run(args.run));
  TRY(auto client, context.client());
  CHECK_OK(client.pin_step(args.run, args.step));
  if (context.json) print_json({{"run", args.run}, {"step", args.step}, {"pinned", true}});
  return {};
}

Result<void> ckpt_unpin(Context& context, const CkptPin& args) {
  CHECK_OK(check_run(args.run));
  TRY(auto client, context.client());
  CHECK_OK(client.unpin_step(args.run, args.step));
  if (context.json) print_json({{"run", args.run}, {"step", args.step}, {"pinned", false}});
  return {};
}

Result<void> ckpt_remove(Context& context, const CkptRemove& args) {
  CHECK_OK(check_run(args.run));
  if (args.step.has_value() == args.after.has_value())
    return fail(Errc::kInvalid, "one of --step and --after is needed");
  TRY(auto client, context.client());
  std::uint64_t removed = 1;
  if (args.step) {
    CHECK_OK(client.remove_step(args.run, *args.step));
  } else {
    std::optional<Progress> progress;
    TRY(removed, client.remove_steps_after(args.run, *args.after, [&](std::uint64_t done, std::uint64_t all) {
      if (!progress) progress.emplace(fmt::format("remove from {}", args.run), all, Progress::Unit::kSteps);
      progress->set(done);
    }));
    progress.reset();
  }
  if (context.json)
    print_json({{"run", args.run}, {"removed", removed}});
  else
    print_line(fmt::format("removed {} {} of {}", removed, removed == 1 ? "step" : "steps", args.run));
  return {};
}

}  // namespace cairn::cli
