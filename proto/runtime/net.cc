#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/posix/stream_descriptor.hpp>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/rt/offload.h"
#include "proto/runtime/address.h"
#include "proto/runtime/asio_loop.h"
#include "proto/runtime/shared_memory.h"

namespace cairn::rt {
namespace {

using Descriptor = asio::posix::stream_descriptor;

class UniqueFd {
 public:
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

enum Direction { kRead = 0, kWrite = 1 };

/// A non-blocking socket and who waits for it. System calls touch a caller's memory only while that caller runs, so a
/// Task can be dropped at any wait: nothing in the kernel or in Asio points into its buffers.
class Socket : public std::enable_shared_from_this<Socket> {
 public:
  Socket(AsioLoop& loop, int fd) : loop_(loop), descriptor_(loop.io(), fd) {}

  int fd() { return descriptor_.native_handle(); }
  bool closed() const { return closed_; }
  void close() {
    if (std::exchange(closed_, true)) return;
    asio::error_code ignored;    // Linux releases the descriptor whatever close() says
    descriptor_.close(ignored);  // wakes the waits through the loop
  }

  struct Wait {
    std::shared_ptr<Socket> socket;
    Direction direction;
    bool for_event;  // else only for the loop's next turn
    std::coroutine_handle<> self{};
    Wait(std::shared_ptr<Socket> s, Direction d, bool e) : socket(std::move(s)), direction(d), for_event(e) {}
    Wait(const Wait&) = delete;
    ~Wait() {
      if (self && socket->waiters_[direction] == self) socket->waiters_[direction] = {};
    }
    bool await_ready() const noexcept { return socket->closed_; }
    void await_suspend(std::coroutine_handle<> handle) {
      assert(!socket->waiters_[direction] && "one read and one write at a time");
      self = socket->waiters_[direction] = handle;
      if (for_event)
        socket->arm(direction);
      else
        socket->loop_.post([s = socket, d = direction] { s->wake(d); });
    }
    void await_resume() noexcept { self = {}; }
  };
  /// May resume without an event; the caller tries again.
  Wait ready(Direction direction) { return {shared_from_this(), direction, true}; }
  Wait next_turn(Direction direction) { return {shared_from_this(), direction, false}; }

  bool drained = true;  // the last read took all there was

  // Unix sockets only: what is to go with the next byte, and what came.
  bool passes_descriptors = false;
  std::shared_ptr<SharedMemory> attached;
  UniqueFd arrived{-1};

  /// A peer that sends or takes as fast as we can must not keep the loop from everybody else.
  bool turn_is_over(Direction direction, std::size_t bytes) {
    auto& used = used_[direction];
    used += bytes + 16 * kKiB;  // small ones count too
    if (used < kMiB) return false;
    used = 0;
    return true;
  }

 private:
  void arm(Direction direction) {
    if (std::exchange(armed_[direction], true)) return;  // a wait that its caller dropped is still there
    descriptor_.async_wait(direction == kRead ? Descriptor::wait_read : Descriptor::wait_write,
                           [self = shared_from_this(), direction](asio::error_code) {
                             self->armed_[direction] = false;
                             self->used_[direction] = 0;
                             self->wake(direction);
                           });
  }
  void wake(Direction direction) {
    if (auto waiter = std::exchange(waiters_[direction], {})) waiter.resume();
  }

  AsioLoop& loop_;
  Descriptor descriptor_;
  std::array<std::coroutine_handle<>, 2> waiters_{};
  std::array<bool, 2> armed_{};
  std::array<std::size_t, 2> used_{};
  bool closed_ = false;
};

class SocketStream final : public Stream {
 public:
  SocketStream(std::shared_ptr<Socket> socket, std::string peer) : socket_(std::move(socket)), peer_(std::move(peer)) {}
  ~SocketStream() override { socket_->close(); }

  Task<std::size_t> read_some(std::span<std::byte> into) override {
    assert(!into.empty());
    const auto socket = socket_;
    const auto peer = peer_;  // the stream may be gone when an error is told
    // After a short read the socket is most likely empty: ask the kernel to tell instead of trying in vain.
    if (socket->drained) co_await socket->ready(kRead);
    for (;;) {
      if (socket->closed()) co_return closed_here(peer);
      const auto got =
          socket->passes_descriptors ? receive(*socket, into) : ::recv(socket->fd(), into.data(), into.size(), 0);
      if (got >= 0) {
        socket->drained = static_cast<std::size_t>(got) < into.size();
        if (socket->turn_is_over(kRead, static_cast<std::size_t>(got))) socket->drained = true;  // next time, wait
        co_return static_cast<std::size_t>(got);
      }
      if (errno == EAGAIN || errno == EWOULDBLOCK)
        co_await socket->ready(kRead);
      else if (errno != EINTR)
        co_return fail(Errc::kUnavailable, "read from " + peer + ": " + errno_text(errno));
    }
  }

