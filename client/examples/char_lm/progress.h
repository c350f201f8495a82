#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>

#include "client/examples/char_lm/checkpoint.h"
#include "client/examples/char_lm/ranks.h"

namespace char_lm {

/// What the ranks measure about saves and the restore, in shared memory: rank 0 prints it, the launcher sums it up.
class Board {
 public:
  static std::expected<Board, std::string> create(int ranks, std::size_t saves);

  struct RestoreTimes {
    double started = 0, done = 0;
    std::uint64_t bytes_wanted = 0, bytes_moved = 0;
  };
  /// Memory for one rank to fill in.
  SaveTimes& save(std::size_t index, int rank);
  RestoreTimes& restore(int rank);

  /// Over all ranks: first start to last commit, longest stall, all bytes.
  struct SaveSummary {
    double stall_seconds = 0, seconds = 0;
    std::uint64_t bytes = 0;
  };
  /// False while a rank's part of it is on its way.
  bool committed(std::size_t index);
  SaveSummary summary(std::size_t index);
  RestoreTimes restore_summary();
  std::size_t saves() const { return saves_; }

 private:
  Board(SharedMemory memory, int ranks, std::size_t saves) : memory_(std::move(memory)), ranks_(ranks), saves_(saves) {}
  SharedMemory memory_;
  int ranks_;
  std::size_t saves_;
};

/// Appends one line to a file and syncs it: who reads it knows that it happened, whatever dies next. False: errno.
bool append_line(const std::string& file, const std::string& line);

/// "12.34 MiB"
std::string text_of_bytes(std::uint64_t bytes);

}  // namespace char_lm
