#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "proto/common/checksum.h"
#include "proto/rpc/frame_reader.h"
#include "proto/rpc/rpc.h"
#include "proto/runtime/runtime.h"
#include "tests/sim/net.h"
#include "tests/sim/world.h"

// A daemon with a small service behind rpc::Server, and a client, over the simulator or over real sockets.

namespace cairn::rpc_test {

using namespace std::chrono_literals;
using rpc::Channel;
using rpc::Piece;
using wire::FrameHeader;
using wire::FrameKind;
using wire::Method;

/// Bytes that are a function of (seed, offset).
inline std::string pattern(std::size_t size, std::uint64_t seed) {
  std::string out(size, '\0');
  for (std::size_t i = 0; i < size; ++i) {
    auto x = (seed * 0x9e3779b97f4a7c15 + i) * 0xff51afd7ed558ccd;
    out[i] = static_cast<char>((x ^ (x >> 29)) >> 17);
  }
  return out;
}
inline std::vector<Piece> pieces_of(const std::string& bytes, std::size_t piece_bytes) {
  std::vector<Piece> out;
  for (std::size_t at = 0; at < bytes.size(); at += piece_bytes)
    out.push_back({.message = std::to_string(at), .payload = Buffer::from(bytes.substr(at, piece_bytes))});
  return out;
}

/// kMap: echo.  kBucketShow: the error whose number is the request.
/// kPutChunk "BYTES": takes an upload of so many bytes, replies its CRC.  kObjectBegin "N": kNoSpace after N data
/// frames. kReadRanges "FRAMES FRAME_BYTES SEED": sends pattern(FRAMES * FRAME_BYTES, SEED), replies the number of
/// bytes. kHeartbeat: never ends.  kObjectSeal "BYTES": as kPutChunk, but waits at a gate before each frame.
struct Service {
  rt::Loop& loop;
  rt::Signal gate_opens;
  bool gate_open = false;
  int running = 0;
  int running_max = 0;
  std::uint64_t request_bytes = 0, request_bytes_max = 0;  // of calls that run
  std::vector<std::string> arrivals;                       // "call request: data message", in order

  explicit Service(rt::Loop& l) : loop(l), gate_opens(l) {}
  void open_gate() {
    gate_open = true;
    gate_opens.notify_all();
  }
  rpc::Server::Handler handler() {
    return [this](std::shared_ptr<rpc::ServerCall> call) { return handle(this, std::move(call)); };
  }

  struct Counted {
    Service& s;
    std::uint64_t bytes;
    Counted(Service& service, std::uint64_t b) : s(service), bytes(b) {
      s.running_max = std::max(s.running_max, ++s.running);
      s.request_bytes_max = std::max(s.request_bytes_max, s.request_bytes += b);
    }
    Counted(const Counted&) = delete;
    ~Counted() {
      --s.running;
      s.request_bytes -= bytes;
    }
  };

  static Task<std::string> handle(Service* self, std::shared_ptr<rpc::ServerCall> call) {
    Counted counted(*self, call->request().size());
    const auto& request = call->request();
    switch (call->method()) {
      case Method::kMap:
        co_return "echo " + request;
      case Method::kBucketShow:
        co_return fail(static_cast<Errc>(std::stoi(request)), "as you wish");
      case Method::kPutChunk:
      case Method::kObjectSeal: {
        const auto size = std::stoull(request);
        std::uint64_t got = 0;
        std::uint32_t crc = 0;
        while (got < size) {
          while (call->method() == Method::kObjectSeal && !self->gate_open) co_await self->gate_opens.wait();
          CO_TRY(const auto data, co_await call->next_data());
          self->arrivals.push_back(request + ": " + data.message);
          if (data.message != std::to_string(got)) co_return fail(Errc::kFailed, "data out of order");
          crc = crc32c(data.memory.bytes.first(data.size), crc);
          got += data.size;
        }
        co_return std::to_string(crc);
      }
      case Method::kObjectBegin: {
        for (int left = std::stoi(request); left > 0; --left) CO_CHECK_OK(co_await call->next_data());
        co_return fail(Errc::kNoSpace, "disk full");
      }
      case Method::kReadRanges: {
        const auto a = request.find(' '), b = request.rfind(' ');
        const auto frames = std::stoull(request), bytes = std::stoull(request.substr(a));
        const auto all = Buffer::from(pattern(frames * bytes, std::stoull(request.substr(b))));
        for (std::size_t i = 0; i < frames; ++i) {
          const auto frame = all.slice(i * bytes, bytes);
          std::vector<Buffer> parts = {frame.slice(0, bytes / 3), frame.slice(bytes / 3, bytes - bytes / 3)};
          CO_CHECK_OK(co_await call->send_data(std::to_string(i * bytes), std::move(parts)));
        }
        co_return std::to_string(frames * bytes);
      }
      case Method::kHeartbeat:
        for (;;) co_await self->loop.sleep(1h);
      default:
        co_return fail(Errc::kInvalid, "no such method");
    }
  }
};

/// Takes a download into memory: whole, or in rows of `row_bytes` with gaps between.
struct MemorySink final : rpc::Sink {
  explicit MemorySink(std::size_t bytes, std::size_t row = 0, std::size_t gap = 0) : row_bytes(row), gap_bytes(gap) {
    const auto rows = row == 0 ? 1 : (bytes + row - 1) / row;
    memory.assign(bytes + rows * gap, std::byte{0xee});
  }
  std::size_t row_bytes, gap_bytes;
  std::vector<std::byte> memory;
  std::size_t at = 0;  // of the payload
  int frames = 0, verified = 0;

