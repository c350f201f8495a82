#include "proto/rpc/connection.h"

#include <algorithm>
#include <cassert>
#include <list>

#include "proto/common/checksum.h"
#include "proto/rpc/hello.h"

namespace cairn::rpc {
namespace {

/// Errors of this size are always answered: each has the place of its call.
constexpr std::size_t kSmallReplyBytes = 512;

/// Keeps a unit together with the credit it came on.
struct CreditedUnit {
  rt::MutableBuffer unit;
  std::weak_ptr<Connection> connection;
  CreditedUnit(rt::MutableBuffer u, std::weak_ptr<Connection> c) : unit(std::move(u)), connection(std::move(c)) {}
  CreditedUnit(const CreditedUnit&) = delete;
  ~CreditedUnit() {
    unit.owner.reset();
    if (auto alive = connection.lock()) alive->return_credit();
  }
};

}  // namespace

std::string identity_of(std::string_view peer) {
  const std::string_view mark = "uid=";
  if (peer.starts_with("unix:")) {
    const auto at = peer.find(mark);
    return "unix:" + std::string(at == peer.npos ? "" : peer.substr(at));
  }
  return std::string(peer.substr(0, peer.rfind(':')));
}

class CallImpl final : public ServerCall, public std::enable_shared_from_this<CallImpl> {
 public:
  struct Facts {
    std::uint64_t id = 0;
    wire::Method method = wire::Method::kNone;
    std::string request;
    rt::Semaphore::Lease share, budget;  // of the request's memory: of the connection, of the server
    std::string client;
    std::uint64_t connection = 0;
    std::shared_ptr<rt::SharedMemory> memory;
    std::weak_ptr<const void> connection_open;
  };
  CallImpl(rt::Loop& loop, std::weak_ptr<Connection> owner, Facts facts)
      : facts_(std::move(facts)), owner_(std::move(owner)), arrived_(loop), turn_(loop, 1) {}

  wire::Method method() const override { return facts_.method; }
  const std::string& request() const override { return facts_.request; }
  const std::string& client() const override { return facts_.client; }
  std::uint64_t connection() const override { return facts_.connection; }
  std::shared_ptr<rt::SharedMemory> memory() const override { return facts_.memory; }
  std::weak_ptr<const void> connection_open() const override { return facts_.connection_open; }
  Task<Data> next_data() override { return next_data_of(shared_from_this()); }
  Task<void> send_data(std::string message, std::vector<Buffer> payload) override {
    return send_data_of(shared_from_this(), std::move(message), std::move(payload));
  }

  std::uint64_t id() const { return facts_.id; }
  /// Its handler waits for the peer's next data frame.
  bool waits_for_data() const { return waiting_ > 0 && incoming_.empty(); }
  void arrive(Data data) {
    incoming_.push_back(std::move(data));
    arrived_.notify_all();
  }
  void end() {
    ended_ = true;
    incoming_.clear();
    arrived_.notify_all();
  }
  /// One data frame of a call is on its way at a time: a handler prepares the next one meanwhile, and no more.
  Task<rt::Semaphore::Lease> turn() { return turn_.acquire(1); }

 private:
  static Failure gone() { return fail(Errc::kUnavailable, "the call has ended: cancelled or its connection lost"); }
  static Task<Data> next_data_of(std::shared_ptr<CallImpl> self) {
    struct Waiting {
      std::shared_ptr<CallImpl> call;
      explicit Waiting(std::shared_ptr<CallImpl> c) : call(std::move(c)) { ++call->waiting_; }
      Waiting(const Waiting&) = delete;
      ~Waiting() { --call->waiting_; }
    } waiting(self);
    while (self->incoming_.empty()) {
      if (self->ended_) co_return gone();
      co_await self->arrived_.wait();
    }
    auto data = std::move(self->incoming_.front());
    self->incoming_.pop_front();
    co_return data;
  }
  static Task<void> send_data_of(std::shared_ptr<CallImpl> self, std::string message, std::vector<Buffer> payload);

