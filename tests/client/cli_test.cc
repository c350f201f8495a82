#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "client/cli/ckpt_names.h"
#include "client/cli/context.h"
#include "client/cli/files.h"
#include "client/cli/output.h"

using namespace cairn;
using namespace cairn::cli;
namespace fs = std::filesystem;

namespace {

/// A folder of the test's own, gone with it.
struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "cairn-cli-test-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
  std::string write(const std::string& name, const std::string& text) const {
    fs::create_directories((path / name).parent_path());
    std::ofstream(path / name) << text;
    return *this / name;
  }
  std::string read(const std::string& name) const {
    std::ifstream file(path / name);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::recursive_directory_iterator(path))
      out.push_back(entry.path().lexically_relative(path).string());
    std::ranges::sort(out);
    return out;
  }
};

std::span<const std::byte> bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

Errc code_of(const auto& result) {
  return result ? Errc{} : result.error().code;
}

}  // namespace

TEST_CASE("cli: sizes, ranges, object and run names are read strictly", "[client]") {
  CHECK(*size_of("512") == 512);
  CHECK(*size_of("64KiB") == 65536);
  CHECK(*size_of("64K") == 65536);
  CHECK(*size_of("10MB") == 10'000'000);
  CHECK(*size_of("1.5TiB") == 3ull << 39);
  for (const char* bad : {"", "-1", "1X", "KiB", "1e30T", "1 KiB", "0x10", "iB", "1iB", "nan", "inf"}) {
    INFO(bad);
    CHECK(code_of(size_of(bad)) == Errc::kInvalid);
  }
  CHECK(range_of("5-9")->last == 9);
  CHECK(range_of("5-")->last == Client::npos);
  CHECK_FALSE(range_of("5-")->from_end);
  CHECK(range_of("-5")->first == 5);
  CHECK(range_of("-5")->from_end);
  for (const char* bad : {"", "-", "5", "-5-", "--5", "9-5", "a-b", "1-2-3", "1-99999999999999999999"}) {
    INFO(bad);
    CHECK(code_of(range_of(bad)) == Errc::kInvalid);
  }
  CHECK(object_name("cairn://b/k/e y")->key == "k/e y");
  CHECK(object_name("cairn://b")->key.empty());
  for (const char* bad : {"b/k", "cairn:/b/k", "cairn:///k", "cairn://../k", ""})
    CHECK(code_of(object_name(bad)) == Errc::kInvalid);
  CHECK(check_run("b/jobs/llama"));
  for (const char* bad : {"b", "b/", "/r", "b/../r", "b/a//c", "b b/r"})
    CHECK(code_of(check_run(bad)) == Errc::kInvalid);
}

TEST_CASE("cli: every kind of error has its exit code", "[client]") {
  CHECK(exit_code(Errc::kInvalid) == 2);
  CHECK(exit_code(Errc::kNotFound) == 3);
  CHECK(exit_code(Errc::kExists) == 4);
  CHECK(exit_code(Errc::kConflict) == 4);
  CHECK(exit_code(Errc::kFenced) == 4);
  CHECK(exit_code(Errc::kDenied) == 5);
  CHECK(exit_code(Errc::kDataLoss) == 6);
  CHECK(exit_code(Errc::kUnavailable) == 7);
  CHECK(exit_code(Errc::kDeadline) == 7);
  CHECK(exit_code(Errc::kNoSpace) == 8);
  CHECK(exit_code(Errc::kAttemptFailed) == 1);
}

TEST_CASE("cli: sizes are short, times are UTC", "[client]") {
  CHECK(size_text(1023) == "1023 B");
  CHECK(size_text(1024) == "1.00 KiB");
  CHECK(size_text(15ull << 30) == "15.0 GiB");
  CHECK(time_iso(1'709'208'000'000'000'000) == "2024-02-29T12:00:00Z");
}

TEST_CASE("cli: a saved name that could leave the folder is refused", "[client]") {
  CHECK(check_saved_name("a/b..c/.d"));
  const std::string with_nul("a\0b", 3);
  for (const std::string& bad : {std::string("../a"), std::string("a/../b"), std::string("/a"), std::string("a//b"),
                                 std::string("a/"), std::string("."), std::string(".."), std::string(""), with_nul,
                                 std::string("a\nb"), std::string("\xff"), std::string(300, 'x')}) {
    INFO(bad);
    CHECK(code_of(check_saved_name(bad)) == Errc::kInvalid);
  }
}