  Result<std::vector<std::span<std::byte>>> place(std::string_view message, std::uint32_t payload_bytes) override {
    if (message != std::to_string(at)) return fail(Errc::kFailed, "data out of order");
    ++frames;
    std::vector<std::span<std::byte>> out;
    for (std::size_t left = payload_bytes; left > 0;) {
      const auto row = row_bytes == 0 ? 0 : at / row_bytes;
      const auto n = row_bytes == 0 ? left : std::min(left, row_bytes - at % row_bytes);
      out.push_back(std::span(memory).subspan(at + row * gap_bytes, n));
      at += n;
      left -= n;
    }
    return out;
  }
  Result<void> placed(std::string_view) override {
    ++verified;
    return {};
  }
  /// The payload without the gaps; a touched gap makes it empty.
  std::string bytes() const {
    if (row_bytes == 0) return std::string(text_of(memory));
    std::string out;
    for (std::size_t from = 0; from < memory.size(); from += row_bytes + gap_bytes) {
      const auto end = std::min(from + row_bytes, memory.size() - gap_bytes);
      out += text_of(std::span(memory).subspan(from, end - from));
      for (const auto gap : std::span(memory).subspan(end, gap_bytes))
        if (gap != std::byte{0xee}) return {};
    }
    return out;
  }
};

inline rpc::Server::Options server_options() {
  rpc::Server::Options o;
  o.node = "n1";
  o.cluster = std::string(16, 'c');
  o.host = "boot";
  return o;
}
inline Channel::Options channel_options() {
  Channel::Options o;
  o.client_name = "test[1]";
  return o;
}

/// A small unit, so that little data fills the credit.
inline constexpr std::size_t kSmallUnitBytes = 4096;

/// Both ends in the simulator.
struct OverSim {
  explicit OverSim(rpc::Server::Options options = server_options(), std::size_t units = 16,
                   std::size_t unit_bytes = kUnitBytes, std::uint64_t seed = 1)
      : world(seed), daemon(world.make_node("daemon")), client(world.make_node("client")), service(daemon) {
    pool = *rt::UnitPool::create(daemon, units, unit_bytes);
    start(std::move(options));
  }
  ~OverSim() {
    scope.reset();
    channel.reset();
    server.reset();
  }
  void start(rpc::Server::Options options) {
    server = rpc::Server::create(daemon.runtime(), *pool, std::move(options), service.handler(),
                                 [] { return std::string("\x08\x2a"); });  // a map of version 42
    server->serve(*daemon.runtime().net.listen("daemon:7420"));
  }
  rt::Runtime runtime() { return client.runtime(); }
  std::string address() const { return "daemon:7420"; }
  rt::TimePoint in(rt::Duration d) { return client.now() + d; }
  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(client, std::move(task));
  }
  void settle() { world.run_for(5s); }
  void connect(Channel::Options options = channel_options()) {
    channel = std::move(run(Channel::connect(runtime(), address(), std::move(options), in(10s)))).value();
    scope.emplace(client);
  }
  Result<std::string> call(Method method, std::string request) {
    return run(channel->call(method, std::move(request), in(60s)));
  }
  Result<std::string> upload(std::string bytes, std::size_t piece) {
    return run(channel->upload(Method::kPutChunk, std::to_string(bytes.size()), pieces_of(bytes, piece), in(60s)));
  }

