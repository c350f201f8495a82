#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "proto/common/result.h"
#include "proto/rpc/rpc.h"

// The first message of each side, and the error reply: pure functions of bytes that come from a peer.

namespace cairn::rpc {

std::string encode_hello(const Channel::Options& options);

/// What a daemon learns from a hello, and its answer.
struct Greeting {
  std::string client;  // printable, about 128 bytes: for logs
  std::string reply;   // a HelloReply
};
/// `self`: the daemon's own half of what gets agreed, features that it offers included; its version is ignored.
/// errors: kProtocol  malformed, or no common version (names both sides' versions)
///         kDenied    authentication that this daemon does not know
///         kInvalid   another cluster is expected
Result<Greeting> answer_hello(std::string_view hello, const Agreed& self);

/// errors: kProtocol  malformed, or terms outside of what this version can keep;  kInvalid  another cluster
Result<Agreed> accept_hello_reply(std::string_view reply, std::string_view expected_cluster);

/// An ErrorReply. `map` (serialized, may be empty) is left out when it would make the message too long.
std::string encode_error(const Error& error, std::string_view map);
struct ErrorAnswer {
  Error error;
  std::string map;  // serialized; empty: none
};
/// Codes of newer versions become kFailed. errors: kProtocol  malformed
Result<ErrorAnswer> decode_error(std::string_view message);

}  // namespace cairn::rpc
