#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <string>
#include <string_view>
#include <vector>

#include "proto/common/result.h"

namespace cairn::rt {

/// "HOST:PORT", "[IPV6]:PORT" or "unix:PATH", taken apart.
struct Address {
  bool is_unix = false;
  std::string path;  // unix
  std::string host;  // otherwise; without brackets
  std::string port;
};
Result<Address> parse_address(std::string_view text);

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  std::string text() const;  // as parse_address() takes it
};

/// Every address that the name stands for; blocks when `host` is a name. Numeric hosts never block.
Result<std::vector<SocketAddress>> resolve(const Address& address);
bool is_numeric(const Address& address);

}  // namespace cairn::rt
