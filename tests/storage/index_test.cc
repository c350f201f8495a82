#include <signal.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <map>

#include "proto/runtime/runtime.h"
#include "storage/index/rocksdb_index.h"
#include "tests/storage/index_conformance.h"

using namespace cairn;
using namespace cairn::storage;
using namespace cairn::tests;
namespace fs = std::filesystem;

namespace {

struct Fixture {
  std::unique_ptr<rt::RealRuntime> runtime = *rt::RealRuntime::create();
  std::string top;
  std::string path;
  RocksDbOptions options{.memory_bytes = 8 * kMiB};
  std::unique_ptr<Index> open_index;
  int crashes = 0;
  std::string synced_log;
  std::uintmax_t synced_bytes = 0;

  Fixture() {
    // What is synced is not at stake here, the files are: memory is quicker.
    top = std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/cairn-index-XXXXXX";
    REQUIRE(mkdtemp(top.data()) != nullptr);
    path = top + "/index";
  }
  Fixture(const Fixture&) = delete;
  ~Fixture() {
    open_index.reset();
    fs::remove_all(top);
  }

  template <class T>
  Result<T> run(Task<T> task) {
    return rt::run(runtime->loop(), std::move(task));
  }
  Result<std::unique_ptr<Index>> open() { return run(open_rocksdb_index(runtime->seams(), path, options)); }
  Index& index() {
    if (!open_index) {
      auto opened = open();
      INFO((opened ? "" : opened.error().message));
      REQUIRE(opened);
      open_index = *std::move(opened);
    }
    return *open_index;
  }
  void reopen() {
    open_index.reset();
    index();
  }
  rt::Loop& loop() { return runtime->loop(); }
  /// The log as far as it is on disk.
  void synced() {
    const auto logs = files(".log");
    synced_log = logs.empty() ? "" : fs::path(logs.back()).filename().string();
    synced_bytes = logs.empty() ? 0 : fs::file_size(logs.back());
  }
  /// As after kill -9: what was written to files is there, what RocksDB still held in memory is not. With an odd `draw`
  /// as after a power loss: the log ends somewhere behind what was synced.
  void crash(std::uint64_t draw = 0) {
    index();
    const auto left = top + "/crash" + std::to_string(++crashes);
    // RocksDB flushes and deletes in the background: a copy counts only if nothing changed meanwhile.
    std::map<std::string, std::uintmax_t> before;
    do {
      before = sizes();
      std::error_code changed;
      fs::remove_all(left);
      fs::copy(path, left, fs::copy_options::recursive, changed);
      if (changed) before.clear();
    } while (before.empty() || before != sizes());
    open_index.reset();
    fs::remove_all(path);
    fs::rename(left, path);
    const auto log = fs::path(path) / synced_log;
    if (draw % 2 == 1 && !synced_log.empty() && fs::exists(log) && files(".log").back() == log.string()) {
      const auto size = fs::file_size(log);
      fs::resize_file(log, synced_bytes + draw / 2 % (size - synced_bytes + 1));
    }
    synced_log.clear();
  }
  std::map<std::string, std::uintmax_t> sizes() {
    std::map<std::string, std::uintmax_t> found;
    std::error_code gone;  // deleted since it was listed
    for (const auto& entry : fs::directory_iterator(path)) found[entry.path()] = entry.file_size(gone);
    return found;
  }
  void put(const std::string& key, const std::string& value) {
    Batch batch;
    batch.put(Table::kRecords, key, value);
    REQUIRE(run(index().commit(std::move(batch), true)));
  }
  std::vector<std::string> files(std::string_view ending) {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(path))
      if (entry.path().filename().string().ends_with(ending)) found.push_back(entry.path());
    std::ranges::sort(found);
    return found;
  }
  /// Enough to have several tables on disk, then a log with the newest.
  void fill() {
    for (int i = 0; i < 12; ++i) {
      Batch batch;
      for (int k = 0; k < 400; ++k)
        batch.put(Table::kRecords, "key" + std::to_string(i * 1000 + k), std::string(1000, static_cast<char>('a' + i)));
      REQUIRE(run(index().commit(std::move(batch), true)));
    }
  }
};

