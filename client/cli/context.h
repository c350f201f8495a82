#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cairn/client.h"

namespace cairn::cli {

/// What every command needs: the servers to talk to, how to print, and whether the user wants to stop.
struct Context {
  std::vector<std::string> servers;
  std::string transport = "auto";  // "tcp", "unix"
  bool json = false;

  /// Connects at the first call. errors: kUnavailable, kInvalid
  Result<Client> client();

 private:
  std::optional<Client> client_;
};

/// Set by SIGINT and SIGTERM; long commands look at it between pieces, undo what they began and return stopped().
extern std::atomic<bool> stop_requested;
void stop_on_signals();
Error stopped();

/// One line on stderr: what was tried, on what, why it failed, what to do. Returns the exit code.
int report(std::string_view what, const Error& error);

/// "cairn://BUCKET/KEY". errors: kInvalid
struct ObjectName {
  std::string bucket, key;
};
Result<ObjectName> object_name(std::string_view url);
/// "BUCKET/RUN". errors: kInvalid
Result<void> check_run(std::string_view name);
/// "512", "64KiB", "1.5G": bytes. errors: kInvalid
Result<std::uint64_t> size_of(std::string_view text);
/// "A-B" with A inclusive, B exclusive; "A-": to the end; "-N": the last N. errors: kInvalid
struct ByteRange {
  std::uint64_t first = 0, last = Client::npos;
  bool from_end = false;  // `first` counts back from the end
};
Result<ByteRange> range_of(std::string_view text);

}  // namespace cairn::cli
