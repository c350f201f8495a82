#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"

namespace cairn::cli {

/// Text for people on stdout; what steers a terminal and what is not UTF-8 never reaches it.
void print_line(std::string_view text);
/// One JSON document on one line.
void print_json(const nlohmann::ordered_json& json);
/// One line on stderr, whatever the text contains.
void print_error(std::string_view text);
/// Everything printed has arrived. errors: kNoSpace, kFailed  stdout is full or closed
Result<void> flush_output();

std::string size_text(std::uint64_t bytes);      // "1.2 GiB"
std::string time_text(std::int64_t unix_nanos);  // "2024-02-29 12:00:00Z"
std::string time_iso(std::int64_t unix_nanos);   // "2024-02-29T12:00:00Z"

/// Columns as wide as their widest cell, printed at the end.
class Table {
 public:
  explicit Table(std::vector<std::string> head) : rows_{std::move(head)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void print() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// A bar on the terminal, once a command has taken longer than a second. Silent without a terminal.
class Progress {
 public:
  enum class Unit { kBytes, kSteps };
  Progress(std::string label, std::uint64_t total, Unit unit = Unit::kBytes);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void set(std::uint64_t done);
  void add(std::uint64_t bytes) { set(done_ + bytes); }
  std::uint64_t done() const { return done_; }
  std::chrono::duration<double> elapsed() const { return std::chrono::steady_clock::now() - start_; }

 private:
  std::string label_;
  std::uint64_t total_, done_ = 0;
  Unit unit_;
  std::chrono::steady_clock::time_point start_, drawn_;
  bool terminal_, shown_ = false;
};

}  // namespace cairn::cli
