#include "client/core/session.h"

#include <algorithm>
#include <functional>

#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

Task<std::string> send_call(std::shared_ptr<rpc::Channel> channel, wire::Method method, std::string request,
                            rt::TimePoint deadline) {
  co_return co_await channel->call(method, std::move(request), deadline);
}

Task<std::string> send_upload(std::shared_ptr<rpc::Channel> channel, std::string request,
                              std::vector<rpc::Piece> pieces, rt::TimePoint deadline) {
  co_return co_await channel->upload(wire::Method::kPutChunk, std::move(request), std::move(pieces), deadline);
}

bool sees_memory(const rpc::Channel& channel) {
  return (channel.agreed().features & rpc::kSharesMemory) != 0;
}

/// The pieces stay as they are until the answer comes: the daemon looks at them where they lie.
Task<std::string> send_places(std::shared_ptr<rpc::Channel> channel, std::string request,
                              std::vector<rpc::Piece> /*pieces*/, rt::TimePoint deadline) {
  co_return co_await channel->call(wire::Method::kPutChunk, std::move(request), deadline);
}

Task<std::string> send_download(std::shared_ptr<rpc::Channel> channel, std::string request,
                                std::unique_ptr<rpc::Sink> sink, rt::TimePoint deadline) {
  co_return co_await channel->download(wire::Method::kReadRanges, std::move(request), *sink, deadline);
}

}  // namespace

Session::Session(rt::Runtime runtime, SessionOptions options)
    : runtime_(runtime), options_(std::move(options)), background_(runtime.loop) {
  for (std::size_t i = 0; i < std::max<std::size_t>(options_.connections, 1); ++i)
    slots_.push_back(std::make_unique<Slot>(runtime_.loop));
}

Session::~Session() {
  close();
}

Task<std::shared_ptr<Session>> Session::connect(rt::Runtime runtime, SessionOptions options, rt::TimePoint deadline) {
  if (options.servers.empty()) co_return fail(Errc::kInvalid, "connect: the list of servers is empty");
  auto session = std::shared_ptr<Session>(new Session(runtime, std::move(options)));
  CO_TRY(auto channel, co_await session->channel(0, deadline));
  session->unit_bytes_ = channel->agreed().unit_bytes;
  if (const auto& o = session->options_; o.memory && o.window_bytes >= session->unit_bytes_)
    session->window_ =
        rt::UnitPool::over(runtime.loop, o.memory, o.memory->bytes().first(o.window_bytes), session->unit_bytes_);
  CO_CHECK_OK(co_await session->load_map(deadline));
  co_return session;
}

Task<std::shared_ptr<rpc::Channel>> Session::dial(std::string address, rt::TimePoint deadline) {
  const auto soon = std::min(deadline, runtime_.loop.now() + options_.dial_max);
  rpc::Channel::Options options;
  options.client_name = options_.name;
  options.memory = options_.memory;
  // What cannot be read is asked for again by repeat(), which reports it.
  options.newer_map = [session = weak_from_this()](std::string map) {
    if (auto self = session.lock()) (void)self->take_map(map);
  };
  CO_TRY(auto channel, co_await rpc::Channel::connect(runtime_, address, options, soon));
  const auto& agreed = channel->agreed();
  if (!agreed.unix_socket.empty() && !options_.host.empty() && agreed.host == options_.host &&
      !address.starts_with("unix:")) {
    // On the daemon's own host its unix socket is cheaper; where it cannot be reached (another user, a container) TCP
    // stays.
    auto local = co_await rpc::Channel::connect(runtime_, "unix:" + agreed.unix_socket, options, soon);
    if (local) {
      channel->close();
      channel = std::move(*local);
    }
  }
  co_return channel;
}

Task<std::shared_ptr<rpc::Channel>> Session::channel(std::size_t slot_index, rt::TimePoint deadline) {
  auto self = shared_from_this();
  Slot& slot = *slots_[slot_index];
  if (slot.channel && slot.channel->alive()) co_return slot.channel;
  CO_TRY(auto turn, co_await slot.opening.acquire(1));
  if (closed_) co_return fail(Errc::kCancelled, "the client is closed");
  if (slot.channel && slot.channel->alive()) co_return slot.channel;
  if (slot.channel) received_before_ += slot.channel->bytes_received();
  slot.channel.reset();
  std::string reasons;
  for (const auto& server : options_.servers) {
    auto dialled = co_await dial(server, deadline);
    if (dialled) {
      slot.channel = std::move(*dialled);
      address_ = slot.channel->peer();
      shares_memory_ = sees_memory(*slot.channel);
      co_return slot.channel;
    }
    // A wrong protocol or address does not heal by trying again.
    if (dialled.error().code == Errc::kInvalid || dialled.error().code == Errc::kProtocol)
      co_return fail(std::move(dialled).error().with("connect to " + server));
    reasons += (reasons.empty() ? "" : ", ") + server + ": " + dialled.error().message;
  }
  co_return fail(Errc::kUnavailable, "no server answered (" + reasons + ")");
}

