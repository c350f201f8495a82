#include "proto/rpc/hello.h"
#include "proto/common/text.h"
#include "proto/wire/frame.h"
#include "tests/fuzz/fuzz.h"

// What two ends say before they know each other, and the answer that ends a call.

namespace cairn::fuzz {
namespace {

rpc::Agreed self() {
  rpc::Agreed out;
  out.node = "n1";
  out.cluster = std::string(16, 'c');
  out.credit_units = 8;
  out.unit_bytes = 1 << 20;
  out.calls_max = 256;
  return out;
}

void one(std::string_view input) {
  Input in(input);
  switch (in.byte() % 3) {
    case 0: {
      const auto greeting = rpc::answer_hello(in.rest(), self());
      if (!greeting) return;
      must(greeting->client.size() <= 256 && printable(greeting->client, 256) == greeting->client,
           "a client's name is fit for a log");
      must(rpc::accept_hello_reply(greeting->reply, self().cluster), "a daemon's own reply is accepted");
      return;
    }
    case 1: {
      const auto agreed = rpc::accept_hello_reply(in.rest(), {});
      if (!agreed) return;
      must(agreed->credit_units > 0 && agreed->calls_max > 0 && agreed->unit_bytes > 0 &&
               agreed->unit_bytes <= wire::kPayloadBytesMax,
           "what was agreed can be kept");
      return;
    }
    default: {
      const auto answer = rpc::decode_error(in.rest());
      if (!answer) return;
      const auto again = rpc::decode_error(rpc::encode_error(answer->error, answer->map));
      must(again, "an error that was decoded is encoded");
      must(again->error.code == answer->error.code, "its code stays");
      if (answer->error.message.size() < 16 << 10)
        must(again->map == answer->map || answer->map.size() > 900'000, "its map stays");
      return;
    }
  }
}

std::vector<std::string> seeds() {
  rpc::Channel::Options options;
  options.client_name = "cairn[1234]";
  options.cluster = self().cluster;
  const auto hello = rpc::encode_hello(options);
  const auto answered = rpc::answer_hello(hello, self());
  return {std::string(1, '\0') + hello, "\x01" + answered->reply,
          "\x02" + rpc::encode_error({.code = Errc::kStale, .message = "epoch 4, not 3"}, "\x08\x2a"),
          "\x02" + rpc::encode_error({.code = Errc::kNoSpace, .message = "disk full"}, "")};
}

const Register registered({.name = "hello", .bytes_max = 1024, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
