#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"

// The real world behind the seams: one thread on epoll, sockets, the kernel's randomness, a few worker threads.

namespace cairn::rt {

/// Keeps a watch; ends it when destroyed.
class Watch {
 public:
  virtual ~Watch() = default;
};

/// A Loop on the operating system. The thread that calls run() is the loop's thread; only one may.
class RealLoop : public Loop {
 public:
  static Result<std::unique_ptr<RealLoop>> create();

  /// Runs jobs until stop(). May be called again afterwards.
  virtual void run() = 0;
  /// Makes run() return after the current job; forgotten if nobody runs it. Any thread.
  virtual void stop() = 0;
  /// Calls `ready` on the loop whenever `fd` is readable (level: again as long as it stays so). `fd` stays the
  /// caller's and must be open until the Watch is gone.
  virtual std::unique_ptr<Watch> watch_readable(int fd, std::function<void()> ready) = 0;
  /// Calls `arrived` with the number of each signal of `signals` that the process receives, instead of its default.
  virtual std::unique_ptr<Watch> watch_signals(std::vector<int> signals, std::function<void(int)> arrived) = 0;
};

/// TCP (TCP_NODELAY) and unix sockets. Host names are looked up on `offload`.
/// A unix socket's file left behind by a dead process is replaced; one that somebody listens on is kBusy.
std::unique_ptr<Net> make_net(RealLoop& loop, Offload& offload);

/// Names the running kernel: equal for a client and a daemon that can meet on a unix socket. Empty where it is not
/// told.
std::string boot_id();

/// Every number from getrandom(): unpredictable, and different in a forked child.
std::unique_ptr<Random> make_os_random();

/// Worker threads. Both `work` and `done` are destroyed on the loop.
class ThreadOffload : public Offload {
 public:
  /// Waits for work that runs and drops work that has not begun; submit() drops everything afterwards. The destructor
  /// does the same.
  virtual void stop() = 0;
};
std::unique_ptr<ThreadOffload> make_thread_offload(Loop& loop, int threads);

enum class LogFormat { kText, kJson };
struct LogOptions {
  Level min = Level::kInfo;
  LogFormat format = LogFormat::kText;
  std::uint32_t lines_per_second = 20;  // of one event, at least 1; more are counted, and the count is told
};

/// One line per event on stderr, whole in one write: time=... level=... event=... key=value, or the same pairs as a
/// JSON object of strings. Values are quoted and escaped where needed, and cut at 1,024 bytes. Peers can cause an event
/// as often as they like: beyond lines_per_second of one event only "log_held_back of=EVENT lines=N" is written.
///
/// Threads: any.
class ProcessLog : public Log {
 public:
  /// From now on.
  virtual void set(LogOptions options) = 0;
};
std::unique_ptr<ProcessLog> make_stderr_log(LogOptions options);

/// One line of such a log, without time; for tests and for other sinks.
std::string log_line(Level level, std::string_view event, std::initializer_list<Field> fields,
                     LogFormat format = LogFormat::kText);

/// Whether nobody outside this machine can reach what listens there: unix sockets, 127.0.0.0/8, ::1, localhost.
bool is_loopback(std::string_view address);

/// Everything a process needs, in the order in which it must be built and torn down.
class RealRuntime {
 public:
  struct Options {
    int offload_threads = 2;        // 1 .. 64; blocking file work and name lookups
    Level log_min = Level::kInfo;   // of the default log
    std::unique_ptr<Log> log = {};  // default: stderr
  };
  static Result<std::unique_ptr<RealRuntime>> create(Options options);
  static Result<std::unique_ptr<RealRuntime>> create() { return create(Options{}); }
  RealRuntime(const RealRuntime&) = delete;
  RealRuntime& operator=(const RealRuntime&) = delete;
  ~RealRuntime();

  RealLoop& loop() { return *loop_; }
  /// Of the default log; another one stays as it is.
  void set_log(LogOptions options) {
    if (process_log_ != nullptr) process_log_->set(options);
  }
  Runtime seams() { return {*loop_, *random_, *net_, *offload_, *log_}; }

 private:
  RealRuntime() = default;
  std::unique_ptr<Log> log_;
  ProcessLog* process_log_ = nullptr;  // the default one, which is log_
  std::unique_ptr<Random> random_;
  std::unique_ptr<ThreadOffload> offload_;
  std::unique_ptr<RealLoop> loop_;  // its last jobs may still submit work
  std::unique_ptr<Net> net_;
};

namespace detail {
template <class T>
Task<void> run_until_done(RealLoop& loop, Task<T> task, std::optional<Result<T>>& out) {
  out.emplace(co_await std::move(task));
  loop.stop();
  co_return {};
}
}  // namespace detail

/// For programs and tests: runs the loop on this thread until `task` has ended. If somebody else stops the loop first,
/// the task is destroyed where it waits and the answer is kCancelled.
template <class T>
Result<T> run(RealLoop& loop, Task<T> task) {
  std::optional<Result<T>> out;
  Scope scope(loop);
  scope.spawn(detail::run_until_done(loop, std::move(task), out));
  if (!out) loop.run();
  if (!out) return fail(Errc::kCancelled, "the loop was stopped");
  return *std::move(out);
}

}  // namespace cairn::rt
