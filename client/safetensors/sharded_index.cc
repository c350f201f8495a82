#include <fmt/format.h>

#include "client/safetensors/safetensors.h"
#include "client/safetensors/strict_json.h"
#include "proto/common/text.h"

namespace cairn::safetensors {
namespace {

/// Reads {"metadata": {"total_size": n, ...}, "weight_map": {tensor: file}}; whatever else there is, is skipped.
class IndexReader : public StrictJson {
 public:
  ShardedIndex index;
  bool has_weight_map = false;

 private:
  static constexpr std::size_t kDepthMax = 16;

  bool in_weight_map() const { return levels().front().key == "weight_map"; }

  bool on_begin(bool object) override {
    if (levels().empty()) return object || refuse("not an object");
    if (levels().size() == 1 && in_weight_map())
      return object ? has_weight_map = true : refuse("weight_map: not an object");
    if (in_weight_map()) return refuse("weight_map may hold file names only");
    return levels().size() < kDepthMax;
  }
  bool on_end() override { return true; }

  bool on_scalar(Scalar scalar) override {
    if (levels().empty()) return refuse("not an object");
    if (levels().size() == 1) return !in_weight_map() || refuse("weight_map: not an object");
    if (in_weight_map()) {
      const auto& tensor = levels()[1].key;
      if (scalar.type != Scalar::Type::kString) return refuse("weight_map may hold file names only");
      const std::string& file = *scalar.text;
      if (file.empty() || file == "." || file == ".." || file.find_first_of("/\\") != file.npos ||
          file.find('\0') != file.npos)
        return refuse(fmt::format("tensor '{}': '{}' is not the name of a file in the folder", printable(tensor),
                                  printable(file)));
      index.weight_map.emplace(tensor, file);
    } else if (levels().size() == 2 && levels()[0].key == "metadata" && levels()[1].key == "total_size" &&
               scalar.type == Scalar::Type::kUnsigned) {
      index.total_size = scalar.number;
    }
    return true;
  }
};

}  // namespace

Result<ShardedIndex> parse_index(std::string_view file, std::string_view json) {
  IndexReader reader;
  auto ok = reader.parse(json);
  if (!ok) return fail(std::move(ok.error()).with(printable(file)));
  if (!reader.has_weight_map) return fail(Errc::kInvalid, fmt::format("{}: no weight_map", printable(file)));
  return std::move(reader.index);
}

std::string encode_index(const ShardedIndex& index) {
  nlohmann::ordered_json out;
  out["metadata"] = nlohmann::ordered_json::object();
  if (index.total_size) out["metadata"]["total_size"] = *index.total_size;
  out["weight_map"] = nlohmann::ordered_json::object();
  for (const auto& [tensor, file] : index.weight_map) out["weight_map"][tensor] = file;
  return out.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace cairn::safetensors
