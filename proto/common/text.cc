#include "proto/common/text.h"

#include <system_error>

namespace cairn {
std::size_t utf8_bytes(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[at + k]); };
  if (at >= text.size()) return 0;
  const unsigned char lead = byte(0);
  const std::size_t size = lead < 0x80                   ? 1
                           : lead >= 0xc2 && lead < 0xe0 ? 2
                           : lead >= 0xe0 && lead < 0xf0 ? 3
                           : lead >= 0xf0 && lead < 0xf5 ? 4
                                                         : 0;
  if (size == 0 || text.size() - at < size) return 0;
  for (std::size_t k = 1; k < size; ++k)
    if ((byte(k) & 0xc0) != 0x80) return 0;
  if ((lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xed && byte(1) > 0x9f)) return 0;
  if ((lead == 0xf0 && byte(1) < 0x90) || (lead == 0xf4 && byte(1) > 0x8f)) return 0;
  return size;
}

bool valid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto size = utf8_bytes(text, at);
    if (size == 0) return false;
    at += size;
  }
  return true;
}

bool steers_terminal(std::string_view character) {
  if (character.size() == 1) {
    const auto c = static_cast<unsigned char>(character[0]);
    return c < 0x20 || c == 0x7f;
  }
  const auto second = static_cast<unsigned char>(character[1]);
  // C1
  if (character.size() == 2) return character[0] == '\xc2' && second < 0xa0;
  // U+200E, U+200F, U+2028 .. U+202E, U+2066 .. U+2069
  if (character.size() != 3 || character[0] != '\xe2') return false;
  const auto third = static_cast<unsigned char>(character[2]);
  return (second == 0x80 && (third == 0x8e || third == 0x8f || (third >= 0xa8 && third <= 0xae))) ||
         (second == 0x81 && third >= 0xa6 && third <= 0xa9);
}

std::string printable(std::string_view text, std::size_t bytes_max) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const auto size = utf8_bytes(text, at);
    const auto character = text.substr(at, size == 0 ? 1 : size);
    if (at + character.size() > bytes_max) return out + "...";
    if (size == 0 || steers_terminal(character))
      out += '?';
    else
      out += character;
    at += character.size();
  }
  return out;
}

std::string errno_text(int error) {
  return std::generic_category().message(error);
}

}  // namespace cairn