  Facts facts_;
  std::weak_ptr<Connection> owner_;
  std::list<Data> incoming_;  // bounded by the connection's credit; a list has no memory while it is empty
  rt::Signal arrived_;
  rt::Semaphore turn_;
  int waiting_ = 0;
  bool ended_ = false;
};

struct Connection::Running {
  Running(rt::Loop& loop, std::shared_ptr<CallImpl> c) : call(std::move(c)), scope(loop) {}
  std::shared_ptr<CallImpl> call;
  bool ended = false;
  rt::Scope scope;
};

void Connection::send_data(const CallImpl& call, std::string message, std::vector<Buffer> payload,
                           rt::Semaphore::Lease turn) {
  outbox_.push({.kind = FrameKind::kData,
                .call_id = call.id(),
                .message = std::move(message),
                .payload = std::move(payload),
                .turn = std::move(turn)});
}

Task<void> CallImpl::send_data_of(std::shared_ptr<CallImpl> self, std::string message, std::vector<Buffer> payload) {
  std::uint64_t size = 0;
  for (const auto& piece : payload) size += piece.size();
  if (size > wire::kPayloadBytesMax || message.size() > wire::kDataMessageBytesMax)
    co_return fail(Errc::kInvalid, "data frame of " + std::to_string(size) + " bytes is over the limit");
  CO_TRY(auto turn, co_await self->turn_.acquire(1));
  auto connection = self->owner_.lock();
  if (!connection || connection->dropped() || self->ended_) co_return gone();
  connection->send_data(*self, std::move(message), std::move(payload), std::move(turn));
  co_return {};
}

// ---- Connection

Connection::Connection(ConnectionHost& host, std::uint64_t id, std::unique_ptr<rt::Stream> stream)
    : host_(host),
      id_(id),
      stream_(std::move(stream)),
      identity_(identity_of(stream_->peer())),
      client_(stream_->peer()),
      reader_(host.rt.loop, *stream_),
      outbox_(
          host.rt.loop, *stream_, [this](OutFrame& f) { starting(f); }, [this](OutFrame&) { written(); }),
      phase_since_(host.rt.loop.now()),
      requests_(host.rt.loop, connection_budget(host)),
      replies_(host.rt.loop, connection_budget(host)),
      checked_(host.rt.loop.now()),
      tasks_(host.rt.loop) {}

Connection::~Connection() {
  take_down();
}

/// At most a quarter of the memory for messages; at least one message.
std::uint64_t Connection::connection_budget(const ConnectionHost& host) {
  return std::max<std::uint64_t>(std::min(host.options.connection_bytes_max, host.budget.capacity() / 4),
                                 wire::kMessageBytesMax + kCallBytes);
}

rt::Loop& Connection::loop() const {
  return host_.rt.loop;
}

void Connection::enter(Phase phase) {
  phase_ = phase;
  phase_since_ = loop().now();
}

void Connection::start() {
  tasks_.spawn(read_frames(), [this](Result<void> end) { drop(std::move(end).error()); });
}

void Connection::drop(Error why) {
  if (dropped_) return;
  dropped_ = true;
  stream_->close();
  host_.log_ended(client_, greeted_, why);
  host_.bury(*this);
}

void Connection::take_down() {
  dropped_ = true;
  stream_->close();
  tasks_.cancel();
  outbox_.clear();
  slots_used_ = 0;
  auto calls = std::exchange(calls_, {});
  for (auto& [id, running] : calls) {
    running->scope.cancel();
    running->call->end();
  }
  open_.reset();
}

void Connection::check(rt::TimePoint now) {
  if (dropped_) return;
  check_progress(now);
  if (dropped_) return;
  const auto& limits = host_.options;
  const auto overdue = [&](rt::TimePoint since, rt::Duration limit, std::string_view what) {
    if (since == rt::kNever || now - since < limit) return;
    ++host_.totals.refused;
    drop(Error{Errc::kUnavailable, std::string(what)});
  };
  switch (phase_) {
    case Phase::kHello:
      overdue(phase_since_, limits.handshake_max, "no hello in time");
      break;
    case Phase::kIdle:
      overdue(phase_since_, limits.idle_max, "no frame for too long");
      if (!dropped_) overdue(reader_.header_begun(), limits.header_max, "a frame header took too long");
      break;
    case Phase::kMessage:
      overdue(phase_since_, limits.header_max, "a message took too long");
      break;
    case Phase::kPayload:  // check_progress()
      break;
    case Phase::kWaiting:
      // We do not read its pings meanwhile; a sign of life keeps it from giving us up.
      pong();
      break;
  }
  if (dropped_) return;
  // A write is at most a few units, so that its whole length is the average that is asked for.
  auto write_max = limits.body_window;
  if (limits.body_bytes_per_second > 0)
    write_max =
        std::max<rt::Duration>(write_max, std::chrono::seconds(outbox_.writing_bytes() / limits.body_bytes_per_second));
  overdue(outbox_.writing_since(), write_max, "the peer takes too few bytes");
}

bool Connection::owes_data() const {
  if (phase_ == Phase::kPayload) return true;
  if (phase_ == Phase::kWaiting || units_out_ >= host_.options.credit_units) return false;  // it waits for us
  return std::ranges::any_of(calls_,
                             [](const auto& c) { return !c.second->ended && c.second->call->waits_for_data(); });
}

void Connection::check_progress(rt::TimePoint now) {
  const auto since = std::exchange(checked_, now);
  if (!owes_data()) {
    owed_ = {};
    owed_from_ = reader_.bytes();
    return;
  }
  owed_ += now - since;
  const auto& limits = host_.options;
  if (owed_ < limits.body_window) return;
  const auto wanted = limits.body_bytes_per_second *
                      static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(owed_).count()) /
                      1000;
  const auto came = reader_.bytes() - owed_from_;
  owed_ = {};
  owed_from_ = reader_.bytes();
  if (came >= std::max<std::uint64_t>(wanted, 1)) return;
  ++host_.totals.refused;
  drop(Error{Errc::kUnavailable, "data that was announced comes too slowly"});
}

