#include <catch2/catch.hpp>

#include <algorithm>
#include <map>
#include <set>

#include "proto/common/checksum.h"
#include "storage/format/index_merge.h"
#include "storage/format/index_pages.h"
#include "storage/format/page_codec.h"
#include "tests/storage/format_model.h"

using namespace cairn;
using namespace cairn::format;
using namespace cairn::format::model;

namespace {

std::string random_name(Random& random, std::size_t length_max) {
  static constexpr std::string_view kStems[] = {"layers.", "model.", "opt/", "caf\xc3\xa9.", "w"};
  std::string out;
  while (out.size() + 8 < length_max && (out.empty() || random.chance(70))) out += kStems[random.in(0, 4)];
  // Long names share nothing: fences are long then, fan-outs small, and levels many.
  while (length_max > 500 && out.size() + 8 < length_max)
    out.insert(out.begin(), static_cast<char>(random.in('a', 'z')));
  return out + std::to_string(random.in(0, 99));
}

std::vector<Extent> extents_for(Random& random, std::uint64_t bytes) {
  std::vector<Extent> out;
  std::uint32_t index = static_cast<std::uint32_t>(random.in(0, 1000));
  const auto writer = random.in(1, 4);
  const auto step = random.in(1, 64);
  while (bytes != 0) {
    const auto length =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(bytes, random.chance(70) ? step : random.in(1, 64)));
    out.push_back({.group = static_cast<std::uint32_t>(random.chance(80) ? 3 : random.in(0, 500)),
                   .chunk = {.owner = OwnerId::make(1, 0, writer, 1), .writer = writer, .index = index},
                   .offset = static_cast<std::uint32_t>(random.chance(70) ? 0 : random.in(0, 4096)),
                   .length = length});
    index += random.chance(80) ? 1 : 5;
    bytes -= length;
  }
  return out;
}

Contents random_contents(Random& random, std::size_t tensors, std::size_t name_bytes_max) {
  Contents out;
  std::set<std::string> names;
  while (names.size() < tensors) names.insert(random_name(random, name_bytes_max));
  for (const auto& name : names) {
    auto shape = random_shape(random, 4, 9);
    const auto dtype = static_cast<DType>(random.in(5, 22));
    if (!shape.empty() && random.chance(10)) shape[0] = 0;
    std::set<Box> seen;
    for (const auto& box : random_tiling(random, shape, random.in(0, 20))) {
      if (!seen.insert(box).second) continue;
      const auto holders = static_cast<std::uint32_t>(random.chance(30) ? random.in(1, 4) : 0);
      for (std::uint32_t i = 0; i < std::max(holders, 1u); ++i) {
        ShardEntry shard{.tensor = name,
                         .dtype = dtype,
                         .global_shape = shape,
                         .box = box,
                         .holder = {},
                         .rank = static_cast<std::uint32_t>(random.in(0, 20000)),
                         .crc = static_cast<std::uint32_t>(random.engine()()),
                         .extents = {}};
        if (holders != 0) shard.holder = Holder{i, holders};
        shard.extents = extents_for(random, *saved_bytes(shard));
        out.shards.push_back(std::move(shard));
      }
    }
  }
  for (std::uint32_t i = 0; i < random.in(0, 5); ++i) {
    const auto size = random.in(0, 300);
    out.blobs.push_back({.name = "rng", .rank = i, .size = size, .crc = 5, .extents = extents_for(random, size)});
    out.tokens.push_back({.stream = "s" + std::to_string(i), .bytes = std::string(random.in(0, 100), 't'), .rank = i});
    out.meta.push_back({.scope = "a.safetensors",
                        .key = "k" + std::to_string(i),
                        .value = std::string(random.in(0, 400), 'v'),
                        .rank = i});
  }
  sort(out);
  return out;
}

Result<Contents> find_in(std::string_view index, std::vector<Query> queries, std::size_t* pages_read = nullptr) {
  TRY(const auto root_page, root_of(index));
  TRY(auto root, decode_root(root_page, index.size()));
  IndexSearch search(std::move(root), std::move(queries));
  for (auto pages = search.wanted(); !pages.empty(); pages = search.wanted())
    for (const auto& page : pages) {
      CHECK_OK(search.supply(page, index.substr(page.offset, page.size)));
      if (pages_read != nullptr) ++*pages_read;
    }
  return search.take();
}

