#include "server/http/request.h"

#include <algorithm>

namespace cairn::server {
namespace {

bool is_token(std::string_view text) {
  return !text.empty() && std::ranges::all_of(text, [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
  });
}
std::string lower(std::string_view text) {
  std::string out(text);
  std::ranges::transform(out, out.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return out;
}
std::string_view trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}
/// The next line of `text` without its end, which must be there.
std::string_view take_line(std::string_view& text) {
  const auto end = text.find('\n');
  auto line = text.substr(0, end);
  text.remove_prefix(end + 1);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}
/// Whether a comma-separated list names `word`.
bool lists(std::string_view list, std::string_view word) {
  while (!list.empty()) {
    const auto comma = list.find(',');
    if (lower(trim(list.substr(0, comma))) == word) return true;
    if (comma == list.npos) break;
    list.remove_prefix(comma + 1);
  }
  return false;
}
HttpRequest refuse(int status) {
  HttpRequest r;
  r.error = status;
  return r;
}

}  // namespace

std::size_t http_head_bytes(std::string_view buffer) {
  for (auto at = buffer.find('\n'); at != buffer.npos; at = buffer.find('\n', at + 1)) {
    const auto rest = buffer.substr(at + 1);
    if (rest.starts_with('\n')) return at + 2;
    if (rest.starts_with("\r\n")) return at + 3;
  }
  return 0;
}

HttpRequest parse_http_head(std::string_view head) {
  HttpRequest r;
  const auto line = take_line(head);
  const auto first = line.find(' '), last = line.rfind(' ');
  if (first == line.npos || first == last) return refuse(400);
  r.method = line.substr(0, first);
  const auto target = line.substr(first + 1, last - first - 1);
  const auto version = line.substr(last + 1);
  if (!is_token(r.method) || !target.starts_with('/') ||
      !std::ranges::all_of(target, [](char c) { return c > ' ' && c <= '~'; }))
    return refuse(400);
  if (version != "HTTP/1.1" && version != "HTTP/1.0") return refuse(version.starts_with("HTTP/") ? 505 : 400);
  r.path = target.substr(0, target.find('?'));
  r.keep_alive = version == "HTTP/1.1";

  int hosts = 0;
  bool body = false;
  while (!head.empty()) {
    const auto field = take_line(head);
    if (field.empty()) break;
    const auto colon = field.find(':');
    if (colon == field.npos || !is_token(field.substr(0, colon))) return refuse(400);  // also folded lines
    const auto name = lower(field.substr(0, colon));
    const auto value = trim(field.substr(colon + 1));
    if (!std::ranges::all_of(value, [](unsigned char c) { return c >= ' ' || c == '\t'; })) return refuse(400);
    if (name == "host") ++hosts;
    if (name == "connection") {
      if (lists(value, "keep-alive")) r.keep_alive = true;
      if (lists(value, "close")) r.keep_alive = false;
    }
    if (name == "transfer-encoding" || (name == "content-length" && value != "0")) body = true;
  }
  if (body) r.keep_alive = false;
  if (hosts > 1 || (hosts == 0 && version == "HTTP/1.1")) return refuse(400);
  return r;
}

}  // namespace cairn::server
