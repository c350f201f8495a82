#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "proto/rt/loop.h"
#include "proto/rt/task.h"

// What logic may know of the world. Real adaptors: proto/runtime. Simulated ones: tests/sim.

namespace cairn::rt {

class Random {
 public:
  virtual ~Random() = default;
  virtual std::uint64_t next() = 0;
};

/// CPU or blocking work away from the loop; in simulation it runs inline.
class Offload {
 public:
  virtual ~Offload() = default;
  /// `work` runs on another thread, then `done` on the loop.
  virtual void submit(Job work, Job done) = 0;
};

/// Memory that two processes of one host see. Whatever the other side wishes may happen to its bytes at any moment, so
/// nothing may depend on them that hurts more than the other side's own data.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  virtual std::span<std::byte> bytes() const = 0;
};

/// One byte stream. At most one read and one write at a time; the two may overlap.
/// A read or write that is waiting when close() is called ends with kUnavailable.
class Stream {
 public:
  virtual ~Stream() = default;
  /// Reads 1 .. into.size() bytes; 0 = the peer closed. `into` must outlive the call.
  /// Dropping the Task while it waits takes nothing from the stream: another read goes on from the same byte.
  /// errors: kUnavailable  reset, closed here
  virtual Task<std::size_t> read_some(std::span<std::byte> into) = 0;
  /// Writes all pieces in order (gathered). They must outlive the call.
  virtual Task<void> write_all(std::vector<std::span<const std::byte>> pieces) = 0;
  /// Sends `memory` with the first byte of the next write_all(). False: this stream cannot (it may leave the host).
  virtual bool attach(std::shared_ptr<SharedMemory> memory) {
    (void)memory;
    return false;
  }
  /// What came attached to the bytes read so far, at most one; null: nothing did.
  /// errors: kInvalid  no memory, or its owner could take it away from under us
  virtual Result<std::shared_ptr<SharedMemory>> take_attached() { return std::shared_ptr<SharedMemory>(); }
  virtual void close() = 0;
  virtual std::string peer() const = 0;
};

class Listener {
 public:
  virtual ~Listener() = default;
  virtual Task<std::unique_ptr<Stream>> accept() = 0;
  /// As dial() takes it, with the port chosen: "127.0.0.1:7420" or "unix:/run/cairn.sock".
  virtual std::string address() const = 0;
  virtual void close() = 0;
};

/// Addresses: "HOST:PORT" (port 0: choose a free one) or "unix:PATH".
class Net {
 public:
  virtual ~Net() = default;
  /// errors: kInvalid  not an address;  kBusy  in use;  kDenied  not allowed to bind
  virtual Result<std::unique_ptr<Listener>> listen(std::string address) = 0;
  /// errors: kUnavailable  refused, unreachable;  kInvalid  not an address
  virtual Task<std::unique_ptr<Stream>> dial(std::string address) = 0;
};

enum class Level { kDebug, kInfo, kWarning, kError };

struct Field {
  std::string_view key;
  std::string value;
};

/// Structured events: a fixed event name and key=value pairs. Whoever stops an error logs it, once.
class Log {
 public:
  virtual ~Log() = default;
  virtual void write(Level level, std::string_view event, std::initializer_list<Field> fields) = 0;
};

/// What a node is made of. All outlive everything that runs on the loop.
struct Runtime {
  Loop& loop;
  Random& random;
  Net& net;
  Offload& offload;
  Log& log;
};

}  // namespace cairn::rt
