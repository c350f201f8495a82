#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <string>
#include <vector>

#include "client/examples/char_lm/trainer.h"

namespace char_lm {

/// What the command line says.
struct Options {
  std::vector<std::string> servers;
  std::string run;
  std::string launch;  // JOB or JOB:RESTART; empty: a new one
  int ranks = 4;
  std::uint64_t steps = 60;
  std::uint64_t save_every = 10;
  std::uint64_t log_every = 5;
  std::string text = "/usr/share/common-licenses";
  std::string status_file;
  std::optional<std::uint64_t> stop_in_save;
  TrainConfig train;
  bool help = false;
};

const char* usage();
/// Error: what is wrong with which flag.
std::expected<Options, std::string> parse(int count, char** arguments);

}  // namespace char_lm
