#include "proto/rpc/hello.h"

#include <algorithm>

#include "proto/common/ids.h"
#include "proto/common/text.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::rpc {
namespace {

constexpr std::uint32_t kVersionMin = wire::kProtocolVersion;
constexpr std::uint32_t kVersionMax = wire::kProtocolVersion;
constexpr std::size_t kNameBytesMax = 256;
constexpr std::size_t kErrorBytesMax = 16 << 10;

std::string versions(std::uint32_t min, std::uint32_t max) {
  return min == max ? std::to_string(min) : std::to_string(min) + " to " + std::to_string(max);
}
std::string hex(std::string_view id) {
  return to_hex({reinterpret_cast<const std::uint8_t*>(id.data()), std::min<std::size_t>(id.size(), 16)});
}
Failure wrong_cluster(std::string_view wanted, std::string_view found) {
  return fail(Errc::kInvalid, "this daemon belongs to cluster " + hex(found) + ", not to " + hex(wanted));
}

}  // namespace

std::string encode_hello(const Channel::Options& options) {
  wire::Hello hello;
  hello.set_version_min(kVersionMin);
  hello.set_version_max(kVersionMax);
  hello.set_features(options.memory ? kFeatures : kFeatures & ~kSharesMemory);
  hello.set_client(options.client_name.substr(0, kNameBytesMax));
  hello.set_auth(options.auth);
  hello.set_cluster(options.cluster);
  return wire::encode(hello);
}

Result<Greeting> answer_hello(std::string_view message, const Agreed& self) {
  wire::Hello hello;
  CHECK_OK(wire::decode(message, hello, "hello"));
  if (hello.version_min() > hello.version_max()) return fail(Errc::kProtocol, "hello: versions out of order");
  const auto version = std::min(kVersionMax, hello.version_max());
  if (version < kVersionMin || version < hello.version_min())
    return fail(Errc::kProtocol, "no common protocol version: the client speaks " +
                                     versions(hello.version_min(), hello.version_max()) + ", this daemon " +
                                     versions(kVersionMin, kVersionMax));
  // Never ignored: a client that sends a secret must not believe that it was checked.
  if (!hello.auth().empty()) return fail(Errc::kDenied, "this daemon knows no authentication; connect without");
  if (!hello.cluster().empty() && hello.cluster() != self.cluster) return wrong_cluster(hello.cluster(), self.cluster);

  wire::HelloReply reply;
  reply.set_version(version);
  reply.set_features(hello.features() & self.features);
  reply.set_node(self.node);
  reply.set_cluster(self.cluster);
  reply.set_credit_units(self.credit_units);
  reply.set_unit_bytes(self.unit_bytes);
  reply.set_calls_max(self.calls_max);
  reply.set_message_bytes_max(wire::kMessageBytesMax);
  reply.set_unix_socket(self.unix_socket);
  reply.set_host(self.host);
  return Greeting{.client = printable(hello.client()), .reply = wire::encode(reply)};
}

Result<Agreed> accept_hello_reply(std::string_view message, std::string_view expected_cluster) {
  wire::HelloReply reply;
  CHECK_OK(wire::decode(message, reply, "hello reply"));
  if (reply.version() < kVersionMin || reply.version() > kVersionMax)
    return fail(Errc::kProtocol, "the daemon chose protocol version " + std::to_string(reply.version()) +
                                     ", this client speaks " + versions(kVersionMin, kVersionMax));
  if (reply.credit_units() == 0 || reply.calls_max() == 0 || reply.unit_bytes() == 0 ||
      reply.unit_bytes() > wire::kPayloadBytesMax || (reply.features() & ~kFeatures) != 0)
    return fail(Errc::kProtocol, "hello reply: terms outside of the protocol");
  if (!expected_cluster.empty() && reply.cluster() != expected_cluster)
    return wrong_cluster(expected_cluster, reply.cluster());
  return Agreed{.version = reply.version(),
                .features = reply.features(),
                .node = reply.node(),
                .cluster = reply.cluster(),
                .credit_units = reply.credit_units(),
                .unit_bytes = reply.unit_bytes(),
                .calls_max = reply.calls_max(),
                .unix_socket = reply.unix_socket(),
                .host = reply.host()};
}

std::string encode_error(const Error& error, std::string_view map) {
  wire::ErrorReply reply;
  reply.set_code(static_cast<int>(error.code));
  // The wire wants UTF-8; a message may quote bytes from a disk or another peer.
  std::string text = error.message.substr(0, kErrorBytesMax);
  if (!check_free_name("message", text)) std::ranges::replace_if(text, [](char c) { return c < ' ' || c > '~'; }, '?');
  reply.set_message(std::move(text));
  if (!map.empty() && map.size() < wire::kMessageBytesMax - 2 * kErrorBytesMax)
    (void)reply.mutable_map()->ParseFromArray(map.data(), static_cast<int>(map.size()));
  return wire::encode(reply);
}

Result<ErrorAnswer> decode_error(std::string_view message) {
  wire::ErrorReply reply;
  CHECK_OK(wire::decode(message, reply, "error reply"));
  const bool known =
      reply.code() >= static_cast<int>(Errc::kFailed) && reply.code() <= static_cast<int>(Errc::kDeleted);
  ErrorAnswer answer;
  answer.error.code = known ? static_cast<Errc>(reply.code()) : Errc::kFailed;
  answer.error.message = reply.message();
  if (reply.has_map()) answer.map = wire::encode(reply.map());
  return answer;
}

}  // namespace cairn::rpc