Task<void> Session::load_map(rt::TimePoint deadline) {
  auto self = shared_from_this();
  CO_TRY(auto control, co_await channel(0, deadline));
  CO_TRY(auto reply, co_await control->call(wire::Method::kMap, std::string{}, deadline));
  co_return take_map(reply);
}

Result<void> Session::take_map(std::string_view bytes) {
  wire::Map map;
  CHECK_OK(wire::decode(bytes, map, "map"));
  if (map.version() < map_version_) return {};
  map_version_ = map.version();
  groups_.clear();
  for (const auto& range : map.groups()) {
    const bool serving =
        std::any_of(range.members().begin(), range.members().end(), [](const auto& m) { return m.serving(); });
    groups_.push_back({range.first(), range.count(), range.home(), {range.generation(), range.epoch()}, serving});
  }
  return {};
}

Result<DataGroup> Session::choose_data_group(const std::vector<DataGroup>& groups, std::uint64_t turn) const {
  std::vector<DataGroup> serving;
  for (const auto group : groups)
    if (std::ranges::any_of(groups_, [&](const auto& g) {
          return !g.home && g.serving && group >= g.first && group - g.first < g.count;
        }))
      serving.push_back(group);
  if (!serving.empty()) return serving[turn % serving.size()];
  return fail(Errc::kUnavailable, "no data group of the bucket's number of copies serves");
}

std::uint32_t Session::unit_bytes() const {
  return unit_bytes_;
}

Result<std::string> Session::stamp(Stamped stamped, std::uint32_t group) const {
  if (stamped == Stamped::kNo) return std::string{};
  for (const auto& g : groups_) {
    if (g.home != (stamped == Stamped::kRecords) || group < g.first || group - g.first >= g.count) continue;
    wire::StampOfRecords records;
    wire::StampOfChunks chunks;
    auto* to = stamped == Stamped::kRecords ? records.mutable_stamp() : chunks.mutable_stamp();
    to->set_group(group);
    to->set_generation(g.epoch.generation);
    to->set_epoch(g.epoch.count);
    return stamped == Stamped::kRecords ? wire::encode(records) : wire::encode(chunks);
  }
  return fail(Errc::kUnavailable, "the map does not name " +
                                      std::string(stamped == Stamped::kRecords ? "home" : "data") + " group " +
                                      std::to_string(group));
}

Task<Session::Reply> Session::repeat(std::string what, std::size_t slot, Stamped stamped, std::uint32_t group,
                                     std::string request, Send send, rt::TimePoint deadline) {
  auto self = shared_from_this();
  auto backoff = options_.backoff_min;
  int sent = 0;
  std::uint64_t stamped_by = 0;  // the map's version when the request was stamped
  for (;;) {
    Error error;
    auto reached = co_await channel(slot, deadline);
    if (reached) {
      auto stamp_bytes = stamp(stamped, group);
      if (!stamp_bytes) co_return fail(std::move(stamp_bytes).error().with(what));
      ++sent;
      stamped_by = map_version_;
      std::string stamped_request = request + *stamp_bytes;
      auto task = send(*reached, std::move(stamped_request));
      auto reply = co_await std::move(task);
      if (reply) co_return Reply{std::move(*reply), sent > 1};
      error = std::move(reply).error();
    } else {
      error = std::move(reached).error();
    }
    const bool late = runtime_.loop.now() >= deadline;
    if (error.code == Errc::kStale && !late) {
      // The daemon restarted or the map moved on. The newer map came with the answer, else it is asked for.
      Result<void> loaded;
      if (map_version_ == stamped_by) loaded = co_await load_map(deadline);
      if (loaded) {
        if (backoff > options_.backoff_min) co_await runtime_.loop.sleep(backoff);
        backoff = std::min(backoff * 2, options_.backoff_max);
        continue;
      }
      error = std::move(loaded).error();
    }
    if (error.code != Errc::kUnavailable && error.code != Errc::kDeadline) co_return fail(std::move(error).with(what));
    if (closed_) co_return fail(Errc::kCancelled, what + ": the client is closed");
    const auto wait =
        backoff / 2 + rt::Duration(runtime_.random.next() % static_cast<std::uint64_t>(backoff.count() / 2 + 1));
    if (late || error.code == Errc::kDeadline || runtime_.loop.now() + wait >= deadline) {
      // P7: say honestly whether the request can have had an effect.
      if (sent > 0)
        co_return fail(Errc::kUnknown, what + ": no answer in time, it may have been done: " + error.message);
      co_return fail(Errc::kUnavailable, what + ": " + error.message);
    }
    co_await runtime_.loop.sleep(wait);
    backoff = std::min(backoff * 2, options_.backoff_max);
  }
}

