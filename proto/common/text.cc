#include "proto/common/text.h"

#include <system_error>

namespace cairn {

std::string printable(std::string_view text, std::size_t bytes_max) {
  std::string out;
  for (char c : text.substr(0, bytes_max)) out += (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) ? '?' : c;
  return text.size() > bytes_max ? out + "..." : out;
}

std::string errno_text(int error) {
  return std::generic_category().message(error);
}

}  // namespace cairn
