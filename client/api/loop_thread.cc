#include "client/api/loop_thread.h"

#include <errno.h>
#include <unistd.h>

#include "proto/runtime/shared_memory.h"

namespace cairn {
namespace {

std::string program_name() {
  return std::string(program_invocation_short_name) + "[" + std::to_string(getpid()) + "]";
}

/// Where a daemon on this host reads to. Enough for its disk to be busy; behind it lies the arena.
constexpr std::uint64_t kWindowBytes = 32 * kMiB;

/// How long a client that ends waits for the daemon to learn what it no longer reads.
constexpr rt::Duration kFarewell = std::chrono::seconds(1);

/// Null where the system refuses: bytes then go through the socket.
std::shared_ptr<rt::SharedMemory> share(std::uint64_t arena_bytes) {
  auto memory = rt::make_shared_memory(kWindowBytes + round_up(arena_bytes, kUnitBytes));
  return memory ? *std::move(memory) : nullptr;
}

Result<void> check(const ClientOptions& options) {
  if (options.servers.empty()) return fail(Errc::kInvalid, "connect: option 'servers' is empty");
  if (options.chunk_bytes < 64 * kKiB || options.chunk_bytes > kChunkBytesMax || options.chunk_bytes % kBlockBytes != 0)
    return fail(Errc::kInvalid, "connect: option 'chunk_bytes' is " + std::to_string(options.chunk_bytes) +
                                    ": must be 64 KiB to 64 MiB, a multiple of 64 KiB");
  if (options.arena_bytes < 8 * kMiB)
    return fail(Errc::kInvalid,
                "connect: option 'arena_bytes' is " + std::to_string(options.arena_bytes) + ": must be 8 MiB or more");
  if (options.chunks_in_flight < 1 || options.chunks_in_flight > 256)
    return fail(Errc::kInvalid, "connect: option 'chunks_in_flight' must be 1 to 256");
  if (options.connections < 1 || options.connections > 16)
    return fail(Errc::kInvalid, "connect: option 'connections' must be 1 to 16");
  if (options.timeout.count() <= 0) return fail(Errc::kInvalid, "connect: option 'timeout' must be above 0");
  return {};
}

}  // namespace

Result<std::shared_ptr<ClientImpl>> ClientImpl::start(ClientOptions options) {
  CHECK_OK(check(options));
  // The last handle may be dropped inside a callback: that thread cannot wait for itself.
  auto impl = std::shared_ptr<ClientImpl>(new ClientImpl, [](ClientImpl* last) {
    if (last->on_loop_thread())
      std::thread([last] { delete last; }).detach();
    else
      delete last;
  });
  impl->options_ = options;
  TRY(impl->runtime_, rt::RealRuntime::create({.offload_threads = 2, .log_min = rt::Level::kWarning, .log = nullptr}));
  const auto chunk_bytes = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(options.chunk_bytes, round_down(options.arena_bytes / 2, kBlockBytes)));
  auto memory = options.unix_socket && options.shared_memory ? share(options.arena_bytes) : nullptr;
  if (memory) {
    impl->arena_ = client::Arena::over(impl->loop(), memory, kWindowBytes, chunk_bytes);
  } else {
    TRY(impl->arena_, client::Arena::create(impl->loop(), options.arena_bytes, chunk_bytes));
  }
  impl->thread_ = std::thread([loop = &impl->loop()] { loop->run(); });

  // Fresh memory costs more to touch than to copy into; populating it changes no byte, so it may run beside a stage().
  if (options.arena_prefault)
    impl->runtime_->seams().offload.submit([slab = memory ? memory->bytes() : impl->arena_->slab(),
                                            stop = &impl->stopping_] { rt::fault_in(slab, *stop); },
                                           [] {});

  client::SessionOptions session;
  session.servers = options.servers;
  session.name = options.name.empty() ? program_name() : options.name;
  if (options.unix_socket) session.host = rt::boot_id();
  session.connections = options.connections;
  session.memory = memory;
  session.window_bytes = memory ? kWindowBytes : 0;
  TRY(impl->session_, impl->call<std::shared_ptr<client::Session>>([raw = impl.get(), session] {
    return client::Session::connect(raw->runtime_->seams(), session, raw->deadline());
  }));
  return impl;
}

ClientImpl::~ClientImpl() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  loop().post([this] {
    while (!operations_.empty()) end(*operations_.begin(), true);
    if (!session_) return stop();
    farewell_ = std::make_unique<rt::Scope>(loop());
    farewell_->spawn(rt::with_deadline(loop(), loop().now() + kFarewell, session_->protection().settled(), "farewell"),
                     [this](Result<void>) { loop().post([this] { stop(); }); });
  });
  thread_.join();
}

void ClientImpl::stop() {
  farewell_.reset();
  if (session_) session_->close();
  session_.reset();
  arena_.reset();
  loop().stop();
}

}  // namespace cairn
