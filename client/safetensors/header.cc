#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "client/safetensors/safetensors.h"
#include "client/safetensors/strict_json.h"
#include "proto/common/text.h"
#include "proto/common/units.h"

namespace cairn::safetensors {
namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::string_view kMetadata = "__metadata__";
constexpr std::size_t kPathShownMax = 1024;

/// Reads {"__metadata__": {text: text}, NAME: {"dtype": text, "shape": [n ...], "data_offsets": [n, n]}, ...}. Other
/// keys of a tensor are skipped, as the reference implementation does, so that the format can grow.
class HeaderReader : public StrictJson {
 public:
  std::vector<TensorInfo> tensors;
  std::vector<std::pair<std::string, std::string>> metadata;
  bool has_metadata = false;

 private:
  enum class Field { kOther, kDtype, kShape, kOffsets };
  static constexpr std::size_t kDepthMax = 32;  // of what is skipped

  bool in_metadata() const { return levels().front().key == kMetadata; }
  bool refuse_here(std::string_view why) {
    if (levels().empty()) return refuse(fmt::format("header {}", why));
    return refuse(fmt::format("tensor '{}': {}", printable(levels().front().key), why));
  }
  Field field() const {
    const auto& key = levels()[1].key;
    return key == "dtype"          ? Field::kDtype
           : key == "shape"        ? Field::kShape
           : key == "data_offsets" ? Field::kOffsets
                                   : Field::kOther;
  }

  bool on_begin(bool object) override {
    switch (levels().size()) {
      case 0:
        return object || refuse_here("is not an object");
      case 1:
        if (!object) return refuse_here(in_metadata() ? "is not an object" : "is not an object (TensorInvalidInfo)");
        if (in_metadata()) return has_metadata = true;
        info_ = {};
        has_dtype_ = has_shape_ = has_offsets_ = false;
        info_.name = levels()[0].key;
        offsets_.clear();
        return true;
      case 2:
        if (in_metadata()) return refuse("__metadata__ may hold text only");
        if (field() == Field::kOther) return true;
        if (object || field() == Field::kDtype)
          return refuse_here(fmt::format("'{}' is not of its type (TensorInvalidInfo)", levels()[1].key));
        (field() == Field::kShape ? has_shape_ : has_offsets_) = true;
        return true;
      default:
        return (field() == Field::kOther && levels().size() < kDepthMax) ||
               refuse_here("nested too deep (TensorInvalidInfo)");
    }
  }

  bool on_scalar(Scalar scalar) override {
    switch (levels().size()) {
      case 0:
        return refuse_here("is not an object");
      case 1:
        return refuse_here("is not an object (TensorInvalidInfo)");
      case 2:
        if (in_metadata()) {
          if (scalar.type != Scalar::Type::kString) return refuse("__metadata__ may hold text only");
          metadata.emplace_back(levels()[1].key, std::move(*scalar.text));
          return true;
        }
        if (field() == Field::kOther) return true;
        if (field() == Field::kDtype && scalar.type == Scalar::Type::kString) {
          const auto dtype = format::dtype_of(*scalar.text);
          if (!dtype)
            return refuse_here(fmt::format("unknown dtype '{}' (TensorInvalidInfo)", printable(*scalar.text)));
          info_.dtype = *dtype;
          has_dtype_ = true;
          return true;
        }
        return refuse_here(fmt::format("'{}' is not of its type (TensorInvalidInfo)", levels()[1].key));
      default:
        if (field() == Field::kOther) return true;
        if (scalar.type != Scalar::Type::kUnsigned)
          return refuse_here(
              fmt::format("'{}' must hold whole numbers from 0 to 2^64 - 1 (TensorInvalidInfo)", levels()[1].key));
        if (field() == Field::kOffsets) {
          if (offsets_.size() == 2) return refuse_here("more than two data_offsets (InvalidOffset)");
          offsets_.push_back(scalar.number);
        } else {
          if (info_.shape.size() == format::kDimensionsMax)
            return refuse_here(fmt::format("more than {} dimensions", format::kDimensionsMax));
          info_.shape.push_back(scalar.number);
        }
        return true;
    }
  }

