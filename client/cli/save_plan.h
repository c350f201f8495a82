#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "client/cli/ckpt_names.h"
#include "client/cli/files.h"

/// What `ckpt save` makes of files and folders: read and checked before the store is asked anything, so that what is
/// malformed leaves no trace there.
///
/// Files named *.safetensors become tensors. In a folder with an index (*.safetensors.index.json) the index decides: it
/// must name every tensor of the files that it names, each in the file where it is; files that it does not name are
/// left over or for another program, and kept as they are, as blobs.
namespace cairn::cli {

struct SavePlan {
  struct File {
    std::unique_ptr<FileSource> source;  // closed until it is read
    SavedFile saved;
    std::vector<safetensors::TensorInfo> tensors;  // of a safetensors file
    std::uint64_t data_offset = 0;
  };
  std::vector<File> files;  // by saved name
  std::map<std::string, std::string> file_of_tensor;
  std::uint64_t bytes = 0;
  std::vector<std::string> warnings;  // what was found odd and harms nothing
};

/// errors: kInvalid  a malformed file, a tensor in two files, an index that other files belong to;  as collect_files()
Result<SavePlan> plan_save(const std::vector<std::string>& paths);

}  // namespace cairn::cli