// ---- Reading

Task<void> Connection::read_frames() {
  CO_CHECK_OK(co_await greet());
  tasks_.spawn(outbox_.run(), [this](Result<void> end) { drop(std::move(end).error()); });
  for (;;) {
    enter(Phase::kIdle);
    CO_TRY(const auto header, co_await reader_.header());
    switch (header.kind) {
      case FrameKind::kRequest:
        CO_CHECK_OK(co_await take_request(header));
        break;
      case FrameKind::kData:
        CO_CHECK_OK(co_await take_data(header));
        break;
      case FrameKind::kCancel:
        CO_CHECK_OK(take_cancel(header));
        break;
      case FrameKind::kPing:
        if (header.message_bytes != 0) co_return fail(Errc::kProtocol, "ping with a message");
        pong();
        break;
      default:
        co_return fail(Errc::kProtocol,
                       "frame of kind " + std::to_string(static_cast<int>(header.kind)) + " from a client");
    }
    if (dropped_) co_return fail(Errc::kUnavailable, "closed on this side");
  }
}

Task<void> Connection::greet() {
  CO_TRY(const auto header, co_await reader_.header());
  if (header.kind != FrameKind::kHello || header.message_bytes > wire::kHelloBytesMax)
    co_return fail(Errc::kProtocol, "the first frame is no hello");
  CO_TRY(const auto hello, co_await reader_.message(header));
  const auto& o = host_.options;
  auto memory = stream_->take_attached();
  if (memory) {
    memory_ = *std::move(memory);
  } else {
    // It goes on without: its bytes come through the socket.
    host_.rt.log.write(rt::Level::kWarning, "shared_memory_refused",
                       {{"client", client_}, {"reason", memory.error().message}});
  }
  auto greeting = answer_hello(hello, {.features = memory_ ? kFeatures : kFeatures & ~kSharesMemory,
                                       .node = o.node,
                                       .cluster = o.cluster,
                                       .credit_units = o.credit_units,
                                       .unit_bytes = static_cast<std::uint32_t>(host_.units.unit_bytes()),
                                       .calls_max = o.calls_max,
                                       .unix_socket = o.unix_socket,
                                       .host = o.host});
  if (greeting && host_.closing()) greeting = fail(Errc::kUnavailable, "this daemon is shutting down");
  const auto answer = greeting ? greeting->reply : encode_error(greeting.error(), {});
  const FrameHeader reply{.kind = greeting ? FrameKind::kHelloReply : FrameKind::kError,
                          .message_bytes = static_cast<std::uint32_t>(answer.size()),
                          .message_crc = crc32c(answer)};
  const auto encoded = reply.encode();
  CO_CHECK_OK(co_await stream_->write_all({encoded, bytes_of(answer)}));
  if (!greeting) co_return fail(std::move(greeting).error());
  client_ = greeting->client + "@" + client_;
  greeted_ = true;
  host_.greeted(id_);
  co_return {};
}

