#include "client/core/step_reader.h"

#include <algorithm>
#include <map>

#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"
#include "storage/format/coverage.h"

namespace cairn::client {
namespace {

constexpr std::uint32_t kReadsInFlight = 4;
constexpr std::uint64_t kVerifySliceBytes = 8 * kMiB;
// Of find(), which so holds at most 16 MiB of pages at once; a single page may be longer (metadata).
constexpr std::size_t kIndexReadsInFlight = 16;
constexpr std::uint64_t kIndexReadBytesMax = 1 * kMiB;

/// Pages [first, last) of a list, which lie side by side.
struct PagesRead {
  std::size_t first = 0, last = 0;
  std::uint64_t size = 0;
  std::string bytes;
};

std::span<std::byte> writable(std::string& text) {
  return std::as_writable_bytes(std::span(text.data(), text.size()));
}

}  // namespace

Result<StepSummary> summary_of(const wire::StepInfo& info) {
  StepSummary s;
  s.step = info.step();
  TRY(s.owner, OwnerId::from_bytes(info.owner()));
  s.world_size = info.world_size();
  s.data_bytes = info.data_bytes();
  s.tensors = info.tensors();
  s.blobs = info.blobs();
  s.committed_unix_nanos = info.committed_unix_nanos();
  s.launch = {info.launch().job(), info.launch().restart()};
  s.run_epoch = {info.run_epoch().loss(), info.run_epoch().count()};
  s.pinned = info.pinned();
  s.pin_revision = info.pin_revision();
  s.index_bytes = info.index_bytes();
  return s;
}

StepReader::StepReader(std::shared_ptr<Session> session, std::string bucket, std::string run, rt::Duration timeout)
    : session_(std::move(session)),
      bucket_(std::move(bucket)),
      run_(std::move(run)),
      timeout_(timeout),
      info_(std::make_unique<wire::StepInfo>()) {}

StepReader::~StepReader() = default;

Task<std::shared_ptr<StepReader>> StepReader::open(std::shared_ptr<Session> session, std::string bucket,
                                                   std::string run, std::optional<std::uint64_t> step,
                                                   rt::Duration timeout) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run));
  auto self = std::shared_ptr<StepReader>(new StepReader(session, bucket, run, timeout));
  wire::StepOpen ask;
  ask.set_bucket(bucket);
  ask.set_run(run);
  if (step) ask.mutable_step()->set_step(*step);
  ask.set_reader(session->protection().draw());
  const auto where = bucket + "/" + run + (step ? " step " + std::to_string(*step) : "");
  const auto asked = session->runtime().loop.now();
  auto sent = co_await session->record_call(wire::Method::kStepOpen, home_group_of(bucket, run), wire::encode(ask),
                                            session->runtime().loop.now() + timeout);
  if (!sent) co_return fail(std::move(sent).error().with(where));
  CO_CHECK_OK(wire::decode(sent->message, *self->info_, "step info"));
  const auto& info = *self->info_;
  CO_TRY(self->summary_, summary_of(info));
  self->held_ = session->protection().hold(ask.reader(), self->summary_.owner,
                                           std::chrono::milliseconds(info.reader_ttl_millis()), asked);
  if (info.root_bytes() == 0 || info.root_bytes() > info.index_bytes())
    co_return fail(Errc::kDataLoss,
                   where + ": the step record names a root page of " + std::to_string(info.root_bytes()) + " bytes");
  auto root = co_await self->read_index(info.index_bytes() - info.root_bytes(), info.root_bytes());
  if (!root) co_return fail(self->explain(std::move(root).error()).with(where));
  if (sha256(*root) != info.root_digest())
    co_return fail(Errc::kDataLoss, where + ": the root page of the index does not match the step record");
  auto decoded = format::decode_root(*root, info.index_bytes());
  if (!decoded) co_return fail(std::move(decoded).error().with(where));
  self->root_ = std::move(*decoded);
  co_return self;
}

Error StepReader::explain(Error error) const {
  if (error.code == Errc::kDeleted)
    error.message =
        "step " + std::to_string(summary_.step) + " was removed while it was being read (" + error.message + ")";
  return error;
}

Result<void> StepReader::check_protected() const {
  if (!held_->lost()) return {};
  return fail(Errc::kDeleted, "step " + std::to_string(summary_.step) +
                                  " was removed while it was being read: the daemon had not heard of this reader for " +
                                  std::to_string(held_->silence() / std::chrono::seconds(1)) + " s; open it again");
}

