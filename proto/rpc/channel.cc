#include <algorithm>
#include <cassert>
#include <cstring>
#include <deque>
#include <map>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/rpc/frame_reader.h"
#include "proto/rpc/hello.h"
#include "proto/rpc/outbox.h"
#include "proto/rpc/rpc.h"
#include "proto/rt/sync.h"

namespace cairn::rpc {
namespace {

using wire::FrameHeader;
using wire::FrameKind;

constexpr rt::Duration kHandshakeMax = std::chrono::seconds(5);
// A daemon that is asked by more than it lets wait hangs up on the oldest who has not said who it is.
constexpr int kHandshakes = 3;
constexpr rt::Duration kHandshakePause = std::chrono::milliseconds(100);
/// Spans of a sink below this size are filled through one buffer: a read per row of a strided slice would cost more
/// than the copy.
constexpr std::size_t kDirectBytesMin = 64 * kKiB;
constexpr std::size_t kBounceBytes = 256 * kKiB;

class ChannelImpl final : public Channel, public std::enable_shared_from_this<ChannelImpl> {
 public:
  ChannelImpl(rt::Runtime runtime, std::unique_ptr<rt::Stream> stream, std::string address, Options options)
      : runtime_(runtime),
        stream_(std::move(stream)),
        address_(std::move(address)),
        options_(std::move(options)),
        reader_(runtime.loop, *stream_),
        outbox_(
            runtime.loop, *stream_, [this](OutFrame& f) { starting(f); }, [this](OutFrame& f) { written(f); }),
        stream_back_(runtime.loop),
        tasks_(runtime.loop) {}

  static Task<std::shared_ptr<Channel>> open(rt::Runtime runtime, std::string address, Options options) {
    for (int tries = 1;; ++tries) {
      CO_TRY(auto stream, co_await runtime.net.dial(address));
      auto channel = std::make_shared<ChannelImpl>(runtime, std::move(stream), address, options);
      auto agreed = co_await rt::with_deadline(runtime.loop, runtime.loop.now() + kHandshakeMax, channel->shake_hands(),
                                               address + ": handshake");
      if (agreed) {
        channel->start();
        co_return std::shared_ptr<Channel>(std::move(channel));
      }
      if (agreed.error().code != Errc::kUnavailable || tries == kHandshakes) co_return fail(std::move(agreed).error());
      co_await runtime.loop.sleep(tries * kHandshakePause);
    }
  }

  Task<std::string> call(wire::Method method, std::string request, rt::TimePoint deadline) override {
    return timed(method, deadline, run_call(shared_from_this(), method, std::move(request)));
  }
  Task<std::string> upload(wire::Method method, std::string request, std::vector<Piece> pieces,
                           rt::TimePoint deadline) override {
    return timed(method, deadline, run_upload(shared_from_this(), method, std::move(request), std::move(pieces)));
  }
  Task<std::string> download(wire::Method method, std::string request, Sink& sink, rt::TimePoint deadline) override {
    return timed(method, deadline, run_download(shared_from_this(), method, std::move(request), &sink));
  }

  const Agreed& agreed() const override { return agreed_; }
  bool alive() const override { return !lost_; }
  std::string peer() const override { return address_; }
  std::uint64_t bytes_sent() const override { return outbox_.bytes(); }
  std::uint64_t bytes_received() const override { return reader_.bytes(); }
  void close() override { lose(Error{Errc::kUnavailable, "closed on this side"}); }

 private:
  /// A call as long as its coroutine lives. Leaving it is giving the call up, wherever it was.
  struct Call {
    explicit Call(std::shared_ptr<ChannelImpl> c) : channel(std::move(c)), changed(channel->runtime_.loop) {}
    Call(const Call&) = delete;
    ~Call() { channel->leave(*this); }

    std::shared_ptr<ChannelImpl> channel;
    rt::Signal changed;
    rt::Semaphore::Lease slot;  // one of Agreed::calls_max
    std::uint64_t id = 0;       // 0: not registered yet
    OutFramePtr request;
    std::optional<Result<std::string>> reply;
    std::string newer_map;
    bool wants_data = false;
    bool offered = false;  // the reader stands at a data frame of ours and waits
    std::string message;   // of that frame
    bool wants_credit = false, has_credit = false;
    OutFramePtr piece;  // not written yet
  };

  Task<std::string> timed(wire::Method method, rt::TimePoint deadline, Task<std::string> task) {
    return rt::with_deadline(runtime_.loop, deadline, std::move(task),
                             std::string(wire::name_of(method)) + " at " + address_);
  }

  // ---- Handshake

