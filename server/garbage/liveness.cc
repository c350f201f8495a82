#include "server/garbage/liveness.h"

#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/records.h"

namespace cairn::server {
namespace {

class FromRecords final : public Liveness {
 public:
  FromRecords(storage::RecordStore& records, const Coordinator& coordinator)
      : records_(records), coordinator_(coordinator) {}

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
    answer.writers.insert(record->value.writers().begin(), record->value.writers().end());
    for (const auto& id : record->value.abandoned()) answer.abandoned.emplace(id.writer(), id.index());
    co_return answer;
  }

 private:
  storage::RecordStore& records_;
  const Coordinator& coordinator_;
};

}  // namespace

std::unique_ptr<Liveness> make_liveness(storage::RecordStore& records, const Coordinator& coordinator) {
  return std::make_unique<FromRecords>(records, coordinator);
}

}  // namespace cairn::server
