#include "storage/disk/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "proto/common/text.h"
#include "proto/common/units.h"
#include "proto/rt/offload.h"
#include "storage/disk/io.h"

namespace cairn::storage {
namespace {

constexpr std::string_view kLockName = "LOCK";
constexpr const char* kProbeName = ".probe";

Errc code_of(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return Errc::kNoSpace;
    case ENOENT:
      return Errc::kNotFound;
    case EEXIST:
      return Errc::kExists;
    case EACCES:
    case EPERM:
    case EROFS:
      return Errc::kDenied;
    default:
      return Errc::kFailed;
  }
}

Failure failed(std::string_view what, std::string_view where, int error) {
  return fail(code_of(error), std::string(what) + " " + std::string(where) + ": " + errno_text(error));
}

/// Opens `name` inside the directory and nowhere else: no way up, no symbolic link.
int open_beneath(int directory, const std::string& name, int flags, mode_t mode) {
  open_how how{};
  how.flags = static_cast<std::uint64_t>(flags | O_CLOEXEC | O_NOFOLLOW);
  how.mode = (flags & O_CREAT) != 0 ? mode : 0;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
  const auto fd = ::syscall(SYS_openat2, directory, name.c_str(), &how, sizeof how);
  if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return static_cast<int>(fd);
  // Kernels and filters from before openat2. Names have no '/', so O_NOFOLLOW alone says the same.
  return ::openat(directory, name.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, mode);
}

/// Reads leave the file's time of access alone: the kernel writes that, in the middle of a read that was submitted from
/// the loop, to the file system's journal, and would hold the loop for as long as the disk stands still. Refused on
/// files that another user owns, where nothing but that is lost.
void keep_access_time(int fd) {
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NOATIME);
}

Result<void> check_name(std::string_view name) {
  if (name.empty() || name.size() > 255 || name.starts_with('.') || name == kLockName || name.find('/') != name.npos ||
      name.find('\0') != name.npos)
    return fail(Errc::kInvalid, "file name '" + printable(name) + "' is not allowed in a data directory");
  return {};
}

/// What the file system under a directory can do.
struct Abilities {
  bool direct = false;
  bool punch = false;
  bool allocate = false;
};

/// The opened directory; shared with the work that runs elsewhere.
struct Root {
  std::string path;
  UniqueFd fd;
  UniqueFd lock;  // released when the last user is gone
  Abilities can;
  bool others_may_read = false;

  std::string at(std::string_view name) const { return path + "/" + std::string(name); }
};

Result<Abilities> probe(const Root& root, const DirectoryOptions& options) {
  Abilities can;
  ::unlinkat(root.fd.get(), kProbeName, 0);  // left by a process that died here
  UniqueFd file(open_beneath(root.fd.get(), kProbeName, O_RDWR | O_CREAT | O_EXCL, 0600));
  if (!file) return failed("create", root.at(kProbeName), errno);
  struct Remove {
    const Root& root;
    ~Remove() { ::unlinkat(root.fd.get(), kProbeName, 0); }
  } remove{root};
  can.allocate = ::fallocate(file.get(), 0, 0, static_cast<off_t>(kBlockBytes)) == 0;
  if (!can.allocate && errno != EOPNOTSUPP) return failed("allocate", root.at(kProbeName), errno);
  if (can.allocate && options.punch)
    can.punch = ::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(kSectorBytes),
                            static_cast<off_t>(kSectorBytes)) == 0;
  if (options.direct) {
    // Some file systems take the flag and refuse the write, or want more than 4096-byte alignment.
    UniqueFd direct(open_beneath(root.fd.get(), kProbeName, O_RDWR | O_DIRECT, 0));
    const std::unique_ptr<void, decltype(&std::free)> sector(std::aligned_alloc(kSectorBytes, kSectorBytes),
                                                             &std::free);
    if (direct && sector) {
      std::memset(sector.get(), 1, kSectorBytes);
      can.direct = ::pwrite(direct.get(), sector.get(), kSectorBytes, static_cast<off_t>(kSectorBytes)) ==
                   static_cast<ssize_t>(kSectorBytes);
    }
  }
  if (::fdatasync(file.get()) != 0) return failed("sync", root.at(kProbeName), errno);
  return can;
}

