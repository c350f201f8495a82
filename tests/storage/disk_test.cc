#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <functional>

#include "proto/common/units.h"
#include "proto/rt/unit_pool.h"
#include "storage/disk/directory.h"

using namespace cairn;
using namespace cairn::storage;
using namespace std::chrono_literals;

namespace {

struct TempDir {
  std::string path;
  explicit TempDir(const std::string& under = "/tmp") {
    std::string name = under + "/cairn-disk-XXXXXX";
    path = mkdtemp(name.data()) != nullptr ? name : "";
  }
  TempDir(const TempDir&) = delete;
  ~TempDir() { std::filesystem::remove_all(path); }
};

/// Keeps what was logged.
class ListLog final : public rt::Log {
 public:
  explicit ListLog(std::vector<std::string>& events) : events_(events) {}
  void write(rt::Level, std::string_view event, std::initializer_list<rt::Field>) override {
    events_.emplace_back(event);
  }

 private:
  std::vector<std::string>& events_;
};

/// One directory through one backend.
struct Fixture {
  std::vector<std::string> events;
  std::unique_ptr<rt::RealRuntime> runtime =
      *rt::RealRuntime::create({.offload_threads = 2, .log = std::make_unique<ListLog>(events)});
  std::unique_ptr<rt::UnitPool> pool = *rt::UnitPool::create(runtime->loop(), 64, 64 * kKiB);
  std::shared_ptr<Io> io;
  std::unique_ptr<Disk> disk;

  explicit Fixture(const std::string& path, IoOptions io_options, DirectoryOptions options = {}) {
    auto made = Io::create(runtime->seams(), runtime->loop(), io_options);
    REQUIRE(made);
    io = *std::move(made);
    auto opened = run(open_directory(runtime->seams(), io, path, options));
    INFO((opened ? "" : opened.error().message));
    REQUIRE(opened);
    disk = *std::move(opened);
  }
  template <class T>
  Result<T> run(Task<T> task) {
    return rt::run(runtime->loop(), std::move(task));
  }
  /// A unit whose bytes follow from `seed`.
  Buffer filled(std::size_t bytes, std::uint32_t seed) {
    auto unit = pool->try_acquire();
    REQUIRE(unit);
    for (std::size_t i = 0; i < bytes; ++i)
      unit->bytes[i] = static_cast<std::byte>((i + seed * 7919) * 2654435761u >> 11);
    return std::move(*unit).freeze(bytes);
  }
  Result<Buffer> read(File& file, std::uint64_t offset, std::size_t bytes) {
    auto unit = pool->try_acquire();
    REQUIRE(unit);
    unit->bytes = unit->bytes.first(bytes);
    TRY(auto got, run(file.read(offset, std::move(*unit))));
    return std::move(got).freeze(bytes);
  }
  bool saw(std::string_view event) const { return std::ranges::find(events, event) != events.end(); }
};

IoBackend any_backend() {
  return GENERATE(IoBackend::kUring, IoBackend::kThreads);
}

std::uint64_t allocated_bytes(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 ? static_cast<std::uint64_t>(status.st_blocks) * 512 : 0;
}

/// Runs `body` in a child process, as another user when we are root; true if it returned true.
bool in_child(const std::function<bool()>& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) _exit(3);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

template <class Condition>
Task<void> wait_until(rt::Loop& loop, Condition condition) {
  while (!condition()) co_await loop.sleep(100us);
  co_return {};
}

}  // namespace

