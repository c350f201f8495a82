#include "storage/record_store/record_store.h"

#include <algorithm>
#include <array>
#include <deque>
#include <set>
#include <string_view>
#include <utility>

#include "storage/index/fields.h"
#include "storage/record_store/layout.h"

namespace cairn::storage {
namespace {

constexpr std::string_view kGroupKeyPrefix = "group.";

/// Transactions of one group that share one commit.
constexpr std::size_t kGatherBytesMax = 4 * 1024 * 1024;

std::string text_of_group(HomeGroup group) {
  return "group " + std::to_string(group);
}

Result<Record> decode_record(HomeGroup group, std::string key, std::string_view value) {
  auto version = get_version(value);
  if (!version) return fail(std::move(version).error().with(text_of_group(group) + " record " + key));
  return Record{.key = std::move(key), .value = std::string(value.substr(kVersionBytes)), .version = *version};
}

std::string text_of_version(const Version& version) {
  if (!version.exists()) return "absent";
  return std::to_string(version.loss) + "." + std::to_string(version.epoch) + "." + std::to_string(version.seq);
}

std::size_t bytes_of_changes(const Transaction& transaction) {
  std::size_t bytes = 0;
  for (const auto& [key, value] : transaction.puts) bytes += key.size() + value.size();
  for (const auto& key : transaction.deletes) bytes += key.size();
  return bytes;
}

Result<void> check(const Transaction& transaction) {
  if (transaction.group >= kHomeGroups)
    return fail(Errc::kInvalid, "there is no home group " + std::to_string(transaction.group));
  std::set<std::string_view> changed;
  auto check_key = [](std::string_view key) -> Result<void> {
    if (key.empty() || key.size() > RecordStore::kKeyBytesMax)
      return fail(Errc::kInvalid, "record key of " + std::to_string(key.size()) + " bytes, allowed are 1 to " +
                                      std::to_string(RecordStore::kKeyBytesMax));
    return {};
  };
  auto check_change = [&](std::string_view key) -> Result<void> {
    CHECK_OK(check_key(key));
    if (!changed.insert(key).second)
      return fail(Errc::kInvalid, "record " + std::string(key) + " changed twice in one transaction");
    return {};
  };
  std::size_t bytes = bytes_of_changes(transaction);
  for (const auto& compare : transaction.compares) {
    CHECK_OK(check_key(compare.key));
    bytes += compare.key.size();
  }
  for (const auto& [key, value] : transaction.puts) {
    CHECK_OK(check_change(key));
    if (value.size() > RecordStore::kValueBytesMax)
      return fail(Errc::kInvalid, "record " + key + ": value of " + std::to_string(value.size()) +
                                      " bytes, allowed are " + std::to_string(RecordStore::kValueBytesMax));
  }
  for (const auto& key : transaction.deletes) CHECK_OK(check_change(key));
  if (bytes > RecordStore::kTransactionBytesMax)
    return fail(Errc::kInvalid, "transaction of " + std::to_string(bytes) + " bytes, allowed are " +
                                    std::to_string(RecordStore::kTransactionBytesMax));
  return {};
}

class Records final : public RecordStore {
 public:
  Records(rt::Runtime runtime, RecordMedium& medium) : loop_(runtime.loop), medium_(medium), scope_(runtime.loop) {}

  void set_epoch(std::uint32_t loss, std::uint64_t epoch_count) override {
    loss_ = loss;
    epoch_ = epoch_count;
  }

  Task<Version> apply(Transaction transaction) override {
    CO_CHECK_OK(check(transaction));
    if (closing_) co_return fail(Errc::kUnavailable, "the record store is closing");
    auto& group = group_of(transaction.group);
    rt::OneShot<Result<Version>> answer(loop_);
    group.queue.push_back({std::move(transaction), answer.setter()});
    if (!std::exchange(group.running, true)) scope_.spawn(run(*this, group));
    co_return co_await answer;
  }

  Task<std::optional<Record>> get(HomeGroup number, std::string key) override {
    CO_TRY(auto reading, co_await start_reading(number));
    CO_TRY(auto value, co_await medium_.get(Table::kRecords, record_key(number, key)));
    if (!value) co_return std::nullopt;
    CO_TRY(auto record, decode_record(number, std::move(key), *value));
    co_return record;
  }