  Task<void> shake_hands() {
    if (options_.memory && !stream_->attach(options_.memory)) options_.memory.reset();
    const auto hello = encode_hello(options_);
    if (hello.size() > wire::kHelloBytesMax)
      co_return fail(Errc::kInvalid, "hello of " + std::to_string(hello.size()) + " bytes is over the limit");
    const FrameHeader header{.kind = FrameKind::kHello,
                             .message_bytes = static_cast<std::uint32_t>(hello.size()),
                             .message_crc = crc32c(hello)};
    const auto encoded = header.encode();
    CO_CHECK_OK(co_await stream_->write_all({encoded, bytes_of(hello)}));
    auto agreed = co_await read_greeting();
    if (!agreed) co_return fail(std::move(agreed).error().with(address_ + ": handshake"));
    agreed_ = *std::move(agreed);
    if (!options_.memory && (agreed_.features & kSharesMemory) != 0)
      co_return fail(Errc::kProtocol, address_ + ": handshake: the daemon takes memory that was not offered");
    slots_.emplace(runtime_.loop, agreed_.calls_max);
    credit_ = agreed_.credit_units;
    co_return {};
  }

  Task<Agreed> read_greeting() {
    auto answer = co_await reader_.header();
    if (!answer) {
      auto error = std::move(answer).error();
      co_return fail(error.code == Errc::kProtocol ? std::move(error).with("not a Cairn daemon") : std::move(error));
    }
    if ((answer->kind != FrameKind::kHelloReply && answer->kind != FrameKind::kError) ||
        answer->message_bytes > wire::kHelloBytesMax)
      co_return fail(Errc::kProtocol, "not a Cairn daemon: the first frame is no answer to a hello");
    CO_TRY(const auto message, co_await reader_.message(*answer));
    if (answer->kind == FrameKind::kError) {
      CO_TRY(auto refusal, decode_error(message));
      co_return fail(std::move(refusal.error).with("refused"));
    }
    co_return accept_hello_reply(message, options_.cluster);
  }

  void start() {
    tasks_.spawn(read_frames(), [this](Result<void> end) { lose(std::move(end).error()); });
    tasks_.spawn(outbox_.run(), [this](Result<void> end) { lose(std::move(end).error()); });
    tasks_.spawn(watch(), [this](Result<void> end) {
      if (!end) lose(std::move(end).error());
    });
  }

  // ---- The connection

  /// Ends the connection for good; every call ends with `why`. Runs inside our own tasks too, so it destroys nothing.
  void lose(Error why) {
    if (lost_) return;
    lost_ = Error{Errc::kUnavailable, address_ + ": connection lost: " + why.message};
    stream_->close();
    outbox_.clear();
    for (auto& [id, call] : calls_) {
      if (!call->reply) call->reply = fail(*lost_);
      call->changed.notify_all();
    }
  }

  /// Pings, and notices a silent peer. Counts its own turns instead of reading the clock: a process that was stopped
  /// for a minute must not take what waits in its socket for silence.
  Task<void> watch() {
    const auto step = std::max(std::min(options_.ping_every, options_.silence_max / 4), rt::Duration(1));
    auto since_ping = rt::Duration(0), silent = rt::Duration(0);
    auto bytes = reader_.bytes();
    while (!lost_) {
      co_await runtime_.loop.sleep(step);
      since_ping += step;
      silent += step;
      if (std::exchange(bytes, reader_.bytes()) != reader_.bytes()) silent = rt::Duration(0);
      if (silent >= options_.silence_max)
        co_return fail(Errc::kUnavailable,
                       "silent for " +
                           std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(silent).count()) +
                           " ms");
      if (since_ping >= options_.ping_every && !ping_queued_ && !lost_) {
        since_ping = rt::Duration(0);
        ping_queued_ = true;
        outbox_.push({.kind = FrameKind::kPing});
      }
    }
    co_return {};
  }

  Task<void> read_frames() {
    for (;;) {
      CO_TRY(const auto header, co_await reader_.header());
      CO_TRY(auto message, co_await reader_.message(header));
      if (header.call_id > last_id_) co_return fail(Errc::kProtocol, "frame for a call that was never made");
      // A call that is gone from calls_ was given up here; the daemon may not know it yet.
      const auto found = calls_.find(header.call_id);
      auto* call = found == calls_.end() || found->second->reply ? nullptr : found->second;
      switch (header.kind) {
        case FrameKind::kReply:
        case FrameKind::kError:
          if (header.call_id == 0) co_return fail(Errc::kProtocol, "reply without a call");
          if (call != nullptr) CO_CHECK_OK(take_reply(*call, header.kind, std::move(message)));
          break;
        case FrameKind::kData:
          if (header.call_id == 0 || (call != nullptr && !call->wants_data))
            co_return fail(Errc::kProtocol, "data for a call that takes none");
          if (call != nullptr) {
            call->message = std::move(message);
            call->offered = stream_lent_ = true;
            call->changed.notify_all();
            while (stream_lent_) co_await stream_back_.wait();
          }
          if (lost_) co_return fail(*lost_);
          CO_CHECK_OK(co_await reader_.skip_payload());
          break;
        case FrameKind::kCredit:
          if (header.method > lent_) co_return fail(Errc::kProtocol, "more credit came back than was used");
          lent_ -= header.method;
          credit_ += header.method;
          hand_out_credit();
          break;
        case FrameKind::kPing:
          if (!pong_queued_) {
            pong_queued_ = true;
            outbox_.push({.kind = FrameKind::kPong});
          }
          break;
        case FrameKind::kPong:
          break;
        default:
          co_return fail(Errc::kProtocol,
                         "frame of kind " + std::to_string(static_cast<int>(header.kind)) + " from a daemon");
      }
    }
  }

