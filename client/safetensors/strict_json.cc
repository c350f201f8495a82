#include "client/safetensors/strict_json.h"

#include <fmt/format.h>

#include <utility>

#include "proto/common/text.h"

namespace cairn::safetensors {

Result<void> StrictJson::parse(std::string_view json) {
  // The parser takes a NUL byte for the end of its input; in JSON it stands nowhere.
  if (json.find('\0') != json.npos) return fail(Errc::kInvalid, "invalid JSON: a NUL byte");
  if (nlohmann::json::sax_parse(json.begin(), json.end(), static_cast<nlohmann::json_sax<nlohmann::json>*>(this)))
    return {};
  return fail(Errc::kInvalid, why_.empty() ? "invalid JSON" : why_);
}

bool StrictJson::refuse(std::string why) {
  if (why_.empty()) why_ = std::move(why);
  return false;
}

bool StrictJson::key(string_t& value) {
  auto& level = levels_.back();
  if (!level.keys.insert(value).second) return refuse(fmt::format("duplicate key '{}'", printable(value)));
  level.key = std::move(value);
  return true;
}

bool StrictJson::parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) {
  const std::string_view text = error.what();
  const auto reason = text.find("] ");
  return refuse(fmt::format("invalid JSON or UTF-8 at byte {}: {}", position,
                            printable(reason == text.npos ? text : text.substr(reason + 2))));
}

bool StrictJson::begin(bool object) {
  if (!on_begin(object)) return refuse("nested deeper than allowed");
  levels_.push_back({.object = object, .keys = {}, .key = {}});
  return true;
}

bool StrictJson::end() {
  levels_.pop_back();
  return on_end();
}

}  // namespace cairn::safetensors