  Task<std::vector<Record>> scan(HomeGroup number, std::string prefix, std::string after, std::size_t limit) override {
    CO_TRY(auto reading, co_await start_reading(number));
    // Behind `after`: the smallest key that is larger.
    auto from = record_key(number, after.empty() || after < prefix ? prefix : after + '\0');
    auto to = after_prefix(record_key(number, prefix));
    std::vector<Record> records;
    if (!to.empty() && from >= to) co_return records;  // `after` lies behind the prefix
    CO_TRY(auto entries, co_await medium_.scan(Table::kRecords, std::move(from), std::move(to), limit));
    records.reserve(entries.size());
    for (auto& entry : entries) {
      CO_TRY(auto record, decode_record(number, entry.key.substr(2), entry.value));
      records.push_back(std::move(record));
    }
    co_return records;
  }

  Task<rt::Semaphore::Lease> hold(HomeGroup number) override { return start_reading(number); }

  Result<void> usable() const override { return medium_.usable(); }

  Task<void> close() override {
    closing_ = true;
    CO_CHECK_OK(co_await scope_.join());
    for (auto& group : groups_)
      if (group) {
        CO_TRY(auto no_reader, co_await group->gate.acquire(kGateAll));
      }
    co_return {};
  }

 private:
  struct Waiting {
    Transaction transaction;
    rt::OneShot<Result<Version>>::Setter answer;
  };
  struct Group {
    Group(rt::Loop& loop, HomeGroup n) : number(n), gate(loop, kGateAll) {}
    HomeGroup number;
    /// Readers hold one, a commit holds all: nobody sees a change between its commit and its answer.
    rt::Semaphore gate;
    std::deque<Waiting> queue;
    bool running = false;
    std::optional<Version> last;   // of the last change; unset until read from the index
    std::optional<Error> failure;  // a change with unknown outcome
  };
  static constexpr std::uint64_t kGateAll = 1 << 20;

  Group& group_of(HomeGroup number) {
    auto& group = groups_[number];
    if (!group) group = std::make_unique<Group>(loop_, number);
    return *group;
  }

  Task<rt::Semaphore::Lease> start_reading(HomeGroup number) {
    if (number >= kHomeGroups) co_return fail(Errc::kInvalid, "there is no home group " + std::to_string(number));
    if (closing_) co_return fail(Errc::kUnavailable, "the record store is closing");
    auto& group = group_of(number);
    CO_TRY(auto lease, co_await group.gate.acquire(1));
    if (group.failure) co_return fail(*group.failure);
    co_return lease;
  }

  static Task<void> run(Records& self, Group& group) {
    while (!group.queue.empty()) {
      // Only one round of a group is under way: it is evaluated on what is durable and on itself.
      std::vector<Waiting> round;
      std::size_t bytes = 0;
      while (!group.queue.empty() && bytes < kGatherBytesMax) {
        bytes += bytes_of_changes(group.queue.front().transaction);
        round.push_back(std::move(group.queue.front()));
        group.queue.pop_front();
      }
      auto done = co_await carry_out(self, group, round);
      if (!done)
        for (auto& waiting : round) waiting.answer.set(fail(done.error()));
    }
    group.running = false;
    co_return {};
  }

  /// Answers every transaction of the round, or returns why those still unanswered failed.
  static Task<void> carry_out(Records& self, Group& group, std::vector<Waiting>& round) {
    if (group.failure) co_return fail(*group.failure);
    if (!group.last) {
      CO_TRY(auto stored, co_await self.medium_.get(Table::kMeta, group_key(group.number)));
      auto version = stored ? get_version(*stored) : Result<Version>(Version{});
      if (!version) co_return fail(std::move(version).error().with(text_of_group(group.number) + " sequence"));
      group.last = *version;
    }

    Batch batch;
    Version last = *group.last;
    std::map<std::string, Version> pending;  // keys changed by this round; absent: deleted
    std::vector<std::pair<std::size_t, Result<Version>>> answers;
    for (std::size_t i = 0; i < round.size(); ++i) {
      auto& transaction = round[i].transaction;
      CO_TRY(auto conflict, co_await evaluate(self, group, transaction, pending));
      if (conflict) {
        if (conflict->durable)
          round[i].answer.set(fail(std::move(conflict->error)));
        else
          answers.emplace_back(i, fail(std::move(conflict->error)));  // once what it was compared with is durable
        continue;
      }
      if (!transaction.puts.empty() || !transaction.deletes.empty())
        last = {.loss = self.loss_, .epoch = self.epoch_, .seq = last.seq + 1};
      for (auto& [key, value] : transaction.puts) {
        std::string stored;
        stored.reserve(kVersionBytes + value.size());
        put_version(stored, last);
        stored += value;
        batch.put(Table::kRecords, record_key(group.number, key), std::move(stored));
        pending[std::move(key)] = last;
      }
      for (auto& key : transaction.deletes) {
        batch.erase(Table::kRecords, record_key(group.number, key));
        pending[std::move(key)] = Version{};
      }
      answers.emplace_back(i, last);
    }

    if (!batch.empty()) {
      // A medium that failed before makes no change uncertain: reads go on.
      CO_CHECK_OK(self.medium_.usable());
      std::string version;
      put_version(version, last);
      batch.put(Table::kMeta, group_key(group.number), std::move(version));
      CO_TRY(auto alone, co_await group.gate.acquire(kGateAll));
      auto committed = co_await self.medium_.commit(
          {.group = group.number, .before = *group.last, .after = last, .changes = std::move(batch)});
      if (!committed) {
        group.failure = std::move(committed).error();
        co_return fail(*group.failure);
      }
      group.last = last;
    }
    for (auto& [i, answer] : answers) round[i].answer.set(std::move(answer));
    co_return {};
  }