  Task<void> write_all(std::vector<std::span<const std::byte>> pieces) override {
    const auto socket = socket_;
    const auto peer = peer_;
    std::size_t next = 0;  // pieces before it are written
    while (next < pieces.size()) {
      if (pieces[next].empty()) {
        ++next;
        continue;
      }
      if (socket->closed()) co_return closed_here(peer);
      std::array<iovec, 64> gathered;
      std::size_t count = 0;
      for (std::size_t i = next; i < pieces.size() && count < gathered.size(); ++i)
        if (!pieces[i].empty())  // the socket only reads what iov_base points to
          gathered[count++] = {const_cast<std::byte*>(pieces[i].data()), pieces[i].size()};
      msghdr message{};
      message.msg_iov = gathered.data();
      message.msg_iovlen = count;
      Control control;
      if (socket->attached) control.put(message, descriptor_of(*socket->attached));
      const auto sent = ::sendmsg(socket->fd(), &message, MSG_NOSIGNAL);
      if (sent < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK)
          co_await socket->ready(kWrite);
        else if (errno != EINTR)
          co_return fail(Errc::kUnavailable, "write to " + peer + ": " + errno_text(errno));
        continue;
      }
      if (sent > 0) socket->attached.reset();
      for (auto left = static_cast<std::size_t>(sent); left > 0;) {
        const auto step = std::min(left, pieces[next].size());
        pieces[next] = pieces[next].subspan(step);
        left -= step;
        if (pieces[next].empty()) ++next;
      }
      if (socket->turn_is_over(kWrite, static_cast<std::size_t>(sent))) co_await socket->next_turn(kWrite);
    }
    co_return {};
  }

  bool attach(std::shared_ptr<SharedMemory> memory) override {
    if (!socket_->passes_descriptors || descriptor_of(*memory) < 0) return false;
    socket_->attached = std::move(memory);
    return true;
  }
  Result<std::shared_ptr<SharedMemory>> take_attached() override {
    if (socket_->arrived.get() < 0) return std::shared_ptr<SharedMemory>();
    return map_shared_memory(socket_->arrived.release());
  }
  void close() override { socket_->close(); }
  std::string peer() const override { return peer_; }

 private:
  /// Room for a descriptor beside the bytes of a message.
  struct Control {
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int))> room{};

    void put(msghdr& message, int fd) {
      message.msg_control = room.data();
      message.msg_controllen = room.size();
      auto* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof fd);
      std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
  };
  /// recv() that keeps the first descriptor a peer sends; the kernel closes those that find no room.
  static ssize_t receive(Socket& socket, std::span<std::byte> into) {
    iovec piece{into.data(), into.size()};
    Control control;
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control.room.data();
    message.msg_controllen = control.room.size();
    const auto got = ::recvmsg(socket.fd(), &message, MSG_CMSG_CLOEXEC);
    if (got < 0) return got;
    for (auto* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
          header->cmsg_len < CMSG_LEN(sizeof(int)))
        continue;
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      UniqueFd owned(fd);
      if (socket.arrived.get() < 0) socket.arrived = std::move(owned);
    }
    return got;
  }

  static Failure closed_here(const std::string& peer) {
    return fail(Errc::kUnavailable, "connection to " + peer + ": closed on this side");
  }

  std::shared_ptr<Socket> socket_;
  std::string peer_;
};

/// TCP_NODELAY: we gather what belongs together ourselves. A failure costs speed only.
void tune(int fd, int family) {
  const int on = 1;
  if (family != AF_UNIX) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return;
  }
  const int bytes = static_cast<int>(2 * kMiB);  // unix sockets do not grow theirs; cut to net.core.wmem_max
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

std::string peer_of(int fd, const SocketAddress& from) {
  if (from.family() != AF_UNIX) return from.text();
  ucred who{};
  socklen_t size = sizeof who;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) return "unix:";
  return "unix:pid=" + std::to_string(who.pid) + ",uid=" + std::to_string(who.uid);
}

