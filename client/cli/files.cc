#include "client/cli/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "proto/common/ids.h"
#include "proto/common/text.h"

namespace cairn::cli {
namespace fs = std::filesystem;
namespace {

/// The parent, so that a rename in it can be synced: "a" lies in ".", "/a" in "/".
std::string folder_of(const std::string& path) {
  const auto parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

std::string without_slashes(std::string path) {
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  return path;
}

Result<void> sync_folder(const std::string& path) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return errno_failure("open folder", path, errno);
  if (::fsync(fd.get()) != 0) return errno_failure("sync folder", path, errno);
  return {};
}

}  // namespace

Failure errno_failure(std::string_view doing, const std::string& path, int error) {
  const auto code = error == ENOENT || error == ENOTDIR                          ? Errc::kNotFound
                    : error == EACCES || error == EPERM || error == EROFS        ? Errc::kDenied
                    : error == EEXIST || error == ENOTEMPTY                      ? Errc::kExists
                    : error == ENOSPC || error == EDQUOT                         ? Errc::kNoSpace
                    : error == EISDIR || error == ENAMETOOLONG || error == ELOOP ? Errc::kInvalid
                                                                                 : Errc::kFailed;
  return fail(code, fmt::format("{} '{}': {}", doing, printable(path, kPathShownMax), std::strerror(error)));
}

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

Result<std::unique_ptr<FileSource>> FileSource::open(std::string path) {
  // Without O_NONBLOCK, opening a named pipe would wait for a writer.
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) return errno_failure("open", path, errno);
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0) return errno_failure("stat", path, errno);
  if (!S_ISREG(info.st_mode))
    return fail(Errc::kInvalid, fmt::format("'{}' is not a regular file", printable(path, kPathShownMax)));
  const auto state = state_of(info);
  return std::unique_ptr<FileSource>(new FileSource(std::move(path), std::move(fd), state));
}

FileSource::State FileSource::state_of(const struct stat& info) {
  return {.device = info.st_dev,
          .inode = info.st_ino,
          .size = static_cast<std::uint64_t>(info.st_size),
          .modified_seconds = info.st_mtim.tv_sec,
          .modified_nanos = info.st_mtim.tv_nsec};
}

Failure FileSource::changed(const State& now) const {
  return fail(Errc::kFailed, fmt::format("'{}' was written to or replaced while it was being saved ({} bytes at first, "
                                         "{} now); save it again when its writer is done",
                                         printable(path_, kPathShownMax), state_.size, now.size));
}

Result<void> FileSource::reopen() {
  TRY(auto again, open(path_));
  if (again->state_ != state_) return changed(again->state_);
  fd_ = std::move(again->fd_);
  return {};
}

Result<void> FileSource::check_unchanged() const {
  struct stat now{};
  const bool closed = fd_.get() < 0;
  if ((closed ? ::stat(path_.c_str(), &now) : ::fstat(fd_.get(), &now)) != 0)
    return errno_failure("stat", path_, errno);
  return state_of(now) == state_ ? Result<void>() : changed(state_of(now));
}

Result<void> FileSource::read(std::uint64_t offset, std::span<std::byte> out) {
  if (fd_.get() < 0) CHECK_OK(reopen());
  while (!out.empty()) {
    const auto got = ::pread(fd_.get(), out.data(), out.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_failure("read", path_, errno);
    if (got == 0)
      return fail(Errc::kFailed, fmt::format("'{}' shrank while it was read: no bytes at {}",
                                             printable(path_, kPathShownMax), offset));
    out = out.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::uint64_t>(got);
  }
  return {};
}

Result<NewFile> NewFile::create(std::string path) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666));
  if (fd.get() < 0) return errno_failure("create", path, errno);
  return NewFile(std::move(path), std::move(fd), false);
}

Result<NewFile> NewFile::open_device(std::string path) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (fd.get() < 0) return errno_failure("open", path, errno);
  return NewFile(std::move(path), std::move(fd), true);
}

Result<void> NewFile::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const auto put = device_ ? ::write(fd_.get(), bytes.data(), bytes.size())
                             : ::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_failure("write", path_, errno);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
    offset += static_cast<std::uint64_t>(put);
  }
  end_ = std::max(end_, offset);
  return {};
}

Result<void> NewFile::append(std::span<const std::byte> bytes) {
  return write(end_, bytes);
}

Result<void> NewFile::sync() {
  if (!device_ && ::fsync(fd_.get()) != 0) return errno_failure("sync", path_, errno);
  return {};
}

Result<FileInPlace> FileInPlace::create(std::string path) {
  struct stat info{};
  if (::stat(path.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) return errno_failure("write", path, EISDIR);
    if (!S_ISREG(info.st_mode)) {
      TRY(auto device, NewFile::open_device(path));
      return FileInPlace(std::move(path), {}, std::move(device));
    }
    std::error_code error;
    if (auto real = fs::canonical(path, error); !error) path = real.string();  // through links, as a shell's > does
  }
  // The process id makes the name ours; what an earlier process of that id left behind is in nobody's use.
  auto temporary = fmt::format("{}/.{}.cairn-{}", folder_of(path), fs::path(path).filename().string(), ::getpid());
  ::unlink(temporary.c_str());
  TRY(auto file, NewFile::create(temporary));
  return FileInPlace(std::move(path), std::move(temporary), std::move(file));
}