/// Rows of one-byte elements of tensor "t<number>", as a large world saves them.
Contents rows(std::uint32_t tensors, std::uint32_t ranks) {
  Contents out;
  for (std::uint32_t t = 0; t < tensors; ++t)
    for (std::uint32_t r = 0; r < ranks; ++r)
      out.shards.push_back({.tensor = "t" + std::to_string(t),
                            .dtype = DType::kU8,
                            .global_shape = {ranks, 16},
                            .box = box({r, 0}, {1, 16}),
                            .holder = {},
                            .rank = r,
                            .crc = r * t,
                            .extents = {{.group = 1,
                                         .chunk = {.owner = OwnerId::make(1, 0, 5, 5), .writer = r, .index = 0},
                                         .offset = t * 16,
                                         .length = 16}}});
  sort(out);
  return out;
}

}  // namespace

TEST_CASE("index: what goes in comes out, in one page or in many levels", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  std::uint8_t levels_max = 0;
  for (int round = 0; round < 60; ++round) {
    INFO("round " << round);
    const auto contents =
        random_contents(random, random.in(0, round % 10 == 0 ? 1500 : 40), round % 10 == 0 ? 1000 : 60);
    const auto encoded = encode(contents);
    REQUIRE(encoded);
    const auto back = decode(*encoded);
    if (!back) FAIL(back.error().message);
    REQUIRE(*back == contents);
    levels_max = std::max(levels_max, decode_root(*root_of(*encoded), encoded->size())->levels);
  }
  CHECK(levels_max >= 3);
}

TEST_CASE("index: the writer reports size, root and totals as the step record keeps them", "[format]") {
  const auto contents = rows(2, 3000);
  std::string bytes;
  IndexWriter writer([&](std::string_view next) -> Result<void> {
    bytes += next;
    return {};
  });
  for (const auto& entry : entries_of(contents)) REQUIRE(writer.add(entry));
  const auto written = writer.finish();
  REQUIRE(written);
  CHECK(written->index_bytes == bytes.size());
  const auto root = bytes.substr(bytes.size() - written->root_bytes);
  CHECK(root == *root_of(bytes));
  CHECK(written->root_digest == sha256(root));
  CHECK(written->totals == Totals{.tensors = 2, .shards = 6000, .blobs = 0, .tokens = 0, .meta = 0, .bytes = 96000});
  CHECK(decode_root(root, bytes.size())->totals == written->totals);
  CHECK(bytes.size() / 6000 < 70);  // an entry's cost; most of it names its writer
  CHECK(bytes == *encode(contents));
}

TEST_CASE("index: an error of the output comes back, entries out of order are refused", "[format]") {
  IndexWriter full([](std::string_view) -> Result<void> { return fail(Errc::kNoSpace, "full"); });
  CHECK(full.finish().error().code == Errc::kNoSpace);
  auto contents = rows(1, 2);
  IndexWriter writer([](std::string_view) -> Result<void> { return {}; });
  REQUIRE(writer.add(contents.shards[1]));
  CHECK(writer.add(contents.shards[1]).error().code == Errc::kInvalid);
  CHECK(writer.add(contents.shards[0]).error().code == Errc::kInvalid);
  contents.shards[1] = contents.shards[0];
  CHECK_FALSE(encode(contents));
  contents.shards[1].extents.clear();
  CHECK_FALSE(encode(contents));
}

TEST_CASE("index: a search reads only the pages that can hold a match, and finds what a filter finds", "[format]") {
  auto contents = rows(20, 4000);
  contents.blobs.push_back({.name = "t7", .rank = 0, .size = 0, .crc = 0, .extents = {}});
  contents.meta.push_back({.scope = "t7", .key = "", .value = "x", .rank = 0});
  const auto index = *encode(contents);
  std::size_t all_pages = 0;
  CHECK(*find_in(index, {}, &all_pages) == contents);
  CHECK(all_pages > 100);

  std::size_t pages = 0;
  const auto one = find_in(index, {{.kind = Kind::kShard, .name = "t7", .box = box({1999, 3}, {3, 2})}}, &pages);
  REQUIRE(one);
  CHECK(one->shards.size() == 3);
  CHECK(one->shards[0].tensor == "t7");
  CHECK(one->blobs.empty());
  CHECK(pages <= 4);

  pages = 0;
  const auto missing = find_in(
      index, {{.kind = Kind::kShard, .name = "t7x", .box = {}}, {.kind = Kind::kToken, .name = "t7", .box = {}}},
      &pages);
  CHECK(*missing == Contents{});
  CHECK(pages <= 4);

  const auto prefix = find_in(index, {{.kind = Kind::kShard, .name = "t1", .prefix = true, .box = box({0, 0}, {1, 1})},
                                      {.kind = Kind::kMeta, .name = "", .prefix = true, .box = {}},
                                      {.kind = Kind::kBlob, .name = "t7", .box = {}}});
  CHECK(prefix->shards.size() == 11);  // t1, t10 .. t19
  CHECK(prefix->meta.size() == 1);
  CHECK(prefix->blobs.size() == 1);
}