Result<std::shared_ptr<Root>> open_root(const std::string& path, const DirectoryOptions& options) {
  auto root = std::make_shared<Root>();
  root->path = path;
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return failed("create data directory", path, errno);
  root->fd = UniqueFd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!root->fd) {
    if (errno == ENOTDIR) return fail(Errc::kInvalid, "data directory " + path + ": not a directory");
    return failed("open data directory", path, errno);
  }
  struct stat status{};
  if (::fstat(root->fd.get(), &status) != 0) return failed("look at data directory", path, errno);
  root->others_may_read = (status.st_mode & 0077) != 0;
  root->lock = UniqueFd(open_beneath(root->fd.get(), std::string(kLockName), O_RDWR | O_CREAT, 0600));
  if (!root->lock) {
    if (code_of(errno) == Errc::kDenied)
      return fail(Errc::kDenied, "data directory " + path + ": not writable: " + errno_text(errno));
    return failed("open", root->at(kLockName), errno);
  }
  if (::flock(root->lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return failed("lock", root->at(kLockName), errno);
    char pid[24] = "";
    const auto size = ::pread(root->lock.get(), pid, sizeof pid - 1, 0);
    const std::string who(pid, static_cast<std::size_t>(std::max<ssize_t>(size, 0)));
    return fail(Errc::kBusy, "data directory " + path + ": another cairnd has it" +
                                 (who.empty() ? "" : " (process " + printable(who.substr(0, who.find('\n'))) + ")"));
  }
  const std::string pid = std::to_string(::getpid()) + "\n";  // for people; the lock is what counts
  if (::ftruncate(root->lock.get(), 0) != 0 || ::pwrite(root->lock.get(), pid.data(), pid.size(), 0) < 0) {
    // A full disk: the directory can still serve reads and deletes.
  }
  TRY(root->can, probe(*root, options));
  return root;
}

class DirectoryFile final : public File {
 public:
  DirectoryFile(rt::Runtime runtime, std::shared_ptr<Root> root, std::shared_ptr<IoQueue> io,
                std::shared_ptr<OpenFile> file, std::uint64_t size, std::uint64_t allocated)
      : runtime_(runtime),
        root_(std::move(root)),
        io_(std::move(io)),
        file_(std::move(file)),
        size_(std::make_shared<std::uint64_t>(size)),
        allocated_(allocated) {}

  // Nothing below touches `this` after its first wait: the File may be gone while an operation is in flight.

  Task<void> write(std::uint64_t offset, Buffer bytes) override {
    const auto io = io_;
    const auto file = file_;
    const auto size = size_;
    const auto view = bytes.bytes();
    auto keep = std::make_shared<Buffer>(std::move(bytes));
    // The kernel only reads these bytes.
    CO_TRY(const int error, co_await io->perform(Op::Kind::kWrite, file, offset, const_cast<std::byte*>(view.data()),
                                                 view.size(), std::move(keep)));
    if (error != 0) co_return failed_io("write", *file, offset, view.size(), error);
    *size = std::max(*size, offset + view.size());
    co_return {};
  }

  Task<rt::MutableBuffer> read(std::uint64_t offset, rt::MutableBuffer into) override {
    const auto io = io_;
    const auto file = file_;
    CO_TRY(const int error,
           co_await io->perform(Op::Kind::kRead, file, offset, into.bytes.data(), into.bytes.size(), into.owner));
    if (error == Op::kEndOfFile)
      co_return fail(Errc::kDataLoss, describe("read", *file, offset, into.bytes.size()) + ": the file ends before");
    if (error != 0) co_return failed_io("read", *file, offset, into.bytes.size(), error);
    co_return into;
  }

  Task<void> flush() override {
    const auto io = io_;
    const auto file = file_;
    CO_TRY(const int error, co_await io->perform(Op::Kind::kFlush, file, 0, nullptr, 0, nullptr));
    if (error != 0) co_return failed("flush", file->name, error);
    co_return {};
  }

  Task<void> punch(std::uint64_t offset, std::uint64_t size) override {
    const auto root = root_;
    if (!root->can.punch || size == 0) return nothing();
    return rt::away(runtime_.loop, runtime_.offload, [root, file = file_, offset, size]() -> Result<void> {
      while (::fallocate(file->fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                         static_cast<off_t>(size)) != 0)
        if (errno != EINTR) return failed_io("punch", *file, offset, size, errno);
      return {};
    });
  }