Task<void> Connection::take_request(FrameHeader header) {
  if (header.call_id <= last_call_) co_return fail(Errc::kProtocol, "request with a call id that does not count up");
  if (slots_used_ >= host_.options.calls_max)
    co_return fail(Errc::kProtocol, "more than calls_max=" + std::to_string(host_.options.calls_max) + " calls");
  // The connection's own share first: who has it all waits for its own calls, and holds nothing of what others want.
  enter(Phase::kWaiting);
  const auto bytes = header.message_bytes + kCallBytes;
  CO_TRY(auto share, co_await requests_.acquire(bytes));
  CO_TRY(auto budget, co_await host_.budget.acquire(bytes));
  enter(Phase::kMessage);
  CO_TRY(auto request, co_await reader_.message(header));
  last_call_ = header.call_id;
  ++slots_used_;
  ++host_.totals.calls_total;
  if (host_.closing()) {
    send_reply(header.call_id, fail(Errc::kUnavailable, "this daemon is shutting down"));
    co_return {};
  }
  auto call = std::make_shared<CallImpl>(loop(), weak_from_this(),
                                         CallImpl::Facts{.id = header.call_id,
                                                         .method = static_cast<wire::Method>(header.method),
                                                         .request = std::move(request),
                                                         .share = std::move(share),
                                                         .budget = std::move(budget),
                                                         .client = client_,
                                                         .connection = id_,
                                                         .memory = memory_,
                                                         .connection_open = open_});
  auto& running = *calls_.emplace(call->id(), std::make_unique<Running>(loop(), call)).first->second;
  running.scope.spawn(run_call(this, call, host_.handler(call)));
  co_return {};
}

Task<void> Connection::take_data(FrameHeader header) {
  if (header.call_id == 0 || header.call_id > last_call_)
    co_return fail(Errc::kProtocol, "data for a call that was never made");
  if (header.payload_bytes > host_.units.unit_bytes())
    co_return fail(Errc::kProtocol, "payload of " + std::to_string(header.payload_bytes) +
                                        " bytes is over the unit of " + std::to_string(host_.units.unit_bytes()));
  if (units_out_ >= host_.options.credit_units) co_return fail(Errc::kProtocol, "data without credit");
  ++units_out_;

  // The unit comes first: it also bounds how many messages of data frames there are.
  std::shared_ptr<CreditedUnit> unit;
  std::span<std::byte> memory;
  if (running(header.call_id) != nullptr) {
    enter(Phase::kWaiting);
    CO_TRY(auto free_unit, co_await host_.units.acquire());
    memory = free_unit.bytes;
    unit = std::make_shared<CreditedUnit>(std::move(free_unit), weak_from_this());
  }
  enter(Phase::kMessage);
  CO_TRY(auto message, co_await reader_.message(header));
  enter(Phase::kPayload);
  if (running(header.call_id) == nullptr) {  // it has ended, and the client does not know yet
    CO_CHECK_OK(co_await reader_.skip_payload());
    if (!unit) return_credit();
    co_return {};
  }
  CO_CHECK_OK(co_await reader_.payload(memory.first(header.payload_bytes)));
  if (auto* call = running(header.call_id))
    call->call->arrive({.message = std::move(message),
                        .memory = {.owner = std::move(unit), .bytes = memory},
                        .size = header.payload_bytes});
  co_return {};
}

