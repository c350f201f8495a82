#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/reader.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "storage/format/index_pages.h"
#include "storage/format/manifest.h"
#include "storage/format/restore_plan.h"

namespace cairn::wire {
class StepInfo;
}

namespace cairn::client {

struct StepSummary {
  std::uint64_t step = 0;
  OwnerId owner;
  std::uint32_t world_size = 0;
  std::uint64_t data_bytes = 0;
  std::uint32_t tensors = 0, blobs = 0;
  std::int64_t committed_unix_nanos = 0;
  Launch launch;
  RunEpoch run_epoch;
  bool pinned = false;
  std::uint64_t pin_revision = 0;
  std::uint64_t index_bytes = 0;
};
Result<StepSummary> summary_of(const wire::StepInfo& info);

/// A committed step, read on demand: of the index only the pages that can hold what is asked for, of the data only the
/// bytes wanted.
///
/// Threads: the loop.
/// source:  ARCHITECTURE.md, "A restore"
class StepReader : public std::enable_shared_from_this<StepReader> {
 public:
  /// `step`: absent = the highest committed one. As long as the reader lives and the daemon hears of it, the step can
  /// be read, also when it is removed or replaced meanwhile. errors: kNotFound;  kBusy  too much is open for reading
  static Task<std::shared_ptr<StepReader>> open(std::shared_ptr<Session> session, std::string bucket, std::string run,
                                                std::optional<std::uint64_t> step, rt::Duration timeout);
  ~StepReader();

  const StepSummary& summary() const { return summary_; }
  const format::Root& root() const { return root_; }
  /// See Protection::Held::silence().
  rt::Duration silence() const { return held_->silence(); }

  /// Entries that match; no queries: the whole index.
  Task<format::Contents> find(std::vector<format::Query> queries);
  struct Wanted {
    std::string tensor;
    std::optional<format::Box> box;  // absent: all of it
  };
  /// What to read to fill memory of sizes[i] bytes with wanted[i], row-major.
  /// errors: kNotFound  tensor or box;  kInvalid;  kDataLoss;  kDeleted
  Task<format::RestorePlan> plan(std::vector<Wanted> wanted, std::vector<std::uint64_t> sizes);
  /// Fills destinations[i], which have the sizes planned for. errors: kDataLoss  names the chunk;  kDeleted
  Task<ReadStats> read(format::RestorePlan plan, std::vector<std::span<std::byte>> destinations);
  /// Both.
  Task<ReadStats> restore(std::vector<Wanted> wanted, std::vector<std::span<std::byte>> destinations);
  /// Of the index, so far.
  std::uint64_t index_bytes_read() const { return index_bytes_read_; }
  /// Bytes of a blob found by find().
  Task<std::string> blob(format::BlobEntry entry);
  /// Proves coverage again, reads everything, compares each shard with the CRC in its entry. `progress`: bytes done, in
  /// all.
  Task<ReadStats> verify(std::function<void(std::uint64_t, std::uint64_t)> progress);

 private:
  StepReader(std::shared_ptr<Session> session, std::string bucket, std::string run, rt::Duration timeout);
  Task<std::string> read_index(std::uint64_t offset, std::uint64_t size);
  /// Into `out`, which must outlive the call.
  Task<void> read_pages(std::uint64_t offset, std::uint64_t size, std::string& out);
  Task<ReadStats> verify_extents(std::vector<format::Extent> extents, std::uint32_t crc, std::string what,
                                 std::function<void(std::uint64_t)> progress);
  /// What an error of a read means here.
  Error explain(Error error) const;
  Result<void> check_protected() const;

  std::shared_ptr<Session> session_;
  std::string bucket_, run_;
  rt::Duration timeout_;
  StepSummary summary_;
  std::unique_ptr<wire::StepInfo> info_;
  std::shared_ptr<const Protection::Held> held_;
  format::Root root_;
  std::uint64_t index_bytes_read_ = 0;
};

/// All steps of a run, a page at a time; runs of a bucket.
struct StepPage {
  std::vector<StepSummary> steps;
  bool more = false;
};
Task<StepPage> list_steps(std::shared_ptr<Session> session, std::string bucket, std::string run,
                          std::optional<std::uint64_t> after, std::uint32_t limit, rt::TimePoint deadline);
struct RunPage {
  std::vector<std::string> runs;
  bool more = false;
};
Task<RunPage> list_runs(std::shared_ptr<Session> session, std::string bucket, std::string after, std::uint32_t limit,
                        rt::TimePoint deadline);
struct Activity {
  bool active = false;
  Launch launch;
  std::uint64_t step = 0;
  std::uint32_t ranks = 0;
};
Task<Activity> run_activity(std::shared_ptr<Session> session, std::string bucket, std::string run,
                            rt::TimePoint deadline);

}  // namespace cairn::client
