#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/common/ids.h"
#include "proto/common/units.h"
#include "proto/rt/loop.h"
#include "proto/rt/seams.h"
#include "storage/disk/directory.h"

namespace cairn::server {

struct CairndOptions {
  std::vector<std::string> data;           // directories, each a target
  std::set<Uuid> lost_targets;             // the operator asserts that they are lost for good
  std::string listen = "127.0.0.1:7420";   // port 0: a free one
  std::string http = "127.0.0.1:7421";     //
  bool insecure_listen = false;            // other addresses than loopback, without encryption and authentication
  std::string node;                        // default: the host's name
  std::optional<std::string> unix_socket;  // path, "none"; default: cairn.sock in the first data directory

  std::uint64_t memory_bytes = 512 * kMiB;  // 64 MiB ..: buffers, index and messages together
  storage::IoBackend io = storage::IoBackend::kAuto;

  rt::Duration garbage_grace = std::chrono::minutes(10);
  rt::Duration garbage_interval = std::chrono::minutes(1);
  rt::Duration reader_ttl = std::chrono::seconds(60);
  rt::Duration retention_interval = std::chrono::minutes(1);
  rt::Duration rank_silence = std::chrono::seconds(30);
  rt::Level log_level = rt::Level::kInfo;
};

/// What the command line asks for: options, or an exit code after help, version or a mistake has been printed.
struct Parsed {
  std::optional<int> exit_code;
  CairndOptions options;
};
Parsed parse_options(int argc, char** argv);

}  // namespace cairn::server
