#include "storage/committer/committer.h"

#include <algorithm>
#include <array>

#include "storage/committer/mark.h"
#include "storage/disk/aligned_memory.h"
#include "storage/index/fields.h"

namespace cairn::storage {
namespace {

constexpr const char* kMarkName = "mark";
constexpr const char* kMarkTemporary = "mark.new";

/// Table kMeta, key "committer.batch": number of the batch that wrote it, 8 bytes little-endian; absent = 0.
constexpr const char* kBatchKey = "committer.batch";

std::string number_of(std::uint64_t batch) {
  std::string out;
  put_field(out, batch);
  return out;
}

Task<std::uint64_t> batch_of(Index& index) {
  CO_TRY(auto stored, co_await index.get(Table::kMeta, kBatchKey));
  if (!stored) co_return 0;
  if (stored->size() != 8) co_return fail(Errc::kDataLoss, "index: its batch number is damaged");
  co_return get_field<std::uint64_t>(*stored, 0);
}

/// The number in the newest good slot of the file; nullopt when there is no file.
Task<std::optional<std::uint64_t>> read_mark(Disk& disk) {
  auto file = co_await disk.open(kMarkName);
  if (!file && file.error().code == Errc::kNotFound) co_return std::nullopt;
  if (!file) co_return fail(std::move(file).error().with("mark"));
  if ((*file)->size() != kMarkBytes)
    co_return fail(Errc::kDataLoss,
                   "mark: " + std::to_string((*file)->size()) + " bytes instead of " + std::to_string(kMarkBytes));
  auto read = co_await (*file)->read(0, aligned_memory(kMarkBytes));
  if (!read) co_return fail(std::move(read).error().with("mark"));
  std::optional<std::uint64_t> newest;
  for (std::size_t slot = 0; slot < kMarkSlots; ++slot)
    if (const auto number = decode_mark(read->bytes.subspan(slot * kMarkSlotBytes, kMarkSlotBytes)))
      newest = std::max(newest.value_or(0), *number);
  if (!newest) co_return fail(Errc::kDataLoss, "mark: both slots are damaged");
  co_return newest;
}

/// A new file at every start: a write of an older process that lands late meets its own file, and what this process
/// read is durable before it is built upon.
Task<std::shared_ptr<File>> replace_mark(Disk& disk, std::uint64_t batch) {
  CO_TRY(auto names, co_await disk.list());
  if (std::ranges::find(names, kMarkTemporary) != names.end()) CO_CHECK_OK(co_await disk.unlink(kMarkTemporary));
  CO_TRY(auto file, co_await disk.create(kMarkTemporary, kMarkBytes));
  auto slots = aligned_memory(kMarkBytes);
  for (std::size_t slot = 0; slot < kMarkSlots; ++slot)
    encode_mark(slots.bytes.subspan(slot * kMarkSlotBytes, kMarkSlotBytes), batch);
  CO_CHECK_OK(co_await file->write(0, std::move(slots).freeze(kMarkBytes)));
  CO_CHECK_OK(co_await file->flush());
  CO_CHECK_OK(co_await disk.rename(kMarkTemporary, kMarkName));
  CO_CHECK_OK(co_await disk.sync_directory());
  co_return file;
}

}  // namespace

struct Committer::State : std::enable_shared_from_this<Committer::State> {
  State(rt::Runtime r, Index& i, PlantedBugs b) : runtime(r), index(i), bugs(b), idle(r.loop), scope(r.loop) {}

  struct Waiting {
    Batch batch;
    std::vector<std::shared_ptr<File>> files;
    rt::OneShot<Result<void>>::Setter answer;
  };

  rt::Runtime runtime;
  Index& index;
  PlantedBugs bugs;
  std::shared_ptr<File> mark;
  std::size_t next_slot = 0;
  std::uint64_t batch = 0;  // of the last round
  std::optional<Error> failure;
  std::vector<Waiting> queue;
  bool running = false;  // a run() is posted or under way
  std::uint64_t commits = 0, rounds = 0;
  rt::Signal idle;
  rt::Scope scope;  // last: its frames use the rest

  Error refusal() const {
    return {failure->code == Errc::kNoSpace ? Errc::kNoSpace : Errc::kFailed,
            "the target has failed and acknowledges nothing more: " + failure->message};
  }

  void stop(Error why) {
    if (failure) return;
    runtime.log.write(rt::Level::kError, "target_failed",
                      {{"error", std::string(name_of(why.code))}, {"reason", why.message}});
    failure = std::move(why);
    for (auto& waiting : std::exchange(queue, {})) waiting.answer.set(fail(refusal()));
  }

  /// Posted, not run at once: everybody who is ready in this turn of the loop shares the first round.
  void start() {
    if (running) return;
    running = true;
    runtime.loop.post([weak = weak_from_this()] {
      if (auto self = weak.lock()) self->scope.spawn(run(*self));
    });
  }

