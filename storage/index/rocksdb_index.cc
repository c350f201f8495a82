#include "storage/index/rocksdb_index.h"

#include <dirent.h>
#include <fcntl.h>
#include <rocksdb/cache.h>
#include <rocksdb/convenience.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/table.h>
#include <rocksdb/wal_filter.h>
#include <rocksdb/write_batch.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <string_view>
#include <utility>
#include <vector>

#include "proto/common/text.h"
#include "proto/rt/offload.h"
#include "proto/runtime/runtime.h"
#include "storage/index/log_check.h"

namespace cairn::storage {
namespace {

constexpr std::array<const char*, kTables> kNames = {"meta", "chunks", "block_crcs", "records", "log"};

rocksdb::Slice slice(std::string_view bytes) {
  return {bytes.data(), bytes.size()};
}

/// While open: what a failed call means.
Failure failed(std::string_view what, const std::string& path, const rocksdb::Status& status) {
  const auto code = status.IsNoSpace() ? Errc::kNoSpace : status.IsCorruption() ? Errc::kDataLoss : Errc::kFailed;
  return fail(code, std::string(what) + " index " + path + ": " + status.ToString());
}

/// What is on the disk cannot be had: it is damaged, or the disk does not read it.
Failure unreadable(std::string_view what, const std::string& path, const rocksdb::Status& status) {
  const bool io = status.IsIOError() && status.ToString().find(errno_text(EIO)) != std::string::npos;
  if (!io) return failed(what, path, status);
  return fail(Errc::kDataLoss, std::string(what) + " index " + path + ": " + status.ToString());
}

Failure damaged(const std::string& path, Error why) {
  if (why.code != Errc::kDataLoss) return fail(std::move(why));
  return fail(Errc::kDataLoss, "index " + path + " is damaged, its target cannot be used: " + why.message);
}

Failure open_failed(const std::string& path, const rocksdb::Status& status) {
  const std::string text = status.ToString();
  if (status.IsIOError() && text.find(path + "/LOCK: ") != text.npos)
    return fail(Errc::kBusy, "index " + path + ": another cairnd has it open");
  if (status.IsIOError() && text.find("Permission denied") != text.npos)
    return fail(Errc::kDenied, "open index " + path + ": " + text);
  // A file that the database names and does not find is damage too.
  if (status.IsCorruption() || status.IsNotFound() || status.IsPathNotFound())
    return damaged(path, Error{Errc::kDataLoss, text});
  return failed("open", path, status);
}

/// Without its CURRENT file RocksDB would take the directory for a new one and remove what lies there.
Result<void> check_files(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(path.c_str()), [](DIR* d) { return ::closedir(d); });
  if (!listing) return fail(Errc::kFailed, "list index " + path + ": " + errno_text(errno));
  bool current = false;
  std::string data;
  while (const dirent* entry = ::readdir(listing.get())) {
    const std::string_view name = entry->d_name;
    current = current || name == "CURRENT";
    if (name.ends_with(".sst") || name.ends_with(".log")) data = name;
  }
  if (!current && !data.empty())
    return fail(Errc::kDataLoss, "index " + path + " is damaged, its target cannot be used: " + data +
                                     " is there and the file CURRENT is missing");
  return {};
}

/// RocksDB says which logs it is about to replay; those that must be whole are checked first. Refusing the first record
/// ends the open before anything is rewritten.
class FinishedLogs final : public rocksdb::WalFilter {
 public:
  explicit FinishedLogs(std::string path) : path_(std::move(path)) {}
  const char* Name() const override { return "cairn.finished_logs"; }
  void ColumnFamilyLogNumberMap(const std::map<uint32_t, uint64_t>& needed,
                                const std::map<std::string, uint32_t>& /*names*/) override {
    std::uint64_t first = UINT64_MAX;
    for (const auto& [table, log] : needed) first = std::min(first, log);
    checked_ = check_finished_logs(path_, first);
  }
  WalProcessingOption LogRecordFound(unsigned long long /*log*/, const std::string& /*file*/,
                                     const rocksdb::WriteBatch& /*batch*/, rocksdb::WriteBatch* /*changed*/,
                                     bool* /*is_changed*/) override {
    return checked_ ? WalProcessingOption::kContinueProcessing : WalProcessingOption::kCorruptedRecord;
  }
  const Result<void>& checked() const { return checked_; }

