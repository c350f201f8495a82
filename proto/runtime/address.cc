#include "proto/runtime/address.h"

#include <arpa/inet.h>
#include <netdb.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "proto/common/text.h"
#include "proto/runtime/runtime.h"

namespace cairn::rt {
namespace {

Failure not_an_address(std::string_view text, std::string_view why) {
  return fail(Errc::kInvalid, "address '" + printable(text) + "': " + std::string(why) +
                                  " (wanted HOST:PORT, [IPV6]:PORT or unix:PATH)");
}

}  // namespace

Result<Address> parse_address(std::string_view text) {
  Address address;
  if (text.find('\0') != text.npos) return not_an_address(text, "has a NUL byte");
  if (text.starts_with("unix:")) {
    address.is_unix = true;
    address.path = text.substr(5);
    if (address.path.empty()) return not_an_address(text, "empty path");
    if (address.path.size() >= sizeof(sockaddr_un::sun_path))
      return fail(Errc::kInvalid, "address '" + printable(text) + "': a unix socket's path has at most " +
                                      std::to_string(sizeof(sockaddr_un::sun_path) - 1) + " bytes");
    return address;
  }
  const auto colon = text.rfind(':');
  if (colon == text.npos) return not_an_address(text, "no port");
  auto host = text.substr(0, colon);
  const auto port = text.substr(colon + 1);
  if (host.starts_with('[') && host.ends_with(']'))
    host = host.substr(1, host.size() - 2);
  else if (host.find(':') != host.npos)
    return not_an_address(text, "an IPv6 host needs brackets");
  if (host.empty()) return not_an_address(text, "no host");
  if (port.empty() || port.size() > 5 || port.find_first_not_of("0123456789") != port.npos ||
      std::stoi(std::string(port)) > 65535)
    return not_an_address(text, "the port is not a number from 0 to 65535");
  address.host = host;
  address.port = port;
  return address;
}

bool is_numeric(const Address& address) {
  in_addr v4{};
  in6_addr v6{};
  return inet_pton(AF_INET, address.host.c_str(), &v4) == 1 || inet_pton(AF_INET6, address.host.c_str(), &v6) == 1;
}

Result<std::vector<SocketAddress>> resolve(const Address& address) {
  std::vector<SocketAddress> found;
  if (address.is_unix) {
    auto& one = found.emplace_back();
    sockaddr_un un{};
    un.sun_family = AF_UNIX;
    std::memcpy(un.sun_path, address.path.data(), address.path.size());
    std::memcpy(&one.storage, &un, sizeof un);
    one.size = sizeof un;
    return found;
  }
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (is_numeric(address) ? AI_NUMERICHOST : 0);
  addrinfo* list = nullptr;
  if (const int rc = getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &list); rc != 0)
    return fail(
        rc == EAI_AGAIN || rc == EAI_SYSTEM || rc == EAI_MEMORY ? Errc::kUnavailable : Errc::kInvalid,
        "look up host '" + printable(address.host) + "': " + (rc == EAI_SYSTEM ? errno_text(errno) : gai_strerror(rc)));
  for (const auto* info = list; info != nullptr; info = info->ai_next) {
    auto& one = found.emplace_back();
    std::memcpy(&one.storage, info->ai_addr, info->ai_addrlen);
    one.size = info->ai_addrlen;
  }
  freeaddrinfo(list);
  return found;
}

std::string SocketAddress::text() const {
  if (storage.ss_family == AF_UNIX) {
    sockaddr_un un{};
    std::memcpy(&un, &storage, sizeof un);
    const std::size_t path_at = offsetof(sockaddr_un, sun_path);
    if (size <= path_at || un.sun_path[0] == '\0') return "unix:";
    return "unix:" + std::string(un.sun_path, strnlen(un.sun_path, sizeof un.sun_path));
  }
  char host[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, &storage, sizeof v4);
    inet_ntop(AF_INET, &v4.sin_addr, host, sizeof host);
    return std::string(host) + ":" + std::to_string(ntohs(v4.sin_port));
  }
  sockaddr_in6 v6{};
  std::memcpy(&v6, &storage, sizeof v6);
  inet_ntop(AF_INET6, &v6.sin6_addr, host, sizeof host);
  return "[" + std::string(host) + "]:" + std::to_string(ntohs(v6.sin6_port));
}

bool is_loopback(std::string_view text) {
  const auto address = parse_address(text);
  if (!address) return false;
  if (address->is_unix || address->host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, address->host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6{};
  if (inet_pton(AF_INET6, address->host.c_str(), &v6) != 1) return false;  // a name: whatever it resolves to today
  return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

}  // namespace cairn::rt
