#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace cairn {

/// A string that came from elsewhere, fit for a message or log: control bytes become '?', the tail is cut.
std::string printable(std::string_view text, std::size_t bytes_max = 128);

/// "ENOENT" in words: "No such file or directory". Unlike strerror(), safe on any thread.
std::string errno_text(int error);

}  // namespace cairn
