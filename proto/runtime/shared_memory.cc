#include "proto/runtime/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "proto/common/text.h"
#include "proto/common/units.h"

namespace cairn::rt {
namespace {

constexpr std::uint64_t kSharedBytesMax = 1ull << 40;  // of one client; only an error of its own can be larger

class MappedFile final : public SharedMemory {
 public:
  explicit MappedFile(int fd) : fd_(fd) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() override {
    if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
    ::close(fd_);
  }
  std::span<std::byte> bytes() const override { return bytes_; }
  int fd() const { return fd_; }

  /// 0 or an errno.
  int map(std::uint64_t bytes) {
    void* at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (at == MAP_FAILED) return errno;
    bytes_ = {static_cast<std::byte*>(at), bytes};
    // Buffers of a store do not belong in a core file, nor in a forked child.
    ::madvise(at, bytes, MADV_DONTDUMP);
    return 0;
  }

 private:
  int fd_;
  std::span<std::byte> bytes_;
};

}  // namespace

Result<std::shared_ptr<SharedMemory>> make_shared_memory(std::uint64_t bytes) {
  const auto failed = [&](const char* what) {
    return fail(Errc::kFailed,
                "shared memory of " + std::to_string(bytes) + " bytes: " + what + ": " + errno_text(errno));
  };
  const int fd = ::memfd_create("cairn", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return failed("memfd_create");
  auto made = std::make_shared<MappedFile>(fd);
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return failed("ftruncate");
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) return failed("seal");
  if (const int error = made->map(bytes)) {
    errno = error;
    return failed("mmap");
  }
  return made;
}

Result<std::shared_ptr<SharedMemory>> map_shared_memory(int fd) {
  auto mapped = std::make_shared<MappedFile>(fd);
  const auto bad = [](std::string why) { return fail(Errc::kInvalid, "shared memory of a peer: " + std::move(why)); };
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0) return bad("not a memfd");
  if ((seals & F_SEAL_SHRINK) == 0) return bad("not sealed against shrinking");
  if ((seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0) return bad("sealed against writing");
  struct stat info{};
  if (::fstat(fd, &info) != 0) return bad(errno_text(errno));
  const auto size = static_cast<std::uint64_t>(info.st_size);
  if (size == 0 || size > kSharedBytesMax || size % kSectorBytes != 0) return bad(std::to_string(size) + " bytes");
  if (const int error = mapped->map(size)) return bad(errno_text(error));
  return mapped;
}

int descriptor_of(const SharedMemory& memory) {
  const auto* file = dynamic_cast<const MappedFile*>(&memory);
  return file == nullptr ? -1 : file->fd();
}

}  // namespace cairn::rt