TEST_CASE("cli: a folder appears whole or not at all, and only where there was none", "[client]") {
  Folder f;
  {
    auto made = FolderInPlace::create(f / "out/");
    REQUIRE(made);
    REQUIRE(made->create_file("sub/a")->append(bytes("hello")));
    CHECK(code_of(made->create_file("../x")) == Errc::kInvalid);
    CHECK_FALSE(fs::exists(f / "out"));
  }
  CHECK(f.names().empty());  // dropped without commit: nothing is left
  fs::create_directory(f / "out");
  {
    auto made = FolderInPlace::create(f / "out");
    REQUIRE(made);
    REQUIRE(made->create_file("sub/a")->append(bytes("hello")));
    REQUIRE(made->commit());
  }
  CHECK(f.read("out/sub/a") == "hello");
  CHECK(f.names() == std::vector<std::string>{"out", "out/sub", "out/sub/a"});
  CHECK(code_of(FolderInPlace::create(f / "out")) == Errc::kExists);
  CHECK(code_of(FolderInPlace::create(f / "out/sub/a")) == Errc::kExists);
  CHECK(code_of(FolderInPlace::create(f / "none/out")) == Errc::kNotFound);
}

TEST_CASE("cli: a file is replaced whole or not at all, through links, devices are written to", "[client]") {
  Folder f;
  f.write("a", "old");
  {
    auto file = FileInPlace::create(f / "a");
    REQUIRE(file);
    REQUIRE(file->file().append(bytes("half")));
  }
  CHECK(f.read("a") == "old");
  CHECK(f.names() == std::vector<std::string>{"a"});
  fs::create_symlink("a", f / "link");
  {
    auto file = FileInPlace::create(f / "link");
    REQUIRE(file);
    REQUIRE(file->file().append(bytes("new")));
    REQUIRE(file->commit());
  }
  CHECK(f.read("a") == "new");
  CHECK(fs::is_symlink(f / "link"));
  auto null = FileInPlace::create("/dev/null");
  REQUIRE(null);
  CHECK(null->file().append(bytes("x")));
  CHECK(null->commit());
  CHECK(fs::is_character_file("/dev/null"));
  CHECK(code_of(FileInPlace::create(f.path.string())) == Errc::kInvalid);
}

TEST_CASE("cli: folders are collected whole and sorted, clashes and odd things are refused", "[client]") {
  Folder f;
  f.write("in/b", "1");
  f.write("in/sub/a", "2");
  f.write("c", "3");
  fs::create_symlink("../c", f / "in/z");
  auto files = collect_files({f / "in/", f / "c"});
  REQUIRE(files);
  std::vector<std::string> names;
  for (const auto& file : *files) names.push_back(file.name);
  CHECK(names == std::vector<std::string>{"b", "c", "sub/a", "z"});
  f.write("other/b", "4");
  CHECK_THAT(collect_files({f / "in", f / "other"}).error().message, Catch::Contains("both be saved as 'b'"));
  CHECK(code_of(collect_files({f / "absent"})) == Errc::kNotFound);
  fs::create_directory(f / "empty");
  CHECK(code_of(collect_files({f / "empty"})) == Errc::kInvalid);
  fs::create_directory_symlink("..", f / "in/up");
  CHECK_THAT(collect_files({f / "in"}).error().message, Catch::Contains("link to a folder"));
  CHECK(code_of(FileSource::open(f.path.string())) == Errc::kInvalid);
}

TEST_CASE("cli: a file that shrinks while it is read is an error, not zeros", "[client]") {
  Folder f;
  auto source = FileSource::open(f.write("a", "0123456789"));
  REQUIRE(source);
  fs::resize_file(f / "a", 5);
  std::vector<std::byte> out(10);
  CHECK_THAT((*source)->read(0, out).error().message, Catch::Contains("shrank"));
}

TEST_CASE("cli: a file whose size or time of modification changed since it was opened is noticed", "[client]") {
  Folder f;
  auto source = FileSource::open(f.write("a", "0123456789"));
  REQUIRE(source);
  CHECK((*source)->check_unchanged());
  fs::last_write_time(f / "a", fs::last_write_time(f / "a") + std::chrono::seconds(1));
  CHECK_THAT((*source)->check_unchanged().error().message, Catch::Contains("written to or replaced while"));
  source = FileSource::open(f / "a");
  REQUIRE(source);
  const auto modified = fs::last_write_time(f / "a");
  fs::resize_file(f / "a", 11);
  fs::last_write_time(f / "a", modified);
  CHECK_FALSE((*source)->check_unchanged());
}

