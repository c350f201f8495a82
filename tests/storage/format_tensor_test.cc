#include <catch2/catch.hpp>

#include "storage/format/box.h"
#include "storage/format/tensor.h"
#include "tests/storage/format_model.h"

using namespace cairn;
using namespace cairn::format;
using namespace cairn::format::model;

TEST_CASE("tensor: every dtype has safetensors' name and width, and comes back from name and number", "[format]") {
  std::uint32_t bits = 0;
  for (std::uint8_t number = 1; number <= 22; ++number) {
    const auto dtype = *dtype_of(number);
    CHECK(*dtype_of(name_of(dtype)) == dtype);
    bits += bits_of(dtype);
  }
  CHECK(bits == 8 + 4 + 6 + 6 + 7 * 8 + 4 * 16 + 3 * 32 + 4 * 64);
  CHECK(name_of(DType::kF8E4M3Fnuz) == "F8_E4M3FNUZ");
  CHECK(bits_of(DType::kC64) == 64);
  for (const std::uint8_t bad : {0, 23, 255}) CHECK_FALSE(dtype_of(bad));
  CHECK_FALSE(dtype_of("bf16"));
}

TEST_CASE("tensor: counts and byte sizes that overflow or are not whole bytes are refused", "[format]") {
  const std::uint64_t big = 1ull << 40;
  CHECK(*elements({}) == 1);
  CHECK(*elements({3, 4}) == 12);
  CHECK(*elements({big, 0, big}) == 0);
  CHECK(elements({big, big}).error().code == Errc::kInvalid);
  CHECK(*bytes_of(DType::kF4, 6) == 3);
  CHECK(*bytes_of(DType::kF6E2M3, 4) == 3);
  CHECK(*bytes_of(DType::kF4, ~0ull - 1) == (~0ull - 1) / 2);
  CHECK(bytes_of(DType::kF4, 3).error().code == Errc::kInvalid);
  CHECK(bytes_of(DType::kF6E3M2, 2).error().code == Errc::kInvalid);
  CHECK(bytes_of(DType::kF64, 1ull << 61).error().code == Errc::kInvalid);
}

TEST_CASE("tensor: a box outside its tensor is refused with the dimension", "[format]") {
  CHECK(check_box(box({}, {}), {}));
  CHECK(check_box(box({1, 2}, {3, 0}), {4, 2}));
  CHECK_THAT(check_box(box({1, 2}, {3, 1}), {4, 2}).error().message, Catch::Contains("dimension 1"));
  CHECK_THAT(check_box(box({1}, {~0ull}), {4}).error().message, Catch::Contains("dimension 0"));
  CHECK_FALSE(check_box(box({0}, {4}), {4, 2}));
  CHECK_FALSE(check_box(box({0, 0}, {4}), {4}));
  CHECK_FALSE(check_box(whole(Shape(33, 1)), Shape(33, 1)));
  CHECK(check_box(whole(Shape(32, 1)), Shape(32, 1)));
  CHECK(text(box({0, 1024}, {2048, 3072})) == "[0:2048, 1024:4096]");
  CHECK(text(box({}, {})) == "[]");
}

TEST_CASE("holders: parts are whole bytes, follow each other and end with the box", "[format]") {
  for (const auto dtype : {DType::kF4, DType::kF6E2M3, DType::kBF16})
    for (const std::uint64_t count : {0, 4, 8, 100, 1000})
      for (const std::uint32_t n : {1, 2, 3, 7, 64}) {
        std::uint64_t next = 0, least = ~0ull, most = 0;
        for (std::uint32_t i = 0; i < n; ++i) {
          const auto part = holder_range(dtype, count, {.index = i, .count = n});
          CHECK(part.first == next);
          CHECK(bytes_of(dtype, part.last - part.first));
          least = std::min(least, part.last - part.first), most = std::max(most, part.last - part.first);
          next = part.last;
        }
        CHECK(next == count);
        CHECK(most - least <= 4);
      }
}

TEST_CASE("copy runs: a whole box is one run, 0-d and 32 dimensions too", "[format]") {
  std::vector<CopyRun> runs;
  const auto run = [&](DType dtype, const Box& saved, const Box& wanted) {
    runs.clear();
    return copy_runs("t", dtype, saved, {0, *elements(saved.shape)}, wanted, runs);
  };
  REQUIRE(run(DType::kF32, box({}, {}), box({}, {})));
  CHECK(runs == std::vector<CopyRun>{{0, 0, 4}});
  REQUIRE(run(DType::kBF16, box({5, 0}, {3, 7}), box({5, 0}, {3, 7})));
  CHECK(runs == std::vector<CopyRun>{{0, 0, 42}});
  REQUIRE(run(DType::kBF16, whole(Shape(32, 2)), whole(Shape(32, 2))));
  CHECK(runs == std::vector<CopyRun>{{0, 0, 2ull << 32}});
  REQUIRE(run(DType::kU8, box({0, 0}, {4, 0}), box({0, 0}, {4, 4})));
  CHECK(runs.empty());
  // Rows of a wider box, whole in the last dimension: one run.
  REQUIRE(run(DType::kU8, box({2, 0}, {4, 8}), box({0, 0}, {8, 8})));
  CHECK(runs == std::vector<CopyRun>{{0, 16, 32}});
  CHECK(run(DType::kU8, box({0}, {4}), box({0, 0}, {4, 4})).error().code == Errc::kInvalid);
  CHECK(run(DType::kF64, whole({1ull << 61}), whole({1ull << 61})).error().code == Errc::kInvalid);
}

TEST_CASE("copy runs: sub-byte elements that do not begin at whole bytes are refused by name", "[format]") {
  std::vector<CopyRun> runs;
  CHECK(copy_runs("odd", DType::kF4, box({0, 0}, {2, 4}), {0, 8}, box({0, 2}, {2, 2}), runs));
  CHECK(runs == std::vector<CopyRun>{{1, 0, 1}, {3, 1, 1}});
  const auto bad = copy_runs("odd", DType::kF4, box({0, 0}, {2, 4}), {0, 8}, box({0, 1}, {2, 2}), runs);
  CHECK(bad.error().code == Errc::kInvalid);
  CHECK_THAT(bad.error().message, Catch::Contains("odd"));
}

TEST_CASE("copy runs: they carry exactly what an element by element copy carries, in as few runs", "[format]") {
  // Goal: every byte, each once, no more runs than needed. Method: mark the wanted bytes element by element.
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 3000; ++round) {
    const auto shape = random_shape(random, 4, 6);
    const Box saved = random_box(random, shape), wanted = random_box(random, shape);
    const auto count = *elements(saved.shape);
    const Holder holder{.index = static_cast<std::uint32_t>(random.in(0, 2)), .count = 3};
    const auto part = random.chance(50) ? LinearRange{0, count} : holder_range(DType::kU16, count, holder);

    std::vector<CopyRun> expected;
    each_element(saved, [&](const auto& at) {
      const auto from = linear(at, saved);
      if (from < part.first || from >= part.last || !holds(wanted, at)) return;
      const CopyRun one{.saved = (from - part.first) * 2, .wanted = linear(at, wanted) * 2, .length = 2};
      auto* last = expected.empty() ? nullptr : &expected.back();
      if (last && last->saved + last->length == one.saved && last->wanted + last->length == one.wanted)
        last->length += 2;
      else
        expected.push_back(one);
    });
    std::vector<CopyRun> runs;
    REQUIRE(copy_runs("t", DType::kU16, saved, part, wanted, runs));
    INFO("round " << round << " saved " << text(saved) << " wanted " << text(wanted));
    REQUIRE(runs == expected);
  }
}