void flip(const std::string& file, std::uintmax_t at) {
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  bytes.seekg(static_cast<std::streamoff>(at));
  const char before = static_cast<char>(bytes.get());
  bytes.seekp(static_cast<std::streamoff>(at));
  bytes.put(static_cast<char>(before ^ 0x10));
}

}  // namespace

TEST_CASE("index: behaves like a map, through reopening and crashes", "[index]") {
  // CAIRN_INDEX_SEEDS=500: as many.
  const char* seeds = std::getenv("CAIRN_INDEX_SEEDS");
  const auto make = [](std::uint64_t) { return std::make_unique<Fixture>(); };
  for (std::uint64_t seed = 1; seed <= (seeds != nullptr ? std::stoull(seeds) : 6); ++seed)
    index_behaves_like_a_map(make, seed, 300);
}

TEST_CASE("index: changes inside a batch apply in order", "[index]") {
  Fixture f;
  index_orders_changes_inside_a_batch(f);
}

TEST_CASE("index: a synced commit covers what came before it", "[index]") {
  Fixture f;
  index_sync_covers_what_came_before(f);
}

TEST_CASE("index: it survives that its directory is new, and is its owner's alone", "[index]") {
  Fixture f;
  f.put("a", "1");
  struct stat status{};
  REQUIRE(stat(f.path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0700);
}

TEST_CASE("index: one process at a time", "[index]") {
  Fixture f;
  f.put("a", "1");
  const auto second = f.open();
  REQUIRE_FALSE(second);
  CHECK(second.error().code == Errc::kBusy);
  CHECK(second.error().message == "index " + f.path + ": another cairnd has it open");
}

TEST_CASE("index: reads answer from tables on disk as well as from memory", "[index]") {
  Fixture f;
  f.fill();
  f.reopen();
  CHECK_FALSE(f.files(".sst").empty());
  CHECK(f.run(f.index().get(Table::kRecords, "key0"))->value() == std::string(1000, 'a'));
  CHECK(f.run(f.index().get(Table::kRecords, "key11399"))->value() == std::string(1000, 'l'));
  CHECK_FALSE(f.run(f.index().get(Table::kRecords, "absent"))->has_value());
  CHECK(f.run(f.index().scan(Table::kRecords, "", "", 100'000))->size() == 4800);
}

TEST_CASE("index: values are whole also where a table's file is not open yet", "[index]") {
  // Goal: RocksDB says "found" without a value for such a table when asked to stay in memory. Method: opening opens a
  // quarter of the tables that may be open at once; here there are more.
  Fixture f;
  f.options.open_files_max = 32;
  std::size_t keys = 0;
  f.index();
  const auto entry = [](std::size_t i) {
    return std::pair(table_of(i % kTables), std::to_string(i * 7'919 % 1'000'003));
  };
  while (f.files(".sst").size() <= 9) {
    Batch batch;
    for (int i = 0; i < 500; ++i) {
      const auto [table, key] = entry(keys++);
      batch.put(table, key, key + std::string(2000, 'v'));
    }
    REQUIRE(f.run(f.index().commit(std::move(batch), false)));
  }
  f.reopen();
  for (std::size_t i = 0; i < keys; i += 7) {
    const auto [table, key] = entry(i);
    const auto value = f.run(f.index().get(table, key));
    REQUIRE(value);
    REQUIRE(*value == key + std::string(2000, 'v'));
  }
}

TEST_CASE("index: a damaged log never yields anything but a beginning of what was committed", "[index]") {
  // Goal: RocksDB's default recovery opens with keys missing in the middle. Ours refuses, or ends early where the end
  // looks torn, which the committer's mark notices. Method: flip one byte of the log, at many places.
  Fixture f;
  constexpr int kKeys = 60;
  for (int i = 0; i < kKeys; ++i) f.put("k" + std::to_string(100 + i), std::string(40, 'v'));
  f.crash();  // leaves the log as it is; closing would, too
  const auto log = f.files(".log");
  REQUIRE(log.size() == 1);
  const auto size = fs::file_size(log[0]);
  const auto pristine = f.top + "/pristine";
  fs::copy(f.path, pristine);
  int refused = 0;
  for (std::uintmax_t at = 3; at < size; at += size / 60) {
    INFO("byte " << at << " of " << size);
    fs::remove_all(f.path);
    fs::copy(pristine, f.path);
    flip(log[0], at);
    auto opened = f.open();
    if (!opened) {
      CHECK(opened.error().code == Errc::kDataLoss);
      CHECK(opened.error().message.starts_with("index " + f.path + " is damaged, its target cannot be used: "));
      ++refused;
      continue;
    }
    const auto entries = f.run((*opened)->scan(Table::kRecords, "", "", 1000));
    REQUIRE(entries);
    for (std::size_t i = 0; i < entries->size(); ++i) {
      CHECK((*entries)[i].key == "k" + std::to_string(100 + i));
      CHECK((*entries)[i].value == std::string(40, 'v'));
    }
  }
  CHECK(refused > 30);
}

TEST_CASE("index: a bit flipped in a log that is not the newest is always noticed", "[index]") {
  // Goal: RocksDB takes some damage in the middle of an older log for its torn end, drops what follows and goes on with
  // the newer log: records are gone and the newest batch number is there. Method: two logs live because one table has
  // been written out and others have not; flip bits, of the first headers all, of the rest a sample.
  Fixture f;
  int keys = 0;
  f.index();
  while (f.files(".log").size() < 2 || fs::file_size(f.files(".log").back()) == 0) {
    Batch batch;
    const auto key = "k" + std::to_string(10'000 + keys++);
    batch.put(Table::kRecords, key, std::string(20, 'v'));
    batch.put(Table::kChunks, key, std::string(40'000, 'w'));
    REQUIRE(f.run(f.index().commit(std::move(batch), true)));
    REQUIRE(keys < 1000);
  }
  f.crash();
  const auto logs = f.files(".log");
  REQUIRE(logs.size() == 2);
  const auto older = std::min(logs[0], logs[1]);
  const auto size = fs::file_size(older);
  const auto pristine = f.top + "/pristine";
  fs::copy(f.path, pristine);
  CHECK(f.run(f.index().scan(Table::kRecords, "", "", 100'000))->size() == static_cast<std::size_t>(keys));
  f.open_index.reset();
  std::vector<std::pair<std::uintmax_t, int>> places;
  for (std::uintmax_t at = 0; at < 7; ++at)
    for (int bit = 0; bit < 8; ++bit) places.emplace_back(at, bit);
  for (std::uintmax_t block = 32'768; block + 7 < size && block < 20 * 32'768; block += 32'768)
    for (const int bit : {0, 2, 5}) places.emplace_back(block + 4 + block / 32'768 % 3, bit);
  for (std::uintmax_t at = 11; at < size; at += size / 60) places.emplace_back(at, static_cast<int>(at % 8));
  for (const auto& [at, bit] : places) {
    INFO("byte " << at << " bit " << bit << " of " << size);
    fs::remove_all(f.path);
    fs::copy(pristine, f.path);
    {
      std::fstream file(older, std::ios::in | std::ios::out | std::ios::binary);
      file.seekg(static_cast<std::streamoff>(at));
      const auto old = static_cast<char>(file.get());
      file.seekp(static_cast<std::streamoff>(at));
      file.put(static_cast<char>(old ^ (1 << bit)));
    }
    for (int tries = 0; tries < 2; ++tries) {  // the refusal has changed nothing
      const auto opened = f.open();
      REQUIRE_FALSE(opened);
      CHECK(opened.error().code == Errc::kDataLoss);
      CHECK(opened.error().message.starts_with("index " + f.path + " is damaged, its target cannot be used: "));
    }
  }
  std::printf("%zu of %zu flips of an older log refused\n", places.size(), places.size());
}

TEST_CASE("index: a bit flipped in the MANIFEST is noticed, or changes nothing", "[index]") {
  // Goal: RocksDB reads the MANIFEST as it reads a log; a record that it drops is tables or logs forgotten. Method: the
  // keys of every table and log are there, or the index does not open.
  Fixture f;
  f.index();
  int keys = 0;
  while (f.files(".sst").size() < 4) {
    Batch batch;
    const auto key = "k" + std::to_string(10'000 + keys++);
    batch.put(Table::kRecords, key, std::string(20, 'v'));
    batch.put(Table::kChunks, key, std::string(40'000, 'w'));
    REQUIRE(f.run(f.index().commit(std::move(batch), true)));
    REQUIRE(keys < 1000);
  }
  f.crash();
  std::string manifest;
  for (const auto& file : f.files(""))
    if (file.find("/MANIFEST-") != std::string::npos) manifest = file;
  REQUIRE_FALSE(manifest.empty());
  const auto size = fs::file_size(manifest);
  f.open_index.reset();
  const auto pristine = f.top + "/pristine";
  fs::copy(f.path, pristine);
  int refused = 0, opens = 0;
  const auto step = std::getenv("CAIRN_EVERY_FLIP") != nullptr ? 1 : 5;
  for (std::uintmax_t n = 0; n < size * 8; n += static_cast<std::uintmax_t>(step)) {
    INFO("byte " << n / 8 << " bit " << n % 8 << " of " << size);
    fs::remove_all(f.path);
    fs::copy(pristine, f.path);
    {
      std::fstream file(manifest, std::ios::in | std::ios::out | std::ios::binary);
      file.seekg(static_cast<std::streamoff>(n / 8));
      const auto old = static_cast<char>(file.get());
      file.seekp(static_cast<std::streamoff>(n / 8));
      file.put(static_cast<char>(old ^ (1 << n % 8)));
    }
    ++opens;
    const auto opened = f.open();
    if (!opened) {
      CHECK(opened.error().code == Errc::kDataLoss);
      ++refused;
      continue;
    }
    const auto entries = f.run((*opened)->scan(Table::kRecords, "", "", 100'000));
    REQUIRE(entries);
    CHECK(entries->size() == static_cast<std::size_t>(keys));
    const auto chunks = f.run((*opened)->scan(Table::kChunks, "", "", 100'000));
    REQUIRE(chunks);
    CHECK(chunks->size() == static_cast<std::size_t>(keys));
  }
  std::printf("%d of %d flips of the MANIFEST refused\n", refused, opens);
}

TEST_CASE("index: a log torn at its end opens with the batches before the tear", "[index]") {
  Fixture f;
  f.put("a", std::string(100, '1'));
  f.put("b", std::string(100, '2'));
  f.crash();
  const auto log = f.files(".log");
  REQUIRE(log.size() == 1);
  fs::resize_file(log[0], fs::file_size(log[0]) - 50);
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
  CHECK_FALSE(f.run(f.index().get(Table::kRecords, "b"))->has_value());
}

TEST_CASE("index: damaged or missing files are data loss, at open or at the read, never other values", "[index]") {
  Fixture f;
  f.fill();
  f.open_index.reset();
  const auto pristine = f.top + "/pristine";
  fs::copy(f.path, pristine);
  const auto tables = f.files(".sst");
  REQUIRE(tables.size() >= 1);
  int seen = 0, wrong_code = 0;
  const auto check = [&](bool must_be_noticed) {
    bool noticed = false;
    const auto note = [&](const Error& error) {
      noticed = true;
      ++seen;
      wrong_code += error.code != Errc::kDataLoss;
      UNSCOPED_INFO(error.message);
    };
    auto opened = f.open();
    if (!opened) {
      note(opened.error());
    } else if (const auto entries = f.run((*opened)->scan(Table::kRecords, "", "", 100'000)); !entries) {
      note(entries.error());
    } else {
      CHECK(entries->size() == 4800);
      for (const auto& entry : *entries) {
        const auto number = std::stoul(entry.key.substr(3));
        CHECK(entry.value == std::string(1000, static_cast<char>('a' + number / 1000)));
      }
    }
    if (must_be_noticed) CHECK(noticed);
    opened = fail(Errc::kFailed, "closed");
    fs::remove_all(f.path);
    fs::copy(pristine, f.path);
  };
  for (const auto& file : {tables.front(), f.path + "/CURRENT"}) {
    INFO("missing " << file);
    fs::remove(file);
    check(true);
  }
  for (const auto& entry : fs::directory_iterator(pristine))
    if (const auto name = entry.path().filename().string(); name.starts_with("MANIFEST")) {
      INFO("missing " << name);
      fs::remove(f.path + "/" + name);
      check(true);
      for (std::uintmax_t at = 10; at < entry.file_size(); at += entry.file_size() / 10) {
        INFO(name << " byte " << at);
        flip(f.path + "/" + name, at);
        check(false);
      }
    }
  const auto size = fs::file_size(tables.front());
  for (std::uintmax_t at = 5; at < size; at += size / 15) {
    INFO(tables.front() << " byte " << at << " of " << size);
    flip(tables.front(), at);
    check(false);
  }
  CHECK(seen > 15);
  CHECK(wrong_code == 0);
}

TEST_CASE("index: verify reads every table file, past what is in memory", "[index]") {
  Fixture f;
  f.options.memory_bytes = 64 * kMiB;  // one table, written by the reopening: nothing is merged away behind this test
  f.fill();
  f.reopen();
  REQUIRE(f.run(f.open_index->verify()));
  const auto tables = f.files(".sst");
  REQUIRE(tables.size() == 1);
  // Right in the middle: a block of data, or what says where they lie.
  flip(tables.back(), fs::file_size(tables.back()) / 2);
  const auto verified = f.run(f.open_index->verify());
  REQUIRE_FALSE(verified);
  CHECK(verified.error().code == Errc::kDataLoss);
  CHECK_THAT(verified.error().message, Catch::Contains(fs::path(tables.back()).filename().string()));
}

TEST_CASE("index: after a failed commit nothing is committed any more, and what was before is there", "[index]") {
  Fixture f;
  f.put("a", "1");
  signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit small = before;
  small.rlim_cur = 64 * kKiB;
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  Batch large;
  large.put(Table::kRecords, "b", std::string(kMiB, 'x'));
  const auto refused = f.run(f.index().commit(std::move(large), true));
  setrlimit(RLIMIT_FSIZE, &before);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kFailed);
  Batch later;
  later.put(Table::kRecords, "c", "3");
  const auto again = f.run(f.index().commit(std::move(later), true));
  REQUIRE_FALSE(again);
  CHECK(again.error().message == refused.error().message);
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
  f.reopen();
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
  CHECK_FALSE(f.run(f.index().get(Table::kRecords, "c"))->has_value());
}

TEST_CASE("index: a full disk is kNoSpace, and space that comes back does not revive the index", "[index]") {
  Fixture f;
  REQUIRE(fs::create_directory(f.path));
  if (mount("tmpfs", f.path.c_str(), "tmpfs", 0, "size=3m,mode=0700") != 0) {
    WARN("skipped: this user cannot mount a small file system");
    return;
  }
  struct Unmount {
    Fixture& fixture;
    ~Unmount() {
      fixture.open_index.reset();
      umount2(fixture.path.c_str(), MNT_DETACH);
    }
  } unmount{f};
  f.put("a", "1");
  Batch large;
  large.put(Table::kRecords, "b", std::string(4 * kMiB, 'x'));
  const auto refused = f.run(f.index().commit(std::move(large), true));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kNoSpace);
  REQUIRE(mount("tmpfs", f.path.c_str(), "tmpfs", MS_REMOUNT, "size=64m,mode=0700") == 0);
  for (int i = 0; i < 3; ++i) {
    Batch later;
    later.put(Table::kRecords, "c", "3");
    CHECK(f.run(f.index().commit(std::move(later), true)).error().code == Errc::kNoSpace);
  }
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
  f.reopen();
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
  CHECK_FALSE(f.run(f.index().get(Table::kRecords, "b"))->has_value());
}

TEST_CASE("index: everything may be destroyed with calls in flight", "[index]") {
  Fixture f;
  f.put("a", "1");
  {
    rt::Scope scope(f.runtime->loop());
    for (int i = 0; i < 20; ++i) {
      Batch batch;
      batch.put(Table::kRecords, std::to_string(i), std::string(100, 'x'));
      scope.spawn(f.index().commit(std::move(batch), true));
      scope.spawn([](Index& index) -> Task<void> {
        CO_TRY(auto entries, co_await index.scan(Table::kRecords, "", "", 10));
        co_return {};
      }(f.index()));
    }
  }
  f.reopen();  // closed at once and completely, whatever was still queued
  CHECK(f.run(f.index().get(Table::kRecords, "a"))->has_value());
}

TEST_CASE("index: options out of range and a missing parent are refused", "[index]") {
  Fixture f;
  f.options.memory_bytes = kMiB;
  CHECK(f.open().error().code == Errc::kInvalid);
  f.options = {.reader_threads = 0};
  CHECK(f.open().error().code == Errc::kInvalid);
  f.options = {};
  f.path = f.top + "/no/index";
  CHECK(f.open().error().code == Errc::kNotFound);
}
