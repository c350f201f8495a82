#include <fmt/format.h>
#include <fnmatch.h>

#include <algorithm>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "client/cli/ckpt_names.h"
#include "client/cli/commands.h"
#include "client/cli/files.h"
#include "client/cli/output.h"
#include "proto/common/text.h"

namespace cairn::cli {
namespace {

using Tensors = std::map<std::string, TensorInfo>;

bool matches(const std::vector<std::string>& globs, const std::string& name) {
  return globs.empty() ||
         std::ranges::any_of(globs, [&](const auto& glob) { return fnmatch(glob.c_str(), name.c_str(), 0) == 0; });
}

/// A file of the step as it will stand in the folder.
struct TargetFile {
  std::string name;
  safetensors::Header header;
  std::string head;  // the bytes before the data buffer
};

/// Any blob or tensor name as one plain file name: what could be read as a path is percent-encoded.
std::string plain_name(std::string_view name) {
  std::string out;
  for (const char c : name) {
    const bool plain =
        static_cast<unsigned char>(c) >= 0x20 && c != 0x7f && c != '/' && c != '%' && !(c == '.' && out.empty());
    out += plain ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return out;
}

/// Reads a step and writes it into a new folder.
class Restorer {
 public:
  Restorer(Step& step, FolderInPlace& folder, const std::vector<std::string>& globs)
      : step_(step), folder_(folder), globs_(globs) {}

  Result<void> run() {
    TRY(auto listed, step_.tensors());
    for (auto& tensor : listed) tensors_.emplace(tensor.name, std::move(tensor));
    TRY(const auto meta, step_.meta());
    TRY(files_, saved_files(meta));
    TRY(blobs_, step_.blobs());
    std::vector<TargetFile> targets;
    for (const auto& file : files_)
      if (file.is_safetensors) CHECK_OK(plan_saved(file, targets));
    CHECK_OK(plan_others(targets));
    if (!globs_.empty() && targets.empty())
      return fail(Errc::kNotFound,
                  fmt::format("no tensor of step {} matches {}", step_.info().step, fmt::join(globs_, " or ")));
    for (const auto& target : targets) total_ += target.header.data_bytes;
    if (globs_.empty())
      for (const auto& blob : blobs_) total_ += blob.size_bytes;
    progress_.emplace("restore", total_);
    for (const auto& target : targets) CHECK_OK(write_tensors(target));
    if (globs_.empty()) return write_blobs();
    return write_indexes(targets);
  }

  std::size_t files_written() const { return written_; }
  std::uint64_t bytes_restored() const { return total_; }

 private:
  /// A saved safetensors file: as it was, or with the tensors asked for.
  Result<void> plan_saved(const SavedFile& file, std::vector<TargetFile>& targets) {
    const std::uint64_t head = 8 + file.header.size();
    if (file.size < head) return fail(Errc::kDataLoss, fmt::format("file '{}': no room for its header", file.name));
    auto header = safetensors::parse_header(file.name, file.header, file.size - head);
    if (!header) return fail(Errc::kDataLoss, std::move(header).error().message);
    for (const auto& tensor : header->tensors) {
      const auto saved = tensors_.find(tensor.name);
      if (saved == tensors_.end() || format_dtype(saved->second.dtype) != tensor.dtype ||
          saved->second.global_shape != tensor.shape)
        return fail(Errc::kDataLoss, fmt::format("tensor '{}' of file '{}' is not in the step as the file says",
                                                 printable(tensor.name), file.name));
      placed_.insert(tensor.name);
    }
    TargetFile target{.name = file.name, .header = *header, .head = {}};
    if (std::ranges::all_of(header->tensors, [&](const auto& tensor) { return matches(globs_, tensor.name); })) {
      for (unsigned i = 0; i < 8; ++i) target.head += static_cast<char>(file.header.size() >> (8 * i));
      target.head += file.header;
      if (!globs_.empty() && header->tensors.empty()) return {};
    } else {
      std::erase_if(target.header.tensors, [&](const auto& tensor) { return !matches(globs_, tensor.name); });
      if (target.header.tensors.empty()) return {};
      CHECK_OK(lay_out_new(target));
    }
    targets.push_back(std::move(target));
    return {};
  }

  /// Tensors that no saved file holds (a training job saved them) go into one file of their own.
  Result<void> plan_others(std::vector<TargetFile>& targets) {
    TargetFile target;
    for (const auto& [name, tensor] : tensors_)
      if (!placed_.contains(name) && matches(globs_, name))
        target.header.tensors.push_back(
            {.name = name, .dtype = format_dtype(tensor.dtype), .shape = tensor.global_shape});
    if (target.header.tensors.empty()) return {};
    const auto taken = [&](const std::string& name) {
      return std::ranges::any_of(files_, [&](const auto& file) { return file.name == name; });
    };
    target.name = "tensors.safetensors";
    for (int i = 1; taken(target.name); ++i) target.name = fmt::format("tensors-{}.safetensors", i);
    CHECK_OK(lay_out_new(target));
    targets.push_back(std::move(target));
    return {};
  }

  static Result<void> lay_out_new(TargetFile& target) {
    CHECK_OK(safetensors::lay_out(target.header));
    TRY(target.head, safetensors::encode_header(target.header));
    return {};
  }

  Result<void> write_tensors(const TargetFile& target) {
    TRY(auto file, folder_.create_file(target.name));
    CHECK_OK(file.append(bytes_of(target.head)));
    // Pieces follow each other in the file: as many as fit in the buffer are one request and one write.
    std::vector<std::byte> buffer;
    std::vector<std::pair<TensorSlice, std::uint64_t>> batch;  // and bytes
    std::uint64_t held = 0;
    const auto flush = [&]() -> Result<void> {
      if (stop_requested) return fail(stopped());
      buffer.resize(held);
      auto restore = step_.restore();
      std::uint64_t at = 0;
      for (auto& [slice, length] : batch) {
        if (length != 0) restore.want(std::move(slice), std::span(buffer).subspan(at, length));
        at += length;
      }
      if (held != 0) CHECK_OK(restore.run());
      CHECK_OK(file.append(buffer));
      progress_->add(held);
      batch.clear();
      held = 0;
      return {};
    };
    for (const auto& tensor : target.header.tensors)
      for (auto& piece : pieces_of(tensor, kPieceBytes)) {
        if (held != 0 && held + piece.length > kPieceBytes) CHECK_OK(flush());
        batch.emplace_back(TensorSlice{tensor.name, std::move(piece.box)}, piece.length);
        held += piece.length;
      }
    CHECK_OK(flush());
    ++written_;
    return file.sync();
  }

  Result<void> write_blobs() {
    std::set<std::string> names;  // blobs that are parts of saved files
    for (const auto& file : files_) {
      if (file.is_safetensors) continue;
      TRY(auto out, folder_.create_file(file.name));
      std::uint64_t size = 0;
      for (std::uint64_t part = 0; part < blob_parts(file.size); ++part) {
        names.insert(blob_part_name(file.name, part));
        TRY(const auto length, append_blob(out, blob_part_name(file.name, part), 0));
        size += length;
      }
      if (size != file.size)
        return fail(Errc::kDataLoss, fmt::format("file '{}': {} bytes are there of {}", file.name, size, file.size));
      CHECK_OK(out.sync());
      ++written_;
    }
    for (const auto& blob : blobs_) {
      if (blob.rank == 0 && names.contains(blob.name)) continue;
      TRY(auto out, folder_.create_file(fmt::format("blobs/rank-{}/{}", blob.rank, plain_name(blob.name))));
      CHECK_OK(append_blob(out, blob.name, blob.rank));
      CHECK_OK(out.sync());
      ++written_;
    }
    return {};
  }

  Result<std::uint64_t> append_blob(NewFile& out, const std::string& name, std::uint32_t rank) {
    if (stop_requested) return fail(stopped());
    TRY(const auto bytes, step_.blob(name, rank));
    CHECK_OK(out.append(bytes));
    progress_->add(bytes.size());
    return bytes.size();
  }

  /// Of tensors asked for, the index of a sharded folder that names them alone.
  Result<void> write_indexes(const std::vector<TargetFile>& targets) {
    constexpr std::string_view kEnd = ".safetensors.index.json";
    for (const auto& file : files_) {
      if (file.is_safetensors || !file.name.ends_with(kEnd)) continue;
      const auto slash = file.name.rfind('/');
      const std::string folder = slash == file.name.npos ? "" : file.name.substr(0, slash + 1);
      safetensors::ShardedIndex index{.total_size = 0, .weight_map = {}};
      for (const auto& target : targets) {
        if (!target.name.starts_with(folder) || target.name.find('/', folder.size()) != target.name.npos) continue;
        for (const auto& tensor : target.header.tensors) {
          index.weight_map.emplace(tensor.name, target.name.substr(folder.size()));
          *index.total_size += tensor.end - tensor.begin;
        }
      }
      if (index.weight_map.empty()) continue;
      TRY(auto out, folder_.create_file(file.name));
      CHECK_OK(out.append(bytes_of(safetensors::encode_index(index))));
      CHECK_OK(out.sync());
      ++written_;
    }
    return {};
  }

  static std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span(text.data(), text.size()));
  }

  Step& step_;
  FolderInPlace& folder_;
  const std::vector<std::string>& globs_;
  Tensors tensors_;
  std::vector<SavedFile> files_;
  std::vector<BlobInfo> blobs_;
  std::set<std::string> placed_;  // tensors that a saved file holds
  std::optional<Progress> progress_;
  std::uint64_t total_ = 0;
  std::size_t written_ = 0;
};

}  // namespace

Result<void> ckpt_restore(Context& context, const CkptRestore& args) {
  CHECK_OK(check_run(args.run));
  TRY(auto client, context.client());
  TRY(auto step, client.open_step(args.run, args.step));
  TRY(auto folder, FolderInPlace::create(args.folder));
  Restorer restorer(step, folder, args.globs);
  CHECK_OK(restorer.run());
  CHECK_OK(folder.commit());
  if (context.json) {
    print_json({{"run", args.run},
                {"step", step.info().step},
                {"files", restorer.files_written()},
                {"bytes", restorer.bytes_restored()}});
  } else {
    print_line(fmt::format("restored {} step {} into {}: {} files, {}", args.run, step.info().step, args.folder,
                           restorer.files_written(), size_text(restorer.bytes_restored())));
  }
  return {};
}

}  // namespace cairn::cli