  struct Conflict {
    Error error;
    bool durable;  // found on durable state, not on this round's own changes
  };
  static Task<std::optional<Conflict>> evaluate(Records& self, Group& group, const Transaction& transaction,
                                                const std::map<std::string, Version>& pending) {
    for (const auto& compare : transaction.compares) {
      Version found;
      const auto own = pending.find(compare.key);
      if (own != pending.end()) {
        found = own->second;
      } else {
        CO_TRY(auto value, co_await self.medium_.get(Table::kRecords, record_key(group.number, compare.key)));
        if (value) {
          auto version = get_version(*value);
          if (!version)
            co_return fail(std::move(version).error().with(text_of_group(group.number) + " record " + compare.key));
          found = *version;
        }
      }
      if (found == compare.version || (!found.exists() && !compare.version.exists())) continue;
      co_return Conflict{
          {Errc::kConflict, text_of_group(group.number) + " record " + compare.key + " is at version " +
                                text_of_version(found) + ", expected " + text_of_version(compare.version)},
          own == pending.end()};
    }
    co_return std::nullopt;
  }

  rt::Loop& loop_;
  RecordMedium& medium_;
  std::uint32_t loss_ = 0;
  std::uint64_t epoch_ = 0;
  bool closing_ = false;
  std::array<std::unique_ptr<Group>, kHomeGroups> groups_;
  rt::Scope scope_;  // last: its frames use the rest
};

}  // namespace

std::string record_key(HomeGroup group, std::string_view key) {
  std::string out;
  out.reserve(2 + key.size());
  put_key_field(out, group);
  out += key;
  return out;
}

std::string group_key(HomeGroup group) {
  std::string out(kGroupKeyPrefix);
  put_key_field(out, group);
  return out;
}

void put_version(std::string& out, const Version& version) {
  put_field(out, version.loss);
  put_field(out, version.epoch);
  put_field(out, version.seq);
}

Result<Version> get_version(std::string_view value) {
  if (value.size() < kVersionBytes)
    return fail(Errc::kDataLoss, std::to_string(value.size()) + " bytes are too few for a version");
  return Version{.loss = get_field<std::uint32_t>(value, 0),
                 .epoch = get_field<std::uint64_t>(value, 4),
                 .seq = get_field<std::uint64_t>(value, 12)};
}

std::string after_prefix(std::string prefix) {
  while (!prefix.empty() && prefix.back() == '\xff') prefix.pop_back();
  if (!prefix.empty()) prefix.back() = static_cast<char>(static_cast<unsigned char>(prefix.back()) + 1);
  return prefix;
}

std::unique_ptr<RecordStore> RecordStore::open(rt::Runtime runtime, RecordMedium& medium) {
  return std::make_unique<Records>(runtime, medium);
}

namespace {

class OneIndex final : public RecordMedium {
 public:
  OneIndex(Index& index, Committer& committer) : index_(index), committer_(committer) {}
  Task<std::optional<std::string>> get(Table table, std::string key) override {
    return index_.get(table, std::move(key));
  }
  Task<std::vector<IndexEntry>> scan(Table table, std::string from, std::string to, std::size_t limit) override {
    return index_.scan(table, std::move(from), std::move(to), limit);
  }
  Task<void> commit(RecordRound round) override { return committer_.commit(std::move(round.changes)); }
  Result<void> usable() const override {
    if (const auto& failure = committer_.failure())
      return fail(Errc::kFailed, "the target has failed: " + failure->message);
    return {};
  }

 private:
  Index& index_;
  Committer& committer_;
};

}  // namespace

std::unique_ptr<RecordMedium> make_record_medium(Index& index, Committer& committer) {
  return std::make_unique<OneIndex>(index, committer);
}

}  // namespace cairn::storage
