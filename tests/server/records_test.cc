#include "server/records/records.h"
#include "proto/common/text.h"
#include "server/records/merged_scan.h"
#include "server/records/writer_list.h"
#include "tests/server/fixture.h"

using namespace cairn;
using namespace cairn::server;

namespace {

void put_raw(Fixture& f, HomeGroup group, const std::string& key) {
  REQUIRE(f.run(f.daemon->records().apply({.group = group, .compares = {}, .puts = {{key, key}}, .deletes = {}})));
}

Task<std::vector<std::string>> all_keys(storage::RecordStore& records, std::string prefix, std::string after) {
  MergedScan scan(records, std::move(prefix), std::move(after), 3);
  std::vector<std::string> out;
  for (;;) {
    CO_TRY(const auto record, co_await scan.next());
    if (!record) co_return std::move(out);
    out.push_back(record->key);
  }
}

}  // namespace

TEST_CASE("records: a merged scan gives every key of all groups, once and sorted", "[server]") {
  Fixture f;
  std::vector<std::string> keys;
  sim::Prng random(7);
  for (int i = 0; i < 500; ++i) {
    keys.push_back("x/" + std::to_string(random.next()));
    put_raw(f, home_group_of(keys.back()), keys.back());
  }
  put_raw(f, 3, "w/other");
  std::sort(keys.begin(), keys.end());
  CHECK(f.run(all_keys(f.daemon->records(), "x/", "")).value() == keys);
  const std::vector<std::string> rest(keys.begin() + 251, keys.end());
  CHECK(f.run(all_keys(f.daemon->records(), "x/", keys[250])).value() == rest);
}

TEST_CASE("records: the last key of a prefix is found among any steps", "[server]") {
  Fixture f;
  const auto last = [&] { return f.run(last_of(f.daemon->records(), 9, step_prefix("b", "r"))).value(); };
  CHECK_FALSE(last());
  put_raw(f, 9, step_key("b", "r2", 99));
  CHECK_FALSE(last());
  std::uint64_t highest = 0;
  for (const std::uint64_t step : {std::uint64_t{7}, std::uint64_t{0}, std::uint64_t{8}, std::uint64_t{1'000'000},
                                   std::uint64_t{12}, UINT64_MAX - 1, std::uint64_t{1} << 40, UINT64_MAX}) {
    put_raw(f, 9, step_key("b", "r", step));
    highest = std::max(highest, step);
    REQUIRE(last());
    CHECK(last()->key == step_key("b", "r", highest));
  }
}

TEST_CASE("records: a value that is no message is data loss, with its key", "[server]") {
  Fixture f;
  REQUIRE(f.run(f.daemon->records().apply(
      {.group = bucket_group("b"), .compares = {}, .puts = {{bucket_key("b"), "\xff\xff\xff"}}, .deletes = {}})));
  wire::BucketShow show;
  show.set_bucket("b");
  auto reply = f.call<wire::BucketInfo>(Method::kBucketShow, show);
  REQUIRE_FALSE(reply);
  CHECK(reply.error().code == Errc::kDataLoss);
  CHECK(reply.error().message.find("b/b") != std::string::npos);
}

TEST_CASE("writer list: what goes in comes out, anything else is refused", "[server]") {
  WriterList list;
  CHECK(encode_writers(list)->empty());
  list.writers = {0, 7, 1ull << 63, UINT64_MAX};
  list.abandoned = {{7, 0}, {7, UINT32_MAX}, {UINT64_MAX, 3}};
  const auto bytes = encode_writers(list);
  REQUIRE(bytes);
  CHECK(bytes->size() == 4 * 12 + 3 * 4);
  const auto back = decode_writers(*bytes);
  REQUIRE(back);
  CHECK(back->writers == list.writers);
  CHECK(back->abandoned == list.abandoned);
  int refused = 0;
  for (std::size_t size = 1; size < bytes->size(); ++size)
    if (const auto cut = decode_writers(std::string_view(*bytes).substr(0, size)); !cut) {
      CHECK(cut.error().code == Errc::kDataLoss);
      ++refused;
    } else {
      CHECK(cut->writers.size() < list.writers.size());
    }
  CHECK(refused > 50);
  CHECK_FALSE(decode_writers(*bytes + *bytes));  // not rising
  for (std::uint64_t i = 0; i < 1'400'000; ++i) list.writers.insert(UINT64_MAX - 2'000'000 + i);
  CHECK(encode_writers(list).error().code == Errc::kInvalid);
}