  sim::World world;
  sim::Node& daemon;
  sim::Node& client;
  Service service;
  std::unique_ptr<rt::UnitPool> pool;
  std::unique_ptr<rpc::Server> server;
  std::shared_ptr<Channel> channel;
  std::optional<rt::Scope> scope;  // for calls in the background
};

/// Both ends on one real loop, over TCP on the loopback.
struct OverSockets {
  explicit OverSockets(rpc::Server::Options options = server_options(), std::size_t units = 16,
                       std::size_t unit_bytes = kUnitBytes)
      : real(*rt::RealRuntime::create({.log_min = rt::Level::kError})), service(real->loop()) {
    pool = *rt::UnitPool::create(real->loop(), units, unit_bytes);
    server = rpc::Server::create(runtime(), *pool, std::move(options), service.handler(),
                                 [] { return std::string("\x08\x2a"); });
    auto listener = *runtime().net.listen("127.0.0.1:0");
    where = listener->address();
    server->serve(std::move(listener));
  }
  ~OverSockets() {
    scope.reset();
    channel.reset();
    server.reset();
  }
  rt::Runtime runtime() { return real->seams(); }
  std::string address() const { return where; }
  rt::TimePoint in(rt::Duration d) { return real->loop().now() + d; }
  template <class T>
  Result<T> run(Task<T> task) {
    return rt::run(real->loop(), std::move(task));
  }
  void settle() {
    // The client's end is known to the client only: let the server see what is on the way.
    for (int i = 0; i < 50; ++i) (void)run(turn(real->loop()));
  }
  static Task<void> turn(rt::Loop& loop) {
    co_await loop.sleep(1ms);
    co_return {};
  }
  void connect(Channel::Options options = channel_options()) {
    channel = std::move(run(Channel::connect(runtime(), address(), std::move(options), in(10s)))).value();
    scope.emplace(real->loop());
  }
  Result<std::string> call(Method method, std::string request) {
    return run(channel->call(method, std::move(request), in(60s)));
  }
  Result<std::string> upload(std::string bytes, std::size_t piece) {
    return run(channel->upload(Method::kPutChunk, std::to_string(bytes.size()), pieces_of(bytes, piece), in(60s)));
  }

  std::unique_ptr<rt::RealRuntime> real;
  Service service;
  std::unique_ptr<rt::UnitPool> pool;
  std::string where;
  std::unique_ptr<rpc::Server> server;
  std::shared_ptr<Channel> channel;
  std::optional<rt::Scope> scope;
};

/// A peer that speaks bytes: for breaking the rules.
struct RawPeer {
  RawPeer(rt::Loop& loop, std::unique_ptr<rt::Stream> s) : stream(std::move(s)), reader(loop, *stream) {}
  std::unique_ptr<rt::Stream> stream;
  rpc::FrameReader reader;

  static Task<std::unique_ptr<RawPeer>> dial(rt::Runtime runtime, std::string address) {
    CO_TRY(auto stream, co_await runtime.net.dial(address));
    co_return std::make_unique<RawPeer>(runtime.loop, std::move(stream));
  }
  Task<void> send(std::string bytes) {
    CO_CHECK_OK(co_await stream->write_all({bytes_of(bytes)}));
    co_return {};
  }
  static std::string frame(FrameHeader header, std::string_view message = {}, std::string_view payload = {}) {
    header.message_bytes = static_cast<std::uint32_t>(message.size());
    header.payload_bytes = static_cast<std::uint32_t>(payload.size());
    header.message_crc = crc32c(message);
    return std::string(text_of(header.encode())) + std::string(message) + std::string(payload);
  }
  struct Frame {
    FrameHeader header;
    std::string message;
  };
  Task<Frame> receive() {
    CO_TRY(const auto header, co_await reader.header());
    CO_TRY(auto message, co_await reader.message(header));
    CO_CHECK_OK(co_await reader.skip_payload());
    co_return Frame{header, std::move(message)};
  }
  /// Everything up to the end of the stream; the frames that came.
  Task<std::vector<Frame>> until_end() {
    std::vector<Frame> frames;
    for (;;) {
      auto frame = co_await receive();
      if (!frame) co_return frames;
      frames.push_back(*std::move(frame));
    }
  }
};

}  // namespace cairn::rpc_test
