#pragma once

#include <functional>
#include <memory>
#include <string>

#include "proto/rt/seams.h"

namespace cairn::server {

struct HttpReply {
  int status = 200;
  std::string type = "text/plain; charset=utf-8";
  std::string body;
};

/// Just enough HTTP/1.1 for health checks and metrics: GET and HEAD, no request body, one request per connection.
///
/// Bounds: connections, bytes of a request, and the time for it; whoever goes beyond is answered 4xx or cut off.
/// Threads: the loop. Lifetime: destroying it cuts off what is under way; `runtime` and what `answer` uses outlive it.
class HttpServer {
 public:
  struct Options {
    std::size_t connections_max = 64;
    std::size_t request_bytes_max = 8 * 1024;
    rt::Duration request_max = std::chrono::seconds(10);  // from accept to the end of the answer
  };
  /// `path` is the request's target without its query.
  using Answer = std::function<HttpReply(const std::string& path)>;

  static std::unique_ptr<HttpServer> create(rt::Runtime runtime, Answer answer, Options options);
  static std::unique_ptr<HttpServer> create(rt::Runtime runtime, Answer answer) {
    return create(runtime, std::move(answer), Options{});
  }
  virtual ~HttpServer() = default;
  virtual void serve(std::unique_ptr<rt::Listener> listener) = 0;
};

}  // namespace cairn::server
