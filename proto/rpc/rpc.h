#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/rt/seams.h"
#include "proto/rt/unit_pool.h"
#include "proto/wire/frame.h"

// Calls over one stream, both ends. Messages are serialized protobuf; this layer does not look inside them (except the
// hello).

namespace cairn::rpc {

/// Features, as bits of the hello. Both sides use what both know.
inline constexpr std::uint64_t kSharesMemory =
    1;  // the client's memory came with the hello and is mapped by the daemon
inline constexpr std::uint64_t kFeatures = kSharesMemory;

/// What both sides agreed on in the hello.
struct Agreed {
  std::uint32_t version = 0;
  std::uint64_t features = 0;
  std::string node = {};     // the daemon's name
  std::string cluster = {};  // 16 bytes
  std::uint32_t credit_units = 0;
  std::uint32_t unit_bytes = 0;
  std::uint32_t calls_max = 0;
  std::string unix_socket = {};  // path on the daemon's host, or empty
  std::string host = {};         // boot id of the daemon's host
};

/// Where the bytes of a download go. place() is told of each data frame before its payload is read.
class Sink {
 public:
  virtual ~Sink() = default;
  /// Memory for the payload, in order, in total payload_bytes; valid until placed() or until the call's Task is gone.
  virtual Result<std::vector<std::span<std::byte>>> place(std::string_view message, std::uint32_t payload_bytes) = 0;
  /// The payload has been read: verify it.
  virtual Result<void> placed(std::string_view message) = 0;
};

/// One piece of an upload: at most Agreed::unit_bytes of payload.
struct Piece {
  std::string message;
  Buffer payload;
};

/// A client's connection to one daemon; many calls at once. A lost connection ends every call with kUnavailable.
/// Dropping a call's Task sends a cancel; its memory is not touched afterwards. A silent peer is noticed by pings.
///
/// Lifetime: await close() (or kill the loop) before destroying the runtime; calls hold the channel.
class Channel {
 public:
  struct Options {
    std::string client_name;  // "cairn[1234]", for the daemon's logs
    std::string auth;         // reserved
    std::string cluster;      // expected cluster id, or empty
    rt::Duration ping_every = std::chrono::seconds(5);
    rt::Duration silence_max = std::chrono::seconds(15);  // no byte for so long: the connection is dead
    /// Offered to a daemon that is reached over a unix socket; taken when Agreed::features says so. The daemon reads
    /// and writes only what calls name, and as long as the connection or their disk operations last.
    std::shared_ptr<rt::SharedMemory> memory = {};
    /// Gets the map (serialized wire::Map) that comes with a kStale error, before that error is returned.
    std::function<void(std::string map)> newer_map = {};
  };
  /// errors: kUnavailable  refused, lost;  kProtocol  not a Cairn daemon, no common version;  kDeadline
  static Task<std::shared_ptr<Channel>> connect(rt::Runtime runtime, std::string address, Options options,
                                                rt::TimePoint deadline);
  virtual ~Channel() = default;

  /// errors: what the daemon answered;  kUnavailable  connection lost (the outcome is unknown to this layer); kDeadline
  virtual Task<std::string> call(wire::Method method, std::string request, rt::TimePoint deadline) = 0;
  /// A call followed by data frames, sent as credit allows. An early error reply stops the sending.
  virtual Task<std::string> upload(wire::Method method, std::string request, std::vector<Piece> pieces,
                                   rt::TimePoint deadline) = 0;
  /// A call whose data frames go to `sink`, which must outlive the Task.
  virtual Task<std::string> download(wire::Method method, std::string request, Sink& sink, rt::TimePoint deadline) = 0;

