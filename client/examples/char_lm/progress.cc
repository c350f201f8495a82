#include "client/examples/char_lm/progress.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <utility>

namespace char_lm {

std::expected<Board, std::string> Board::create(int ranks, std::size_t saves) {
  auto memory = SharedMemory::create(ranks * (sizeof(RestoreTimes) + saves * sizeof(SaveTimes)));
  if (!memory) return std::unexpected(memory.error());
  return Board(std::move(*memory), ranks, saves);
}

Board::RestoreTimes& Board::restore(int rank) {
  return reinterpret_cast<RestoreTimes*>(memory_.data())[rank];
}

SaveTimes& Board::save(std::size_t index, int rank) {
  return reinterpret_cast<SaveTimes*>(memory_.data() + ranks_ * sizeof(RestoreTimes))[index * ranks_ + rank];
}

bool Board::committed(std::size_t index) {
  for (int rank = 0; rank < ranks_; ++rank)
    if (std::atomic_ref(save(index, rank).committed).load(std::memory_order_acquire) == 0) return false;
  return true;
}

Board::SaveSummary Board::summary(std::size_t index) {
  SaveSummary all;
  double started = save(index, 0).started, committed = 0;
  for (int rank = 0; rank < ranks_; ++rank) {
    const SaveTimes& times = save(index, rank);
    started = std::min(started, times.started);
    committed = std::max(committed, times.committed);
    all.stall_seconds = std::max(all.stall_seconds, times.staged - times.called);
    all.bytes += times.bytes;
  }
  all.seconds = committed - started;
  return all;
}

Board::RestoreTimes Board::restore_summary() {
  RestoreTimes all = restore(0);
  for (int rank = 1; rank < ranks_; ++rank) {
    const RestoreTimes& times = restore(rank);
    all.started = std::min(all.started, times.started);
    all.done = std::max(all.done, times.done);
    all.bytes_wanted += times.bytes_wanted;
    all.bytes_moved += times.bytes_moved;
  }
  return all;
}

bool append_line(const std::string& file, const std::string& line) {
  int fd = open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd < 0) return false;
  const std::string text = line + "\n";
  const bool done = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()) && fsync(fd) == 0;
  close(fd);
  return done;
}

std::string text_of_bytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace char_lm