  static Task<void> run(State& self) {
    while (!self.queue.empty()) {
      auto round = std::exchange(self.queue, {});
      auto done = co_await carry_out(self, round);
      if (!done) self.stop(std::move(done).error());
      // Also when a data write failed meanwhile: nothing is acknowledged after that.
      if (!self.failure) {
        self.commits += round.size();
        self.rounds++;
      }
      for (auto& waiting : round) {
        if (self.failure)
          waiting.answer.set(fail(self.refusal()));
        else
          waiting.answer.set({});
      }
    }
    self.running = false;
    self.idle.notify_all();
    co_return {};
  }

  static Task<void> carry_out(State& self, std::vector<Waiting>& round) {
    std::vector<std::shared_ptr<File>> files;
    for (auto& waiting : round)
      for (auto& file : waiting.files)
        if (std::ranges::find(files, file) == files.end()) files.push_back(file);
    if (!files.empty() && !self.bugs.no_flush) {
      // Submitted now, after every write of this round was seen to complete: a flush in flight may not cover them.
      std::vector<Task<void>> flushes;
      for (auto& file : files) flushes.push_back(file->flush());
      auto flushed = co_await rt::all(self.runtime.loop, std::move(flushes));
      if (!flushed) co_return fail(std::move(flushed).error().with("flush of chunk data"));
    }
    if (self.bugs.join_flush) {
      // Wrong on purpose: whoever came during the flush is taken as covered by it.
      auto late = std::exchange(self.queue, {});
      for (auto& waiting : late) {
        const bool covered = std::ranges::all_of(
            waiting.files, [&](const auto& file) { return std::ranges::find(files, file) != files.end(); });
        (covered ? round : self.queue).push_back(std::move(waiting));
      }
    }
    if (self.failure) co_return fail(*self.failure);

    Batch batch;
    for (auto& waiting : round) batch.append(std::move(waiting.batch));
    batch.put(Table::kMeta, kBatchKey, number_of(++self.batch));
    auto committed = co_await self.index.commit(std::move(batch), !self.bugs.no_index_sync);
    if (!committed) co_return fail(std::move(committed).error().with("commit to the index"));

    auto slot = aligned_memory(kMarkSlotBytes);
    encode_mark(slot.bytes, self.batch);
    const auto offset = self.next_slot * kMarkSlotBytes;
    auto marked = co_await self.mark->write(offset, std::move(slot).freeze(kMarkSlotBytes));
    if (marked) marked = co_await self.mark->flush();
    if (!marked) co_return fail(std::move(marked).error().with("mark"));
    self.next_slot = (self.next_slot + 1) % kMarkSlots;
    co_return {};
  }
};

Task<std::unique_ptr<Committer>> Committer::open(rt::Runtime runtime, Disk& disk, Index& index, PlantedBugs bugs) {
  auto state = std::make_shared<State>(runtime, index, bugs);
  CO_TRY(state->batch, co_await batch_of(index));

  CO_TRY(auto mark, co_await read_mark(disk));
  if (!mark && state->batch != 0)
    co_return fail(Errc::kDataLoss, "mark: the file is missing, the index is at batch " + std::to_string(state->batch));
  if (mark && state->batch < *mark)
    co_return fail(Errc::kDataLoss, "the index came back at batch " + std::to_string(state->batch) +
                                        ", older than batch " + std::to_string(*mark) +
                                        " that was synced: acknowledged data is missing");
  if (mark && state->batch > *mark) {
    // What a crash between the two leaves. The batch may have been read back without ever having been synced, and must
    // not be shown before it is: a synced one after it takes it along.
    Batch batch;
    batch.put(Table::kMeta, kBatchKey, number_of(++state->batch));
    CO_CHECK_OK(co_await index.commit(std::move(batch), true));
  }
  CO_TRY(state->mark, co_await replace_mark(disk, state->batch));
  co_return std::unique_ptr<Committer>(new Committer(std::move(state)));
}

Committer::Committer(std::shared_ptr<State> state) : state_(std::move(state)) {}
Committer::~Committer() {
  state_->scope.cancel();
}

Task<void> Committer::commit(Batch batch, std::vector<std::shared_ptr<File>> flush_first) {
  auto& state = *state_;
  if (state.failure) co_return fail(state.refusal());
  rt::OneShot<Result<void>> answer(state.runtime.loop);
  state.queue.push_back({std::move(batch), std::move(flush_first), answer.setter()});
  state.start();
  co_return co_await answer;
}

void Committer::fail_stop(Error why) {
  state_->stop(std::move(why));
}

const std::optional<Error>& Committer::failure() const {
  return state_->failure;
}

Task<void> Committer::close() {
  auto& state = *state_;
  while (state.running) co_await state.idle.wait();
  co_return {};
}

std::uint64_t Committer::commits() const {
  return state_->commits;
}
std::uint64_t Committer::rounds() const {
  return state_->rounds;
}

}  // namespace cairn::storage
