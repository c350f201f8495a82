#include "server/http/http.h"

#include <array>
#include <list>
#include <string_view>
#include <utility>
#include <variant>

#include "proto/common/buffer.h"
#include "proto/rt/sync.h"

namespace cairn::server {
namespace {

std::string_view reason_of(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 431:
      return "Request Header Fields Too Large";
    case 503:
      return "Service Unavailable";
    default:
      return "Status";
  }
}

HttpReply refusal(int status) {
  return {.status = status, .body = std::string(reason_of(status)) + "\n"};
}

/// The first line of a request: "GET /metrics?x=1 HTTP/1.1".
struct RequestLine {
  bool head = false;
  std::string path;
};
/// Or the status to refuse it with.
std::variant<RequestLine, int> parse(std::string_view line) {
  const auto first = line.find(' ');
  const auto second = first == line.npos ? line.npos : line.find(' ', first + 1);
  if (second == line.npos || !line.substr(second + 1).starts_with("HTTP/1.")) return 400;
  const auto method = line.substr(0, first);
  auto target = line.substr(first + 1, second - first - 1);
  if (method != "GET" && method != "HEAD") return 405;
  if (!target.starts_with('/')) return 400;
  return RequestLine{.head = method == "HEAD", .path = std::string(target.substr(0, target.find('?')))};
}

class ServerImpl final : public HttpServer {
 public:
  ServerImpl(rt::Runtime runtime, Answer answer, Options options)
      : runtime_(runtime),
        answer_(std::move(answer)),
        options_(options),
        places_(runtime.loop, options.connections_max),
        tasks_(runtime.loop) {}

  void serve(std::unique_ptr<rt::Listener> listener) override {
    tasks_.spawn(accept(*listeners_.emplace_back(std::move(listener))));
  }

 private:
  Task<void> accept(rt::Listener& listener) {
    for (;;) {
      CO_TRY(auto place, co_await places_.acquire(1));
      auto stream = co_await listener.accept();
      if (stream)
        tasks_.spawn(serve_one(*std::move(stream), std::move(place)));
      else
        co_await runtime_.loop.sleep(std::chrono::milliseconds(100));
    }
  }

  Task<void> serve_one(std::unique_ptr<rt::Stream> stream, rt::Semaphore::Lease place) {
    // Whoever is too slow is cut off; there is nobody to tell.
    (void)co_await rt::with_deadline(runtime_.loop, runtime_.loop.now() + options_.request_max, exchange(*stream),
                                     "http");
    stream->close();
    co_return {};
  }

  Task<void> exchange(rt::Stream& stream) {
    std::string request;
    std::array<std::byte, 2048> buffer;
    HttpReply reply;
    bool head = false;
    for (;;) {
      CO_TRY(const auto size, co_await stream.read_some(buffer));
      if (size == 0) co_return {};
      request += text_of(std::span(buffer).first(size));
      if (request.find("\r\n\r\n") != request.npos) {
        const auto line = parse(std::string_view(request).substr(0, request.find("\r\n")));
        if (const auto* status = std::get_if<int>(&line)) {
          reply = refusal(*status);
        } else {
          reply = answer_(std::get<RequestLine>(line).path);
          head = std::get<RequestLine>(line).head;
        }
        break;
      }
      if (request.size() > options_.request_bytes_max) {
        reply = refusal(431);
        break;
      }
    }
    std::string text = "HTTP/1.1 " + std::to_string(reply.status) + " " + std::string(reason_of(reply.status)) +
                       "\r\nContent-Type: " + reply.type + "\r\nContent-Length: " + std::to_string(reply.body.size()) +
                       "\r\nConnection: close\r\n\r\n";
    if (!head) text += reply.body;
    co_return co_await stream.write_all({bytes_of(text)});
  }

  rt::Runtime runtime_;
  Answer answer_;
  Options options_;
  rt::Semaphore places_;
  std::list<std::unique_ptr<rt::Listener>> listeners_;
  rt::Scope tasks_;  // last: its frames use the rest
};

}  // namespace

std::unique_ptr<HttpServer> HttpServer::create(rt::Runtime runtime, Answer answer, Options options) {
  return std::make_unique<ServerImpl>(runtime, std::move(answer), options);
}

}  // namespace cairn::server
