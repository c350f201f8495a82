#include "proto/runtime/runtime.h"

namespace cairn::rt {

Result<std::unique_ptr<RealRuntime>> RealRuntime::create(Options options) {
  if (options.offload_threads < 1 || options.offload_threads > 64)
    return fail(Errc::kInvalid, "offload_threads=" + std::to_string(options.offload_threads) + " is not in 1 .. 64");
  std::unique_ptr<RealRuntime> made(new RealRuntime);
  made->log_ = std::move(options.log);
  if (!made->log_) {
    auto log = make_stderr_log({.min = options.log_min});
    made->process_log_ = log.get();
    made->log_ = std::move(log);
  }
  made->random_ = make_os_random();
  TRY(made->loop_, RealLoop::create());
  made->offload_ = make_thread_offload(*made->loop_, options.offload_threads);
  made->net_ = make_net(*made->loop_, *made->offload_);
  return made;
}

RealRuntime::~RealRuntime() {
  if (offload_) offload_->stop();  // its threads post to the loop
}

}  // namespace cairn::rt