Task<Session::Reply> Session::record_call(wire::Method method, HomeGroup group, std::string request,
                                          rt::TimePoint deadline) {
  Send send = [method, deadline](std::shared_ptr<rpc::Channel> channel, std::string stamped) {
    return send_call(std::move(channel), method, std::move(stamped), deadline);
  };
  co_return co_await repeat(std::string(wire::name_of(method)), 0, Stamped::kRecords, group, std::move(request),
                            std::move(send), deadline);
}

Task<Session::Reply> Session::plain_call(wire::Method method, std::string request, rt::TimePoint deadline) {
  Send send = [method, deadline](std::shared_ptr<rpc::Channel> channel, std::string stamped) {
    return send_call(std::move(channel), method, std::move(stamped), deadline);
  };
  co_return co_await repeat(std::string(wire::name_of(method)), 0, Stamped::kNo, 0, std::move(request), std::move(send),
                            deadline);
}

Task<Session::Reply> Session::put_chunk(DataGroup group, std::string request, std::vector<rpc::Piece> pieces,
                                        rt::TimePoint deadline) {
  // As further fields of the request, for connections where it makes sense.
  wire::PutChunk places;
  for (const auto& piece : pieces) {
    const auto place = place_of(piece.payload.bytes());
    if (!place) break;
    places.add_shared(*place);
  }
  const bool all = !pieces.empty() && static_cast<std::size_t>(places.shared_size()) == pieces.size();
  Send send = [pieces = std::move(pieces), places = all ? wire::encode(places) : std::string(), deadline](
                  std::shared_ptr<rpc::Channel> channel, std::string stamped) {
    if (!places.empty() && sees_memory(*channel))
      return send_places(std::move(channel), std::move(stamped) + places, pieces, deadline);
    return send_upload(std::move(channel), std::move(stamped), pieces, deadline);
  };
  const auto slot = next_bulk_++ % slots_.size();
  co_return co_await repeat("put chunk", slot, Stamped::kChunks, group, std::move(request), std::move(send), deadline);
}

std::optional<std::uint64_t> Session::place_of(std::span<const std::byte> bytes) const {
  if (!options_.memory) return std::nullopt;
  const auto all = options_.memory->bytes();
  const std::less_equal<const std::byte*> before;
  if (!before(all.data(), bytes.data()) || !before(bytes.data() + bytes.size(), all.data() + all.size()))
    return std::nullopt;
  return static_cast<std::uint64_t>(bytes.data() - all.data());
}

Task<std::string> Session::read_shared(DataGroup group, std::string request, rt::TimePoint deadline) {
  auto self = shared_from_this();
  CO_TRY(auto channel, co_await this->channel(next_bulk_++ % slots_.size(), deadline));
  if (!sees_memory(*channel)) co_return fail(Errc::kUnavailable, "the connection shares no memory");
  CO_TRY(const auto stamp_bytes, stamp(Stamped::kChunks, group));
  co_return co_await channel->call(wire::Method::kReadShared, std::move(request) + stamp_bytes, deadline);
}

Task<Session::Reply> Session::read_ranges(DataGroup group, std::string request,
                                          std::function<std::unique_ptr<rpc::Sink>()> sink, rt::TimePoint deadline) {
  Send send = [sink = std::move(sink), deadline](std::shared_ptr<rpc::Channel> channel, std::string stamped) {
    return send_download(std::move(channel), std::move(stamped), sink(), deadline);
  };
  const auto slot = next_bulk_++ % slots_.size();
  co_return co_await repeat("read", slot, Stamped::kChunks, group, std::move(request), std::move(send), deadline);
}

std::string Session::description() const {
  return address_ + (shares_memory_ ? ", shared memory" : "");
}

std::uint64_t Session::bytes_received() const {
  auto total = received_before_;
  for (const auto& slot : slots_)
    if (slot->channel) total += slot->channel->bytes_received();
  return total;
}

void Session::close() {
  if (std::exchange(closed_, true)) return;
  background_.cancel();
  for (auto& slot : slots_)
    if (slot->channel) slot->channel->close();
}

}  // namespace cairn::client