 private:
  std::string path_;
  Result<void> checked_;
};

rocksdb::ColumnFamilyOptions table_options(const RocksDbOptions& options, std::shared_ptr<rocksdb::Cache> cache,
                                           std::string_view name) {
  rocksdb::BlockBasedTableOptions blocks;
  blocks.block_cache = std::move(cache);
  blocks.cache_index_and_filter_blocks = true;  // else they live outside the budget
  blocks.pin_l0_filter_and_index_blocks_in_cache = true;
  blocks.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));  // "is this chunk new?" is asked for every chunk
  blocks.format_version = 5;
  blocks.checksum = rocksdb::kXXH3;
  rocksdb::ColumnFamilyOptions table;
  table.table_factory.reset(rocksdb::NewBlockBasedTableFactory(blocks));
  table.write_buffer_size = options.memory_bytes / 8;
  table.max_write_buffer_number = 2;
  table.compression = name == "block_crcs" ? rocksdb::kNoCompression : rocksdb::kLZ4Compression;
  table.force_consistency_checks = true;
  table.paranoid_file_checks = true;  // reads each new table back before the log that it replaces may go
  return table;
}

/// RocksDB's diary, file LOG of the index: warnings of this start, and LOG.old of the one before. RocksDB's own logger
/// ends the process at the first line after one that could not be written, when a disk that fails is what it should
/// tell about: here such lines are lost.
class InfoLog final : public rocksdb::Logger {
 public:
  explicit InfoLog(const std::string& path) : Logger(rocksdb::InfoLogLevel::WARN_LEVEL) {
    ::rename((path + "/LOG").c_str(), (path + "/LOG.old").c_str());
    fd_ = ::open((path + "/LOG").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  }
  ~InfoLog() override {
    if (fd_ >= 0) ::close(fd_);
  }
  using Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    char line[1024];
    const int size = std::vsnprintf(line, sizeof line - 1, format, arguments);
    if (fd_ < 0 || size < 0 || lines_.fetch_add(1) >= kLinesMax) return;
    const auto end = std::min<std::size_t>(static_cast<std::size_t>(size), sizeof line - 2);
    line[end] = '\n';
    static_cast<void>(!::write(fd_, line, end + 1));
  }

 private:
  static constexpr std::uint32_t kLinesMax = 4096;
  int fd_ = -1;
  std::atomic<std::uint32_t> lines_ = 0;
};

rocksdb::DBOptions database_options(const std::string& path, const RocksDbOptions& options) {
  rocksdb::DBOptions db;
  db.create_if_missing = true;
  db.create_missing_column_families = true;
  db.paranoid_checks = true;
  // The default drops everything after a damaged log record and opens all the same (protocol.md 6).
  db.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  db.recycle_log_file_num = 0;
  db.track_and_verify_wals_in_manifest = true;
  db.verify_sst_unique_id_in_manifest = true;
  db.max_bgerror_resume_count = 0;  // fail-stop: a failed write is not tried again behind our back
  db.db_write_buffer_size = options.memory_bytes / 2;
  db.max_total_wal_size = options.memory_bytes;
  db.max_open_files = options.open_files_max;
  db.max_background_jobs = 2;
  db.info_log = std::make_shared<InfoLog>(path);
  db.stats_dump_period_sec = 0;
  db.stats_persist_period_sec = 0;
  return db;
}

/// The open database. Everything in it is safe from any thread.
struct Database {
  std::string path;
  std::unique_ptr<rocksdb::DB> db;
  std::vector<std::unique_ptr<rocksdb::ColumnFamilyHandle>> handles;  // destroyed before `db`
  std::array<rocksdb::ColumnFamilyHandle*, kTables> tables{};

