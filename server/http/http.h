#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "proto/common/units.h"
#include "proto/rt/seams.h"

namespace cairn::server {

struct HttpReply {
  int status = 200;
  std::string type = "text/plain; charset=utf-8";
  std::string body = {};
};

/// Just enough HTTP/1.1 for health checks and metrics: GET and HEAD, no request body; connections may be kept.
/// Everything a peer can take is bounded: connections, bytes of a head, time. Who goes beyond is answered 4xx or cut
/// off.
///
/// Threads:  the loop.
/// Lifetime: destroying it cuts off what is under way, not from inside `answer`; `runtime` and what `answer` uses
///           outlive it.
class HttpServer {
 public:
  struct Options {
    std::uint32_t connections_max = 64;                // who has sent no whole request makes room, oldest first
    std::uint32_t head_bytes_max = 8 * kKiB;           //
    rt::Duration head_max = std::chrono::seconds(5);   // from the connection or the last reply to the head's end
    rt::Duration write_max = std::chrono::seconds(5);  // to take a reply
  };
  struct Stats {
    std::uint64_t connections = 0, requests_total = 0;
  };
  /// `path` is the request's target without its query. Unknown ones are answered 404.
  using Answer = std::function<HttpReply(const std::string& path)>;

  static std::unique_ptr<HttpServer> create(rt::Runtime runtime, Answer answer, Options options);
  static std::unique_ptr<HttpServer> create(rt::Runtime runtime, Answer answer) {
    return create(runtime, std::move(answer), Options{});
  }
  virtual ~HttpServer() = default;
  /// Accepts from `listener` for ever. Call once per listener.
  virtual void serve(std::unique_ptr<rt::Listener> listener) = 0;
  virtual Stats stats() const = 0;
};

}  // namespace cairn::server
