#include <catch2/catch.hpp>

#include <algorithm>
#include <map>

#include "storage/format/box.h"
#include "storage/format/restore_plan.h"
#include "tests/storage/format_model.h"

using namespace cairn;
using namespace cairn::format;
using namespace cairn::format::model;

namespace {

/// Chunks in memory, written as a client writes them: shards packed one after the other, split at a chunk's end.
struct Store {
  std::uint32_t chunk_bytes = 1 << 20;
  std::map<ChunkId, std::string> chunks;
  ChunkId current{.owner = {}, .writer = 1, .index = 0};
  std::vector<ShardEntry> shards;

  std::vector<Extent> write(std::string_view bytes) {
    std::vector<Extent> extents;
    while (!bytes.empty()) {
      if (chunks[current].size() >= chunk_bytes) ++current.index;
      auto& chunk = chunks[current];
      const auto piece = bytes.substr(0, chunk_bytes - chunk.size());
      extents.push_back({.group = current.index % 3,
                         .chunk = current,
                         .offset = static_cast<std::uint32_t>(chunk.size()),
                         .length = static_cast<std::uint32_t>(piece.size())});
      chunk += piece;
      bytes.remove_prefix(piece.size());
    }
    return extents;
  }

  /// Saves a box of a tensor whose element e (row-major in the tensor) has the bytes of value(tensor, e).
  void save(std::string tensor, const Shape& shape, Box box, std::optional<Holder> holder = {}) {
    ShardEntry shard{.tensor = tensor,
                     .dtype = DType::kU16,
                     .global_shape = shape,
                     .box = std::move(box),
                     .holder = holder,
                     .rank = 0,
                     .crc = 1,
                     .extents = {}};
    const auto part = *saved_range(shard);
    std::string bytes;
    each_element(shard.box, [&](const auto& at) {
      const auto n = linear(at, shard.box);
      if (n >= part.first && n < part.last) bytes += value(tensor, linear(at, whole(shape)));
    });
    shard.extents = write(bytes);
    shards.push_back(std::move(shard));
  }

  static std::string value(std::string_view tensor, std::uint64_t element) {
    const auto v =
        static_cast<std::uint16_t>(element * 31 + tensor.size() * 7919 + static_cast<unsigned char>(tensor[0]));
    return {static_cast<char>(v), static_cast<char>(v >> 8)};
  }

  /// Carries the plan out; every byte of every want must be filled once.
  std::vector<std::string> restore(const std::vector<Want>& wants, const PlanLimits& limits, bool disjoint) {
    const auto made = plan(wants, shards, limits);
    if (!made) FAIL(made.error().message);
    std::vector<std::string> out;
    std::vector<std::vector<int>> filled;
    for (const auto& want : wants) {
      out.emplace_back(*elements(want.box.shape) * 2, '?');
      filled.emplace_back(out.back().size(), 0);
    }
    std::uint64_t total = 0;
    for (const auto& request : made->requests) {
      std::string reply;
      std::size_t ranges = 0;
      std::uint64_t runs = 0;
      for (const auto& chunk : request.chunks) {
        REQUIRE(chunk.offsets.size() == chunk.lengths.size());
        REQUIRE(chunk.id.index % 3 == request.group);
        for (std::size_t i = 0; i < chunk.offsets.size(); ++i, ++ranges) {
          REQUIRE(chunk.lengths[i] > 0);
          REQUIRE(chunk.offsets[i] + chunk.lengths[i] <= chunks.at(chunk.id).size());
          if (i > 0 && disjoint && chunk.strided.empty() && made->requests.size() == 1)
            REQUIRE(chunk.offsets[i] > chunk.offsets[i - 1]);
          if (i > 0) REQUIRE(chunk.offsets[i] != chunk.offsets[i - 1] + chunk.lengths[i - 1]);  // else one range
          reply += chunks.at(chunk.id).substr(chunk.offsets[i], chunk.lengths[i]);
        }
        for (const auto& strided : chunk.strided) {
          REQUIRE(!strided.steps.empty());
          const auto checked = check_strided(strided, chunks.at(chunk.id).size(), limits.request_runs_max);
          if (!checked) FAIL(checked.error().message);
          for (RunCursor at(strided); !at.done(); at.take(at.left()))
            reply += chunks.at(chunk.id).substr(at.at(), at.left());
          runs += strided.runs();
          ++ranges;
        }
      }
      REQUIRE(reply.size() == request.bytes);
      REQUIRE(reply.size() <= limits.request_bytes_max);
      REQUIRE(ranges <= limits.request_ranges_max);
      REQUIRE(runs <= limits.request_runs_max);
      std::size_t at = 0;
      for (const auto& piece : request.scatter) {
        for (RunCursor to(piece.to); !to.done(); to.take(to.left())) {
          for (std::uint32_t i = 0; i < to.left(); ++i) ++filled.at(piece.want).at(to.at() + i);
          out.at(piece.want).replace(to.at(), to.left(), reply, at, to.left());
          at += to.left();
        }
      }
      REQUIRE(at == reply.size());
      total += reply.size();
    }
    REQUIRE(total == made->bytes);
    for (const auto& want : filled) REQUIRE(std::ranges::all_of(want, [](int n) { return n == 1; }));
    return out;
  }
};

std::string expected(const Want& want, const Shape& shape) {
  std::string out;
  each_element(want.box, [&](const auto& at) { out += Store::value(want.tensor, linear(at, whole(shape))); });
  return out;
}

Want want_of(std::string tensor, Box box) {
  return {.tensor = std::move(tensor), .box = std::move(box), .dtype = DType::kU16, .size_bytes = {}};
}

}  // namespace