TEST_CASE("disk: bytes written are the bytes read, also after reopening", "[disk]") {
  TempDir dir;
  const auto backend = any_backend();
  const bool registered = GENERATE(false, true);
  const bool direct = GENERATE(true, false);
  for (const bool again : {false, true}) {
    Fixture f(dir.path, {.backend = backend}, {.direct = direct});
    if (registered) f.disk->register_memory(f.pool->slab());
    auto file = f.run(again ? f.disk->open("data") : f.disk->create("data", 0));
    REQUIRE(file);
    for (std::uint32_t i = 0; i < 4; ++i) {
      if (!again) CHECK(f.run((*file)->write(i * 64 * kKiB, f.filled(64 * kKiB, i))));
      const auto got = f.read(**file, i * 64 * kKiB, 64 * kKiB);
      REQUIRE(got);
      CHECK(std::ranges::equal(got->bytes(), f.filled(64 * kKiB, i).bytes()));
    }
    CHECK(f.run((*file)->flush()));
    CHECK((*file)->size() == 256 * kKiB);
    CHECK(f.io->stats().reads == 4);
    CHECK((f.io->stats().fixed > 0) == (registered && backend == IoBackend::kUring));
    CHECK(f.io->in_flight() == 0);
    CHECK(f.pool->available() == f.pool->units());
  }
}

TEST_CASE("disk: more operations at once than the queue holds all complete", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend(), .queue_entries = 4, .threads = 2});
  auto file = *f.run(f.disk->create("data", 8 * kMiB));
  std::vector<Task<void>> tasks;
  for (std::uint32_t i = 0; i < 60; ++i) {
    tasks.push_back(file->write(i * 64 * kKiB, f.filled(64 * kKiB, i)));
    if (i % 7 == 0) tasks.push_back(file->flush());
  }
  CHECK(f.run(rt::all(f.runtime->loop(), std::move(tasks))));
  for (std::uint32_t i = 0; i < 60; ++i)
    CHECK(std::ranges::equal(f.read(*file, i * 64 * kKiB, 64 * kKiB)->bytes(), f.filled(64 * kKiB, i).bytes()));
}

TEST_CASE("disk: names appear, move and go as asked, and errors name the file", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()});
  CHECK(f.run(f.disk->list())->empty());
  CHECK(f.run(f.disk->create("b", 0)));
  CHECK(f.run(f.disk->create("a", 64 * kKiB)));
  std::filesystem::create_directory(dir.path + "/subdirectory");
  CHECK(*f.run(f.disk->list()) == std::vector<std::string>{"a", "b"});
  const auto twice = f.run(f.disk->create("a", 0));
  REQUIRE_FALSE(twice);
  CHECK(twice.error().code == Errc::kExists);
  CHECK(twice.error().message == "create " + dir.path + "/a: File exists");
  CHECK(f.run(f.disk->rename("a", "b")));
  CHECK(f.run(f.disk->open("b")).value()->size() == 64 * kKiB);
  CHECK(f.run(f.disk->sync_directory()));
  const auto gone = f.run(f.disk->open("a"));
  REQUIRE_FALSE(gone);
  CHECK(gone.error().code == Errc::kNotFound);
  CHECK(gone.error().message == "open " + dir.path + "/a: No such file or directory");
  CHECK(f.run(f.disk->rename("a", "c")).error().code == Errc::kNotFound);
  CHECK(f.run(f.disk->unlink("b")));
  CHECK(f.run(f.disk->unlink("b")).error().code == Errc::kNotFound);
  CHECK(f.run(f.disk->list())->empty());
  CHECK(f.run(f.disk->space())->total_bytes > f.run(f.disk->space())->free_bytes);
}

TEST_CASE("disk: no name leads out of the directory", "[disk]") {
  TempDir dir, outside;
  Fixture f(dir.path, {.backend = any_backend()});
  std::filesystem::create_symlink(outside.path, dir.path + "/link");
  std::filesystem::create_symlink(outside.path + "/target", dir.path + "/linked_file");
  for (const std::string name : {"", ".", "..", "../x", "a/b", "/etc/passwd", "LOCK", ".hidden", "link/x"}) {
    INFO(name);
    CHECK(f.run(f.disk->create(name, 0)).error().code == Errc::kInvalid);
    CHECK(f.run(f.disk->open(name)).error().code == Errc::kInvalid);
    CHECK(f.run(f.disk->unlink(name)).error().code == Errc::kInvalid);
    CHECK(f.run(f.disk->rename(name, "x")).error().code == Errc::kInvalid);
    CHECK(f.run(f.disk->rename("x", name)).error().code == Errc::kInvalid);
  }
  CHECK(f.run(f.disk->create(std::string("a\0b", 3), 0)).error().code == Errc::kInvalid);
  CHECK_FALSE(f.run(f.disk->open("linked_file")));
  CHECK_FALSE(f.run(f.disk->open("link")));
  CHECK(f.run(f.disk->list())->empty());
  CHECK(std::filesystem::is_empty(outside.path));
}

