// Reads everything in copies of a data directory that have one bit flipped, with the daemon's storage engine.
//
//   store_reader PRISTINE SCRATCH
//
// Each line of input is "FILE BYTE BIT" (FILE in PRISTINE) or "-", nothing flipped; each gets one line of output:
//   same              every record, and every byte of every chunk, is what the first run without a flip has read
//   damaged WHAT      the target is refused, or something cannot be read, because of damage; all else is the same
//   refused WHAT      the same, with another code than DATA_LOSS
//   WRONG WHAT        something is there, not there or different, and nobody says so

#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <sstream>

#include "proto/runtime/runtime.h"
#include "storage/disk/directory.h"
#include "storage/index/rocksdb_index.h"
#include "storage/target/target.h"

namespace cairn::storage {
namespace {

namespace fs = std::filesystem;

struct NoLog final : rt::Log {
  void write(rt::Level, std::string_view, std::initializer_list<rt::Field>) override {}
};

/// What a target holds, by name; a value that cannot be read because of damage is absent and counted.
struct Content {
  std::map<std::string, std::string> values;
  std::set<std::string> damaged;
  std::string first_damage;
};

/// A file without its holes: segments are mostly those.
struct Image {
  std::uint64_t size = 0;
  std::map<std::uint64_t, std::string> pieces;
};

constexpr std::size_t kPiece = 4096;

Image image_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  Image out;
  std::string piece(kPiece, '\0');
  while (in.read(piece.data(), kPiece) || in.gcount() > 0) {
    const auto got = static_cast<std::size_t>(in.gcount());
    if (std::string_view(piece).substr(0, got).find_first_not_of('\0') != std::string::npos)
      out.pieces.emplace(out.size, piece.substr(0, got));
    out.size += got;
  }
  return out;
}

void write_image(const fs::path& path, const Image& image) {
  std::error_code ignored;
  fs::remove(path, ignored);
  {
    std::ofstream out(path, std::ios::binary);
    for (const auto& [at, piece] : image.pieces) {
      out.seekp(static_cast<std::streamoff>(at));
      out.write(piece.data(), static_cast<std::streamsize>(piece.size()));
    }
  }
  fs::resize_file(path, image.size);
}

class Store {
 public:
  Store(fs::path pristine, fs::path scratch) : scratch_(std::move(scratch)) {
    for (const auto& entry : fs::recursive_directory_iterator(pristine))
      if (entry.is_regular_file()) files_.emplace(fs::relative(entry.path(), pristine), image_of(entry.path()));
    rt::RealRuntime::Options options;
    options.log = std::make_unique<NoLog>();
    runtime_ = std::move(rt::RealRuntime::create(std::move(options))).value();
    io_ = std::move(Io::create(runtime_->seams(), runtime_->loop(), {.backend = IoBackend::kThreads, .threads = 1}))
              .value();
    units_ = std::move(rt::UnitPool::create(runtime_->loop(), 8, kUnitBytes)).value();
  }

  std::string answer(const std::string& line) {
    restore();
    if (line != "-") {
      std::istringstream words(line);
      std::string file;
      std::uint64_t at = 0;
      int bit = 0;
      words >> file >> at >> bit;
      const auto path = scratch_ / file;
      std::fstream bytes(path, std::ios::in | std::ios::out | std::ios::binary);
      bytes.seekg(static_cast<std::streamoff>(at));
      const char before = static_cast<char>(bytes.get());
      bytes.seekp(static_cast<std::streamoff>(at));
      bytes.put(static_cast<char>(before ^ (1 << bit)));
      if (!bytes) return "WRONG cannot flip " + line;
    }
    Content found;
    const auto read = rt::run(runtime_->loop(), read_all(this, &found));
    if (!read) {
      if (read.error().code == Errc::kDataLoss) return "damaged " + read.error().message;
      return "refused " + std::string(name_of(read.error().code)) + ": " + read.error().message;
    }
    if (!truth_) truth_ = found;
    for (const auto& [name, value] : truth_->values) {
      const auto at = found.values.find(name);
      if (at == found.values.end() && !found.damaged.contains(name)) return "WRONG " + name + " is not there";
      if (at != found.values.end() && at->second != value) return "WRONG " + name + " is something else";
    }
    for (const auto& [name, value] : found.values)
      if (!truth_->values.contains(name)) return "WRONG " + name + " is there";
    return found.damaged.empty() ? "same" : "damaged " + found.first_damage;
  }

