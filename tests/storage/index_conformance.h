#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include "proto/rt/sync.h"
#include "storage/index/index.h"

// What every Index must do, checked against a std::map. A World lends the index under test:
//
//   template <class T> Result<T> run(Task<T>);   // runs to its end
//   rt::Loop& loop();
//   storage::Index& index();                     // the open index
//   void reopen();                               // closed in order, opened again
//   void synced();                               // told after each synced commit
//   void crash(std::uint64_t draw);              // ended at once, opened again; `draw` chooses what an unsynced end
//   loses

namespace cairn::tests {

/// A small generator of our own: the same numbers everywhere for a printed seed.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t n) { return next() % n; }

 private:
  std::uint64_t state_;
};

using IndexModel = std::array<std::map<std::string, std::string>, storage::kTables>;

inline void apply_to(IndexModel& model, const storage::Batch& batch) {
  for (const auto& change : batch.changes()) {
    auto& table = model[static_cast<std::size_t>(change.table)];
    if (change.value)
      table[change.key] = *change.value;
    else
      table.erase(change.key);
  }
}

inline storage::Table table_of(std::size_t i) {
  return static_cast<storage::Table>(i);
}

/// Few keys, so that they meet: empty ones, prefixes of each other, bytes 0 and 255, and long ones alike in the front,
/// as those of chunks are.
inline std::string any_key(Dice& dice) {
  std::string key;
  if (dice.below(4) == 0) key = std::string(16, "\0b"[dice.below(2)]) + std::string(7, '\0');
  for (auto n = dice.below(4); n > 0; --n) key += "\0a\xff"[dice.below(3)];
  return key;
}

