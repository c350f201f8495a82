#include "client/cli/save_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "proto/common/ids.h"
#include "proto/common/text.h"

namespace cairn::cli {
namespace {

constexpr std::uint64_t kIndexBytesMax = 256ull << 20;
constexpr std::string_view kIndexEnd = ".safetensors.index.json";

/// "" or "a/b/".
std::string prefix_of(const std::string& name) {
  const auto slash = name.rfind('/');
  return slash == name.npos ? "" : name.substr(0, slash + 1);
}

/// An index with the place it stands in.
struct FolderIndex {
  std::string name, folder;
  safetensors::ShardedIndex index;
  std::set<std::string> files;  // that it names, as they are saved
};

Result<FolderIndex> read_index(FileSource& source, const std::string& name) {
  if (source.size() > kIndexBytesMax)
    return fail(Errc::kInvalid, fmt::format("{}: {} bytes are too many for an index; at most {} are read",
                                            printable(name), source.size(), kIndexBytesMax));
  std::string text(source.size(), '\0');
  CHECK_OK(source.read(0, std::as_writable_bytes(std::span(text.data(), text.size()))));
  source.close();
  auto index = safetensors::parse_index(source.name(), text);
  if (!index)
    return fail(index.error().code, index.error().message + "; copy or write it again, or leave it out of the folder");
  FolderIndex out{.name = name, .folder = prefix_of(name), .index = *std::move(index), .files = {}};
  for (const auto& [tensor, file] : out.index.weight_map) out.files.insert(out.folder + file);
  return out;
}

Result<void> read_tensors(SavePlan::File& file) {
  auto& source = *file.source;
  TRY(file.saved.header, safetensors::read_header_text(source));
  source.close();
  TRY(auto header,
      safetensors::parse_header(source.name(), file.saved.header, source.size() - 8 - file.saved.header.size()));
  file.data_offset = header.data_offset;
  file.tensors = std::move(header.tensors);
  return {};
}

Result<void> add_tensors(SavePlan& plan, const SavePlan::File& file) {
  for (const auto& tensor : file.tensors) {
    if (auto ok = check_free_name("tensor", tensor.name); !ok)
      return fail(std::move(ok).error().with(printable(file.source->name(), kPathShownMax)));
    const auto [at, fresh] = plan.file_of_tensor.emplace(tensor.name, file.saved.name);
    if (!fresh)
      return fail(Errc::kInvalid,
                  fmt::format("tensor '{}' is in both '{}' and '{}': one checkpoint holds a name once; "
                              "save the files as two runs",
                              printable(tensor.name), printable(at->second), printable(file.saved.name)));
  }
  return {};
}

Result<void> check_index(SavePlan& plan, const FolderIndex& found) {
  const auto wrong = [&](const std::string& tensor, const std::string& why) {
    return fail(Errc::kInvalid, fmt::format("{}: tensor '{}' {}; copy the folder again, or leave the index out of it",
                                            printable(found.name), printable(tensor), why));
  };
  for (const auto& [tensor, file] : found.index.weight_map) {
    const auto at = plan.file_of_tensor.find(tensor);
    if (at == plan.file_of_tensor.end())
      return wrong(tensor, fmt::format("should be in '{}' and is not: the folder is not complete", printable(file)));
    if (at->second != found.folder + file)
      return wrong(tensor, fmt::format("should be in '{}' and is in '{}': the index belongs to other files",
                                       printable(file), printable(at->second)));
  }
  std::uint64_t bytes = 0;
  for (const auto& file : plan.files) {
    if (!found.files.contains(file.saved.name)) continue;
    for (const auto& tensor : file.tensors) {
      if (!found.index.weight_map.contains(tensor.name))
        return wrong(tensor.name, fmt::format("of '{}' is not in its weight_map: the index belongs to other files",
                                              printable(file.saved.name)));
      bytes += tensor.end - tensor.begin;
    }
  }
  // Every tensor was found where it should be, so nothing is missing. Readers do not use the number, and tools that
  // share or convert tensors get it wrong.
  if (const auto said = found.index.total_size; said && *said != bytes)
    plan.warnings.push_back(
        fmt::format("{}: total_size is {}, and its tensors have {} bytes; the tensors are all there",
                    printable(found.name), *said, bytes));
  return {};
}

/// In a folder with an index, what the index does not name is no part of the model.
void keep_as_they_are(SavePlan& plan, const std::vector<FolderIndex>& indexes) {
  std::vector<std::string> kept;
  for (auto& file : plan.files) {
    if (!file.saved.is_safetensors) continue;
    const auto folder = prefix_of(file.saved.name);
    if (std::ranges::none_of(indexes, [&](const auto& index) { return index.folder == folder; }) ||
        std::ranges::any_of(indexes, [&](const auto& index) { return index.files.contains(file.saved.name); }))
      continue;
    file.saved.is_safetensors = false;
    file.saved.header.clear();
    file.tensors.clear();
    kept.push_back(file.saved.name);
  }
  if (kept.empty()) return;
  constexpr std::size_t kShown = 3;
  std::string names;
  for (std::size_t i = 0; i < std::min(kept.size(), kShown); ++i)
    names += fmt::format("{}'{}'", i == 0 ? "" : ", ", printable(kept[i]));
  if (kept.size() > kShown) names += fmt::format(" and {} more", kept.size() - kShown);
  plan.warnings.push_back(fmt::format(
      "the index of its folder does not name {}; saved as plain files, whose tensors cannot be restored by name",
      names));
}

}  // namespace

Result<SavePlan> plan_save(const std::vector<std::string>& paths) {
  TRY(const auto found, collect_files(paths));
  SavePlan plan;
  std::vector<FolderIndex> indexes;
  for (const auto& local : found) {
    SavePlan::File file;
    TRY(file.source, FileSource::open(local.path));
    file.saved = {.name = local.name,
                  .is_safetensors = local.name.ends_with(".safetensors"),
                  .size = file.source->size(),
                  .header = {}};
    if (file.saved.is_safetensors) {
      if (auto ok = read_tensors(file); !ok) {
        if (ok.error().code != Errc::kInvalid) return fail(std::move(ok).error());
        return fail(Errc::kInvalid, ok.error().message +
                                        "; copy or write the file again, or save it under a name that does not end in "
                                        ".safetensors to keep it as it is");
      }
    } else if (local.name.ends_with(kIndexEnd)) {
      TRY(auto index, read_index(*file.source, local.name));
      indexes.push_back(std::move(index));
    }
    file.source->close();  // there may be more files than descriptors
    plan.bytes += file.saved.size;
    plan.files.push_back(std::move(file));
  }
  keep_as_they_are(plan, indexes);
  for (const auto& file : plan.files) CHECK_OK(add_tensors(plan, file));
  for (const auto& index : indexes) CHECK_OK(check_index(plan, index));
  return plan;
}

}  // namespace cairn::cli
