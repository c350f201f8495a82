#include "client/cli/ckpt_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>

#include "client/cli/files.h"

namespace cairn::cli {

std::vector<MetaItem> meta_of(const SavedFile& file) {
  std::vector<MetaItem> out{{file.name, "cairn.file", file.is_safetensors ? "safetensors" : "blob"},
                            {file.name, "cairn.size", std::to_string(file.size)}};
  if (file.is_safetensors) out.push_back({file.name, "cairn.header", file.header});
  return out;
}

Result<std::vector<SavedFile>> saved_files(const std::vector<MetaItem>& meta) {
  std::map<std::string, SavedFile> files;
  for (const auto& item : meta)
    if (item.key == "cairn.file") {
      auto& file = files[item.scope];
      file.name = item.scope;
      file.is_safetensors = item.value == "safetensors";
    }
  for (const auto& item : meta) {
    const auto file = files.find(item.scope);
    if (file == files.end()) continue;
    if (item.key == "cairn.header") file->second.header = item.value;
    if (item.key != "cairn.size") continue;
    const auto end = item.value.data() + item.value.size();
    const auto read = std::from_chars(item.value.data(), end, file->second.size);
    if (read.ec != std::errc() || read.ptr != end)
      return fail(Errc::kDataLoss, fmt::format("file '{}': its size is not a number", item.scope));
  }
  std::vector<SavedFile> out;
  for (auto& [name, file] : files) {
    CHECK_OK(check_saved_name(name));
    out.push_back(std::move(file));
  }
  return out;
}

std::uint64_t blob_parts(std::uint64_t size) {
  return size == 0 ? 1 : (size - 1) / kPieceBytes + 1;
}

std::string blob_part_name(const std::string& name, std::uint64_t part) {
  return part == 0 ? name : fmt::format("{}/part-{:06}", name, part);
}

std::vector<TensorPiece> pieces_of(const safetensors::TensorInfo& tensor, std::uint64_t bytes_max) {
  const std::uint64_t bytes = tensor.end - tensor.begin, bits = format::bits_of(tensor.dtype);
  const auto& shape = tensor.shape;
  const Box whole{std::vector<std::uint64_t>(shape.size(), 0), shape};
  if (bytes <= bytes_max) return {{whole, 0, bytes}};

  // Cut along `axis`, one index at a time in the dimensions before it. Elements smaller than a byte are cut only along
  // the first dimension that can be, four rows at a time: then every piece is whole bytes.
  const bool sub_byte = bits % 8 != 0;
  std::uint64_t row_bits = bytes * 8;  // of one index along the axis
  std::size_t axis = 0;
  for (; axis < shape.size(); ++axis) {
    row_bits /= shape[axis];
    if (row_bits / 8 <= bytes_max || (sub_byte && shape[axis] > 1)) break;
  }
  if (axis == shape.size()) {  // not even one element fits
    if (axis == 0) return {{whole, 0, bytes}};
    --axis;
  }
  std::uint64_t rows = std::max<std::uint64_t>(1, bytes_max * 8 / std::max<std::uint64_t>(row_bits, 1));
  if (sub_byte) rows = std::max<std::uint64_t>(4, rows / 4 * 4);

  std::vector<TensorPiece> out;
  Box box = whole;
  for (std::size_t d = 0; d < axis; ++d) box.shape[d] = 1;
  std::uint64_t offset = 0;
  while (offset < bytes) {
    for (std::uint64_t row = 0; row < shape[axis]; row += rows) {
      box.offset[axis] = row;
      box.shape[axis] = std::min(rows, shape[axis] - row);
      const auto length = row_bits * box.shape[axis] / 8;
      out.push_back({box, offset, length});
      offset += length;
    }
    for (std::size_t d = axis; d-- > 0;) {
      if (++box.offset[d] < shape[d]) break;
      box.offset[d] = 0;
    }
  }
  return out;
}

DType api_dtype(format::DType dtype) {
  return static_cast<DType>(dtype);
}
format::DType format_dtype(DType dtype) {
  return static_cast<format::DType>(dtype);
}
static_assert(static_cast<int>(DType::u64) == static_cast<int>(format::DType::kU64));

}  // namespace cairn::cli
