#include "client/safetensors/safetensors.h"
#include "proto/common/text.h"
#include "tests/fuzz/fuzz.h"

namespace cairn::fuzz {
namespace {

using namespace safetensors;

void reason(const Error& error) {
  must(!error.message.empty(), "a refusal has a reason");
}

void header(std::string_view json, std::uint64_t data_bytes) {
  auto parsed = parse_header("f.safetensors", json, data_bytes);
  if (!parsed) return reason(parsed.error());
  std::uint64_t at = 0;
  for (const auto& tensor : parsed->tensors) {
    must(tensor.begin == at && tensor.end >= tensor.begin, "tensors lie one after the other");
    at = tensor.end;
    const auto count = format::elements(tensor.shape);
    must(count, "its elements can be counted");
    const auto bytes = format::bytes_of(tensor.dtype, *count);
    must(bytes && *bytes == tensor.end - tensor.begin, "its bytes are what its shape says");
  }
  must(at == data_bytes && parsed->data_bytes == data_bytes, "and fill the file");
  // Written and read again, it holds the same tensors.
  const auto before = *parsed;
  must(lay_out(*parsed), "it can be laid out");
  const auto written = encode_header(*parsed);
  must(written, "it can be written");
  const auto again = parse_header("f.safetensors", std::string_view(*written).substr(8), data_bytes);
  must(again, "what was written can be read");
  must(again->tensors.size() == before.tensors.size() && again->metadata == before.metadata &&
           again->has_metadata == before.has_metadata,
       "and is the same");
}

void index(std::string_view json) {
  const auto parsed = parse_index("model.safetensors.index.json", json);
  if (!parsed) return reason(parsed.error());
  const auto again = parse_index("model.safetensors.index.json", encode_index(*parsed));
  must(again, "an index that was read can be written and read");
  must(again->weight_map == parsed->weight_map, "and is the same");
  for (const auto& [tensor, file] : parsed->weight_map)
    must(file.find('/') == file.npos && file != ".." && file != ".", "its files lie in the folder");
}

void one(std::string_view input) {
  Input in(input);
  const auto size = in.number(2);
  if (size == 0xffff) return index(in.rest());
  header(in.rest(), size);
}

std::vector<std::string> seeds() {
  const auto with = [](std::uint32_t size, std::string_view json) {
    std::string out;
    out += static_cast<char>(size >> 8);
    out += static_cast<char>(size);
    return out += json;
  };
  return {
      with(
          24,
          R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}})"),
      with(0, R"({"__metadata__":{"format":"pt","k\u00e9y":"v"}})"),
      with(0, R"({"e":{"dtype":"I64","shape":[0,3],"data_offsets":[0,0]}}   )"),
      with(3, R"({"f":{"dtype":"F4","shape":[6],"data_offsets":[0,3]}})"),
      with(0xffff, R"({"metadata":{"total_size":40},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"x"}})")};
}

const Register registered({.name = "safetensors", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
