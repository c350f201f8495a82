#pragma once

#include <string>
#include <string_view>

namespace cairn::server {

/// The head of one HTTP/1.x request, as far as we care.
struct HttpRequest {
  int error = 0;  // status that refuses it, or 0; then the rest holds
  std::string method;
  std::string path;         // without the query
  bool keep_alive = false;  // the peer may send another one
};

/// Bytes of the head at the start of `buffer`, the empty line included; 0: not whole yet. Lines may end in LF alone.
std::size_t http_head_bytes(std::string_view buffer);

/// Takes a whole head apart. A request with a body is answered without reading it, so its connection cannot go on.
HttpRequest parse_http_head(std::string_view head);

}  // namespace cairn::server