Task<std::string> StepReader::read_index(std::uint64_t offset, std::uint64_t size) {
  auto self = shared_from_this();
  CO_CHECK_OK(check_protected());
  const std::vector<wire::ExtentRun> runs(info_->index().begin(), info_->index().end());
  CO_TRY(auto extents, extents_in(runs, summary_.owner, offset, size));
  std::string out(size, '\0');
  auto read = co_await read_extents(session_, std::move(extents), writable(out), timeout_);
  if (!read) {
    auto error = std::move(read).error();
    co_return fail(std::move(error).with("index of step " + std::to_string(summary_.step)));
  }
  index_bytes_read_ += size;
  co_return out;
}

Task<void> StepReader::read_pages(std::uint64_t offset, std::uint64_t size, std::string& out) {
  auto self = shared_from_this();
  CO_TRY(out, co_await read_index(offset, size));
  co_return {};
}

Task<format::Contents> StepReader::find(std::vector<format::Query> queries) {
  auto self = shared_from_this();
  format::IndexSearch search(root_, std::move(queries));
  for (auto pages = search.wanted(); !pages.empty(); pages = search.wanted()) {
    // Pages that lie side by side come in one read, and several reads are under way: a rank that wants a slice of each
    // of a thousand tensors needs a page here and a page there, and would wait for a thousand round trips.
    for (std::size_t next = 0; next < pages.size();) {
      std::vector<PagesRead> reads;
      while (next < pages.size() && reads.size() < kIndexReadsInFlight) {
        auto& read =
            reads.emplace_back(PagesRead{.first = next, .last = next + 1, .size = pages[next].size, .bytes = {}});
        while (read.last < pages.size() && pages[read.last].offset == pages[read.first].offset + read.size &&
               read.size + pages[read.last].size <= kIndexReadBytesMax)
          read.size += pages[read.last++].size;
        next = read.last;
      }
      std::vector<Task<void>> tasks;
      for (auto& read : reads) tasks.push_back(read_pages(pages[read.first].offset, read.size, read.bytes));
      if (auto done = co_await rt::all(session_->runtime().loop, std::move(tasks)); !done)
        co_return fail(explain(std::move(done).error()));
      for (const auto& read : reads) {
        std::string_view rest = read.bytes;
        for (auto i = read.first; i < read.last; ++i) {
          CO_CHECK_OK(search.supply(pages[i], rest.substr(0, pages[i].size)));
          rest.remove_prefix(pages[i].size);
        }
      }
    }
  }
  co_return search.take();
}

Task<format::RestorePlan> StepReader::plan(std::vector<Wanted> wanted, std::vector<std::uint64_t> sizes) {
  auto self = shared_from_this();
  std::vector<format::Query> queries;
  for (const auto& want : wanted) queries.push_back({format::Kind::kShard, want.tensor, false, want.box});
  CO_TRY(auto found, co_await find(std::move(queries)));
  std::map<std::string_view, const format::Shape*> shapes;
  for (const auto& shard : found.shards) shapes.emplace(shard.tensor, &shard.global_shape);
  std::vector<format::Want> wants;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    auto box = std::move(wanted[i].box);
    if (!box) {
      const auto shape = shapes.find(wanted[i].tensor);
      if (shape == shapes.end())
        co_return fail(Errc::kNotFound,
                       "step " + std::to_string(summary_.step) + " has no tensor '" + wanted[i].tensor + "'");
      box = format::whole(*shape->second);
    }
    wants.push_back({std::move(wanted[i].tensor), std::move(*box), std::nullopt, sizes[i]});
  }
  co_return format::plan(wants, found.shards);
}

Task<ReadStats> StepReader::restore(std::vector<Wanted> wanted, std::vector<std::span<std::byte>> destinations) {
  auto self = shared_from_this();
  std::vector<std::uint64_t> sizes;
  for (const auto& destination : destinations) sizes.push_back(destination.size());
  CO_TRY(auto planned, co_await plan(std::move(wanted), std::move(sizes)));
  co_return co_await read(std::move(planned), std::move(destinations));
}

Task<ReadStats> StepReader::read(format::RestorePlan plan, std::vector<std::span<std::byte>> destinations) {
  auto self = shared_from_this();
  auto stats = co_await read_all(session_, std::move(plan.requests), std::move(destinations), kReadsInFlight, timeout_);
  if (!stats) co_return fail(explain(std::move(stats).error()));
  co_return *stats;
}

Task<std::string> StepReader::blob(format::BlobEntry entry) {
  auto self = shared_from_this();
  CO_CHECK_OK(check_protected());
  std::string out(entry.size, '\0');
  auto read = co_await read_extents(session_, std::move(entry.extents), writable(out), timeout_);
  if (!read) co_return fail(explain(std::move(read).error()).with("blob '" + entry.name + "'"));
  if (crc32c(out) != entry.crc) co_return fail(Errc::kDataLoss, "blob '" + entry.name + "': CRC does not match");
  co_return out;
}

