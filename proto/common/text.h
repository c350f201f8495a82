#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace cairn {

/// Bytes of the UTF-8 character that begins at `at` (shortest form, no surrogates), 1 .. 4; 0: there is none.
std::size_t utf8_bytes(std::string_view text, std::size_t at);
bool valid_utf8(std::string_view text);

/// Whether one character of UTF-8 does something other than show itself: control characters, line separators, marks of
/// direction.
bool steers_terminal(std::string_view character);

/// A string that came from elsewhere, fit for a message or log: whole characters, at most `bytes_max` bytes of them;
/// what
/// steers a terminal and bytes that are not UTF-8 become '?'.
std::string printable(std::string_view text, std::size_t bytes_max = 128);

/// "ENOENT" in words: "No such file or directory". Unlike strerror(), safe on any thread.
std::string errno_text(int error);

}  // namespace cairn