TEST_CASE("disk: a read past the end is data loss, never short", "[disk]") {
  TempDir dir;
  const bool direct = GENERATE(true, false);
  Fixture f(dir.path, {.backend = any_backend()}, {.direct = direct});
  auto file = *f.run(f.disk->create("data", 0));
  CHECK(f.run(file->write(0, f.filled(8192, 1))));
  CHECK(f.read(*file, 4096, 4096));
  for (const auto& [offset, bytes] : {std::pair{4096, 8192}, {8192, 4096}, {1 << 20, 4096}}) {
    const auto got = f.read(*file, static_cast<std::uint64_t>(offset), static_cast<std::size_t>(bytes));
    REQUIRE_FALSE(got);
    CHECK(got.error().code == Errc::kDataLoss);
    CHECK(got.error().message == "read " + dir.path + "/data offset=" + std::to_string(offset) +
                                     " bytes=" + std::to_string(bytes) + ": the file ends before");
  }
  // A size that is no multiple of a sector, as a torn write may leave it.
  REQUIRE(truncate((dir.path + "/data").c_str(), 5000) == 0);
  CHECK(f.read(*file, 4096, 4096).error().code == Errc::kDataLoss);
}

TEST_CASE("disk: a write that the kernel cuts short is completed or fails whole", "[disk]") {
  // Method: RLIMIT_FSIZE lets the first part through and refuses the rest.
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()});
  auto file = *f.run(f.disk->create("data", 0));
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit small = before;
  small.rlim_cur = 32 * kKiB;
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const auto wrote = f.run(file->write(0, f.filled(64 * kKiB, 1)));
  setrlimit(RLIMIT_FSIZE, &before);
  REQUIRE_FALSE(wrote);
  CHECK(wrote.error().code == Errc::kFailed);
  CHECK(wrote.error().message == "write " + dir.path + "/data offset=0 bytes=65536: File too large");
  CHECK(f.io->stats().resumed >= 1);  // it did come back short first
  CHECK(f.io->stats().errors == 1);
  CHECK(file->size() == 0);
  CHECK(f.run(file->write(0, f.filled(64 * kKiB, 1))));
}

TEST_CASE("disk: a dropped operation keeps its memory until the kernel is done with it", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()});
  auto file = *f.run(f.disk->create("data", kMiB));
  auto body = [](Fixture& fx, std::shared_ptr<File> data) -> Task<void> {
    rt::Scope scope(fx.runtime->loop());
    for (std::uint32_t i = 0; i < 8; ++i) scope.spawn(data->write(i * 64 * kKiB, fx.filled(64 * kKiB, i)));
    scope.spawn(data->flush());
    data.reset();
    CHECK(fx.pool->available() == fx.pool->units() - 8);
    scope.cancel();
    CHECK(fx.pool->available() == fx.pool->units() - 8);
    CHECK(fx.io->in_flight() == 9);
    CO_CHECK_OK(co_await wait_until(fx.runtime->loop(), [&] { return fx.io->in_flight() == 0; }));
    CHECK(fx.pool->available() == fx.pool->units());
    co_return {};
  };
  CHECK(f.run(body(f, std::move(file))));
  CHECK(f.io->stats().writes == 8);
}

