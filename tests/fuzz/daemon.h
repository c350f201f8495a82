#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "proto/rpc/frame_reader.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"
#include "tests/sim/daemon.h"
#include "tests/sim/memory.h"
#include "tests/sim/world.h"

namespace cairn::fuzz {

/// A frame with the lengths and CRCs that its parts ask for.
std::string frame(wire::FrameHeader header, std::string_view message, std::string_view payload = {});
std::string hello_frame();

/// A simulated daemon that serves, and a peer that speaks bytes to it.
class Served {
 public:
  Served();
  ~Served();

  /// Opens the peer's connection, anew if need be; what arrives on it is collected.
  void connect();
  /// The handshake, and the map.
  void greet();
  void send(std::string bytes);
  struct Answer {
    wire::FrameKind kind = wire::FrameKind::kError;
    std::string message;
  };
  /// What came for the call, within a second of waiting for it.
  std::optional<Answer> answer(std::uint64_t call);
  const wire::Map& map() const { return map_; }

  /// Whatever the peer did: the daemon serves, and an honest client gets an answer.
  void check();

  sim::World world;
  sim::SimDaemon daemon;
  sim::Node& peer;
  /// What the peer shares on its connections.
  std::shared_ptr<sim::SimMemory> memory = std::make_shared<sim::SimMemory>(256 * kKiB);

 private:
  struct Line;
  static Task<void> collect(Line* line);
  static Task<void> write(Line* line, std::string bytes);

  wire::Map map_;
  std::vector<std::unique_ptr<Line>> lines_;  // the last one is in use
};

}  // namespace cairn::fuzz
