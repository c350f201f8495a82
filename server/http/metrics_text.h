#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace cairn::server {

/// Writes metrics in Prometheus' text format, version 0.0.4.
///
///   MetricsText text;
///   text.counter("cairn_rpc_calls_total", "Calls begun.", stats.calls_total);
///   text.family("cairn_target_bytes", "Bytes stored.", MetricsText::Type::kGauge);
///   for (const auto& t : targets) text.sample({{"target", t.name}}, t.bytes);
///
/// Names are ours ([a-zA-Z_:][a-zA-Z0-9_:]*, checked by assert); help and label values may be any UTF-8.
class MetricsText {
 public:
  static constexpr std::string_view kContentType = "text/plain; version=0.0.4; charset=utf-8";
  enum class Type { kCounter, kGauge };
  using Labels = std::initializer_list<std::pair<std::string_view, std::string_view>>;

  /// Begins a metric; its samples follow. Each name at most once.
  void family(std::string_view name, std::string_view help, Type type);
  template <std::unsigned_integral T>
  void sample(Labels labels, T value) {
    line(labels, std::to_string(value));
  }
  void sample(Labels labels, double value);

  /// A metric of one sample without labels.
  template <class T>
  void counter(std::string_view name, std::string_view help, T value) {
    family(name, help, Type::kCounter);
    sample({}, value);
  }
  template <class T>
  void gauge(std::string_view name, std::string_view help, T value) {
    family(name, help, Type::kGauge);
    sample({}, value);
  }

  const std::string& text() const { return text_; }

 private:
  void line(Labels labels, std::string_view value);

  std::string text_;
  std::string name_;  // of the family begun
};

}  // namespace cairn::server