TEST_CASE("index: random searches find what a filter over everything finds", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 40; ++round) {
    const auto contents = random_contents(random, 150, 200);
    const auto index = *encode(contents);
    for (int k = 0; k < 20; ++k) {
      const auto& shard = contents.shards[random.in(0, contents.shards.size() - 1)];
      Query query{.kind = Kind::kShard, .name = shard.tensor, .prefix = random.chance(30), .box = {}};
      if (query.prefix) query.name.resize(random.in(0, query.name.size()));
      if (!query.prefix && random.chance(70)) query.box = random_box(random, shard.global_shape);
      const auto found = find_in(index, {query, {.kind = Kind::kBlob, .name = "rng", .box = {}}});
      REQUIRE(found);
      Contents expected;
      expected.blobs = contents.blobs;
      for (const auto& one : contents.shards) {
        if (query.prefix ? !one.tensor.starts_with(query.name) : one.tensor != query.name) continue;
        if (!query.box || empty(*query.box) || intersect(one.box, *query.box)) expected.shards.push_back(one);
      }
      auto shards = found->shards;
      if (query.box && !empty(*query.box)) std::erase_if(shards, [](const auto& one) { return empty(one.box); });
      REQUIRE(shards == expected.shards);
      REQUIRE(found->blobs == expected.blobs);
    }
  }
}

TEST_CASE("index: every single flipped bit and every truncation is detected", "[format]") {
  Random random(5);
  Contents contents = random_contents(random, 2, 30);
  contents.tokens.push_back({.stream = "train", .bytes = "abc", .rank = 0});
  contents.meta.push_back({.scope = "f", .key = "k", .value = "v", .rank = 0});
  sort(contents);
  const auto good = *encode(contents);
  REQUIRE(*decode(good) == contents);
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    auto bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    const auto result = decode(bad);
    if (result && *result != contents) FAIL("bit " << bit << " gives other contents");
    if (!result && result.error().code != Errc::kDataLoss) FAIL("bit " << bit << ": " << result.error().message);
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    CHECK_FALSE(decode(std::string_view(good).substr(0, size)));
    CHECK_FALSE(decode(std::string_view(good).substr(good.size() - size)));
  }
}

TEST_CASE("index: pages with a right checksum and wrong contents are refused or harmless, never a crash", "[format]") {
  // Goal: the decoders bound everything themselves. Method: damage bodies, then make CRCs right again.
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  const auto reseal = [](std::string page) {
    page.replace(16, 4, std::string(4, '\0'));
    const auto crc = crc32c(std::string_view(page).substr(20), crc32c(std::string_view(page).substr(0, 16)));
    for (std::size_t i = 0; i < 4; ++i) page[16 + i] = static_cast<char>(crc >> (8 * i));
    return std::pair(page, crc);
  };
  int refused = 0, taken = 0;
  for (int round = 0; round < 12; ++round) {
    const auto index = *encode(random_contents(random, 200, round % 2 == 0 ? 700 : 40));
    std::vector<Fence> all, level = decode_root(*root_of(index), index.size())->fences;
    while (!level.empty()) {
      std::vector<Fence> below;
      for (const auto& page : level) {
        all.push_back(page);
        if (page.level == 0) continue;
        for (auto& fence : *decode_fences(std::string_view(index).substr(page.offset, page.size), page))
          below.push_back(fence);
      }
      level = std::move(below);
    }
    for (int k = 0; k < 400; ++k) {
      auto ref = all[random.in(0, all.size() - 1)];
      auto bytes = index.substr(ref.offset, ref.size);
      for (auto n = random.in(1, 3); n-- > 0;)
        bytes[random.in(0, 3) == 0 ? random.in(8, 11) : random.in(20, bytes.size() - 1)] =
            random.chance(40) ? '\xff' : static_cast<char>(random.engine()());
      std::tie(bytes, ref.crc) = reseal(std::move(bytes));
      const bool ok = ref.level == 0 ? decode_entries(bytes, ref).has_value() : decode_fences(bytes, ref).has_value();
      ++(ok ? taken : refused);
    }
    for (int k = 0; k < 100; ++k) {
      auto bytes = std::string(*root_of(index));
      bytes[random.in(20, bytes.size() - 1)] = static_cast<char>(random.engine()());
      std::tie(bytes, std::ignore) = reseal(std::move(bytes));
      (void)decode_root(bytes, index.size());
    }
  }
  CHECK(refused > 1000);
  CHECK(taken > 0);
}