TEST_CASE("disk: everything may be destroyed with operations in flight", "[disk]") {
  TempDir dir;
  const auto backend = any_backend();
  const int turns = GENERATE(0, 1, 3);
  Fixture f(dir.path, {.backend = backend});
  auto file = *f.run(f.disk->create("data", kMiB));
  {
    rt::Scope scope(f.runtime->loop());
    for (std::uint32_t i = 0; i < 8; ++i) scope.spawn(file->write(i * 64 * kKiB, f.filled(64 * kKiB, i)));
    auto read_all = [](std::shared_ptr<File> from, rt::MutableBuffer into) -> Task<void> {
      CO_TRY(auto got, co_await from->read(0, std::move(into)));
      co_return {};
    };
    for (int i = 0; i < 8; ++i) scope.spawn(read_all(file, *f.pool->try_acquire()));
    for (int i = 0; i < turns; ++i) f.runtime->loop().post([] {});
    f.runtime->loop().post([&] { f.runtime->loop().stop(); });
    f.runtime->loop().run();
  }
  file.reset();
  f.disk.reset();
  f.io.reset();
}

TEST_CASE("disk: create() has its space, punch() gives it back as zeros", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()});
  auto file = *f.run(f.disk->create("segment", 4 * kMiB));
  CHECK(file->size() == 4 * kMiB);
  const auto path = dir.path + "/segment";
  const auto before = allocated_bytes(path);
  CHECK(before >= 4 * kMiB);
  CHECK(f.run(file->write(0, f.filled(64 * kKiB, 1))));
  CHECK(f.run(file->write(kMiB, f.filled(64 * kKiB, 2))));
  CHECK(f.run(file->punch(0, kMiB)));
  CHECK(allocated_bytes(path) <= before - kMiB);
  CHECK(file->size() == 4 * kMiB);
  const auto zeros = f.read(*file, 0, 64 * kKiB);
  REQUIRE(zeros);
  CHECK(std::ranges::all_of(zeros->bytes(), [](std::byte b) { return b == std::byte{0}; }));
  CHECK(std::ranges::equal(f.read(*file, kMiB, 64 * kKiB)->bytes(), f.filled(64 * kKiB, 2).bytes()));
}

TEST_CASE("disk: a file that does not fit is kNoSpace and leaves nothing", "[disk]") {
  if (access("/dev/shm", W_OK) != 0) return;
  TempDir dir("/dev/shm");  // tmpfs refuses more than its size at once
  Fixture f(dir.path, {.backend = any_backend()});
  const auto total = f.run(f.disk->space())->total_bytes;
  const auto refused = f.run(f.disk->create("huge", total + kMiB));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  CHECK(f.run(f.disk->list())->empty());
}

TEST_CASE("disk: two processes cannot open one directory, and the second is told which", "[disk]") {
  TempDir dir;
  const auto backend = any_backend();
  {
    Fixture first(dir.path, {.backend = backend});
    auto second = first.run(open_directory(first.runtime->seams(), first.io, dir.path));
    REQUIRE_FALSE(second);
    CHECK(second.error().code == Errc::kBusy);
    CHECK(second.error().message ==
          "data directory " + dir.path + ": another cairnd has it (process " + std::to_string(getpid()) + ")");
  }
  Fixture after(dir.path, {.backend = backend});  // free once the first is gone
}