TEST_CASE("cli: a closed file is opened again by a read, unless it is not the same any more", "[client]") {
  Folder f;
  auto source = FileSource::open(f.write("a", "0123456789"));
  REQUIRE(source);
  std::vector<std::byte> out(3);
  for (int round = 0; round < 2; ++round) {
    (*source)->close();
    CHECK((*source)->check_unchanged());
    REQUIRE((*source)->read(4, out));
    CHECK(std::memcmp(out.data(), "456", 3) == 0);
  }
  const auto modified = fs::last_write_time(f / "a");
  f.write("b", "abcdefghij");
  fs::last_write_time(f / "b", modified);
  fs::rename(f / "b", f / "a");
  CHECK((*source)->check_unchanged());  // open: still that of before
  (*source)->close();
  CHECK_THAT((*source)->check_unchanged().error().message, Catch::Contains("replaced"));
  CHECK_THAT((*source)->read(4, out).error().message, Catch::Contains("replaced"));
  fs::remove(f / "a");
  CHECK(code_of((*source)->check_unchanged()) == Errc::kNotFound);
}

TEST_CASE("cli: pieces of a tensor are its bytes in order, in boxes that match them", "[client]") {
  std::mt19937_64 random(11);
  for (int round = 0; round < 3000; ++round) {
    safetensors::TensorInfo tensor{.name = "t", .dtype = static_cast<format::DType>(random() % 22 + 1), .shape = {}};
    tensor.shape.resize(random() % 5);
    for (auto& size : tensor.shape) size = random() % 9;
    const auto count = *format::elements(tensor.shape);
    const auto size = format::bytes_of(tensor.dtype, count);
    if (!size) continue;
    tensor.end = *size;
    const std::uint64_t limit = random() % 40 + 1;
    std::uint64_t next = 0;
    for (const auto& piece : pieces_of(tensor, limit)) {
      REQUIRE(piece.offset == next);
      const format::Box box{piece.box.offset, piece.box.shape};
      REQUIRE(format::check_box(box, tensor.shape));
      REQUIRE(*format::bytes_of(tensor.dtype, *format::elements(box.shape)) == piece.length);
      // The box's first element is the piece's first byte, and no element between lies outside: one range.
      std::uint64_t first = 0;
      bool cut = false, whole_after = true;
      for (std::size_t d = 0; d < box.shape.size(); ++d) {
        first = first * tensor.shape[d] + box.offset[d];
        if (cut && box.shape[d] != tensor.shape[d]) whole_after = false;
        if (box.shape[d] > 1) cut = true;
      }
      REQUIRE(whole_after);
      if (count != 0) REQUIRE(first * format::bits_of(tensor.dtype) == piece.offset * 8);
      if (format::bits_of(tensor.dtype) % 8 == 0)
        REQUIRE(piece.length <= std::max<std::uint64_t>(limit, format::bits_of(tensor.dtype) / 8));
      next += piece.length;
    }
    REQUIRE(next == *size);
  }
}

TEST_CASE("cli: what a save notes about files is what a restore reads", "[client]") {
  std::vector<SavedFile> files{{.name = "a.safetensors", .is_safetensors = true, .size = 10, .header = "{}"},
                               {.name = "sub/b", .is_safetensors = false, .size = 0, .header = {}}};
  std::vector<MetaItem> meta{{"job", "lr", "0.1"}};
  for (const auto& file : files)
    for (auto& item : meta_of(file)) meta.push_back(item);
  const auto back = saved_files(meta);
  REQUIRE(back);
  REQUIRE(back->size() == 2);
  CHECK((*back)[0].header == "{}");
  CHECK((*back)[0].size == 10);
  CHECK_FALSE((*back)[1].is_safetensors);
  meta.push_back({"../../etc/passwd", "cairn.file", "blob"});
  CHECK_FALSE(saved_files(meta));
  CHECK(blob_parts(0) == 1);
  CHECK(blob_parts(kPieceBytes) == 1);
  CHECK(blob_parts(kPieceBytes + 1) == 2);
}