TEST_CASE("index: a few bytes that name a huge number of chunks are refused before they are believed", "[format]") {
  ShardEntry shard{.tensor = "w",
                   .dtype = DType::kU8,
                   .global_shape = {1ull << 40},
                   .box = whole({1ull << 40}),
                   .holder = {},
                   .rank = 0,
                   .crc = 0,
                   .extents = {}};
  for (std::uint32_t i = 0; i < (1u << 18) + 1; ++i)
    shard.extents.push_back({.group = 0, .chunk = {.owner = {}, .writer = 0, .index = i}, .offset = 0, .length = 1});
  shard.global_shape = {shard.extents.size()};
  shard.box = whole(shard.global_shape);
  const auto refused = encode({.shards = {shard}, .blobs = {}, .tokens = {}, .meta = {}});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kInvalid);
  shard.extents.pop_back();
  shard.global_shape[0]--, shard.box = whole(shard.global_shape);
  const auto index = encode({.shards = {shard}, .blobs = {}, .tokens = {}, .meta = {}});
  REQUIRE(index);
  CHECK(index->size() < 400);
  CHECK(decode(*index)->shards[0] == shard);
}

TEST_CASE("index: a page that names more chunks than a page may is refused whatever its size", "[format]") {
  const auto page_of = [](std::uint32_t chunks, Fence& ref) {
    std::string body;
    pages::put_varint(body, 1);
    body.append(16, 'w');  // one owner
    pages::put_varint(body, 1);
    pages::put_varint(body, 0);
    body.append(8, 'w');  // one writer of it
    body += '\2';         // a blob
    pages::put_name(body, "b", "");
    pages::put_varint(body, 0);
    pages::put_varint(body, chunks);
    pages::put_u32(body, 0);
    for (const std::uint64_t value : {1u, 0u, 0u, 0u, chunks, 0u, 1u, 1u}) pages::put_varint(body, value);
    auto page = pages::seal(pages::PageKind::kEntries, 0, 1, body, ref.crc);
    ref.size = static_cast<std::uint32_t>(page.size());
    return page;
  };
  Fence ref;
  const auto most = page_of(pages::kExtentsMax, ref);
  CHECK(decode_entries(most, ref)->blobs[0].extents.size() == pages::kExtentsMax);
  const auto more = page_of(pages::kExtentsMax + 1, ref);
  CHECK(decode_entries(more, ref).error().code == Errc::kDataLoss);
}

TEST_CASE("index: fences of pages that overlap or reach past their parent are refused", "[format]") {
  // Otherwise a few pages that name each other could cost a reader for ever.
  const auto decode_two = [](std::uint32_t first_size, std::uint64_t gap, std::uint32_t second_size) {
    Fence one, two, ref;
    one.offset = 0, one.size = first_size;
    two.offset = first_size + gap, two.size = second_size;
    one.name = one.last_name = "a", two.name = two.last_name = "b";
    std::string body;
    pages::put_fence(body, one, "", 0);
    pages::put_fence(body, two, one.name, first_size);
    const auto page = pages::seal(pages::PageKind::kFences, 1, 2, body, ref.crc);
    ref.level = 1, ref.offset = 1000, ref.size = static_cast<std::uint32_t>(page.size());
    return decode_fences(page, ref).has_value();
  };
  CHECK(decode_two(400, 0, 600));
  CHECK(decode_two(400, 200, 400));
  CHECK_FALSE(decode_two(400, 0, 601));
  CHECK_FALSE(decode_two(400, 201, 400));
  CHECK_FALSE(decode_two(400, ~0ull - 500, 600));  // back to the first page, in 64 bits
  CHECK_FALSE(decode_two(1001, 0, 20));
}

TEST_CASE("index: one written by a newer program is refused as such, not as damage", "[format]") {
  auto index = *encode(rows(1, 2));
  const auto root_bytes = root_of(index)->size();
  auto root = index.substr(index.size() - root_bytes);
  root[20] = 9;  // format version
  root[24] = 9;  // oldest reader
  const auto crc = crc32c(std::string_view(root).substr(20), crc32c(std::string_view(root).substr(0, 16)));
  for (std::size_t i = 0; i < 4; ++i) root[16 + i] = static_cast<char>(crc >> (8 * i));
  const auto result = decode_root(root, index.size());
  REQUIRE_FALSE(result);
  CHECK(result.error().code == Errc::kInvalid);
  CHECK_THAT(result.error().message, Catch::Contains("version 9"));
}