  bool on_end() override {
    if (levels().size() != 1 || in_metadata()) return true;
    return end_tensor();
  }

  bool end_tensor() {
    if (!has_dtype_ || !has_shape_ || !has_offsets_)
      return refuse_here("dtype, shape and data_offsets are needed (TensorInvalidInfo)");
    if (offsets_.size() != 2) return refuse_here("needs two data_offsets (InvalidOffset)");
    info_.begin = offsets_[0], info_.end = offsets_[1];
    tensors.push_back(std::move(info_));
    return true;
  }

  TensorInfo info_;
  std::vector<std::uint64_t> offsets_;
  bool has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
};

Failure bad(std::string_view file, std::string_view why) {
  return fail(Errc::kInvalid, fmt::format("{}: {}", printable(file, kPathShownMax), why));
}
Failure bad(std::string_view file, const TensorInfo& tensor, std::string_view why) {
  return bad(file, fmt::format("tensor '{}': {}", printable(tensor.name), why));
}

/// Bytes that dtype and shape call for. errors: the reason alone
Result<std::uint64_t> bytes_for(const TensorInfo& tensor) {
  std::uint64_t count = 1, bits = 0;
  for (const auto size : tensor.shape)
    if (!mul_checked(count, size, count)) return fail(Errc::kInvalid, "shape overflows (ValidationOverflow)");
  if (!mul_checked(count, format::bits_of(tensor.dtype), bits))
    return fail(Errc::kInvalid, "size overflows (ValidationOverflow)");
  if (bits % 8 != 0)
    return fail(Errc::kInvalid, fmt::format("{} elements of {} are not whole bytes (MisalignedSlice)", count,
                                            format::name_of(tensor.dtype)));
  return bits / 8;
}

/// Tensors must follow each other without gap or overlap from 0 to the end of the file: nothing can hide between them.
Result<void> check_layout(std::string_view file, const Header& header) {
  std::uint64_t next = 0;
  for (const auto& tensor : header.tensors) {
    if (tensor.begin != next || tensor.end < tensor.begin)
      return bad(file, tensor,
                 fmt::format("data_offsets [{}, {}) where the data goes on at {}: {} (InvalidOffset)", tensor.begin,
                             tensor.end, next,
                             tensor.end < tensor.begin ? "end before begin"
                             : tensor.begin > next     ? "a hole"
                                                       : "an overlap"));
    const auto bytes = bytes_for(tensor);
    if (!bytes) return bad(file, tensor, bytes.error().message);
    if (tensor.end - tensor.begin != *bytes)
      return bad(file, tensor,
                 fmt::format("data_offsets hold {} bytes, dtype and shape need {} (TensorInvalidInfo)",
                             tensor.end - tensor.begin, *bytes));
    next = tensor.end;
  }
  if (next != header.data_bytes)
    return bad(file,
               fmt::format("tensors end at {} of {} data bytes: {} (MetadataIncompleteBuffer)", next, header.data_bytes,
                           next < header.data_bytes ? "bytes follow them" : "bytes are missing"));
  return {};
}

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump();
}

}  // namespace

Result<Header> parse_header(std::string_view file, std::string_view json, std::uint64_t data_bytes) {
  if (!json.starts_with('{')) return bad(file, "header does not start with '{' (InvalidHeaderStart)");
  const auto last = json.find_last_not_of(' ');
  if (json[last] != '}') return bad(file, "header does not end with '}' and spaces (InvalidHeaderDeserialization)");
  HeaderReader reader;
  if (auto ok = reader.parse(json); !ok) return bad(file, ok.error().message);
  Header out;
  out.tensors = std::move(reader.tensors);
  out.metadata = std::move(reader.metadata);
  out.has_metadata = reader.has_metadata;
  out.data_offset = kLengthBytes + json.size();
  out.data_bytes = data_bytes;
  // Zero-size tensors share their begin with the next one and come before it.
  std::ranges::sort(out.tensors, {}, [](const TensorInfo& t) { return std::tie(t.begin, t.end, t.name); });
  CHECK_OK(check_layout(file, out));
  return out;
}

