#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"

/// JSON read event by event, strictly; private to client/safetensors.
namespace cairn::safetensors {

struct Scalar {
  enum class Type { kNull, kBool, kUnsigned, kOtherNumber, kString } type = Type::kNull;
  std::uint64_t number = 0;
  std::string* text = nullptr;
};

/// Refuses duplicate keys in any object, and nesting deeper than what a derived class allows: nothing is built for
/// what will be refused.
class StrictJson : protected nlohmann::json_sax<nlohmann::json> {
 public:
  /// errors: kInvalid  the reason alone: callers add the file
  Result<void> parse(std::string_view json);

 protected:
  struct Level {
    bool object = false;
    std::set<std::string, std::less<>> keys;  // seen in this object
    std::string key;                          // being read
  };
  /// Levels entered so far; levels().back() holds the value or key at hand.
  const std::vector<Level>& levels() const { return levels_; }
  bool refuse(std::string why);

  /// Called before a level is entered and after it is left; false stops (say why with refuse).
  virtual bool on_begin(bool object) = 0;
  virtual bool on_end() = 0;
  virtual bool on_scalar(Scalar scalar) = 0;

 private:
  bool null() override { return on_scalar({}); }
  bool boolean(bool) override { return on_scalar({.type = Scalar::Type::kBool}); }
  bool number_integer(number_integer_t) override { return on_scalar({.type = Scalar::Type::kOtherNumber}); }
  bool number_unsigned(number_unsigned_t value) override {
    return on_scalar({.type = Scalar::Type::kUnsigned, .number = value});
  }
  bool number_float(number_float_t, const string_t&) override {
    return on_scalar({.type = Scalar::Type::kOtherNumber});
  }
  bool string(string_t& value) override { return on_scalar({.type = Scalar::Type::kString, .text = &value}); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return begin(true); }
  bool start_array(std::size_t) override { return begin(false); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& value) override;
  bool parse_error(std::size_t position, const std::string& last_token,
                   const nlohmann::detail::exception& error) override;
  bool begin(bool object);
  bool end();

  std::vector<Level> levels_;
  std::string why_;
};

}  // namespace cairn::safetensors