 private:
  void restore() {
    fs::remove_all(scratch_);
    for (const auto& [name, image] : files_) {
      fs::create_directories((scratch_ / name).parent_path());
      write_image(scratch_ / name, image);
    }
  }

  static Task<void> read_all(Store* self, Content* out) {
    const auto path = self->scratch_.string();
    CO_TRY(auto disk, co_await open_directory(self->runtime_->seams(), self->io_, path));
    CO_CHECK_OK(co_await Target::check(*disk));
    CO_TRY(auto index,
           co_await open_rocksdb_index(self->runtime_->seams(), path + "/index", {.memory_bytes = 8 * kMiB}));
    Target::Options options;
    options.chunks.ballast_bytes = 0;
    CO_TRY(const auto target,
           co_await Target::open(self->runtime_->seams(), std::move(disk), std::move(index), *self->units_, options));
    auto read = co_await read_tables(*target, out);
    if (read) read = co_await read_chunks(*target, out);
    CO_CHECK_OK(co_await target->close());
    co_return read;
  }

  static Task<void> read_tables(Target& target, Content* out) {
    const std::pair<Table, const char*> tables[] = {{Table::kMeta, "meta "},
                                                    {Table::kChunks, "chunk "},
                                                    {Table::kBlockCrcs, "crcs "},
                                                    {Table::kRecords, "record "},
                                                    {Table::kLog, "log "}};
    for (const auto& [table, name] : tables) {
      CO_TRY(const auto entries, co_await target.index().scan(table, "", "", 1'000'000));
      for (const auto& entry : entries) {
        if (entry.key == "committer.batch") continue;  // opening counts on
        // Both ways to a value: a scan, and a read that asks the filters.
        CO_TRY(const auto again, co_await target.index().get(table, entry.key));
        std::string key = name;
        for (const char c : entry.key) key += c > ' ' && c <= '~' ? c : '?';
        key += " " + to_hex({reinterpret_cast<const std::uint8_t*>(entry.key.data()), entry.key.size()});
        out->values.emplace(key, again ? *again == entry.value ? entry.value : "two values" : "found by scans only");
      }
    }
    co_return {};
  }

  static Task<void> read_chunks(Target& target, Content* out) {
    auto& chunks = target.chunks();
    CO_TRY(const auto all, co_await chunks.list(std::nullopt, 1'000'000));
    for (const auto& chunk : all) {
      const auto name = "bytes of " + chunk.id.text();
      std::string bytes;
      while (bytes.size() < chunk.length) {
        const auto size = std::min<std::size_t>(chunks.unit_bytes(), chunk.length - bytes.size());
        auto piece =
            co_await chunks.read(chunk.id, static_cast<std::uint32_t>(bytes.size()), static_cast<std::uint32_t>(size));
        if (!piece && piece.error().code != Errc::kDataLoss) co_return fail(std::move(piece).error());
        if (!piece) {
          out->damaged.insert(name);
          if (out->first_damage.empty()) out->first_damage = piece.error().message;
          break;
        }
        bytes += piece->bytes.text();
      }
      if (bytes.size() == chunk.length) out->values.emplace(name, std::move(bytes));
    }
    co_return {};
  }

  fs::path scratch_;
  std::map<fs::path, Image> files_;
  std::unique_ptr<rt::RealRuntime> runtime_;
  std::shared_ptr<Io> io_;
  std::unique_ptr<rt::UnitPool> units_;
  std::optional<Content> truth_;
};

}  // namespace
}  // namespace cairn::storage

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: store_reader PRISTINE SCRATCH\n";
    return 2;
  }
  cairn::storage::Store store(argv[1], argv[2]);
  if (const auto truth = store.answer("-"); truth != "same") {
    std::cout << "the pristine copy does not read: " << truth << std::endl;
    return 1;
  }
  std::cout << "ready" << std::endl;
  for (std::string line; std::getline(std::cin, line);) std::cout << store.answer(line) << std::endl;
}
