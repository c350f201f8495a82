#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "proto/common/result.h"
#include "storage/format/tensor.h"

/// The safetensors file format, strictly: whatever the format's rules do not allow is refused with the reason. Keys of
/// a tensor that they do not name are no matter of theirs.
/// source: the design's formats page, "safetensors"
namespace cairn::safetensors {

inline constexpr std::uint64_t kHeaderBytesMax = 100'000'000;

/// Bytes of one file, read by ranges: a file of many GB never lies in memory.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual std::string name() const = 0;  // for messages
  virtual std::uint64_t size() const = 0;
  /// Fills `out` from `offset`; the range lies inside size().
  virtual Result<void> read(std::uint64_t offset, std::span<std::byte> out) = 0;
};

struct TensorInfo {
  std::string name;
  format::DType dtype = format::DType::kF32;
  format::Shape shape;
  std::uint64_t begin = 0, end = 0;  // bytes in the data buffer
  bool operator==(const TensorInfo&) const = default;
};

struct Header {
  std::vector<TensorInfo> tensors;                            // by rising offset
  std::vector<std::pair<std::string, std::string>> metadata;  // __metadata__, in the file's order
  bool has_metadata = false;                                  // an empty __metadata__ is not none
  std::uint64_t data_offset = 0;                              // of the data buffer in the file: 8 + N
  std::uint64_t data_bytes = 0;
};

/// Reads and checks the header against the file's size.
/// errors: kInvalid  "FILE: tensor 'X': REASON (Name)", with safetensors' own name of the error where it has one
Result<Header> read_header(ByteSource& file);
/// The same when the N header bytes lie in memory. `data_bytes` is the length of what follows them in the file.
Result<Header> parse_header(std::string_view file, std::string_view json, std::uint64_t data_bytes);
/// The N bytes of JSON as they stand in the file, padding included.
Result<std::string> read_header_text(ByteSource& file);

/// Puts tensors in the writer's order (dtype descending, then name) and gives them their offsets.
/// errors: kInvalid  a tensor twice, not whole bytes, overflow
Result<void> lay_out(Header& header);
/// The first 8 + N bytes of a file with this header: length, JSON, padding to a multiple of 8.
/// errors: kInvalid  longer than the format allows
Result<std::string> encode_header(const Header& header);

/// model.safetensors.index.json: which file holds which tensor.
struct ShardedIndex {
  std::optional<std::uint64_t> total_size;        // sum of the tensors' bytes, as the file says
  std::map<std::string, std::string> weight_map;  // tensor -> file
};
/// errors: kInvalid  not JSON of that form, a duplicate key, or a file name that is not a plain name in the folder
Result<ShardedIndex> parse_index(std::string_view file, std::string_view json);
std::string encode_index(const ShardedIndex& index);

}  // namespace cairn::safetensors
