#include "client/core/protection.h"

#include <algorithm>
#include <utility>

#include "client/core/session.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr int kRenewalsPerTtl = 4;
constexpr std::size_t kPerCall = 4096;  // readers named in one message

}  // namespace

struct Protection::Open {
  OwnerId owner;
  rt::Duration ttl;
  rt::TimePoint heard;     // when the last request that the daemon answered was sent
  rt::Duration silence{};  // before that, the longest
  bool lost = false;
};

struct Protection::State {
  explicit State(rt::Loop& l) : loop(l), changed(l) {}
  rt::Loop& loop;
  std::map<std::uint64_t, Open> open;                     // by reader
  std::vector<std::pair<std::uint64_t, OwnerId>> closed;  // to be told
  rt::Signal changed;
  bool running = false;

  /// Until something was closed: what is removed should not wait for the ttl.
  static Task<void> until_closed(std::shared_ptr<State> self) {
    while (self->closed.empty()) co_await self->changed.wait();
    co_return {};
  }
};

Protection::Protection(Session& session) : session_(session), state_(std::make_shared<State>(session.runtime().loop)) {}
Protection::~Protection() = default;

Protection::Held::Held(std::shared_ptr<State> state, std::uint64_t reader)
    : state_(std::move(state)), reader_(reader) {}

Protection::Held::~Held() {
  const auto known = state_->open.find(reader_);
  // Lost: the daemon does not know it any more.
  if (!known->second.lost) state_->closed.emplace_back(reader_, known->second.owner);
  state_->open.erase(known);
  state_->changed.notify_all();
}

bool Protection::Held::lost() const {
  return state_->open.at(reader_).lost;
}

rt::Duration Protection::Held::silence() const {
  const auto& open = state_->open.at(reader_);
  return std::max(open.silence, state_->loop.now() - open.heard);
}

std::uint64_t Protection::draw() {
  for (;;)
    if (const auto reader = session_.runtime().random.next(); reader != 0 && !state_->open.contains(reader))
      return reader;
}

std::shared_ptr<const Protection::Held> Protection::hold(std::uint64_t reader, OwnerId owner, rt::Duration ttl,
                                                         rt::TimePoint asked) {
  state_->open.emplace(reader, Open{.owner = owner, .ttl = ttl, .heard = asked});
  if (!std::exchange(state_->running, true)) session_.background().spawn(renew(&session_, state_));
  return std::make_shared<const Held>(state_, reader);
}

Task<void> Protection::renew(Session* session, std::shared_ptr<State> state) {
  auto& loop = state->loop;
  while (!state->open.empty() || !state->closed.empty()) {
    auto ttl = rt::Duration(std::chrono::seconds(60));
    for (const auto& [reader, open] : state->open) ttl = std::min(ttl, open.ttl);
    const auto pause = std::max<rt::Duration>(ttl / kRenewalsPerTtl, std::chrono::milliseconds(1));
    (void)co_await rt::with_deadline(loop, loop.now() + pause, State::until_closed(state), "closed");

    // By home group, in pieces: one call each.
    std::map<HomeGroup, std::vector<std::uint64_t>> open;
    std::map<HomeGroup, std::vector<std::pair<std::uint64_t, OwnerId>>> closed;
    for (const auto& [reader, known] : state->open)
      if (!known.lost) open[known.owner.home_group()].push_back(reader);
    for (auto& gone : std::exchange(state->closed, {})) closed[gone.second.home_group()].push_back(gone);
    std::vector<Task<void>> calls;
    const auto deadline = loop.now() + pause;
    for (HomeGroup group = 0; group < kHomeGroups; ++group) {
      auto& of_open = open[group];
      auto& of_closed = closed[group];
      for (std::size_t at = 0; at < std::max(of_open.size(), of_closed.size()); at += kPerCall) {
        const auto piece = [&](const auto& all) {
          const auto first = all.begin() + static_cast<std::ptrdiff_t>(std::min(at, all.size()));
          return std::vector(first,
                             first + static_cast<std::ptrdiff_t>(std::min<std::size_t>(kPerCall, all.end() - first)));
        };
        calls.push_back(send(session, state, group, piece(of_open), piece(of_closed), deadline));
      }
    }
    CO_CHECK_OK(co_await rt::all(loop, std::move(calls)));
  }
  state->running = false;
  state->changed.notify_all();
  co_return {};
}

Task<void> Protection::settled_on(std::shared_ptr<State> state) {
  while (state->running && state->open.empty()) co_await state->changed.wait();
  co_return {};
}

Task<void> Protection::send(Session* session, std::shared_ptr<State> state, HomeGroup group,
                            std::vector<std::uint64_t> open, std::vector<std::pair<std::uint64_t, OwnerId>> closed,
                            rt::TimePoint deadline) {
  wire::ReaderRenew request;
  request.set_home_group(group);
  for (const auto reader : open) {
    const auto known = state->open.find(reader);
    if (known == state->open.end()) continue;
    auto& named = *request.add_readers();
    named.set_id(reader);
    named.set_owner(std::string(known->second.owner.view()));
  }
  for (const auto& [reader, owner] : closed) {
    auto& named = *request.add_closed();
    named.set_id(reader);
    named.set_owner(std::string(owner.view()));
  }
  const auto asked = state->loop.now();
  auto sent = co_await session->record_call(wire::Method::kReaderRenew, group, wire::encode(request), deadline);
  if (!sent) co_return {};  // the next renewal tries again; what was closed expires
  wire::ReaderRenewReply reply;
  if (!wire::decode(sent->message, reply, "renewal")) co_return {};
  for (const auto& named : request.readers())
    if (const auto known = state->open.find(named.id()); known != state->open.end()) {
      known->second.silence = std::max(known->second.silence, state->loop.now() - known->second.heard);
      known->second.heard = asked;
    }
  for (const auto reader : reply.gone())
    if (const auto known = state->open.find(reader); known != state->open.end()) known->second.lost = true;
  co_return {};
}

}  // namespace cairn::client
