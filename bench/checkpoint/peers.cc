#include "bench/checkpoint/peers.h"

#include <fcntl.h>
#include <liburing.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace cairn::bench {
namespace {

constexpr std::size_t kWriteBytes = 8u << 20;
constexpr std::size_t kDirectBytes = 4u << 20;
constexpr unsigned kInFlight = 8;

std::string error(const std::string& what, int code) {
  return what + ": " + std::strerror(code);
}

std::string sync_parent(const std::string& path) {
  const auto parent = path.substr(0, path.rfind('/'));
  const int fd = open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return error("open " + parent, errno);
  const int done = fsync(fd);
  close(fd);
  return done == 0 ? "" : error("fsync " + parent, errno);
}

template <class Byte>
std::string direct(int fd, std::span<Byte> memory) {
  io_uring ring;
  if (int made = io_uring_queue_init(kInFlight, &ring, 0); made < 0) return error("io_uring", -made);
  std::size_t next = 0, done = 0;
  unsigned flying = 0;
  std::string failed;
  while (done < memory.size() && failed.empty()) {
    while (flying < kInFlight && next < memory.size()) {
      auto* entry = io_uring_get_sqe(&ring);
      const auto size = std::min(kDirectBytes, memory.size() - next);
      if constexpr (std::is_const_v<Byte>)
        io_uring_prep_write(entry, fd, memory.data() + next, static_cast<unsigned>(size), next);
      else
        io_uring_prep_read(entry, fd, memory.data() + next, static_cast<unsigned>(size), next);
      io_uring_sqe_set_data64(entry, size);
      next += size;
      ++flying;
    }
    io_uring_submit_and_wait(&ring, 1);
    io_uring_cqe* result = nullptr;
    while (io_uring_peek_cqe(&ring, &result) == 0) {
      if (result->res < 0)
        failed = error("direct I/O", -result->res);
      else if (static_cast<std::uint64_t>(result->res) != io_uring_cqe_get_data64(result))
        failed = "short direct I/O";
      else
        done += static_cast<std::size_t>(result->res);
      io_uring_cqe_seen(&ring, result);
      --flying;
    }
  }
  io_uring_queue_exit(&ring);
  return failed;
}

std::string closed(int fd, std::string failed) {
  close(fd);
  return failed;
}

}  // namespace

std::string save_file(const std::string& path, std::span<const std::byte> memory) {
  const int fd = open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return error("open " + path, errno);
  for (std::size_t at = 0; at < memory.size();) {
    const auto n = write(fd, memory.data() + at, std::min(kWriteBytes, memory.size() - at));
    if (n <= 0) return closed(fd, error("write " + path, errno));
    at += static_cast<std::size_t>(n);
  }
  if (fsync(fd) != 0) return closed(fd, error("fsync " + path, errno));
  close(fd);
  return sync_parent(path);
}

std::string load_file(const std::string& path, std::span<std::byte> memory) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return error("open " + path, errno);
  for (std::size_t at = 0; at < memory.size();) {
    const auto n = read(fd, memory.data() + at, std::min(kWriteBytes, memory.size() - at));
    if (n <= 0) return closed(fd, error("read " + path, errno));
    at += static_cast<std::size_t>(n);
  }
  return closed(fd, {});
}

std::string save_direct(const std::string& path, std::span<const std::byte> memory) {
  const int fd = open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0) return error("open " + path, errno);
  auto failed = direct<const std::byte>(fd, memory);
  if (failed.empty() && fdatasync(fd) != 0) failed = error("fdatasync " + path, errno);
  close(fd);
  return failed.empty() ? sync_parent(path) : failed;
}

std::string load_direct(const std::string& path, std::span<std::byte> memory) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (fd < 0) return error("open " + path, errno);
  return closed(fd, direct<std::byte>(fd, memory));
}

}  // namespace cairn::bench
