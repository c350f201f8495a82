#include "server/daemon/metrics.h"

#include <fmt/format.h>

namespace cairn::server {

void MetricsText::counter_seconds(std::string_view name, std::string_view help, double value) {
  add(name, help, "counter", fmt::format("{:.6f}", value));
}

void MetricsText::add(std::string_view name, std::string_view help, std::string_view type, std::string_view value) {
  text_ += fmt::format("# HELP {0} {1}\n# TYPE {0} {2}\n{0} {3}\n", name, help, type, value);
}

}  // namespace cairn::server
