#include "server/http/http.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <list>

#include "proto/common/buffer.h"
#include "proto/rt/sync.h"
#include "server/http/request.h"

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
    case 408:
      return "Request Timeout";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 503:
      return "Service Unavailable";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return status < 300 ? "Success" : status < 500 ? "Refused" : "Failed";
  }
}

std::string head_of(const HttpReply& reply, bool keep_alive) {
  std::string head = "HTTP/1.1 " + std::to_string(reply.status) + ' ';
  head += reason_of(reply.status);
  head += "\r\nContent-Type: " + reply.type;
  head += "\r\nContent-Length: " + std::to_string(reply.body.size());
  head += "\r\nCache-Control: no-store";
  if (reply.status == 405) head += "\r\nAllow: GET, HEAD";
  head += keep_alive ? "\r\nConnection: keep-alive\r\n\r\n" : "\r\nConnection: close\r\n\r\n";
  return head;
}

HttpReply refusal(int status) {
  return {.status = status, .body = std::string(reason_of(status)) + '\n'};
}

class ServerImpl final : public HttpServer {
 public:
  ServerImpl(rt::Runtime runtime, Options options, Answer answer)
      : rt_(runtime),
        options_(std::move(options)),
        answer_(std::move(answer)),
        changed_(runtime.loop),
        tasks_(runtime.loop) {
    assert(options_.connections_max >= 1);
  }

  void serve(std::unique_ptr<rt::Listener> listener) override {
    auto& ref = *listeners_.emplace_back(std::move(listener));
    tasks_.spawn(accept_from(ref));
  }
  Stats stats() const override { return {.connections = connections_, .requests_total = requests_}; }

 private:
  struct Peer {
    rt::Stream* stream;
    bool reading = true;  // waits for a request
    bool closed = false;  // to make room
  };

  Task<void> accept_from(rt::Listener& listener) {
    for (;;) {
      auto stream = co_await listener.accept();
      if (!stream) {
        rt_.log.write(rt::Level::kError, "http_accept_failed",
                      {{"address", listener.address()}, {"reason", stream.error().message}});
        co_await rt_.loop.sleep(std::chrono::seconds(1));
        continue;
      }
      while (connections_ >= options_.connections_max) {
        // Who is still writing a request, or thinks about the next one, makes room, the oldest first; who is being
        // answered does not.
        const auto idle = std::ranges::find_if(streams_, [](const Peer* p) { return p->reading && !p->closed; });
        if (idle != streams_.end()) {
          (*idle)->closed = true;
          (*idle)->stream->close();
        }
        co_await changed_.wait();
      }
      // A peer that goes away or says nonsense is no event of ours.
      tasks_.spawn(converse(*std::move(stream)), [](const Result<void>&) {});
    }
  }

  Task<void> converse(std::unique_ptr<rt::Stream> stream) {
    struct Counted {
      ServerImpl& server;
      Peer peer;
      std::list<Peer*>::iterator self;
      Counted(ServerImpl& s, rt::Stream& stream) : server(s), peer{&stream} {
        ++server.connections_;
        self = server.streams_.insert(server.streams_.end(), &peer);
      }
      Counted(const Counted&) = delete;
      ~Counted() {
        --server.connections_;
        server.streams_.erase(self);
        server.changed_.notify_all();
      }
    } counted(*this, *stream);
    std::string buffer;  // at most head_bytes_max
    for (bool more = true; more;) {
      auto head = co_await rt::with_deadline(rt_.loop, rt_.loop.now() + options_.head_max, read_head(*stream, buffer),
                                             "request head");
      counted.peer.reading = false;
      HttpRequest request;
      if (head) {
        request = parse_http_head(std::string_view(buffer).substr(0, *head));
        buffer.erase(0, *head);
      } else if (head.error().code == Errc::kDeadline && !buffer.empty()) {
        request.error = 408;
      } else if (head.error().code == Errc::kInvalid) {
        request.error = 431;
      } else {
        co_return fail(std::move(head).error());  // gone, or idle for too long
      }
      ++requests_;
      more = request.error == 0 && request.keep_alive;
      const auto reply = answer(request);
      const auto text = head_of(reply, more);
      std::vector<std::span<const std::byte>> pieces = {bytes_of(text)};
      if (request.method != "HEAD") pieces.push_back(bytes_of(reply.body));
      CO_CHECK_OK(co_await rt::with_deadline(rt_.loop, rt_.loop.now() + options_.write_max,
                                             stream->write_all(std::move(pieces)), "reply"));
      counted.peer.reading = true;
    }
    co_return {};
  }

  /// The size of the head at the start of `buffer`. errors: kInvalid  longer than allowed
  Task<std::size_t> read_head(rt::Stream& stream, std::string& buffer) {
    for (;;) {
      if (const auto size = http_head_bytes(buffer); size > 0) co_return size;
      if (buffer.size() >= options_.head_bytes_max) co_return fail(Errc::kInvalid, "head too large");
      std::array<std::byte, 2048> bytes;
      const auto room = std::min(bytes.size(), options_.head_bytes_max - buffer.size());
      CO_TRY(const auto got, co_await stream.read_some(std::span(bytes).first(room)));
      if (got == 0) co_return fail(Errc::kUnavailable, "closed by the peer");
      buffer += text_of(std::span(bytes).first(got));
    }
  }

  HttpReply answer(const HttpRequest& request) const {
    if (request.error != 0) return refusal(request.error);
    if (request.method != "GET" && request.method != "HEAD") return refusal(405);
    return answer_(request.path);
  }

  rt::Runtime rt_;
  const Options options_;
  const Answer answer_;
  std::list<std::unique_ptr<rt::Listener>> listeners_;
  std::list<Peer*> streams_;  // in the order of arrival
  std::uint64_t connections_ = 0, requests_ = 0;
  rt::Signal changed_;
  rt::Scope tasks_;  // last: its coroutines use all of the above
};

}  // namespace

std::unique_ptr<HttpServer> HttpServer::create(rt::Runtime runtime, Answer answer, Options options) {
  return std::make_unique<ServerImpl>(runtime, std::move(options), std::move(answer));
}

}  // namespace cairn::server
