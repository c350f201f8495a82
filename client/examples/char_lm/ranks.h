#pragma once

#include <pthread.h>
#include <sys/types.h>

#include <cstddef>
#include <expected>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace char_lm {

/// Zeroed memory seen by this process and every child forked after. Pages are taken when first touched.
class SharedMemory {
 public:
  static std::expected<SharedMemory, std::string> create(std::size_t bytes);
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory();
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  SharedMemory(std::byte* data, std::size_t size) : data_(data), size_(size) {}
  std::byte* data_;
  std::size_t size_;
};

/// A barrier of processes; lives in shared memory. A rank that dies leaves the others waiting: run_ranks() ends them.
class Barrier {
 public:
  void init(unsigned count);
  void wait();

 private:
  pthread_barrier_t barrier_;
};

/// Rows [begin, end) of a dimension of `rows` that `rank` holds: pieces of ceil(rows / ranks), as torch.chunk cuts
/// them, so the last ranks may hold fewer rows, or none.
struct Rows {
  std::size_t begin = 0, end = 0;
  std::size_t count() const { return end - begin; }
};
Rows rows_of(std::size_t rows, int rank, int ranks);

/// Forks `ranks` processes which run `body(rank)` and exit with what it returns, and waits for all of them. If one
/// fails or is killed, ends the others at once (they could wait for it forever) and tells which. Ranks die with this
/// process. `started`, if given, gets their process ids before any of them is waited for.
std::expected<void, std::string> run_ranks(int ranks, const std::function<int(int rank)>& body,
                                           const std::function<void(std::span<const pid_t>)>& started = {});

}  // namespace char_lm