inline storage::Batch any_batch(Dice& dice) {
  storage::Batch batch;
  const bool large = dice.below(20) == 0;  // fills what is kept in memory
  for (auto n = dice.below(large ? 40 : 8); n > 0; --n) {
    const auto table = table_of(dice.below(storage::kTables));
    if (dice.below(3) == 0) {
      batch.erase(table, any_key(dice));
      continue;
    }
    const auto size = dice.below(2) == 0 ? dice.below(10) : dice.below(large ? 100'000 : 3000);
    batch.put(table, any_key(dice), std::string(size, static_cast<char>(dice.next())));
  }
  return batch;
}

struct IndexStep {
  enum class Kind {
    kCommit,
    kGet,
    kScan,
    kPages,    // a scan from page to page
    kOverlap,  // a commit, and meanwhile a get and scans
    kReopen,
    kCrash
  } kind = Kind::kReopen;
  storage::Batch batch{};
  bool sync = false;
  storage::Table table{};
  std::string key{}, to{};
  std::size_t limit = 0;
  std::uint64_t draw = 0;
};

inline std::vector<IndexStep> index_steps(std::uint64_t seed, int count) {
  using Kind = IndexStep::Kind;
  Dice dice(seed);
  std::vector<IndexStep> steps;
  for (int i = 0; i < count; ++i) {
    const auto roll = dice.below(100);
    IndexStep step;
    step.kind = roll < 40   ? Kind::kCommit
                : roll < 50 ? Kind::kOverlap
                : roll < 70 ? Kind::kGet
                : roll < 87 ? Kind::kScan
                : roll < 95 ? Kind::kPages
                : roll < 98 ? Kind::kReopen
                            : Kind::kCrash;
    if (step.kind == Kind::kCommit || step.kind == Kind::kOverlap) step.batch = any_batch(dice);
    step.sync = dice.below(2) == 0;
    step.table = table_of(dice.below(storage::kTables));
    step.key = any_key(dice);
    step.to = any_key(dice);
    step.limit = dice.below(6);
    step.draw = dice.next();
    steps.push_back(std::move(step));
  }
  return steps;
}

inline std::string hex(std::string_view bytes) {
  std::string out;
  for (const unsigned char c : bytes.substr(0, 40)) (out += "0123456789abcdef"[c / 16]) += "0123456789abcdef"[c % 16];
  return out;
}

inline std::string text(const IndexStep& step) {
  using Kind = IndexStep::Kind;
  const auto table = " table " + std::to_string(static_cast<int>(step.table));
  std::string changes = step.sync ? " synced" : "";
  for (const auto& change : step.batch.changes())
    changes += "\n    " + std::string(change.value ? "put" : "erase") + " table " +
               std::to_string(static_cast<int>(change.table)) + " key " + hex(change.key) +
               (change.value ? " " + std::to_string(change.value->size()) + " bytes" : "");
  const auto range = table + " [" + hex(step.key) + ", " + hex(step.to) + ")";
  switch (step.kind) {
    case Kind::kCommit:
      return "commit" + changes;
    case Kind::kOverlap:
      return "reads during a commit" + changes;
    case Kind::kGet:
      return "get" + table + " key " + hex(step.key);
    case Kind::kScan:
      return "scan" + range + " limit " + std::to_string(step.limit);
    case Kind::kPages:
      return "pages of" + range + " limit " + std::to_string(step.limit + 1);
    case Kind::kReopen:
      return "reopen";
    case Kind::kCrash:
      return "crash " + std::to_string(step.draw);
  }
  return "?";
}

using IndexEntries = std::vector<std::pair<std::string, std::string>>;

inline IndexEntries range_of(const IndexModel& model, storage::Table table, const std::string& from,
                             const std::string& to, std::size_t limit) {
  const auto& entries = model[static_cast<std::size_t>(table)];
  IndexEntries out;
  for (auto at = entries.lower_bound(from); out.size() < limit && at != entries.end() && (to.empty() || at->first < to);
       ++at)
    out.emplace_back(*at);
  return out;
}
inline IndexEntries pairs(const std::vector<storage::IndexEntry>& entries) {
  IndexEntries out;
  for (const auto& entry : entries) out.emplace_back(entry.key, entry.value);
  return out;
}

/// What calls that overlapped have answered.
struct Overlapped {
  std::optional<Result<void>> committed;
  std::optional<Result<std::optional<std::string>>> got;
  std::array<std::optional<Result<std::vector<storage::IndexEntry>>>, storage::kTables> scanned;
};
inline Task<void> overlapping(rt::Loop* loop, storage::Index* index, IndexStep step, Overlapped* out) {
  rt::Scope scope(*loop);
  const auto commit = [](storage::Index* i, storage::Batch batch, bool sync, Overlapped* o) -> Task<void> {
    o->committed = co_await i->commit(std::move(batch), sync);
    co_return {};
  };
  const auto read = [](storage::Index* i, storage::Table table, std::string key, Overlapped* o) -> Task<void> {
    o->got = co_await i->get(table, std::move(key));
    co_return {};
  };
  const auto scan = [](storage::Index* i, std::size_t table, Overlapped* o) -> Task<void> {
    o->scanned[table] = co_await i->scan(table_of(table), "", "", 1'000'000);
    co_return {};
  };
  if (step.draw % 2 == 0) scope.spawn(commit(index, step.batch, step.sync, out));
  scope.spawn(read(index, step.table, step.key, out));
  for (std::size_t t = 0; t < storage::kTables; ++t) scope.spawn(scan(index, t, out));
  if (step.draw % 2 != 0) scope.spawn(commit(index, step.batch, step.sync, out));
  co_return co_await scope.join();
}

template <class World>
IndexModel contents(World& world) {
  IndexModel all;
  for (std::size_t t = 0; t < storage::kTables; ++t) {
    auto entries = world.run(world.index().scan(table_of(t), "", "", 1'000'000));
    REQUIRE(entries);
    for (auto& entry : *entries) all[t].emplace(std::move(entry.key), std::move(entry.value));
  }
  return all;
}

struct IndexFailure {
  std::size_t step;
  std::string what;
};

/// The first thing that is not as the model says. After a crash the index holds the batches up to some point, at least
/// up to the last synced one.
template <class World>
std::optional<IndexFailure> first_failure(World& world, const std::vector<IndexStep>& steps) {
  using Kind = IndexStep::Kind;
  IndexModel model;
  std::vector<IndexModel> since_sync{model};  // what a crash may leave: the state after each batch since the last sync
  const auto committed = [&](bool sync) {
    if (sync) {
      since_sync.clear();
      world.synced();
    }
    since_sync.push_back(model);
  };
  for (std::size_t i = 0; i <= steps.size(); ++i) {
    if (i == steps.size()) {
      world.reopen();
      if (contents(world) != model) return IndexFailure{i, "other contents after the last reopen"};
      break;
    }
    const auto& step = steps[i];
    const auto wrong = [&](std::string what) { return IndexFailure{i, text(step) + ": " + what}; };
    switch (step.kind) {
      case Kind::kCommit: {
        const auto done = world.run(world.index().commit(step.batch, step.sync));
        if (!done) return wrong(done.error().message);
        apply_to(model, step.batch);
        committed(step.sync);
        break;
      }
      case Kind::kOverlap: {
        const auto before = model;
        apply_to(model, step.batch);
        Overlapped seen;
        const auto done = world.run(overlapping(&world.loop(), &world.index(), step, &seen));
        if (!done || !seen.committed || !*seen.committed || !seen.got || !*seen.got) return wrong("a call failed");
        const auto& table = static_cast<std::size_t>(step.table);
        const auto value_in = [&](const IndexModel& m) {
          const auto at = m[table].find(step.key);
          return at == m[table].end() ? std::nullopt : std::optional(at->second);
        };
        if (**seen.got != value_in(before) && **seen.got != value_in(model)) return wrong("get: neither old nor new");
        for (std::size_t t = 0; t < storage::kTables; ++t) {
          const auto& scanned = seen.scanned[t];
          if (!scanned || !*scanned) return wrong("a scan failed");
          const auto found = pairs(**scanned);
          if (found != range_of(before, table_of(t), "", "", ~0ull) &&
              found != range_of(model, table_of(t), "", "", ~0ull))
            return wrong("scan of table " + std::to_string(t) + ": neither all of the batch nor nothing of it");
        }
        committed(step.sync);
        break;
      }
      case Kind::kGet: {
        const auto got = world.run(world.index().get(step.table, step.key));
        if (!got) return wrong(got.error().message);
        const auto& table = model[static_cast<std::size_t>(step.table)];
        const auto at = table.find(step.key);
        if (*got != (at == table.end() ? std::nullopt : std::optional(at->second))) return wrong("another value");
        break;
      }
      case Kind::kScan: {
        const auto got = world.run(world.index().scan(step.table, step.key, step.to, step.limit));
        if (!got) return wrong(got.error().message);
        if (pairs(*got) != range_of(model, step.table, step.key, step.to, step.limit)) return wrong("other entries");
        break;
      }
      case Kind::kPages: {
        IndexEntries all;
        for (auto from = step.key;;) {
          const auto got = world.run(world.index().scan(step.table, from, step.to, step.limit + 1));
          if (!got) return wrong(got.error().message);
          for (auto& entry : pairs(*got)) all.push_back(std::move(entry));
          if (got->size() < step.limit + 1) break;
          from = all.back().first + '\0';
        }
        if (all != range_of(model, step.table, step.key, step.to, ~0ull)) return wrong("other entries");
        break;
      }
      case Kind::kReopen:
        world.reopen();
        if (contents(world) != model) return wrong("other contents");
        break;
      case Kind::kCrash: {
        world.crash(step.draw);
        auto now = contents(world);
        if (std::find(since_sync.begin(), since_sync.end(), now) == since_sync.end())
          return wrong("not what was there after a batch since the last sync");
        model = std::move(now);
        since_sync = {model};
        break;
      }
    }
  }
  return std::nullopt;
}

/// Random batches, reads, scans, reads during commits, reopens and crashes, each seed in a new world. When one fails,
/// fewer and fewer of its steps are tried, and the fewest that still fail are shown.
template <class Make>
void index_behaves_like_a_map(Make make, std::uint64_t seed, int count) {
  auto steps = index_steps(seed, count);
  const auto fails = [&](const std::vector<IndexStep>& some) {
    auto world = make(seed);
    return first_failure(*world, some);
  };
  auto failure = fails(steps);
  if (!failure) return;
  const auto first = failure->what;
  steps.resize(std::min(steps.size(), failure->step + 1));
  for (auto piece = steps.size() / 2; piece > 0; piece /= 2)
    for (std::size_t at = 0; at + piece <= steps.size();) {
      auto fewer = steps;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(at),
                  fewer.begin() + static_cast<std::ptrdiff_t>(at + piece));
      if (auto still = fails(fewer)) {
        steps = std::move(fewer);
        failure = std::move(still);
      } else {
        at += piece;
      }
    }
  std::string shown;
  for (const auto& step : steps) shown += "\n  " + text(step);
  FAIL("seed " << seed << ": " << first << "\nfewest steps that fail:" << shown << "\nthen: " << failure->what);
}

