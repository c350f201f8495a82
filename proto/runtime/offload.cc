#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "proto/runtime/runtime.h"

namespace cairn::rt {
namespace {

class Workers final : public ThreadOffload {
 public:
  Workers(Loop& loop, int threads) : loop_(loop) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() override { stop(); }

  void stop() override {
    std::deque<Item> dropped;  // destroyed here, without the lock: what a job holds may submit() when it goes
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      dropped.swap(queue_);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  void submit(Job work, Job done) override {
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
      queue_.push_back({std::move(work), std::move(done)});
    }
    wake_.notify_one();
  }

 private:
  struct Item {
    Job work, done;
  };

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      auto item = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      item.work();
      // What `work` captured may belong to the loop (buffers of a pool): it travels back and dies there.
      loop_.post([item = std::move(item)]() mutable { item.done(); });
      lock.lock();
    }
  }

  Loop& loop_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<ThreadOffload> make_thread_offload(Loop& loop, int threads) {
  return std::make_unique<Workers>(loop, threads);
}

}  // namespace cairn::rt