  std::uint64_t size() const override { return *size_; }
  std::uint64_t allocated() const override { return allocated_; }

 private:
  static Task<void> nothing() { co_return {}; }
  static std::string describe(std::string_view what, const OpenFile& file, std::uint64_t offset, std::uint64_t size) {
    return std::string(what) + " " + file.name + " offset=" + std::to_string(offset) + " bytes=" + std::to_string(size);
  }
  static Failure failed_io(std::string_view what, const OpenFile& file, std::uint64_t offset, std::uint64_t size,
                           int error) {
    // Only these have a code of their own in an operation on bytes.
    const auto code = error == ENOSPC || error == EDQUOT ? Errc::kNoSpace : Errc::kFailed;
    return fail(code, describe(what, file, offset, size) + ": " + errno_text(error));
  }

  rt::Runtime runtime_;
  std::shared_ptr<Root> root_;
  std::shared_ptr<IoQueue> io_;
  std::shared_ptr<OpenFile> file_;
  std::shared_ptr<std::uint64_t> size_;
  std::uint64_t allocated_;
};

class Directory final : public Disk {
  /// Runs `work` on the directory, on another thread.
  template <class Work>
  auto away(Work work) {
    return rt::away(runtime_.loop, runtime_.offload, [root = root_, work = std::move(work)] { return work(*root); });
  }

 public:
  Directory(rt::Runtime runtime, std::shared_ptr<IoQueue> io, std::shared_ptr<Root> root)
      : runtime_(runtime), io_(std::move(io)), root_(std::move(root)) {}

  Task<std::shared_ptr<File>> create(std::string name, std::uint64_t size) override {
    return open_file(runtime_, io_, root_, std::move(name),
                     [size](const Root& root, const std::string& file) { return create_blocking(root, file, size); });
  }
  Task<std::shared_ptr<File>> open(std::string name) override {
    return open_file(runtime_, io_, root_, std::move(name), open_blocking);
  }

  Task<void> rename(std::string from, std::string to) override {
    return away([from = std::move(from), to = std::move(to)](const Root& root) -> Result<void> {
      CHECK_OK(check_name(from));
      CHECK_OK(check_name(to));
      if (::renameat(root.fd.get(), from.c_str(), root.fd.get(), to.c_str()) != 0)
        return failed("rename", root.at(from) + " to " + to, errno);
      return {};
    });
  }
  Task<void> unlink(std::string name) override {
    return away([name = std::move(name)](const Root& root) -> Result<void> {
      CHECK_OK(check_name(name));
      if (::unlinkat(root.fd.get(), name.c_str(), 0) != 0) return failed("unlink", root.at(name), errno);
      return {};
    });
  }
  Task<void> sync_directory() override {
    return away([](const Root& root) -> Result<void> {
      if (::fsync(root.fd.get()) != 0) return failed("sync directory", root.path, errno);
      return {};
    });
  }
  Task<std::vector<std::string>> list() override { return away(list_blocking); }
  Task<Space> space() override {
    return away([](const Root& root) -> Result<Space> {
      struct statvfs now{};
      if (::fstatvfs(root.fd.get(), &now) != 0) return failed("space of", root.path, errno);
      return Space{.total_bytes = std::uint64_t{now.f_blocks} * now.f_frsize,
                   .free_bytes = std::uint64_t{now.f_bavail} * now.f_frsize};
    });
  }

  void register_memory(std::span<std::byte> slab) override { io_->register_memory(slab); }
  std::string description() const override {
    std::string text = std::string(io_->name()) + " " + root_->path;
    if (!root_->can.direct) text += " (buffered)";
    if (!root_->can.punch) text += " (no hole punching)";
    if (!root_->can.allocate) text += " (no preallocation)";
    return text;
  }

 private:
  struct Opened {
    UniqueFd fd;
    std::uint64_t size = 0;
    std::uint64_t allocated = 0;
  };

  template <class Open>
  static Task<std::shared_ptr<File>> open_file(rt::Runtime runtime, std::shared_ptr<IoQueue> io,
                                               std::shared_ptr<Root> root, std::string name, Open open) {
    CO_CHECK_OK(check_name(name));
    CO_TRY(auto opened,
           co_await rt::away(runtime.loop, runtime.offload, [root, name, open] { return open(*root, name); }));
    auto file = std::make_shared<OpenFile>(runtime.offload, std::move(opened.fd), root->at(name), root->can.direct);
    co_return std::make_shared<DirectoryFile>(runtime, std::move(root), std::move(io), std::move(file), opened.size,
                                              opened.allocated);
  }