Task<ReadStats> StepReader::verify_extents(std::vector<format::Extent> extents, std::uint32_t crc, std::string what,
                                           std::function<void(std::uint64_t)> progress) {
  auto self = shared_from_this();
  ReadStats stats;
  std::uint32_t found = 0;
  std::string slice;
  std::vector<format::Extent> batch;
  std::uint64_t batch_bytes = 0;
  for (std::size_t i = 0; i <= extents.size(); ++i) {
    if (batch_bytes > 0 && (i == extents.size() || batch_bytes + extents[i].length > kVerifySliceBytes)) {
      slice.resize(batch_bytes);
      CO_CHECK_OK(check_protected());
      auto read = co_await read_extents(session_, std::exchange(batch, {}), writable(slice), timeout_, true);
      if (!read) co_return fail(explain(std::move(read).error()).with(what));
      stats += *read;
      found = crc32c(slice, found);
      progress(batch_bytes);
      batch_bytes = 0;
    }
    if (i < extents.size()) {
      batch.push_back(extents[i]);
      batch_bytes += extents[i].length;
    }
  }
  if (found != crc) co_return fail(Errc::kDataLoss, what + ": bytes do not match the CRC in the index");
  co_return stats;
}

Task<ReadStats> StepReader::verify(std::function<void(std::uint64_t, std::uint64_t)> progress) {
  auto self = shared_from_this();
  CO_TRY(auto contents, co_await find({}));
  std::vector<format::Contents> by_rank{contents};
  auto proved = format::merge(std::move(by_rank));
  if (!proved)
    co_return fail(Errc::kDataLoss, "the committed index does not tile its tensors: " + proved.error().message);
  std::uint64_t total = 0, done = 0;
  for (const auto& s : contents.shards)
    for (const auto& e : s.extents) total += e.length;
  for (const auto& b : contents.blobs) total += b.size;
  const auto step_progress = [&](std::uint64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };
  ReadStats stats;
  for (auto& s : contents.shards) {
    const auto what = "tensor '" + s.tensor + "' box " + format::text(s.box) + " of rank " + std::to_string(s.rank);
    CO_TRY(auto one, co_await verify_extents(std::move(s.extents), s.crc, what, step_progress));
    stats += one;
  }
  for (auto& b : contents.blobs) {
    CO_TRY(auto one, co_await verify_extents(std::move(b.extents), b.crc, "blob '" + b.name + "'", step_progress));
    stats += one;
  }
  co_return stats;
}

Task<StepPage> list_steps(std::shared_ptr<Session> session, std::string bucket, std::string run,
                          std::optional<std::uint64_t> after, std::uint32_t limit, rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run));
  wire::StepList ask;
  ask.set_bucket(bucket);
  ask.set_run(run);
  if (after) ask.mutable_after()->set_step(*after);
  ask.set_limit(limit);
  auto sent =
      co_await session->record_call(wire::Method::kStepList, home_group_of(bucket, run), wire::encode(ask), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(bucket + "/" + run));
  wire::StepListReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "step list"));
  StepPage page{{}, reply.more()};
  for (const auto& info : reply.steps()) {
    CO_TRY(auto summary, summary_of(info));
    page.steps.push_back(std::move(summary));
  }
  co_return page;
}

Task<RunPage> list_runs(std::shared_ptr<Session> session, std::string bucket, std::string after, std::uint32_t limit,
                        rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  wire::RunList ask;
  ask.set_bucket(bucket);
  ask.set_after(after);
  ask.set_limit(limit);
  auto sent = co_await session->plain_call(wire::Method::kRunList, wire::encode(ask), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(bucket));
  wire::RunListReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "run list"));
  co_return RunPage{{reply.runs().begin(), reply.runs().end()}, reply.more()};
}

Task<Activity> run_activity(std::shared_ptr<Session> session, std::string bucket, std::string run,
                            rt::TimePoint deadline) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_run_name(run));
  wire::RunActivity ask;
  ask.set_bucket(bucket);
  ask.set_run(run);
  auto sent = co_await session->record_call(wire::Method::kRunActivity, home_group_of(bucket, run), wire::encode(ask),
                                            deadline);
  if (!sent) co_return fail(std::move(sent).error().with(bucket + "/" + run));
  wire::RunActivityReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "run activity"));
  co_return Activity{reply.active(), {reply.launch().job(), reply.launch().restart()}, reply.step(), reply.ranks()};
}

}  // namespace cairn::client
