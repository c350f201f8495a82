#include "server/http/request.h"
#include "tests/fuzz/fuzz.h"

namespace cairn::fuzz {
namespace {

void one(std::string_view input) {
  const auto size = server::http_head_bytes(input);
  must(size <= input.size(), "a head lies in the bytes that are there");
  if (size == 0) return;
  // The end is found as soon as it is there, and whatever follows it.
  must(server::http_head_bytes(input.substr(0, size)) == size, "what follows a head does not move its end");
  must(server::http_head_bytes(input.substr(0, size - 1)) == 0, "a head without its last byte is not whole");
  const auto request = server::parse_http_head(input.substr(0, size));
  if (request.error != 0) {
    must(request.error >= 400 && request.error < 600, "a refusal is a refusal");
    return;
  }
  must(!request.method.empty() && request.path.starts_with('/'), "what is accepted has a method and a path");
  must(request.path.find_first_of(std::string_view(" ?\r\n\0", 5)) == request.path.npos, "a path is one word");
}

std::vector<std::string> seeds() {
  return {"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET /readyz?verbose HTTP/1.0\n\n",
          "HEAD /metrics HTTP/1.1\r\nHost: x\r\nConnection: Foo, keep-alive\r\n\r\nGET / HTTP/1.1\r\n",
          "POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello"};
}

const Register registered({.name = "http", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
