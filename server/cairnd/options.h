#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/ids.h"
#include "proto/common/result.h"
#include "proto/common/units.h"
#include "proto/rt/loop.h"
#include "proto/runtime/runtime.h"
#include "storage/disk/directory.h"

// What can be said to the daemon, and the one table of it, from which the flags, the configuration file,
// --print-config and the check of all of them are made.
//
// To add an option: a field in CairndOptions with its default and unit; a row in the table in options.cc, in its
// section ("scrub.pace" is `pace` in [scrub] of the file and the flag --scrub-pace); its use in serve.cc, where start()
// builds the parts, and, when the row says kLive, where apply() changes them in a running daemon; then
// `cairnd --print-config > deploy/cairnd.toml`, which a test compares.

namespace cairn::server {

struct CairndOptions {
  std::vector<std::string> data;          // directories, each a target; at least one
  std::set<Uuid> lost_targets;            // the operator asserts that they are lost for good
  std::string listen = "127.0.0.1:7420";  // port 0: a free one
  std::string http = "127.0.0.1:7421";    //
  bool insecure_listen = false;           // other addresses than loopback, without encryption and authentication
  std::string unix_socket;                // path; "none"; empty: cairn.sock in the first data directory
  std::string node;                       // empty: the host's name
  std::uint64_t memory_bytes = 512 * kMiB;
  storage::IoBackend io = storage::IoBackend::kAuto;

  rt::Level log_level = rt::Level::kInfo;
  rt::LogFormat log_format = rt::LogFormat::kText;
  std::uint32_t log_lines = 20;  // a second, of one event

  // A peer on the client port; the http port has its own, in server/http.
  std::uint32_t connections = 16384;
  std::uint32_t connections_per_peer = 1024;
  std::uint32_t connections_unknown = 1024;
  rt::Duration handshake = std::chrono::seconds(5);
  rt::Duration header = std::chrono::seconds(10);
  rt::Duration idle = std::chrono::seconds(60);
  std::uint64_t body_rate = 64 * kKiB;  // bytes a second
  rt::Duration body_window = std::chrono::seconds(30);
  std::uint64_t connection_bytes = 64 * kMiB;
  std::uint32_t http_connections = 64;
  std::uint64_t http_head = 8 * kKiB;

  std::uint64_t ballast = 64 * kMiB;
  std::uint64_t recycle = 16 * kGiB;  // of each directory
  std::uint32_t space_low = 5;        // percent
  rt::Duration upload_idle = std::chrono::minutes(10);
  rt::Duration rank_silence = std::chrono::seconds(30);
  rt::Duration rank_join = std::chrono::minutes(10);
  std::uint64_t handover_memory = 64 * kGiB;  // of clients
  rt::Duration reader_ttl = std::chrono::seconds(60);
  std::size_t readers_max = 65'536;
  std::size_t connection_readers_max = 4096;
  rt::Duration retention_interval = std::chrono::minutes(1);
  rt::Duration garbage_grace = std::chrono::minutes(10);
  rt::Duration garbage_interval = std::chrono::minutes(1);
  std::uint64_t scrub_pace = 64 * kMiB;  // bytes a second of each target; 0: no limit
  rt::Duration scrub_interval = std::chrono::hours(7 * 24);
  std::uint64_t repair_pace = 256 * kMiB;  // bytes a second; 0: no limit
};

/// One row of the table.
struct Option {
  enum class Kind { kText, kTexts, kFlag, kCount, kBytes, kDuration, kChoice };
  enum class When { kStart, kLive };  // takes effect: at the next start; at SIGHUP too

  std::string_view key;  // "garbage.grace": `grace` in section [garbage]; or without a section
  Kind kind;
  When when;
  std::string_view help;  // what it does, a sentence without its full stop
  std::string allowed;    // "64MiB to 1TiB", "HOST:PORT"
  /// Takes values as text, one unless kTexts. errors: kInvalid  what is wrong, and what is allowed
  std::function<Result<void>(CairndOptions&, const std::vector<std::string>&)> set;
  /// As set() takes them.
  std::function<std::vector<std::string>(const CairndOptions&)> get;

  /// "--garbage-grace".
  std::string flag() const;
};
const std::vector<Option>& option_table();

/// How the memory budget is shared. What is not named here (code, maps of chunks and segments) must fit in the rest.
struct MemoryShares {
  std::size_t units;            // of 1 MiB: what sockets receive into and disks read into
  std::uint64_t index_bytes;    // RocksDB: blocks, tables in memory
  std::uint64_t message_bytes;  // requests and replies under way
  std::uint64_t merge_bytes;    // manifests being merged
  std::uint32_t connections;    // as many as an eighth of the budget holds
};
MemoryShares memory_shares(const CairndOptions& options);

/// The address may be listened on. errors: kInvalid  not an address;  kDenied  not loopback, and that is not allowed
Result<void> check_listen(const CairndOptions& options, const std::string& address);

/// What is wrong with options that are each right alone; empty: nothing. Looks at nothing outside of them.
std::vector<Error> contradictions(const CairndOptions& options);

}  // namespace cairn::server