  Database() = default;
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;
  ~Database() {
    if (db) rocksdb::CancelAllBackgroundWork(db.get(), true);  // compaction goes on at the next start
    handles.clear();
  }
  rocksdb::ColumnFamilyHandle* table(Table table) const { return tables[static_cast<std::size_t>(table)]; }

  static Result<std::unique_ptr<Database>> open(const std::string& path, const RocksDbOptions& options) {
    if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
      const int error = errno;
      const auto code = error == EACCES || error == EROFS ? Errc::kDenied
                        : error == ENOSPC                 ? Errc::kNoSpace
                        : error == ENOENT                 ? Errc::kNotFound
                                                          : Errc::kFailed;
      return fail(code, "create index " + path + ": " + errno_text(error));
    }
    CHECK_OK(check_files(path));
    if (auto manifest = check_manifest(path); !manifest) return damaged(path, std::move(manifest).error());
    auto opened = std::make_unique<Database>();
    opened->path = path;
    FinishedLogs logs(path);
    auto db_options = database_options(path, options);
    db_options.wal_filter = &logs;  // used by open only
    const auto cache = rocksdb::NewLRUCache(options.memory_bytes / 2);
    std::vector<rocksdb::ColumnFamilyDescriptor> tables;
    tables.emplace_back(rocksdb::kDefaultColumnFamilyName, table_options(options, cache, "default"));  // always there
    for (const char* name : kNames) tables.emplace_back(name, table_options(options, cache, name));
    std::vector<rocksdb::ColumnFamilyHandle*> handles;
    rocksdb::DB* db = nullptr;
    const auto status = rocksdb::DB::Open(db_options, path, tables, &handles, &db);
    if (status.IsInvalidArgument() && status.ToString().find("Column families not opened") != std::string::npos)
      return fail(Errc::kInvalid,
                  "index " + path + " has tables that only a newer version knows: " + status.ToString());
    opened->db.reset(db);
    for (auto* handle : handles) opened->handles.emplace_back(handle);
    if (!logs.checked()) return damaged(path, logs.checked().error());
    if (!status.ok()) return open_failed(path, status);
    for (std::size_t i = 0; i < kTables; ++i) opened->tables[i] = handles[i + 1];
    return opened;
  }

  /// Called by one thread only. Fail-stop is ours: RocksDB takes up writing again once a full disk has space.
  Result<void> commit(const Batch& batch, bool sync) {
    if (failure_) return fail(*failure_);
    auto committed = write(batch, sync);
    if (!committed) failure_ = committed.error();
    return committed;
  }

  Result<void> write(const Batch& batch, bool sync) const {
    rocksdb::WriteBatch changes;
    for (const auto& change : batch.changes()) {
      const auto status = change.value ? changes.Put(table(change.table), slice(change.key), slice(*change.value))
                                       : changes.Delete(table(change.table), slice(change.key));
      if (!status.ok()) return failed("commit to", path, status);
    }
    rocksdb::WriteOptions how;
    how.sync = sync;
    const auto status = batch.empty() && sync ? db->SyncWAL() : db->Write(how, &changes);
    if (!status.ok()) return failed("commit to", path, status);
    return {};
  }

  /// `in_memory`: false is returned, and nothing read, when the answer is not in memory.
  Result<bool> get(Table from, const std::string& key, bool in_memory, std::optional<std::string>& out) const {
    rocksdb::ReadOptions how;
    how.verify_checksums = true;
    if (in_memory) how.read_tier = rocksdb::kBlockCacheTier;
    rocksdb::PinnableSlice value;
    const auto status = db->Get(how, table(from), slice(key), &value);
    if (status.IsIncomplete()) return false;
    // RocksDB answers "found", without the value, when the table's file is not even open: see TableCache::Get. Only a
    // read that may go to the disk is believed about an empty value.
    if (in_memory && status.ok() && value.empty()) return false;
    if (status.IsNotFound())
      out.reset();
    else if (!status.ok())
      return unreadable("read from", path, status);
    else
      out.emplace(value.data(), value.size());
    return true;
  }

  Result<std::vector<IndexEntry>> scan(Table in, const std::string& from, const std::string& to,
                                       std::size_t limit) const {
    rocksdb::ReadOptions how;
    how.verify_checksums = true;
    how.fill_cache = limit <= 1000;  // a walk over everything would push out what is in use
    const auto end = slice(to);
    if (!to.empty()) how.iterate_upper_bound = &end;
    const std::unique_ptr<rocksdb::Iterator> at(db->NewIterator(how, table(in)));
    std::vector<IndexEntry> entries;
    for (at->Seek(slice(from)); entries.size() < limit && at->Valid(); at->Next())
      entries.push_back({at->key().ToString(), at->value().ToString()});
    if (!at->status().ok()) return unreadable("scan", path, at->status());
    return entries;
  }

  Result<void> verify() const {
    rocksdb::ReadOptions how;
    how.fill_cache = false;
    const auto status = db->VerifyChecksum(how);
    if (!status.ok()) return unreadable("verify", path, status);
    return {};
  }

 private:
  std::optional<Error> failure_;  // of the first failed commit
};

