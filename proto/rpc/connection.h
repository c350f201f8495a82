#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "proto/rpc/frame_reader.h"
#include "proto/rpc/outbox.h"
#include "proto/rpc/rpc.h"
#include "proto/rt/sync.h"

namespace cairn::rpc {

using wire::FrameHeader;
using wire::FrameKind;

class CallImpl;
class Connection;

/// What a call costs beside its request: its frames and those of its handler, about.
constexpr std::uint64_t kCallBytes = kKiB;

/// Who a peer is, as far as we know: its user on a unix socket, else its address without the port.
std::string identity_of(std::string_view peer);

/// What connections share, and what they tell the server that has them. It outlives them.
struct ConnectionHost {
  ConnectionHost(rt::Runtime runtime, rt::UnitPool& pool, Server::Options o, Server::Handler handle,
                 std::function<std::string()> map, std::uint64_t message_bytes)
      : rt(runtime),
        units(pool),
        options(std::move(o)),
        handler(std::move(handle)),
        stale_map(std::move(map)),
        budget(runtime.loop, message_bytes),
        replies(runtime.loop, message_bytes) {}
  virtual ~ConnectionHost() = default;

  virtual bool closing() const = 0;
  /// Something ended: whoever waits for quiet looks again.
  virtual void changed() = 0;
  /// It is dropped: takes it down from a turn of its own.
  virtual void bury(const Connection& gone) = 0;
  virtual void greeted(std::uint64_t id) = 0;
  virtual void log_ended(const std::string& client, bool greeted, const Error& why) = 0;

  rt::Runtime rt;
  rt::UnitPool& units;
  Server::Options options;
  const Server::Handler handler;
  const std::function<std::string()> stale_map;
  rt::Semaphore budget, replies;  // messages: of requests, of replies
  Server::Stats totals;           // of connections that are gone, and counts that belong to none
};

/// One connection: a task that reads, one that writes, and the handlers of its calls.
///
/// Nothing that runs inside its tasks destroys it: drop() only closes, and the server takes it down from its own turn.
class Connection final : public std::enable_shared_from_this<Connection> {
 public:
  Connection(ConnectionHost& host, std::uint64_t id, std::unique_ptr<rt::Stream> stream);
  ~Connection();

  void start();
  /// Ends the connection: no more reading, writing or handlers. Safe from inside its own tasks.
  void drop(Error why);
  /// Destroys its tasks and handlers. Not from inside them.
  void take_down();
  /// Called now and then by the server: limits of time.
  void check(rt::TimePoint now);

  bool dropped() const { return dropped_; }
  bool greeted() const { return greeted_; }
  const std::string& identity() const { return identity_; }
  /// Nothing runs and nothing waits to be sent.
  bool quiet() const { return slots_used_ == 0 && outbox_.idle(); }
  std::uint64_t id() const { return id_; }
  std::size_t calls() const { return slots_used_; }
  std::uint64_t bytes_received() const { return reader_.bytes(); }
  std::uint64_t bytes_sent() const { return outbox_.bytes(); }

  void send_data(const CallImpl& call, std::string message, std::vector<Buffer> payload, rt::Semaphore::Lease turn);
  /// A data frame's unit is free again.
  void return_credit();

 private:
  enum class Phase {
    kHello,    // since it was accepted
    kIdle,     // waits for a frame, or is inside its header
    kMessage,  // reads a message
    kPayload,  // reads a payload
    kWaiting,  // for our own memory: not the peer's fault
  };
  struct Running;

  static std::uint64_t connection_budget(const ConnectionHost& host);
  rt::Loop& loop() const;
  void enter(Phase phase);
  bool owes_data() const;
  void check_progress(rt::TimePoint now);
  Task<void> read_frames();
  Task<void> greet();
  Task<void> take_request(FrameHeader header);
  Task<void> take_data(FrameHeader header);
  Result<void> take_cancel(FrameHeader header);
  static Task<void> run_call(Connection* self, std::shared_ptr<CallImpl> call, Task<std::string> handler);
  void finish(CallImpl& call, Result<std::string> result);
  void send_reply(std::uint64_t call_id, Result<std::string> result);
  void pong();
  void starting(OutFrame& frame);
  void written();
  Running* running(std::uint64_t call_id);

  ConnectionHost& host_;
  const std::uint64_t id_;
  std::unique_ptr<rt::Stream> stream_;
  const std::string identity_;
  std::string client_;                                               // name and address, for handlers and logs
  std::shared_ptr<rt::SharedMemory> memory_;                         // the client's
  std::shared_ptr<const bool> open_ = std::make_shared<bool>(true);  // until it is taken down
  FrameReader reader_;
  Outbox outbox_;
  Phase phase_ = Phase::kHello;
  rt::TimePoint phase_since_;
  bool greeted_ = false;
  bool dropped_ = false;
  bool pong_queued_ = false, credit_queued_ = false;

  // Invariant: units_out_ <= credit_units: what the client has sent on credit and has not got back.
  std::uint32_t units_out_ = 0;
  std::uint32_t units_back_ = 0;  // free again, not told yet

  // A call takes one of calls_max until its reply starts to be written (the client may use it again from then on).
  std::size_t slots_used_ = 0;
  rt::Semaphore requests_;  // bytes under way; who is over its share is not read
  rt::Semaphore replies_;   // bytes not taken
  std::uint64_t last_call_ = 0;

  // Time for which the peer has owed data since it last owed none, and what came meanwhile; both up to the last check.
  rt::Duration owed_ = {};
  std::uint64_t owed_from_ = 0;  // bytes_received() when it began
  rt::TimePoint checked_;
  std::map<std::uint64_t, std::unique_ptr<Running>> calls_;
  rt::Scope tasks_;
};

}  // namespace cairn::rpc