/// The file of a unix socket, removed with its listener unless somebody else has replaced it.
struct SocketFile {
  std::string path;
  dev_t device = 0;
  ino_t inode = 0;
  SocketFile() = default;
  SocketFile(const SocketFile&) = delete;
  SocketFile& operator=(const SocketFile&) = delete;
  ~SocketFile() { remove(); }
  void own(std::string at) {
    struct stat now{};
    if (::lstat(at.c_str(), &now) != 0) return;
    path = std::move(at);
    device = now.st_dev;
    inode = now.st_ino;
  }
  void remove() {
    struct stat now{};
    if (!path.empty() && ::lstat(path.c_str(), &now) == 0 && now.st_dev == device && now.st_ino == inode)
      ::unlink(path.c_str());
    path.clear();
  }
};

class SocketListener final : public Listener {
 public:
  SocketListener(AsioLoop& loop, std::shared_ptr<Socket> socket, std::string address)
      : loop_(loop), socket_(std::move(socket)), address_(std::move(address)) {}
  ~SocketListener() override { close(); }

  Task<std::unique_ptr<Stream>> accept() override {
    const auto socket = socket_;
    const auto address = address_;
    auto& loop = loop_;
    for (;;) {
      if (socket->closed()) co_return fail(Errc::kUnavailable, "accept at " + address + ": closed on this side");
      SocketAddress from;
      from.size = sizeof from.storage;
      UniqueFd fd(::accept4(socket->fd(), reinterpret_cast<sockaddr*>(&from.storage), &from.size,
                            SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (fd.get() >= 0) {
        tune(fd.get(), from.family());
        const bool from_unix = from.family() == AF_UNIX;
        auto peer = peer_of(fd.get(), from);
        auto accepted = std::make_shared<Socket>(loop, fd.release());
        accepted->passes_descriptors = from_unix;
        co_return std::make_unique<SocketStream>(std::move(accepted), std::move(peer));
      }
      const int error = errno;
      if (error == EAGAIN || error == EWOULDBLOCK) {
        co_await socket->ready(kRead);
      } else if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM) {
        // Descriptors run out: newcomers wait in the kernel's queue while those connected go on.
        co_await loop.sleep(std::chrono::milliseconds(100));
      } else if (error == EBADF || error == EINVAL || error == ENOTSOCK) {
        co_return fail(Errc::kFailed, "accept at " + address + ": " + errno_text(error));
      }  // else that one connection failed (aborted, refused by a filter): the next may not
    }
  }
  std::string address() const override { return address_; }
  void close() override {
    file.remove();
    socket_->close();
  }

  SocketFile file;

 private:
  AsioLoop& loop_;
  std::shared_ptr<Socket> socket_;
  std::string address_;
};

class RealNet final : public Net {
 public:
  RealNet(AsioLoop& loop, Offload& offload) : loop_(loop), offload_(offload) {}

  Result<std::unique_ptr<Listener>> listen(std::string text) override {
    TRY(const auto address, parse_address(text));
    TRY(const auto candidates, resolve(address));
    if (address.is_unix) return listen_unix(address, candidates.front());
    TRY(auto listener, listen_on(candidates.front(), text));
    return listener;
  }

  Task<std::unique_ptr<Stream>> dial(std::string text) override {
    auto& loop = loop_;
    CO_TRY(auto address, parse_address(text));
    std::vector<SocketAddress> candidates;
    if (address.is_unix || is_numeric(address)) {
      CO_TRY(candidates, resolve(address));
    } else {
      CO_TRY(candidates, co_await away(loop, offload_, [address] { return resolve(address); }));
    }
    Result<std::unique_ptr<Stream>> last = fail(Errc::kUnavailable, "dial " + printable(text) + ": no address");
    for (const auto& candidate : candidates) {
      last = co_await dial_one(loop, candidate, text);
      if (last) break;
    }
    co_return last;
  }

