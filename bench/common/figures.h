#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace cairn::bench {

/// Figures by name, one value a round; round 0 stands apart from the others.
class Figures {
 public:
  void add(const std::string& name, std::uint32_t round, double value);
  double median(const std::string& name) const;
  /// {"NAME": {"min", "median", "max", "first_round"}, ...}
  nlohmann::json json() const;
  /// The same as a table.
  void print() const;

 private:
  std::map<std::string, std::vector<double>> rounds_, first_;
};

/// How busy the machine was: the load averages of the kernel, for the reader of a figure.
std::string load_average();

}  // namespace cairn::bench
