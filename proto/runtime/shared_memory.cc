#include "proto/runtime/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/rt/mapped_pages.h"

namespace cairn::rt {
namespace {

constexpr std::uint64_t kSharedBytesMax = 1ull << 40;  // of one client; only an error of its own can be larger
constexpr std::uint64_t kHugePageBytes = 2 * kMiB;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; the C library's headers are older

class MappedFile final : public SharedMemory, public MappedPages {
 public:
  explicit MappedFile(int fd) : fd_(fd) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() override {
    if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
    ::close(fd_);
  }
  std::span<std::byte> bytes() const override { return bytes_; }
  void unmap_pages() override { ::madvise(bytes_.data(), bytes_.size(), MADV_DONTNEED); }
  int fd() const { return fd_; }

  /// 0 or an errno.
  int map(std::uint64_t bytes) {
    // Where a huge page of the file may begin, so that one entry of the page table can map it.
    auto* room = static_cast<std::byte*>(
        ::mmap(nullptr, bytes + kHugePageBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (room == MAP_FAILED) return errno;
    const auto before = (0 - reinterpret_cast<std::uintptr_t>(room)) % kHugePageBytes;
    void* at = ::mmap(room + before, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_, 0);
    if (at == MAP_FAILED) {
      const int error = errno;
      ::munmap(room, bytes + kHugePageBytes);
      return error;
    }
    if (before > 0) ::munmap(room, before);
    ::munmap(room + before + bytes, kHugePageBytes - before);
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

void fault_in(std::span<std::byte> bytes, const std::atomic<bool>& stop) {
  // Each collapse waits once for all processors, hence many pages at a time.
  constexpr std::size_t kStepBytes = 16 * kHugePageBytes;
  while (!bytes.empty() && !stop) {
    // Up to where a huge page may begin, then whole ones.
    const auto ahead = (0 - reinterpret_cast<std::uintptr_t>(bytes.data())) % kHugePageBytes;
    const auto step = bytes.first(std::min<std::size_t>(bytes.size(), ahead > 0 ? ahead : kStepBytes));
    bytes = bytes.subspan(step.size());
    // Shared memory gets huge pages by collapsing what is there, at least one page; private memory has them by itself.
    const auto whole = ahead > 0 ? 0 : round_down(step.size(), kHugePageBytes);
    for (std::size_t page = 0; page < whole; page += kHugePageBytes)
      ::madvise(step.data() + page, kSectorBytes, MADV_POPULATE_WRITE);
    if (whole > 0) ::madvise(step.data(), whole, kCollapse);
    ::madvise(step.data(), step.size(), MADV_POPULATE_WRITE);  // what could not be collapsed
  }
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
