#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "client/safetensors/safetensors.h"
#include "proto/common/result.h"

/// The local side of the command line: files and folders.
struct stat;

namespace cairn::cli {

/// Of a path in messages: longer than any sensible one, shorter than a screen.
inline constexpr std::size_t kPathShownMax = 1024;

/// "DOING 'PATH': No such file or directory", with a code that fits errno.
Failure errno_failure(std::string_view doing, const std::string& path, int error);

/// An open file or folder descriptor.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);  // what was held is closed with `other`
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }

 private:
  int fd_;
};

/// A file of any size, read by ranges. Its size is taken when it is opened; a file that shrinks meanwhile is an error.
/// Between close() and the next read() it holds no descriptor.
class FileSource : public safetensors::ByteSource {
 public:
  /// errors: kNotFound, kDenied, kInvalid  not a regular file
  static Result<std::unique_ptr<FileSource>> open(std::string path);
  std::string name() const override { return path_; }
  std::uint64_t size() const override { return state_.size; }
  /// errors: kFailed  the file shrank, or is not the one that was closed
  Result<void> read(std::uint64_t offset, std::span<std::byte> out) override;
  void close() { fd_ = Fd(); }
  /// What was read since open() is one state of the file, if nobody wrote to it meanwhile: it is the same file, and its
  /// size and its time of modification are still those of open(). errors: kFailed
  Result<void> check_unchanged() const;

 private:
  struct State {
    std::uint64_t device, inode, size;
    std::int64_t modified_seconds, modified_nanos;
    bool operator==(const State&) const = default;
  };
  FileSource(std::string path, Fd fd, State state) : path_(std::move(path)), fd_(std::move(fd)), state_(state) {}
  static State state_of(const struct stat& info);
  Result<void> reopen();
  Failure changed(const State& now) const;
  std::string path_;
  Fd fd_;        // -1: closed
  State state_;  // when it was opened first
};

/// A new file, written by ranges.
class NewFile {
 public:
  static Result<NewFile> create(std::string path);
  /// A device or pipe that is there already: bytes go to it in order.
  static Result<NewFile> open_device(std::string path);
  Result<void> write(std::uint64_t offset, std::span<const std::byte> bytes);
  Result<void> append(std::span<const std::byte> bytes);
  /// The bytes survive power loss.
  Result<void> sync();

 private:
  NewFile(std::string path, Fd fd, bool device) : path_(std::move(path)), fd_(std::move(fd)), device_(device) {}
  std::string path_;
  Fd fd_;
  bool device_;
  std::uint64_t end_ = 0;
};

/// A file that appears under its name only whole: written beside it, synced, renamed. Replaces a file that was there;
/// a device or pipe (/dev/null) is written to.
class FileInPlace {
 public:
  static Result<FileInPlace> create(std::string path);
  FileInPlace(FileInPlace&&) noexcept;
  ~FileInPlace();
  NewFile& file() { return file_; }
  Result<void> commit();

 private:
  FileInPlace(std::string path, std::string temporary, NewFile file)
      : path_(std::move(path)), temporary_(std::move(temporary)), file_(std::move(file)) {}
  std::string path_, temporary_;  // temporary_ empty: committed or moved from
  NewFile file_;
};

/// A folder that appears under its name only whole; the name must be new or an empty folder.
class FolderInPlace {
 public:
  /// errors: kExists  not empty
  static Result<FolderInPlace> create(std::string path);
  FolderInPlace(FolderInPlace&&) noexcept;
  ~FolderInPlace();
  /// A new file under a saved name, which is checked; folders in between are made.
  Result<NewFile> create_file(const std::string& name);
  Result<void> commit();

 private:
  FolderInPlace(std::string path, std::string temporary) : path_(std::move(path)), temporary_(std::move(temporary)) {}
  std::string path_, temporary_;
};

struct LocalFile {
  std::string path;  // where it lies
  std::string name;  // under which it is saved: '/' between folders, relative
};
/// Regular files named by `paths`, folders with all below them, sorted by name.
/// errors: kNotFound, kInvalid  two files with one saved name, something that is neither file nor folder
Result<std::vector<LocalFile>> collect_files(const std::vector<std::string>& paths);

/// A saved name comes from the store: relative, no empty segment, no '.' or '..', UTF-8, no control bytes.
/// errors: kInvalid
Result<void> check_saved_name(std::string_view name);

}  // namespace cairn::cli
