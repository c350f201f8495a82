#include "bench/common/figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

namespace cairn::bench {

void Figures::add(const std::string& name, std::uint32_t round, double value) {
  (round == 0 ? first_[name] : rounds_[name]).push_back(value);
}

double Figures::median(const std::string& name) const {
  const auto found = rounds_.find(name);
  if (found == rounds_.end() || found->second.empty()) return 0;
  auto v = found->second;
  std::sort(v.begin(), v.end());
  return v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

nlohmann::json Figures::json() const {
  nlohmann::json out;
  for (const auto& [name, values] : rounds_) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    out[name] = {{"min", *low}, {"median", median(name)}, {"max", *high}};
    if (auto f = first_.find(name); f != first_.end()) out[name]["first_round"] = f->second.front();
  }
  return out;
}

void Figures::print() const {
  fmt::print("{:<28}{:>12}{:>12}{:>12}{:>14}\n", "", "min", "median", "max", "first round");
  for (const auto& [name, values] : rounds_) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    auto f = first_.find(name);
    fmt::print("{:<28}{:>12.4g}{:>12.4g}{:>12.4g}{:>14.4g}\n", name, *low, median(name), *high,
               f == first_.end() ? 0.0 : f->second.front());
  }
}

std::string load_average() {
  std::ifstream in("/proc/loadavg");
  std::string one, five, fifteen;
  in >> one >> five >> fifteen;
  return one + " " + five + " " + fifteen;
}

}  // namespace cairn::bench