namespace {

/// Merges whole indexes whose bytes come in pieces of random size, into one.
Result<std::string> merge_in_pieces(Random& random, const std::vector<std::string>& parts, std::uint64_t piece_max) {
  std::vector<std::uint64_t> sizes;
  for (const auto& part : parts) sizes.push_back(part.size());
  IndexMerge merge(sizes, {});
  std::vector<std::size_t> given(parts.size(), 0);
  std::string out;
  IndexWriter writer([&out](std::string_view bytes) -> Result<void> {
    out += bytes;
    return {};
  });
  for (;;) {
    TRY(const auto* entry, merge.next());
    if (entry != nullptr) {
      CHECK_OK(writer.add_checked(*entry));
      continue;
    }
    const auto source = merge.hungry();
    if (!source) break;
    CHECK(merge.stream(*source).buffered() < merge.stream(*source).wanted());
    const auto size = std::min<std::uint64_t>(random.in(1, piece_max), parts[*source].size() - given[*source]);
    if (size == 0) return fail(Errc::kFailed, "hungry after the last byte");
    merge.supply(*source, std::string_view(parts[*source]).substr(given[*source], size));
    given[*source] += size;
  }
  CHECK(merge.ended());
  CHECK_OK(writer.finish());
  return out;
}

std::vector<Contents> scattered(Random& random, const Contents& all, std::size_t parts) {
  std::vector<Contents> out(parts);
  for (const auto& entry : entries_of(all)) append(out[random.in(0, parts - 1)], entry);
  return out;
}

}  // namespace

TEST_CASE("merge: indexes that come in pieces become the index of all their entries, in levels too", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 60; ++round) {
    const auto all = random_contents(random, random.in(0, 60), random.chance(50) ? 40 : 700);
    const auto whole = encode(all);
    REQUIRE(whole);
    std::vector<std::string> parts;
    for (const auto& part : scattered(random, all, random.in(1, 40))) parts.push_back(*encode(part));
    const auto piece = random.chance(50) ? 1 << 20 : random.in(16, 3000);
    const auto at_once = merge_in_pieces(random, parts, piece);
    INFO((at_once ? "" : at_once.error().message));
    REQUIRE(at_once);
    REQUIRE(*at_once == *whole);
    // Whatever is merged first, and in how many levels, the bytes are the same.
    while (parts.size() > 1) {
      std::vector<std::string> some;
      for (auto n = random.in(2, 8); n > 0 && !parts.empty(); --n) {
        const auto at = parts.begin() + static_cast<std::ptrdiff_t>(random.in(0, parts.size() - 1));
        some.push_back(std::move(*at));
        parts.erase(at);
      }
      auto merged = merge_in_pieces(random, some, piece);
      REQUIRE(merged);
      parts.push_back(*std::move(merged));
    }
    REQUIRE(parts.front() == *whole);
  }
}

TEST_CASE("merge: every single flipped bit and every truncation of a part is detected", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  const auto all = random_contents(random, 6, 40);
  std::vector<std::string> parts;
  for (const auto& part : scattered(random, all, 2)) parts.push_back(*encode(part));
  REQUIRE(merge_in_pieces(random, parts, 1 << 20));
  for (std::size_t at = 0; at < parts[1].size(); ++at) {
    auto bad = parts;
    bad[1][at] = static_cast<char>(bad[1][at] ^ 1 << random.in(0, 7));
    const auto merged = merge_in_pieces(random, bad, 1 << 20);
    REQUIRE_FALSE(merged);
    CHECK(merged.error().code == Errc::kDataLoss);
    bad[1] = parts[1].substr(0, at);
    const auto cut = merge_in_pieces(random, bad, 1 << 20);
    REQUIRE_FALSE(cut);
    CHECK(cut.error().code == Errc::kDataLoss);
  }
}

TEST_CASE("merge: entries that stand in two parts, or go back, are refused", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  const auto part = encode(random_contents(random, 3, 40));
  REQUIRE(part);
  const auto twice = merge_in_pieces(random, {*part, *part}, 1 << 20);
  REQUIRE_FALSE(twice);
  CHECK(twice.error().code == Errc::kInvalid);
}
