#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/cairnd/options.h"

namespace cairn::server {

inline constexpr std::size_t kConfigBytesMax = 1 << 20;

/// Puts what `text` (TOML) says into `options`; keys that it does not name stay as they are. Returns what is wrong,
/// each as "FILE:LINE: KEY: why; what is allowed"; then `options` holds the right part. All mistakes, but of those that
/// make it no TOML only the first.
/// sizes: text at most kConfigBytesMax
std::vector<Error> read_config(std::string_view text, std::string_view file, CairndOptions& options);

/// The whole configuration as a commented file: every key with its meaning, what is allowed, its default and when it
/// takes effect; keys at their default are commented out. read_config() of it gives the same options; without a data
/// directory it names the one of deploy/cairnd.service.
std::string print_config(const CairndOptions& options);

}  // namespace cairn::server