FileInPlace::FileInPlace(FileInPlace&& other) noexcept
    : path_(std::move(other.path_)), temporary_(std::exchange(other.temporary_, {})), file_(std::move(other.file_)) {}

FileInPlace::~FileInPlace() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

Result<void> FileInPlace::commit() {
  CHECK_OK(file_.sync());
  if (temporary_.empty()) return {};
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) return errno_failure("rename to", path_, errno);
  temporary_.clear();
  return sync_folder(folder_of(path_));
}

Result<FolderInPlace> FolderInPlace::create(std::string path) {
  std::error_code error;
  path = without_slashes(fs::absolute(path, error).lexically_normal().string());
  const auto status = fs::symlink_status(path, error);
  auto mode = ::umask(0);
  ::umask(mode);
  mode = 0777 & ~mode;
  if (fs::exists(status)) {
    const bool empty = fs::is_directory(status) && fs::is_empty(path, error);
    if (error) return errno_failure("read folder", path, error.value());
    if (!empty)
      return fail(Errc::kExists, fmt::format("'{}' is not a new or empty folder", printable(path, kPathShownMax)));
  }
  auto temporary = fmt::format("{}/.{}.cairn-XXXXXX", folder_of(path), fs::path(path).filename().string());
  if (::mkdtemp(temporary.data()) == nullptr) return errno_failure("make a folder beside", path, errno);
  struct stat info{};
  if (::stat(path.c_str(), &info) == 0) mode = info.st_mode & 07777;
  ::chmod(temporary.c_str(), mode);
  return FolderInPlace(std::move(path), std::move(temporary));
}

FolderInPlace::FolderInPlace(FolderInPlace&& other) noexcept
    : path_(std::move(other.path_)), temporary_(std::exchange(other.temporary_, {})) {}

FolderInPlace::~FolderInPlace() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

Result<NewFile> FolderInPlace::create_file(const std::string& name) {
  CHECK_OK(check_saved_name(name));
  const auto path = temporary_ + "/" + name;
  std::error_code error;
  fs::create_directories(folder_of(path), error);
  if (error) return errno_failure("make folder", folder_of(path), error.value());
  return NewFile::create(path);
}

Result<void> FolderInPlace::commit() {
  std::error_code error;
  for (const auto& entry : fs::recursive_directory_iterator(temporary_, error))
    if (entry.is_directory()) CHECK_OK(sync_folder(entry.path()));
  if (error) return errno_failure("read folder", temporary_, error.value());
  CHECK_OK(sync_folder(temporary_));
  // Takes the place of an empty folder too; of one that is not empty any more it does not.
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) return errno_failure("rename to", path_, errno);
  temporary_.clear();
  return sync_folder(folder_of(path_));
}

Result<std::vector<LocalFile>> collect_files(const std::vector<std::string>& paths) {
  std::vector<LocalFile> out;
  for (const auto& given : paths) {
    const auto path = without_slashes(given);
    std::error_code error;
    const auto status = fs::status(path, error);
    if (!fs::exists(status)) return errno_failure("open", path, error ? error.value() : ENOENT);
    if (!fs::is_directory(status)) {
      out.push_back({path, fs::path(path).filename().string()});
      continue;
    }
    for (fs::recursive_directory_iterator at(path, error), end; !error && at != end; at.increment(error)) {
      // Links to files are followed (model hubs keep folders of them); links to folders could run in circles.
      const auto name = at->path().lexically_relative(path).generic_string();
      if (at->is_directory() && at->is_symlink())
        return fail(Errc::kInvalid, fmt::format("'{}' is a link to a folder: name that folder itself",
                                                printable(at->path().string(), kPathShownMax)));
      if (!at->is_directory()) out.push_back({at->path().string(), name});
    }
    if (error) return errno_failure("read folder", path, error.value());
  }
  std::ranges::sort(out, {}, &LocalFile::name);
  for (std::size_t i = 0; i < out.size(); ++i) {
    CHECK_OK(check_saved_name(out[i].name));
    if (i > 0 && out[i].name == out[i - 1].name)
      return fail(Errc::kInvalid,
                  fmt::format("'{}' and '{}' would both be saved as '{}'", printable(out[i - 1].path, kPathShownMax),
                              printable(out[i].path, kPathShownMax), printable(out[i].name)));
  }
  if (out.empty()) return fail(Errc::kInvalid, "no files there");
  return out;
}

Result<void> check_saved_name(std::string_view name) {
  CHECK_OK(check_free_name("file", name));
  const auto bad = [&](std::string_view why) {
    return fail(Errc::kInvalid, fmt::format("file name '{}': {}", printable(name), why));
  };
  if (std::ranges::any_of(name, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }))
    return bad("control bytes");
  for (std::size_t start = 0;;) {
    const auto end = name.find('/', start);
    const auto segment = name.substr(start, end == name.npos ? end : end - start);
    if (segment.empty() || segment == "." || segment == "..") return bad("not a plain relative path");
    if (segment.size() > 255) return bad("a part of it is longer than 255 bytes");
    if (end == name.npos) return {};
    start = end + 1;
  }
}

}  // namespace cairn::cli