template <class World>
void index_orders_changes_inside_a_batch(World& world) {
  storage::Batch batch;
  batch.put(storage::Table::kMeta, "k", "1");
  batch.erase(storage::Table::kMeta, "k");
  batch.put(storage::Table::kMeta, "k", "2");
  batch.put(storage::Table::kLog, "gone", "x");
  batch.erase(storage::Table::kLog, "gone");
  batch.erase(storage::Table::kLog, "never there");
  REQUIRE(world.run(world.index().commit(std::move(batch), true)));
  CHECK(world.run(world.index().get(storage::Table::kMeta, "k"))->value() == "2");
  CHECK_FALSE(world.run(world.index().get(storage::Table::kLog, "gone"))->has_value());
  CHECK_FALSE(world.run(world.index().get(storage::Table::kChunks, "k"))->has_value());
}

/// A synced commit, also an empty one, makes everything before it durable.
template <class World>
void index_sync_covers_what_came_before(World& world) {
  storage::Batch lazy;
  lazy.put(storage::Table::kRecords, "a", "1");
  REQUIRE(world.run(world.index().commit(std::move(lazy), false)));
  REQUIRE(world.run(world.index().commit({}, true)));
  world.synced();
  world.crash(0);
  CHECK(world.run(world.index().get(storage::Table::kRecords, "a"))->value() == "1");
}

}  // namespace cairn::tests