 private:
  static Task<std::unique_ptr<Stream>> dial_one(AsioLoop& loop, SocketAddress to, std::string text) {
    const auto failed = [&](int error) {
      return fail(Errc::kUnavailable, "dial " + printable(text) + ": " + errno_text(error));
    };
    UniqueFd fd(::socket(to.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) co_return failed(errno);
    tune(fd.get(), to.family());
    const int rc = ::connect(fd.get(), to.get(), to.size);
    const int error = errno;
    auto socket = std::make_shared<Socket>(loop, fd.release());
    socket->passes_descriptors = to.family() == AF_UNIX;
    // The descriptor closes with `socket`, also when this Task is dropped during the wait.
    struct Closer {
      std::shared_ptr<Socket> socket;
      ~Closer() {
        if (socket) socket->close();
      }
    } closer{socket};
    if (rc != 0) {
      // EINTR: connecting goes on in the background, as with EINPROGRESS. EAGAIN: a unix listener's queue is full.
      if (error != EINPROGRESS && error != EINTR) co_return failed(error);
      for (;;) {
        co_await socket->ready(kWrite);
        int status = 0;
        socklen_t size = sizeof status;
        if (getsockopt(socket->fd(), SOL_SOCKET, SO_ERROR, &status, &size) != 0) co_return failed(errno);
        if (status != 0) co_return failed(status);
        SocketAddress peer;
        peer.size = sizeof peer.storage;
        if (::getpeername(socket->fd(), reinterpret_cast<sockaddr*>(&peer.storage), &peer.size) == 0) break;
        if (errno != ENOTCONN) co_return failed(errno);
      }
    }
    auto stream = std::make_unique<SocketStream>(socket, to.text());
    closer.socket.reset();
    co_return stream;
  }

  Result<std::unique_ptr<SocketListener>> listen_on(const SocketAddress& at, const std::string& text) {
    const auto failed = [&](int error) {
      const auto code = error == EADDRINUSE                                             ? Errc::kBusy
                        : error == EACCES || error == EPERM || error == EROFS           ? Errc::kDenied
                        : error == EADDRNOTAVAIL || error == ENOENT || error == ENOTDIR ? Errc::kInvalid
                                                                                        : Errc::kFailed;
      return fail(code, "listen at " + printable(text) + ": " + errno_text(error));
    };
    UniqueFd fd(::socket(at.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) return failed(errno);
    const int on = 1;
    if (at.family() != AF_UNIX && setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0)
      return failed(errno);
    if (at.family() == AF_INET6 && setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on) != 0)
      return failed(errno);
    if (::bind(fd.get(), at.get(), at.size) != 0) return failed(errno);
    if (::listen(fd.get(), 1024) != 0) return failed(errno);
    SocketAddress bound;
    bound.size = sizeof bound.storage;
    if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound.storage), &bound.size) != 0) return failed(errno);
    auto socket = std::make_shared<Socket>(loop_, fd.release());
    return std::make_unique<SocketListener>(loop_, std::move(socket), bound.text());
  }

  Result<std::unique_ptr<Listener>> listen_unix(const Address& address, const SocketAddress& at) {
    const std::string text = "unix:" + address.path;
    // Two daemons starting at once must not each take the other's fresh socket for a stale one, so the steps from the
    // look to listen() happen under a lock of the directory.
    const auto slash = address.path.rfind('/');
    const std::string directory = slash == address.path.npos ? "." : address.path.substr(0, slash + 1);
    UniqueFd lock(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (lock.get() < 0) {
      const auto code = errno == EACCES ? Errc::kDenied : Errc::kInvalid;
      return fail(code, "listen at " + printable(text) + ": directory: " + errno_text(errno));
    }
    while (::flock(lock.get(), LOCK_EX) != 0)
      if (errno != EINTR) return fail(Errc::kFailed, "listen at " + printable(text) + ": lock: " + errno_text(errno));
    struct stat found{};
    if (::lstat(address.path.c_str(), &found) == 0) {
      if (!S_ISSOCK(found.st_mode))
        return fail(Errc::kBusy, "listen at " + printable(text) + ": a file of another kind has that name");
      UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      if (probe.get() < 0) return fail(Errc::kFailed, "listen at " + printable(text) + ": " + errno_text(errno));
      if (::connect(probe.get(), at.get(), at.size) == 0 || errno != ECONNREFUSED)
        return fail(Errc::kBusy, "listen at " + printable(text) + ": Address already in use");
      if (::unlink(address.path.c_str()) != 0 && errno != ENOENT)
        return fail(Errc::kDenied, "listen at " + printable(text) + ": remove the old socket: " + errno_text(errno));
    }
    TRY(auto listener, listen_on(at, text));
    listener->file.own(address.path);
    return listener;
  }

  AsioLoop& loop_;
  Offload& offload_;
};

}  // namespace

std::unique_ptr<Net> make_net(RealLoop& loop, Offload& offload) {
  return std::make_unique<RealNet>(static_cast<AsioLoop&>(loop), offload);
}

}  // namespace cairn::rt
