#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cairn/types.h"
#include "client/safetensors/safetensors.h"
#include "proto/common/result.h"

/// How `ckpt save` lays files into a checkpoint, so that `ckpt restore` writes them back byte for byte.
///
/// A safetensors file: its tensors become tensors of the step. Metadata, scope = the file's name:
///   cairn.file    "safetensors"
///   cairn.size    bytes of the file
///   cairn.header  its JSON header as it stands in the file, padding included
/// Any other file: blobs of rank 0, the first kPieceBytes named as the file, the others NAME/part-000001 and so on (no
/// other file can have such a name, NAME being a file). Metadata:
///   cairn.file    "blob"
///   cairn.size    bytes of the file
namespace cairn::cli {

inline constexpr std::uint64_t kPieceBytes = 64ull << 20;

struct SavedFile {
  std::string name;
  bool is_safetensors = false;
  std::uint64_t size = 0;
  std::string header;  // of a safetensors file
};

std::vector<MetaItem> meta_of(const SavedFile& file);
/// Files among a step's metadata, by name. errors: kDataLoss  metadata that no save writes
Result<std::vector<SavedFile>> saved_files(const std::vector<MetaItem>& meta);

std::uint64_t blob_parts(std::uint64_t size);
std::string blob_part_name(const std::string& name, std::uint64_t part);

/// A box of a tensor that is one range of its bytes.
struct TensorPiece {
  Box box;
  std::uint64_t offset = 0, length = 0;  // in the tensor's bytes
};
/// The whole tensor in pieces of about `bytes_max`, in order of their bytes. Rows are never cut, so a row longer than
/// that is a longer piece only where all dimensions before it are 1.
std::vector<TensorPiece> pieces_of(const safetensors::TensorInfo& tensor, std::uint64_t bytes_max);

DType api_dtype(format::DType dtype);
format::DType format_dtype(DType dtype);

}  // namespace cairn::cli
