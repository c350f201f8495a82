#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace cairn::server {

/// Lines in Prometheus' text format, each metric with its description.
class MetricsText {
 public:
  void counter(std::string_view name, std::string_view help, std::uint64_t value) {
    add(name, help, "counter", std::to_string(value));
  }
  void gauge(std::string_view name, std::string_view help, std::uint64_t value) {
    add(name, help, "gauge", std::to_string(value));
  }
  void counter_seconds(std::string_view name, std::string_view help, double value);
  const std::string& text() const { return text_; }

 private:
  void add(std::string_view name, std::string_view help, std::string_view type, std::string_view value);
  std::string text_;
};

}  // namespace cairn::server
