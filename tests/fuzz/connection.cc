#include "proto/wire/codec.h"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/fuzz.h"

// Any bytes on a connection to a whole daemon: garbage, and frames with right checksums in any order.

namespace cairn::fuzz {
namespace {

using namespace std::chrono_literals;
using wire::FrameHeader;
using wire::FrameKind;
using wire::Method;

constexpr std::uint8_t kRaw = 0xff, kPause = 0xfe;

void one(std::string_view input) {
  Input in(input);
  Served served;
  served.connect();
  if (in.byte() & 1) served.greet();
  while (!in.empty()) {
    const auto kind = in.byte();
    if (kind == kRaw) {
      served.send(std::string(in.piece()));
    } else if (kind == kPause) {
      served.world.run_for(std::chrono::milliseconds(in.number(2)));
    } else {
      FrameHeader header{.kind = static_cast<FrameKind>(kind % 12), .method = in.byte(), .call_id = in.byte()};
      const auto message = in.piece();
      served.send(frame(header, message, header.kind == FrameKind::kData ? in.piece() : std::string_view()));
    }
  }
  served.check();
}

std::string record(FrameKind kind, Method method, std::uint8_t call, std::string_view message) {
  std::string out;
  out += static_cast<char>(kind);
  out += static_cast<char>(method);
  out += static_cast<char>(call);
  return out += piece_of(message);
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  const auto hello = hello_frame();
  out.push_back(std::string("\0\xff", 2) + piece_of(hello));
  out.push_back(std::string("\0\xff", 2) + piece_of(hello.substr(0, 40)) + "\xfe\x20\x20\xff" +
                piece_of(hello.substr(40)));
  out.push_back(
      "\x01" + record(FrameKind::kRequest, Method::kMap, 2, "") + record(FrameKind::kPing, Method::kNone, 0, "") +
      record(FrameKind::kRequest, Method::kBucketList, 3, "") + record(FrameKind::kCancel, Method::kNone, 3, ""));
  wire::PutChunk put;
  put.set_length(10);
  put.mutable_id()->set_owner(std::string(16, 'o'));
  put.add_block_crcs(1);
  put.mutable_stamp()->set_group(1);
  wire::DataHeader data;
  out.push_back("\x01" + record(FrameKind::kRequest, Method::kPutChunk, 2, wire::encode(put)) +
                record(FrameKind::kData, Method::kNone, 2, wire::encode(data)) + piece_of("0123456789"));
  out.push_back("\x01" + record(FrameKind::kRequest, Method::kHeartbeat, 2, "") +
                record(FrameKind::kCredit, Method::kMap, 0, "") + record(FrameKind::kReply, Method::kNone, 2, "") +
                record(FrameKind::kHello, Method::kNone, 0, ""));
  out.push_back("\x01\xff" +
                piece_of(frame({.kind = FrameKind::kRequest, .method = 21, .call_id = 9}, std::string(300, 'x'))));
  return out;
}

const Register registered({.name = "connection", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