TEST_CASE("disk: a directory is made when only it is missing, for its owner alone", "[disk]") {
  TempDir dir;
  auto runtime = *rt::RealRuntime::create();
  auto io = *Io::create(runtime->seams(), runtime->loop(), {.backend = IoBackend::kThreads});
  const auto open = [&](const std::string& path) {
    return rt::run(runtime->loop(), open_directory(runtime->seams(), io, path));
  };
  CHECK(open(dir.path + "/new"));
  struct stat status{};
  REQUIRE(stat((dir.path + "/new").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0700);
  const auto deep = open(dir.path + "/no/such");
  REQUIRE_FALSE(deep);
  CHECK(deep.error().code == Errc::kNotFound);
  CHECK(deep.error().message.find(dir.path + "/no/such") != std::string::npos);
  fclose(fopen((dir.path + "/file").c_str(), "w"));
  CHECK(open(dir.path + "/file").error().code == Errc::kInvalid);
}

TEST_CASE("disk: a directory that may not be written is kDenied", "[disk]") {
  TempDir dir;
  REQUIRE(chmod(dir.path.c_str(), 0555) == 0);
  CHECK(in_child([&] {
    auto runtime = *rt::RealRuntime::create();
    auto io = *Io::create(runtime->seams(), runtime->loop(), {.backend = IoBackend::kThreads});
    const auto refused = rt::run(runtime->loop(), open_directory(runtime->seams(), io, dir.path));
    return !refused && refused.error().code == Errc::kDenied &&
           refused.error().message == "data directory " + dir.path + ": not writable: Permission denied";
  }));
}

TEST_CASE("disk: memory that the kernel will not lock is used unregistered, and said so", "[disk]") {
  TempDir dir;
  REQUIRE(chmod(dir.path.c_str(), 0777) == 0);
  CHECK(in_child([&] {
    const rlimit tiny{.rlim_cur = 64 * kKiB, .rlim_max = 64 * kKiB};
    if (setrlimit(RLIMIT_MEMLOCK, &tiny) != 0) return false;
    Fixture f(dir.path, {.backend = IoBackend::kUring});
    f.disk->register_memory(f.pool->slab());
    f.disk->register_memory(f.pool->slab());
    auto file = *f.run(f.disk->create("data", 0));
    return f.run(file->write(0, f.filled(4096, 1))) && f.io->stats().fixed == 0 &&
           f.io->stats().memory_not_registered == 1 && f.saw("io_uring_memory_not_registered");
  }));
}

TEST_CASE("disk: several slabs can be registered, before and during operations", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()});
  auto other = *rt::UnitPool::create(f.runtime->loop(), 4, 64 * kKiB);
  auto file = *f.run(f.disk->create("data", kMiB));
  f.disk->register_memory(f.pool->slab());
  auto body = [](Fixture& fx, rt::UnitPool& more, File& data) -> Task<void> {
    rt::Scope scope(fx.runtime->loop());
    Result<void> last;
    const auto keep = [&last](Result<void> r) {
      if (!r) last = std::move(r);
    };
    for (std::uint32_t i = 0; i < 8; ++i) scope.spawn(data.write(i * 64 * kKiB, fx.filled(64 * kKiB, i)), keep);
    co_await fx.runtime->loop().sleep(10us);
    fx.disk->register_memory(more.slab());
    auto unit = *more.try_acquire();
    std::memset(unit.bytes.data(), 9, unit.bytes.size());
    scope.spawn(data.write(8 * 64 * kKiB, std::move(unit).freeze(64 * kKiB)), keep);
    CO_CHECK_OK(co_await scope.join());
    co_return last;
  };
  CHECK(f.run(body(f, *other, *file)));
  for (std::uint32_t i = 0; i < 8; ++i)
    CHECK(std::ranges::equal(f.read(*file, i * 64 * kKiB, 64 * kKiB)->bytes(), f.filled(64 * kKiB, i).bytes()));
  CHECK(f.read(*file, 8 * 64 * kKiB, 4096)->bytes()[100] == std::byte{9});
}

TEST_CASE("disk: without O_DIRECT and hole punching it says so and works", "[disk]") {
  TempDir dir;
  Fixture f(dir.path, {.backend = any_backend()}, {.direct = false, .punch = false});
  CHECK(f.disk->description() == std::string(f.io->name()) + " " + dir.path + " (buffered) (no hole punching)");
  auto file = *f.run(f.disk->create("data", 0));
  CHECK(f.run(file->write(3, f.filled(100, 1))));
  CHECK(f.run(file->flush()));
  CHECK(std::ranges::equal(f.read(*file, 3, 100)->bytes(), f.filled(100, 1).bytes()));
  CHECK(f.run(file->punch(0, 4096)));
}

TEST_CASE("disk: automatic choice works here, and options out of range are refused", "[disk]") {
  auto runtime = *rt::RealRuntime::create();
  const auto make = [&](IoOptions options) { return Io::create(runtime->seams(), runtime->loop(), options); };
  CHECK(make({}));
  CHECK(make({.queue_entries = 0}).error().code == Errc::kInvalid);
  CHECK(make({.queue_entries = 5000}).error().code == Errc::kInvalid);
  CHECK(make({.threads = 0}).error().code == Errc::kInvalid);
}
