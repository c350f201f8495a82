#include "storage/target/target.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "storage/chunk_store/layout.h"
#include "storage/chunk_store/segments.h"
#include "storage/disk/aligned_memory.h"
#include "storage/target/superblock.h"

namespace cairn::storage {
namespace {

constexpr const char* kSuperblockName = "superblock";
constexpr const char* kSuperblockTemporary = "superblock.new";
constexpr const char* kMarkName = "mark";
constexpr const char* kMarkTemporary = "mark.new";
constexpr const char* kLockName = "LOCK";

/// Table kMeta, key "target.uuid": the uuid of the superblock, 16 bytes.
constexpr const char* kUuidKey = "target.uuid";

bool contains(const std::vector<std::string>& names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

/// What `disk` holds: its superblock, or nothing when it may be formatted.
Task<std::optional<Superblock>> examine(Disk& disk) {
  CO_TRY(auto names, co_await disk.list());
  if (!contains(names, kSuperblockName)) {
    // The superblock is written last: the rest of an interrupted formatting may be there.
    for (auto& name : names) {
      if (name.starts_with(kSegmentPrefix))
        co_return fail(Errc::kDataLoss, "superblock: missing, but there are segments (" + name + ")");
      if (name != kLockName && name != kMarkName && name != kMarkTemporary && name != kSuperblockTemporary)
        co_return fail(Errc::kInvalid, "the directory is neither empty nor a Cairn target: it holds " + name);
    }
    co_return std::nullopt;
  }
  auto file = co_await disk.open(kSuperblockName);
  if (!file) co_return fail(std::move(file).error().with(kSuperblockName));
  if ((*file)->size() != Superblock::kBytes)
    co_return fail(Errc::kDataLoss, "superblock: " + std::to_string((*file)->size()) + " bytes instead of " +
                                        std::to_string(Superblock::kBytes));
  auto read = co_await (*file)->read(0, aligned_memory(Superblock::kBytes));
  if (!read) co_return fail(std::move(read).error().with(kSuperblockName));
  CO_TRY(auto superblock, decode_superblock(read->bytes, Target::kFormatVersion));
  if (!contains(names, kMarkName)) co_return fail(Errc::kDataLoss, "mark: the file is missing");
  co_return superblock;
}

Task<void> write_superblock(Disk& disk, Superblock superblock) {
  auto memory = aligned_memory(Superblock::kBytes);
  encode_superblock(memory.bytes, superblock);
  CO_TRY(auto names, co_await disk.list());
  if (contains(names, kSuperblockTemporary)) CO_CHECK_OK(co_await disk.unlink(kSuperblockTemporary));
  CO_TRY(auto file, co_await disk.create(kSuperblockTemporary, Superblock::kBytes));
  CO_CHECK_OK(co_await file->write(0, std::move(memory).freeze(Superblock::kBytes)));
  CO_CHECK_OK(co_await file->flush());
  CO_CHECK_OK(co_await disk.rename(kSuperblockTemporary, kSuperblockName));
  co_return co_await disk.sync_directory();
}

/// Without a superblock nothing may be in the index but what an interrupted formatting wrote.
Task<void> check_unused(Index& index) {
  for (auto table : {Table::kChunks, Table::kRecords}) {
    CO_TRY(auto entries, co_await index.scan(table, "", "", 1));
    if (!entries.empty()) co_return fail(Errc::kDataLoss, "superblock: missing, but the index is not empty");
  }
  co_return {};
}

Task<void> check_owner(Index& index, Uuid uuid) {
  CO_TRY(auto stored, co_await index.get(Table::kMeta, kUuidKey));
  if (!stored)
    co_return fail(Errc::kDataLoss, "the index is not the one of target " + uuid.text() + ": it names no target");
  if (*stored != uuid.view()) {
    const auto other = Uuid::from_bytes(*stored);
    co_return fail(Errc::kDataLoss, "the index is not the one of target " + uuid.text() + ": it names " +
                                        (other ? other->text() : "something else"));
  }
  co_return {};
}

class OpenTarget final : public Target {
 public:
  OpenTarget(std::unique_ptr<Disk> disk, std::unique_ptr<Index> index)
      : disk_(std::move(disk)), index_(std::move(index)) {}

  Task<void> start(rt::Runtime runtime, rt::UnitPool& units, Options options) {
    CO_TRY(auto found, co_await examine(*disk_));
    if (!found) CO_CHECK_OK(co_await check_unused(*index_));
    CO_TRY(committer_, co_await Committer::open(runtime, *disk_, *index_, options.bugs));
    if (found) {
      superblock_ = *found;
      CO_CHECK_OK(co_await check_owner(*index_, superblock_.uuid));
    } else {
      CO_CHECK_OK(co_await format(runtime, options));
    }
    // Durable before a segment can carry it: no other start ever has this number.
    superblock_.incarnation++;
    CO_CHECK_OK(co_await write_superblock(*disk_, superblock_));
    CO_CHECK_OK(co_await remove_temporaries());

    disk_->register_memory(units.slab());
    options.chunks.segment_bytes = superblock_.segment_bytes;
    CO_TRY(chunks_, co_await ChunkStore::open(runtime, *disk_, *index_, *committer_, units, superblock_.incarnation,
                                              options.chunks, options.bugs));
    medium_ = make_record_medium(*index_, *committer_);
    records_ = RecordStore::open(runtime, *medium_);
    co_return {};
  }

  Uuid uuid() const override { return superblock_.uuid; }
  std::uint64_t incarnation() const override { return superblock_.incarnation; }
  Disk& disk() override { return *disk_; }
  Index& index() override { return *index_; }
  Committer& committer() override { return *committer_; }
  ChunkStore& chunks() override { return *chunks_; }
  RecordStore& records() override { return *records_; }
  Task<void> verify() override {
    CO_TRY(const auto found, co_await examine(*disk_));
    if (!found || found->uuid != superblock_.uuid || found->incarnation != superblock_.incarnation)
      co_return fail(Errc::kDataLoss, "superblock: not the one that this start has written");
    co_return co_await index_->verify();
  }
  Task<void> close() override {
    CO_CHECK_OK(co_await records_->close());
    CO_CHECK_OK(co_await chunks_->close());
    co_return co_await committer_->close();
  }

 private:
  /// The superblock itself is written last, by start().
  Task<void> format(rt::Runtime runtime, const Options& options) {
    CO_TRY(auto space, co_await disk_->space());
    superblock_ = {.version = kFormatVersion,
                   .oldest_reader = kFormatVersion,
                   .uuid = {},
                   .segment_bytes = segment_bytes_for(space.total_bytes, options.chunks.segment_bytes),
                   .incarnation = 0};
    for (std::size_t half = 0; half < 2; ++half) {
      const auto random = runtime.random.next();
      std::memcpy(superblock_.uuid.bytes.data() + 8 * half, &random, 8);
    }
    Batch batch;
    batch.put(Table::kMeta, kUuidKey, std::string(superblock_.uuid.view()));
    co_return co_await committer_->commit(std::move(batch));
  }

  Task<void> remove_temporaries() {
    CO_TRY(auto names, co_await disk_->list());
    for (const char* name : {kMarkTemporary, kSuperblockTemporary})
      if (contains(names, name)) CO_CHECK_OK(co_await disk_->unlink(name));
    co_return {};
  }

  // In this order: each uses those before it.
  std::unique_ptr<Disk> disk_;
  std::unique_ptr<Index> index_;
  Superblock superblock_;
  std::unique_ptr<Committer> committer_;
  std::unique_ptr<ChunkStore> chunks_;
  std::unique_ptr<RecordMedium> medium_;
  std::unique_ptr<RecordStore> records_;
};

}  // namespace

Task<bool> Target::check(Disk& disk) {
  CO_TRY(const auto superblock, co_await examine(disk));
  co_return superblock.has_value();
}

Task<std::unique_ptr<Target>> Target::open(rt::Runtime runtime, std::unique_ptr<Disk> disk,
                                           std::unique_ptr<Index> index, rt::UnitPool& units, Options options) {
  auto target = std::make_unique<OpenTarget>(std::move(disk), std::move(index));
  CO_CHECK_OK(co_await target->start(runtime, units, options));
  co_return target;
}

}  // namespace cairn::storage