class RocksDbIndex final : public Index {
 public:
  RocksDbIndex(rt::Loop& loop, std::unique_ptr<Database> database, std::unique_ptr<rt::ThreadOffload> committer,
               std::unique_ptr<rt::ThreadOffload> readers)
      : loop_(loop), database_(std::move(database)), committer_(std::move(committer)), readers_(std::move(readers)) {}

  ~RocksDbIndex() override {
    committer_->stop();
    readers_->stop();
  }

  Task<void> commit(Batch batch, bool sync) override {
    return rt::away(loop_, *committer_, [database = database_.get(), batch = std::move(batch), sync] {
      return database->commit(batch, sync);
    });
  }

  Task<std::optional<std::string>> get(Table table, std::string key) override {
    std::optional<std::string> value;
    CO_TRY(const bool found_out, database_->get(table, key, true, value));
    if (found_out) co_return value;
    co_return co_await rt::away(loop_, *readers_, [database = database_.get(), table, key = std::move(key)] {
      std::optional<std::string> slow;
      const auto read = database->get(table, key, false, slow);
      return read ? Result<std::optional<std::string>>(std::move(slow)) : fail(read.error());
    });
  }

  Task<std::vector<IndexEntry>> scan(Table table, std::string from, std::string to, std::size_t limit) override {
    return rt::away(loop_, *readers_,
                    [database = database_.get(), table, from = std::move(from), to = std::move(to), limit] {
                      return database->scan(table, from, to, limit);
                    });
  }

  Task<void> verify() override {
    return rt::away(loop_, *readers_, [database = database_.get()] { return database->verify(); });
  }

 private:
  rt::Loop& loop_;
  std::unique_ptr<Database> database_;            // used by the threads until they have stopped
  std::unique_ptr<rt::ThreadOffload> committer_;  // one thread: a commit blocks until the disk has it
  std::unique_ptr<rt::ThreadOffload> readers_;
};

}  // namespace

Task<std::unique_ptr<Index>> open_rocksdb_index(rt::Runtime runtime, std::string path, RocksDbOptions options) {
  if (options.memory_bytes < 8 * kMiB) co_return fail(Errc::kInvalid, "index memory: less than 8 MiB");
  if (options.reader_threads < 1 || options.reader_threads > 16)
    co_return fail(Errc::kInvalid, "index reader_threads is not in 1 .. 16");
  if (options.open_files_max < 32) co_return fail(Errc::kInvalid, "index open_files_max: less than 32");
  auto committer = rt::make_thread_offload(runtime.loop, 1);
  CO_TRY(auto database,
         co_await rt::away(runtime.loop, *committer, [path, options] { return Database::open(path, options); }));
  auto readers = rt::make_thread_offload(runtime.loop, options.reader_threads);
  co_return std::make_unique<RocksDbIndex>(runtime.loop, std::move(database), std::move(committer), std::move(readers));
}

}  // namespace cairn::storage