  virtual const Agreed& agreed() const = 0;
  virtual bool alive() const = 0;
  virtual std::string peer() const = 0;
  virtual std::uint64_t bytes_sent() const = 0;
  virtual std::uint64_t bytes_received() const = 0;
  virtual void close() = 0;
};

/// One call as its handler sees it.
class ServerCall {
 public:
  struct Data {
    std::string message;
    rt::MutableBuffer memory;  // one unit of the server's pool; the credit goes back when it is released
    std::uint32_t size = 0;
  };
  virtual ~ServerCall() = default;
  virtual wire::Method method() const = 0;
  virtual const std::string& request() const = 0;
  virtual const std::string& client() const = 0;  // name from the hello and peer address
  virtual std::uint64_t connection() const = 0;   // unique per connection since start
  /// The client's own memory, mapped here; null: not shared on this connection.
  virtual std::shared_ptr<rt::SharedMemory> memory() const { return nullptr; }
  /// Expires when the connection has ended and its calls are gone.
  virtual std::weak_ptr<const void> connection_open() const = 0;
  /// The next data frame of this call. errors: kUnavailable  connection lost
  virtual Task<Data> next_data() = 0;
  /// Sends one data frame (payload in pieces, in total at most the client's limit). Waits while the peer reads slowly.
  virtual Task<void> send_data(std::string message, std::vector<Buffer> payload) = 0;
};

/// Accepts connections and runs a handler per call. Memory: one unit per data frame from `units`; requests inside one
/// `message_budget`, for which the server waits, not reading, and replies inside another, beyond which one becomes
/// kUnavailable. A peer that breaks a rule or a limit loses its connection. A call's handler is dropped where it waits
/// when the client cancels or its connection is lost.
///
/// Lifetime: destroying it drops all handlers and connections at once; never from inside a handler.
class Server {
 public:
  /// What may change while it serves.
  struct Limits {
    std::uint32_t connections_max = 16384;
    /// Of one address, or of one user id on a unix socket: what stands for an identity until peers have one.
    std::uint32_t connections_per_peer = 1024;
    std::uint32_t connections_unknown = 1024;  // that have not finished the hello; the oldest makes room
    rt::Duration handshake_max = std::chrono::seconds(5);
    rt::Duration header_max = std::chrono::seconds(10);  // from first byte of a frame header to its message's end
    rt::Duration idle_max = std::chrono::seconds(60);    // no frame; clients ping
    /// Who owes data, or is to take some, must move so many bytes a second, averaged over the window.
    std::uint64_t body_bytes_per_second = 64 * kKiB;
    rt::Duration body_window = std::chrono::seconds(30);
    std::uint64_t connection_bytes_max = 64 * kMiB;  // of requests under way, and of replies not taken
  };
  struct Options : Limits {
    std::string node;
    std::string cluster;                             // 16 bytes
    std::string unix_socket;                         // told to clients
    std::string host;                                // boot id
    std::uint32_t credit_units = 8;                  // per connection, at least 1
    std::uint32_t calls_max = 256;                   // per connection
    std::uint64_t message_budget_bytes = 64 * kMiB;  // of all requests, and again of all replies
  };
  struct Stats {
    std::uint64_t connections = 0, connections_total = 0, calls_total = 0, calls_running = 0;
    std::uint64_t bytes_received = 0, bytes_sent = 0, protocol_errors = 0;
    std::uint64_t refused = 0;  // connections closed for a limit of their number or of time
    std::uint64_t busy = 0;     // replies for which there was no memory
  };
  /// The reply message, or an error sent as ErrorReply. kStale errors get the current map attached by `stale_map`.
  using Handler = std::function<Task<std::string>(std::shared_ptr<ServerCall>)>;

  static std::unique_ptr<Server> create(rt::Runtime runtime, rt::UnitPool& units, Options options, Handler handler,
                                        std::function<std::string()> stale_map);
  virtual ~Server() = default;
  /// Accepts from `listener` until close(). Call once per listener.
  virtual void serve(std::unique_ptr<rt::Listener> listener) = 0;
  virtual Stats stats() const = 0;
  /// From now on; connections that are there stay.
  virtual void set(const Limits& limits) = 0;
  /// Stops accepting, lets running calls end until `deadline`, then closes all connections. Not from a handler.
  virtual Task<void> close(rt::TimePoint deadline) = 0;
};

}  // namespace cairn::rpc