  static Result<void> take_reply(Call& call, FrameKind kind, std::string message) {
    if (kind == FrameKind::kReply) {
      call.reply = std::move(message);
    } else {
      TRY(auto answer, decode_error(message));
      call.newer_map = std::move(answer.map);
      call.reply = fail(std::move(answer.error));
    }
    call.changed.notify_all();
    return {};
  }

  void starting(OutFrame& frame) {
    if (frame.kind == FrameKind::kPing) ping_queued_ = false;
    if (frame.kind == FrameKind::kPong) pong_queued_ = false;
    if (frame.kind != FrameKind::kData) return;
    // From here on the credit is the daemon's to give back, whatever becomes of the call.
    ++lent_;
    if (const auto it = calls_.find(frame.call_id); it != calls_.end()) it->second->has_credit = false;
  }
  void written(OutFrame& frame) {
    if (frame.kind != FrameKind::kData) return;
    if (const auto it = calls_.find(frame.call_id); it != calls_.end() && it->second->piece.get() == &frame) {
      it->second->piece.reset();
      it->second->changed.notify_all();
    }
  }

  /// To the uploads in the order in which they asked, one unit each, so that they advance together.
  void hand_out_credit() {
    while (credit_ > 0 && !credit_waiters_.empty()) {
      auto* call = credit_waiters_.front();
      credit_waiters_.pop_front();
      call->wants_credit = false;
      call->has_credit = true;
      --credit_;
      call->changed.notify_all();
    }
  }

  // ---- Calls

  static Task<void> begin(Call& call, wire::Method method, std::string request) {
    auto& self = *call.channel;
    if (self.lost_) co_return fail(*self.lost_);
    if (request.size() > wire::kMessageBytesMax)
      co_return fail(Errc::kInvalid, std::string(wire::name_of(method)) + ": request of " +
                                         std::to_string(request.size()) + " bytes is over the limit");
    CO_TRY(call.slot, co_await self.slots_->acquire(1));
    if (self.lost_) co_return fail(*self.lost_);
    call.id = ++self.last_id_;
    self.calls_.emplace(call.id, &call);
    call.request = self.outbox_.push({.kind = FrameKind::kRequest,
                                      .method = static_cast<std::uint16_t>(method),
                                      .call_id = call.id,
                                      .message = std::move(request)});
    co_return {};
  }

  void leave(Call& call) {
    if (call.id == 0) return;
    calls_.erase(call.id);
    if (call.wants_credit) std::erase(credit_waiters_, &call);
    if (call.piece) outbox_.withdraw(call.piece.get());
    if (call.has_credit) {  // not used: its frame, if any, has not started
      ++credit_;
      hand_out_credit();
    }
    if (call.offered) give_stream_back();
    if (lost_ || outbox_.withdraw(call.request.get()) || call.reply) return;
    outbox_.push({.kind = FrameKind::kCancel, .call_id = call.id});
  }

  void give_stream_back() {
    stream_lent_ = false;
    stream_back_.notify_all();
  }

  static Task<std::string> wait_for_reply(Call& call) {
    while (!call.reply) co_await call.changed.wait();
    if (!call.newer_map.empty() && call.channel->options_.newer_map)
      call.channel->options_.newer_map(std::move(call.newer_map));
    co_return *std::move(call.reply);
  }

  static Task<std::string> run_call(std::shared_ptr<ChannelImpl> self, wire::Method method, std::string request) {
    Call call(std::move(self));
    CO_CHECK_OK(co_await begin(call, method, std::move(request)));
    co_return co_await wait_for_reply(call);
  }