TEST_CASE("plan: any layout restores into any other, byte for byte", "[format]") {
  // Goal: random tilings, holders and duplicates of several tensors; wants of random boxes and of another tiling.
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 600; ++round) {
    INFO("round " << round);
    Store store;
    store.chunk_bytes = static_cast<std::uint32_t>(random.in(8, 400));
    std::map<std::string, Shape> tensors;
    for (const auto* name : {"a", "b.weight", "c"}) {
      const auto shape = tensors[name] = random_shape(random, 4, 6);
      for (const auto& box : random_tiling(random, shape, random.in(0, 10))) {
        const auto holders = static_cast<std::uint32_t>(random.chance(30) ? random.in(1, 5) : 0);
        for (std::uint32_t i = 0; i < holders; ++i) store.save(name, shape, box, Holder{i, holders});
        if (holders == 0) store.save(name, shape, box);
        if (holders == 0 && random.chance(20)) store.save(name, shape, box);
      }
      if (!shape.empty()) {  // zero-size shards anywhere change nothing
        Box none = random_box(random, shape);
        none.shape[0] = 0;
        store.save(name, shape, none);
      }
    }
    std::shuffle(store.shards.begin(), store.shards.end(), random.engine());
    std::vector<Want> wants;
    const bool disjoint = random.chance(50);
    for (const auto& [name, shape] : tensors) {
      for (const auto& box : random_tiling(random, shape, random.in(0, 5))) wants.push_back(want_of(name, box));
      if (disjoint) continue;
      wants.push_back(want_of(name, random_box(random, shape)));
      wants.push_back(want_of(name, whole(shape)));
    }
    std::shuffle(wants.begin(), wants.end(), random.engine());
    PlanLimits limits;
    if (random.chance(50))
      limits = {.request_bytes_max = random.in(1, 300),
                .request_ranges_max = static_cast<std::uint32_t>(random.in(1, 9)),
                .request_runs_max = static_cast<std::uint32_t>(random.in(1, 40))};
    const auto out = store.restore(wants, limits, disjoint);
    for (std::size_t i = 0; i < wants.size(); ++i) REQUIRE(out[i] == expected(wants[i], tensors[wants[i].tensor]));
  }
}

TEST_CASE("plan: the layout it was saved in is one range a chunk", "[format]") {
  Store store;
  store.save("w", {64, 64}, box({0, 0}, {32, 64}));
  store.save("w", {64, 64}, box({32, 0}, {32, 64}));
  const std::vector<Want> wants{want_of("w", whole({64, 64}))};
  const auto made = plan(wants, store.shards);
  REQUIRE(made);
  REQUIRE(made->requests.size() == 1);
  CHECK(made->requests[0].chunks[0].lengths == std::vector<std::uint32_t>{64 * 64 * 2});
  CHECK(made->requests[0].scatter.size() == 1);
  CHECK(made->requests[0].scatter[0].to == Strided{.offset = 0, .length = 64 * 64 * 2});
}