Result<void> Connection::take_cancel(FrameHeader header) {
  if (header.message_bytes != 0 || header.call_id == 0 || header.call_id > last_call_)
    return fail(Errc::kProtocol, "cancel of a call that was never made");
  const auto it = calls_.find(header.call_id);
  const bool was_running = it != calls_.end() && !it->second->ended;
  if (was_running) {
    const auto gone = std::move(it->second);
    calls_.erase(it);
    --slots_used_;
    gone->scope.cancel();
    gone->call->end();
  }
  const auto replies = outbox_.withdraw_call(header.call_id);
  assert(replies <= (was_running ? 0u : 1u));
  slots_used_ -= replies;
  host_.changed();
  return {};
}

Connection::Running* Connection::running(std::uint64_t call_id) {
  const auto it = calls_.find(call_id);
  return it == calls_.end() || it->second->ended ? nullptr : it->second.get();
}

// ---- Calls

Task<void> Connection::run_call(Connection* self, std::shared_ptr<CallImpl> call, Task<std::string> handler) {
  auto result = co_await std::move(handler);
  (void)co_await call->turn();  // the reply follows the call's last data frame
  self->finish(*call, std::move(result));
  co_return {};
}

void Connection::finish(CallImpl& call, Result<std::string> result) {
  running(call.id())->ended = true;
  call.end();
  if (!dropped_) send_reply(call.id(), std::move(result));
  // We are inside the call's own task: its scope goes in a later turn.
  loop().post([weak = weak_from_this(), id = call.id()] {
    if (auto self = weak.lock()) self->calls_.erase(id);
  });
}

void Connection::send_reply(std::uint64_t call_id, Result<std::string> result) {
  if (result && result->size() > wire::kMessageBytesMax)
    result = fail(Errc::kFailed, "the reply has " + std::to_string(result->size()) + " bytes, over the limit");
  OutFrame frame{.kind = FrameKind::kReply, .call_id = call_id};
  if (result) {
    frame.message = *std::move(result);
  } else {
    const bool stale = result.error().code == Errc::kStale && host_.stale_map;
    frame.kind = FrameKind::kError;
    frame.message = encode_error(result.error(), stale ? host_.stale_map() : std::string());
  }
  if (frame.message.size() > kSmallReplyBytes) {
    auto share = replies_.try_acquire(frame.message.size());
    auto memory = share ? host_.replies.try_acquire(frame.message.size()) : std::nullopt;
    if (memory) {
      frame.share = *std::move(share);
      frame.memory = *std::move(memory);
    } else {
      ++host_.totals.busy;
      frame.kind = FrameKind::kError;
      frame.message =
          encode_error({Errc::kUnavailable, share ? "replies that clients have not taken use all memory for them"
                                                  : "replies that this client has not taken use all its memory"},
                       {});
    }
  }
  outbox_.push(std::move(frame));
}

// ---- Writing

void Connection::return_credit() {
  ++units_back_;
  if (credit_queued_ || dropped_) return;
  credit_queued_ = true;
  outbox_.push({.kind = FrameKind::kCredit});
}

void Connection::pong() {
  if (pong_queued_) return;
  pong_queued_ = true;
  outbox_.push({.kind = FrameKind::kPong});
}

void Connection::starting(OutFrame& frame) {
  switch (frame.kind) {
    case FrameKind::kReply:
    case FrameKind::kError:
      --slots_used_;
      break;
    case FrameKind::kPong:
      pong_queued_ = false;
      break;
    case FrameKind::kCredit:
      frame.method = static_cast<std::uint16_t>(units_back_);
      units_out_ -= std::exchange(units_back_, 0);
      credit_queued_ = false;
      break;
    default:
      break;
  }
}

void Connection::written() {
  if (host_.closing()) host_.changed();
}

}  // namespace cairn::rpc
