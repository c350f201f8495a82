#pragma once

#include <string>
#include <utility>
#include <vector>

#include "server/cairnd/options.h"

namespace cairn::server {

/// What the command line says; flags override the configuration file.
struct CommandLine {
  enum class Action { kServe, kCheckConfig, kPrintConfig, kExit };
  Action action = Action::kServe;
  int exit_code = 0;   // of kExit: help or version has been printed, or a mistake
  std::string config;  // file; empty: none
  std::vector<std::pair<const Option*, std::vector<std::string>>> flags;
};
/// Prints help, version and mistakes.
CommandLine parse_command_line(int argc, char** argv);

/// The options that file and flags make together, and all that is wrong with them: then nothing of them is to be used.
/// Reads the file again at each call.
struct Configured {
  CairndOptions options;
  std::vector<Error> mistakes;
};
Configured configure(const CommandLine& line);

}  // namespace cairn::server