TEST_CASE("plan: columns of row-saved tensors are one set of runs a shard, placed in one run", "[format]") {
  // Goal: what is asked for does not grow with the number of rows.
  Store store;
  for (std::uint64_t first = 0; first < 4096; first += 1024) store.save("w", {4096, 96}, box({first, 0}, {1024, 96}));
  store.save("stack", {8, 128, 96}, whole({8, 128, 96}));
  const std::vector<Want> wants{want_of("w", box({0, 32}, {4096, 16})),
                                want_of("stack", box({0, 0, 32}, {8, 128, 16}))};
  const auto made = plan(wants, store.shards);
  REQUIRE(made);
  REQUIRE(made->requests.size() == 1);
  REQUIRE(made->requests[0].chunks.size() == 1);
  CHECK(made->requests[0].chunks[0].offsets.empty());
  CHECK(made->requests[0].chunks[0].strided.size() == 5);
  CHECK(made->requests[0].scatter.size() == 2);
  CHECK(made->requests[0].bytes == (4096 + 1024) * 16 * 2);
  CHECK(store.restore(wants, {}, true)[1] == expected(wants[1], {8, 128, 96}));
}

TEST_CASE("plan: a missing box, tensor or holder is named", "[format]") {
  Store store;
  store.save("w", {8, 8}, box({0, 0}, {4, 8}));
  store.save("w", {8, 8}, box({4, 0}, {4, 5}));
  store.save("h", {8}, box({0}, {8}), Holder{0, 3});
  store.save("h", {8}, box({0}, {8}), Holder{2, 3});
  const auto error = [&](Want want) {
    const auto made = plan(std::vector{std::move(want)}, store.shards);
    REQUIRE_FALSE(made);
    return made.error();
  };
  CHECK(plan(std::vector{want_of("w", box({1, 1}, {5, 4}))}, store.shards));
  CHECK(error(want_of("w", box({1, 1}, {5, 7}))).code == Errc::kNotFound);
  CHECK_THAT(error(want_of("w", box({1, 1}, {5, 7}))).message, Catch::Contains("'w'") && Catch::Contains("[4:6, 5:8]"));
  CHECK(error(want_of("v", box({}, {}))).code == Errc::kNotFound);
  CHECK_THAT(error(want_of("h", box({0}, {8}))).message, Catch::Contains("holder 1 of 3"));
}

TEST_CASE("plan: wrong dtype, shape or buffer size is refused, contradicting shards are data loss", "[format]") {
  Store store;
  store.save("w", {8}, box({0}, {4}));
  store.save("w", {8}, box({4}, {4}));
  const auto code = [&](Want want) { return plan(std::vector{std::move(want)}, store.shards).error().code; };
  CHECK(code({.tensor = "w", .box = box({0}, {8}), .dtype = DType::kF16, .size_bytes = {}}) == Errc::kInvalid);
  CHECK(code({.tensor = "w", .box = box({0}, {9}), .dtype = {}, .size_bytes = {}}) == Errc::kInvalid);
  CHECK(code({.tensor = "w", .box = box({0, 0}, {8, 1}), .dtype = {}, .size_bytes = {}}) == Errc::kInvalid);
  CHECK(code({.tensor = "w", .box = box({0}, {8}), .dtype = {}, .size_bytes = 15}) == Errc::kInvalid);
  CHECK(plan(std::vector<Want>{{.tensor = "w", .box = box({8}, {0}), .dtype = {}, .size_bytes = 0}}, store.shards));
  const Want all = want_of("w", whole({8}));
  auto good = store.shards;
  store.save("w", {8}, box({3}, {2}));
  CHECK(code(all) == Errc::kDataLoss);
  store.shards = good;
  store.shards[1].extents[0].length += 1;
  CHECK(code(all) == Errc::kDataLoss);
  store.shards = good;
  store.shards.push_back(good[0]);
  CHECK(plan(std::vector{all}, store.shards));
  store.shards.back().crc++;
  CHECK(code(all) == Errc::kDataLoss);
}
