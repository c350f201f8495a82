#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include "storage/index/index.h"

// What every Index must do, checked against a std::map. A World lends the index under test:
//
//   template <class T> Result<T> run(Task<T>);   // runs to its end
//   storage::Index& index();                     // the open index
//   void reopen();                               // closed in order, opened again
//   bool crash();                                // ended at once, opened again; false: this world cannot

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

/// Few keys, so that they meet: empty ones, prefixes of each other, bytes 0 and 255.
inline std::string any_key(Dice& dice) {
  std::string key;
  for (auto n = dice.below(4); n > 0; --n) key += "\0a\xff"[dice.below(3)];
  return key;
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

/// Random batches, reads, scans, reopens and crashes. After a crash the index holds the batches up to some point, at
/// least up to the last synced one.
template <class World>
void index_behaves_like_a_map(World& world, std::uint64_t seed, int steps) {
  INFO("seed " << seed);
  Dice dice(seed);
  IndexModel model;
  std::vector<IndexModel> since_sync{model};  // what a crash may leave: the state after each batch since the last sync
  for (int step = 0; step < steps; ++step) {
    INFO("step " << step);
    const auto roll = dice.below(100);
    if (roll < 50) {
      storage::Batch batch;
      for (auto n = dice.below(8); n > 0; --n) {
        const auto table = table_of(dice.below(storage::kTables));
        if (dice.below(3) == 0)
          batch.erase(table, any_key(dice));
        else
          batch.put(
              table, any_key(dice),
              std::string(dice.below(2) == 0 ? dice.below(10) : dice.below(3000), static_cast<char>(dice.next())));
      }
      const bool sync = dice.below(2) == 0;
      apply_to(model, batch);
      REQUIRE(world.run(world.index().commit(std::move(batch), sync)));
      if (sync) since_sync.clear();
      since_sync.push_back(model);
    } else if (roll < 75) {
      const auto table = dice.below(storage::kTables);
      const auto key = any_key(dice);
      const auto got = world.run(world.index().get(table_of(table), key));
      REQUIRE(got);
      const auto expected = model[table].find(key);
      if (expected == model[table].end())
        CHECK_FALSE(got->has_value());
      else
        CHECK(*got == expected->second);
    } else if (roll < 95) {
      const auto table = dice.below(storage::kTables);
      auto from = any_key(dice), to = any_key(dice);
      const auto limit = dice.below(6);
      const auto got = world.run(world.index().scan(table_of(table), from, to, limit));
      REQUIRE(got);
      std::vector<std::pair<std::string, std::string>> expected, entries;
      for (auto at = model[table].lower_bound(from);
           expected.size() < limit && at != model[table].end() && (to.empty() || at->first < to); ++at)
        expected.emplace_back(*at);
      for (const auto& entry : *got) entries.emplace_back(entry.key, entry.value);
      CHECK(entries == expected);
    } else if (roll < 98) {
      world.reopen();
      CHECK(contents(world) == model);
    } else if (world.crash()) {
      const auto now = contents(world);
      CHECK(std::find(since_sync.begin(), since_sync.end(), now) != since_sync.end());
      model = now;
      since_sync = {model};
    }
  }
  world.reopen();
  CHECK(contents(world) == model);
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
  if (!world.crash()) world.reopen();
  CHECK(world.run(world.index().get(storage::Table::kRecords, "a"))->value() == "1");
}

}  // namespace cairn::tests