Result<std::string> read_header_text(ByteSource& file) {
  const auto name = file.name();
  if (file.size() < kLengthBytes)
    return bad(name, fmt::format("{} bytes are too few for a header (HeaderTooSmall)", file.size()));
  std::byte raw[kLengthBytes];
  CHECK_OK(file.read(0, raw));
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(raw[i]);
  if (length > kHeaderBytesMax)
    return bad(name,
               fmt::format("header of {} bytes, at most {} are allowed (HeaderTooLarge)", length, kHeaderBytesMax));
  if (length > file.size() - kLengthBytes)
    return bad(name, fmt::format("header of {} bytes in a file of {} (InvalidHeaderLength)", length, file.size()));
  if (length < 2) return bad(name, fmt::format("header of {} bytes (HeaderTooSmall)", length));
  std::string text(length, '\0');
  CHECK_OK(file.read(kLengthBytes, std::as_writable_bytes(std::span(text.data(), text.size()))));
  return text;
}

Result<Header> read_header(ByteSource& file) {
  TRY(const auto text, read_header_text(file));
  return parse_header(file.name(), text, file.size() - kLengthBytes - text.size());
}

Result<void> lay_out(Header& header) {
  std::ranges::sort(header.tensors, [](const TensorInfo& a, const TensorInfo& b) {
    return a.dtype != b.dtype ? a.dtype > b.dtype : a.name < b.name;
  });
  std::set<std::string_view> names;
  std::uint64_t next = 0;
  for (auto& tensor : header.tensors) {
    const auto where = fmt::format("tensor '{}'", printable(tensor.name));
    if (tensor.name == kMetadata || !names.insert(tensor.name).second)
      return fail(Errc::kInvalid, where + ": the name stands for something else in this file");
    auto bytes = bytes_for(tensor);
    if (!bytes) return fail(std::move(bytes.error()).with(where));
    tensor.begin = next;
    if (!add_checked(next, *bytes, next)) return fail(Errc::kInvalid, where + ": the file's size overflows");
    tensor.end = next;
  }
  header.data_bytes = next;
  return {};
}

Result<std::string> encode_header(const Header& header) {
  std::string json = "{";
  try {
    if (header.has_metadata || !header.metadata.empty()) {
      json += quoted(std::string(kMetadata)) + ":{";
      for (const auto& [key, value] : header.metadata)
        json += (json.back() == '{' ? "" : ",") + quoted(key) + ":" + quoted(value);
      json += "}";
    }
    for (const auto& tensor : header.tensors)
      json += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                          json.size() == 1 ? "" : ",", quoted(tensor.name), format::name_of(tensor.dtype),
                          fmt::join(tensor.shape, ","), tensor.begin, tensor.end);
  } catch (const nlohmann::json::exception&) {
    return fail(Errc::kInvalid, "a name or metadata is not valid UTF-8");
  }
  json += "}";
  json.resize(round_up(kLengthBytes + json.size(), 8) - kLengthBytes, ' ');
  if (json.size() > kHeaderBytesMax)
    return fail(Errc::kInvalid, fmt::format("header of {} bytes, at most {} are allowed (HeaderTooLarge)", json.size(),
                                            kHeaderBytesMax));
  std::string out;
  for (unsigned i = 0; i < kLengthBytes; ++i) out += static_cast<char>(json.size() >> (8 * i));
  return out + json;
}

}  // namespace cairn::safetensors
