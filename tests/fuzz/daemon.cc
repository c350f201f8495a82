#include "tests/fuzz/daemon.h"

#include "proto/common/checksum.h"
#include "proto/rpc/hello.h"
#include "proto/wire/codec.h"
#include "tests/fuzz/fuzz.h"
#include "tests/sim/net.h"

namespace cairn::fuzz {

using namespace std::chrono_literals;
using wire::FrameKind;
using wire::Method;

std::string frame(wire::FrameHeader header, std::string_view message, std::string_view payload) {
  header.message_bytes = static_cast<std::uint32_t>(message.size());
  header.payload_bytes = static_cast<std::uint32_t>(payload.size());
  header.message_crc = crc32c(message);
  std::string out(text_of(header.encode()));
  out += message;
  return out += payload;
}

std::string hello_frame() {
  rpc::Channel::Options options;
  options.client_name = "fuzz";
  return frame({.kind = FrameKind::kHello}, rpc::encode_hello(options));
}

struct Served::Line {
  Line(sim::Node& node, std::unique_ptr<rt::Stream> s) : stream(std::move(s)), reader(node, *stream) {}
  std::unique_ptr<rt::Stream> stream;
  rpc::FrameReader reader;
  std::map<std::uint64_t, Answer> answers;  // by call; that of the handshake has number 0
};

Served::Served() : world(1), daemon(world, {}), peer(world.make_node("peer")) {
  world.net().options.shares_memory = true;
  daemon.start();
  must(world.run_until([&] { return daemon.ready(); }, world.now() + 10s), "the daemon starts");
}

Served::~Served() {
  // The frames that read from the lines go before these.
  peer.kill(sim::Death::kProcess);
}

Task<void> Served::collect(Line* line) {
  for (;;) {
    CO_TRY(const auto header, co_await line->reader.header());
    CO_TRY(auto message, co_await line->reader.message(header));
    CO_CHECK_OK(co_await line->reader.skip_payload());
    if (header.kind == FrameKind::kReply || header.kind == FrameKind::kError || header.kind == FrameKind::kHelloReply)
      line->answers.insert_or_assign(header.call_id, Answer{.kind = header.kind, .message = std::move(message)});
  }
}

Task<void> Served::write(Line* line, std::string bytes) {
  co_return co_await line->stream->write_all({bytes_of(bytes)});
}

void Served::connect() {
  auto stream = world.run(peer, peer.runtime().net.dial(daemon.address()));
  must(stream, "the daemon takes a connection");
  must((*stream)->attach(memory), "memory can be shared");
  lines_.push_back(std::make_unique<Line>(peer, *std::move(stream)));
  peer.spawn(collect(lines_.back().get()));
}

void Served::greet() {
  send(hello_frame() +
       frame({.kind = FrameKind::kRequest, .method = static_cast<std::uint16_t>(Method::kMap), .call_id = 1}, ""));
  const auto found = answer(1);
  must(found && found->kind == FrameKind::kReply, "the daemon tells its map");
  must(wire::decode(found->message, map_, "map"), "which can be read");
}

void Served::send(std::string bytes) {
  // What does not read any more is no reason to wait for long.
  (void)world.run(peer, write(lines_.back().get(), std::move(bytes)), 1s);
}

std::optional<Served::Answer> Served::answer(std::uint64_t call) {
  auto& answers = lines_.back()->answers;
  world.run_until([&] { return answers.contains(call); }, world.now() + 1s);
  const auto found = answers.find(call);
  if (found == answers.end()) return std::nullopt;
  return found->second;
}

void Served::check() {
  must(daemon.ready() && !daemon.refused() && !daemon.fail_stopped(), "the daemon serves");
  connect();
  greet();
  send(frame({.kind = FrameKind::kRequest, .method = static_cast<std::uint16_t>(Method::kBucketList), .call_id = 2},
             ""));
  const auto listed = answer(2);
  must(listed && listed->kind == FrameKind::kReply, "buckets can be listed");
  wire::BucketListReply reply;
  must(wire::decode(listed->message, reply, "list"), "and the list can be read");
}

}  // namespace cairn::fuzz