  static Result<Opened> create_blocking(const Root& root, const std::string& name, std::uint64_t size) {
    UniqueFd fd(open_beneath(root.fd.get(), name, O_RDWR | O_CREAT | O_EXCL | (root.can.direct ? O_DIRECT : 0), 0600));
    if (!fd) return failed("create", root.at(name), errno);
    keep_access_time(fd.get());
    int error = 0;
    if (size > 0) {
      do {
        error = (root.can.allocate ? ::fallocate(fd.get(), 0, 0, static_cast<off_t>(size))
                                   : ::ftruncate(fd.get(), static_cast<off_t>(size))) == 0
                    ? 0
                    : errno;
      } while (error == EINTR);
    }
    if (error != 0) {
      ::unlinkat(root.fd.get(), name.c_str(), 0);
      return failed("allocate " + std::to_string(size) + " bytes for", root.at(name), error);
    }
    return Opened{std::move(fd), size, size};
  }

  static Result<Opened> open_blocking(const Root& root, const std::string& name) {
    UniqueFd fd(open_beneath(root.fd.get(), name, O_RDWR | O_NONBLOCK | (root.can.direct ? O_DIRECT : 0), 0));
    if (!fd) return failed("open", root.at(name), errno);
    struct stat status{};
    if (::fstat(fd.get(), &status) != 0) return failed("look at", root.at(name), errno);
    if (!S_ISREG(status.st_mode)) return fail(Errc::kFailed, "open " + root.at(name) + ": not a regular file");
    keep_access_time(fd.get());
    constexpr std::uint64_t kUnit = 512;  // of st_blocks, whatever the file system's
    return Opened{std::move(fd), static_cast<std::uint64_t>(status.st_size),
                  static_cast<std::uint64_t>(status.st_blocks) * kUnit};
  }

  static Result<std::vector<std::string>> list_blocking(const Root& root) {
    UniqueFd again(::openat(root.fd.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));  // with a position of its own
    if (!again) return failed("list", root.path, errno);
    const std::unique_ptr<DIR, int (*)(DIR*)> listing(::fdopendir(::dup(again.get())),
                                                      [](DIR* d) { return ::closedir(d); });
    if (!listing) return failed("list", root.path, errno);
    std::vector<std::string> names;
    for (;;) {
      errno = 0;
      const dirent* entry = ::readdir(listing.get());
      if (entry == nullptr) break;
      if (!check_name(entry->d_name)) continue;
      struct stat status{};
      if (::fstatat(root.fd.get(), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode))
        names.emplace_back(entry->d_name);
    }
    if (errno != 0) return failed("list", root.path, errno);
    std::ranges::sort(names);
    return names;
  }

  rt::Runtime runtime_;
  std::shared_ptr<IoQueue> io_;
  std::shared_ptr<Root> root_;
};

}  // namespace

Task<std::unique_ptr<Disk>> open_directory(rt::Runtime runtime, std::shared_ptr<Io> io, std::string path,
                                           DirectoryOptions options) {
  CO_TRY(auto root,
         co_await rt::away(runtime.loop, runtime.offload, [path, options] { return open_root(path, options); }));
  if (!root->can.direct && options.direct)
    runtime.log.write(rt::Level::kWarning, "disk_without_direct_io",
                      {{"directory", path}, {"effect", "data goes through the page cache"}});
  if (!root->can.punch && options.punch)
    runtime.log.write(rt::Level::kWarning, "disk_without_hole_punching",
                      {{"directory", path}, {"effect", "space comes back only when a whole segment is free"}});
  if (!root->can.allocate)
    runtime.log.write(rt::Level::kWarning, "disk_without_preallocation",
                      {{"directory", path}, {"effect", "a full disk may fail a write in the middle of a segment"}});
  if (root->others_may_read)
    runtime.log.write(rt::Level::kWarning, "data_directory_open_to_others",
                      {{"directory", path}, {"remedy", "chmod 700 " + path}});
  auto queue = std::static_pointer_cast<IoQueue>(std::move(io));
  co_return std::make_unique<Directory>(runtime, std::move(queue), std::move(root));
}

}  // namespace cairn::storage
