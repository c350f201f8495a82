#include "server/garbage/liveness.h"

#include <utility>

#include "proto/common/checksum.h"
#include "proto/wire/records.pb.h"
#include "server/chunks/chunk_stream.h"
#include "server/records/keys.h"
#include "server/records/records.h"
#include "server/records/runs.h"
#include "server/records/writer_list.h"

namespace cairn::server {
namespace {

class FromRecords final : public Liveness {
 public:
  FromRecords(storage::RecordStore& records, const Coordinator& coordinator, Chunks& chunks)
      : records_(records), coordinator_(coordinator), chunks_(chunks) {}

  Task<Answer> ask(OwnerId owner) override {
    if (owner.home_group() >= kHomeGroups) co_return Answer{};  // nobody to ask
    auto record = co_await load<records::Owner>(records_, owner.home_group(), owner_key(owner));
    if (!record) co_return Answer{};
    Answer answer;
    answer.loss = coordinator_.map()->find(true, owner.home_group())->loss;
    if (!record->exists()) {
      answer.kind = Answer::Kind::kAbsent;
      co_return answer;
    }
    switch (record->value.kind()) {
      case records::Owner::OBJECT:
      case records::Owner::STEP:
        break;
      default:  // also kinds of later versions: alive
        answer.kind = Answer::Kind::kOpen;
        co_return answer;
    }
    answer.kind = Answer::Kind::kCommitted;
    if (record->value.has_stored_writers()) {
      // Damaged or not to be had now: everything lives.
      auto list = co_await stored_writers(owner, record->value.stored_writers());
      if (!list) co_return Answer{};
      answer.writers = std::move(list->writers);
      answer.abandoned = std::move(list->abandoned);
      co_return answer;
    }
    answer.writers.insert(record->value.writers().begin(), record->value.writers().end());
    for (const auto& id : record->value.abandoned()) answer.abandoned.emplace(id.writer(), id.index());
    co_return answer;
  }

 private:
  Task<WriterList> stored_writers(OwnerId owner, records::StoredWriters stored) {
    if (stored.bytes() > kWriterListBytesMax) co_return fail(Errc::kDataLoss, "list of writers: too long");
    std::vector<StoredRun> runs;
    for (const auto& run : stored.runs()) {
      CO_CHECK_OK(check_run(run, owner, "list of writers"));
      runs.push_back({.group = run.group(),
                      .writer = run.writer(),
                      .first_index = run.first_index(),
                      .count = run.count(),
                      .chunk_bytes = run.chunk_bytes(),
                      .last_bytes = run.last_bytes()});
    }
    std::string bytes;
    CO_CHECK_OK(co_await read_stored(chunks_, owner, std::move(runs), stored.offset(), stored.bytes(), bytes));
    if (sha256(bytes) != stored.digest()) co_return fail(Errc::kDataLoss, "list of writers: digest differs");
    co_return decode_writers(bytes);
  }

  storage::RecordStore& records_;
  const Coordinator& coordinator_;
  Chunks& chunks_;
};

}  // namespace

std::unique_ptr<Liveness> make_liveness(storage::RecordStore& records, const Coordinator& coordinator, Chunks& chunks) {
  return std::make_unique<FromRecords>(records, coordinator, chunks);
}

}  // namespace cairn::server