  static Task<std::string> run_upload(std::shared_ptr<ChannelImpl> self, wire::Method method, std::string request,
                                      std::vector<Piece> pieces) {
    Call call(std::move(self));
    auto& channel = *call.channel;
    for (const auto& piece : pieces)
      if (piece.payload.size() > channel.agreed_.unit_bytes || piece.message.size() > wire::kDataMessageBytesMax)
        co_return fail(Errc::kInvalid, std::string(wire::name_of(method)) + ": piece of " +
                                           std::to_string(piece.payload.size()) + " bytes is over the unit of " +
                                           std::to_string(channel.agreed_.unit_bytes));
    CO_CHECK_OK(co_await begin(call, method, std::move(request)));
    for (auto& piece : pieces) {
      call.wants_credit = true;
      channel.credit_waiters_.push_back(&call);
      channel.hand_out_credit();
      while (!call.has_credit && !call.reply) co_await call.changed.wait();
      if (call.reply) break;
      call.piece = channel.outbox_.push({.kind = FrameKind::kData,
                                         .call_id = call.id,
                                         .message = std::move(piece.message),
                                         .payload = {std::move(piece.payload)}});
      while (call.piece && !call.reply) co_await call.changed.wait();
      if (call.reply) break;  // an early answer, most likely an error: the rest is not wanted
    }
    co_return co_await wait_for_reply(call);
  }

  static Task<std::string> run_download(std::shared_ptr<ChannelImpl> self, wire::Method method, std::string request,
                                        Sink* sink) {
    Call call(std::move(self));
    call.wants_data = true;
    CO_CHECK_OK(co_await begin(call, method, std::move(request)));
    for (;;) {
      while (!call.offered && !call.reply) co_await call.changed.wait();
      if (!call.offered) break;
      CO_CHECK_OK(co_await receive(call, *sink));
    }
    co_return co_await wait_for_reply(call);
  }

  /// Reads one payload in the call's own coroutine: dropped with it, so nothing writes to the sink's memory later.
  static Task<void> receive(Call& call, Sink& sink) {
    auto& channel = *call.channel;
    // Also when this frame is dropped: the reading task goes on with what is left of the payload.
    struct Borrowed {
      Call& call;
      ~Borrowed() {
        call.offered = false;
        call.channel->give_stream_back();
      }
    } borrowed{call};
    if (channel.lost_) co_return fail(*channel.lost_);
    const auto size = channel.reader_.payload_left();
    CO_TRY(const auto spans, sink.place(call.message, size));
    std::size_t placed = 0;
    for (const auto& span : spans) placed += span.size();
    assert(placed == size && "a sink places the whole payload");
    if (placed != size)
      co_return fail(Errc::kFailed, "sink placed " + std::to_string(placed) + " of " + std::to_string(size) + " bytes");
    auto read = co_await channel.scatter(spans);
    if (!read) {
      channel.lose(std::move(read).error());
      co_return fail(*channel.lost_);
    }
    co_return sink.placed(call.message);
  }

  Task<void> scatter(const std::vector<std::span<std::byte>>& spans) {
    for (std::size_t i = 0; i < spans.size();) {
      std::size_t end = i, total = 0;
      while (end < spans.size() && spans[end].size() < kDirectBytesMin && total + spans[end].size() <= kBounceBytes)
        total += spans[end++].size();
      if (end <= i + 1) {
        CO_CHECK_OK(co_await reader_.payload(spans[i++]));
        continue;
      }
      bounce_.resize(kBounceBytes);
      CO_CHECK_OK(co_await reader_.payload(std::span(bounce_).first(total)));
      for (const auto* from = bounce_.data(); i < end; from += spans[i++].size())
        if (!spans[i].empty()) std::memcpy(spans[i].data(), from, spans[i].size());
    }
    co_return {};
  }

  rt::Runtime runtime_;
  std::unique_ptr<rt::Stream> stream_;
  std::string address_;
  Options options_;
  Agreed agreed_;
  FrameReader reader_;
  Outbox outbox_;
  std::optional<Error> lost_;

  // Bounds of what is queued: requests and cancels by slots_, data by credit, one ping, one pong.
  std::optional<rt::Semaphore> slots_;
  std::map<std::uint64_t, Call*> calls_;  // ids count up: the map is in the order of the requests
  std::uint64_t last_id_ = 0;
  std::uint32_t credit_ = 0;  // units we may use
  std::uint32_t lent_ = 0;    // units that are with the daemon
  std::deque<Call*> credit_waiters_;
  bool ping_queued_ = false, pong_queued_ = false;

  // The reading task lends the stream to a call that takes a payload, and waits.
  bool stream_lent_ = false;
  rt::Signal stream_back_;
  std::vector<std::byte> bounce_;

  rt::Scope tasks_;  // last: its coroutines use all of the above
};

}  // namespace

Task<std::shared_ptr<Channel>> Channel::connect(rt::Runtime runtime, std::string address, Options options,
                                                rt::TimePoint deadline) {
  auto what = "connect to " + address;
  return rt::with_deadline(runtime.loop, deadline, ChannelImpl::open(runtime, std::move(address), std::move(options)),
                           std::move(what));
}

}  // namespace cairn::rpc
