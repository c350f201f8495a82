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

namespace {

struct OneRun {
  std::uint64_t saved = 0, wanted = 0, length = 0;
  bool operator==(const OneRun&) const = default;
};

/// Run by run; those that touch in both are one.
std::vector<OneRun> each_run(const std::vector<CopyRuns>& sets) {
  std::vector<OneRun> out;
  const auto add = [&](OneRun one) {
    auto* last = out.empty() ? nullptr : &out.back();
    if (last && last->saved + last->length == one.saved && last->wanted + last->length == one.wanted)
      last->length += one.length;
    else
      out.push_back(one);
  };
  const auto walk = [&](auto& self, const CopyRuns& set, std::size_t d, OneRun at) -> void {
    if (d == set.steps.size()) return add(at);
    for (std::uint64_t i = 0; i < set.steps[d].count; ++i) {
      self(self, set, d + 1, at);
      at.saved += set.steps[d].saved;
      at.wanted += set.steps[d].wanted;
    }
  };
  for (const auto& set : sets) walk(walk, set, 0, {set.saved, set.wanted, set.length});
  return out;
}

/// All bytes of strided runs, in order, by the cursor.
std::vector<std::uint64_t> each_byte(const Strided& runs) {
  std::vector<std::uint64_t> out;
  for (RunCursor at(runs); !at.done(); at.take(1)) out.push_back(at.at());
  return out;
}

}  // namespace

TEST_CASE("copy runs: a whole box is one run, 0-d and 32 dimensions too", "[format]") {
  std::vector<CopyRuns> runs;
  const auto run = [&](DType dtype, const Box& saved, const Box& wanted) {
    runs.clear();
    return copy_runs("t", dtype, saved, {0, *elements(saved.shape)}, wanted, runs);
  };
  const auto one = [](std::uint64_t saved, std::uint64_t wanted, std::uint64_t length) {
    return std::vector<CopyRuns>{{.saved = saved, .wanted = wanted, .length = length}};
  };
  REQUIRE(run(DType::kF32, box({}, {}), box({}, {})));
  CHECK(runs == one(0, 0, 4));
  REQUIRE(run(DType::kBF16, box({5, 0}, {3, 7}), box({5, 0}, {3, 7})));
  CHECK(runs == one(0, 0, 42));
  REQUIRE(run(DType::kBF16, whole(Shape(32, 2)), whole(Shape(32, 2))));
  CHECK(runs == one(0, 0, 2ull << 32));
  REQUIRE(run(DType::kU8, box({0, 0}, {4, 0}), box({0, 0}, {4, 4})));
  CHECK(runs.empty());
  // Rows of a wider box, whole in the last dimension: one run.
  REQUIRE(run(DType::kU8, box({2, 0}, {4, 8}), box({0, 0}, {8, 8})));
  CHECK(runs == one(0, 16, 32));
  // Columns: one set, of one step although there are two dimensions of rows.
  REQUIRE(run(DType::kBF16, whole({6, 50, 100}), box({0, 0, 30}, {6, 50, 10})));
  CHECK(runs == std::vector<CopyRuns>{
                    {.saved = 60, .wanted = 0, .length = 20, .steps = {{.count = 300, .saved = 200, .wanted = 20}}}});
  CHECK(runs[0].from() == Strided{.offset = 60, .length = 20, .steps = {{.count = 300, .stride = 200}}});
  CHECK(runs[0].to() == Strided{.offset = 0, .length = 6000});
  CHECK(run(DType::kU8, box({0}, {4}), box({0, 0}, {4, 4})).error().code == Errc::kInvalid);
  CHECK(run(DType::kF64, whole({1ull << 61}), whole({1ull << 61})).error().code == Errc::kInvalid);
}

TEST_CASE("copy runs: sub-byte elements that do not begin at whole bytes are refused by name", "[format]") {
  std::vector<CopyRuns> runs;
  CHECK(copy_runs("odd", DType::kF4, box({0, 0}, {2, 4}), {0, 8}, box({0, 2}, {2, 2}), runs));
  CHECK(each_run(runs) == std::vector<OneRun>{{1, 0, 1}, {3, 1, 1}});
  const auto refused = [&](const Box& saved, const Box& wanted) {
    const auto bad = copy_runs("odd", DType::kF4, saved, {0, *elements(saved.shape)}, wanted, runs);
    return bad.error().code == Errc::kInvalid && bad.error().message.find("odd") != std::string::npos;
  };
  CHECK(refused(box({0, 0}, {2, 4}), box({0, 1}, {2, 2})));
  CHECK(refused(box({0, 0}, {2, 5}), box({0, 0}, {2, 2})));  // the first run is whole, the second is not
}

TEST_CASE("copy runs: they carry exactly what an element by element copy carries, in as few sets", "[format]") {
  // Goal: every byte, each once, whatever the boxes. Method: mark the wanted bytes element by element.
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 3000; ++round) {
    const auto shape = random_shape(random, 4, 6);
    const Box saved = random_box(random, shape), wanted = random_box(random, shape);
    const auto count = *elements(saved.shape);
    const Holder holder{.index = static_cast<std::uint32_t>(random.in(0, 2)), .count = 3};
    const bool all = random.chance(50);
    const auto part = all ? LinearRange{0, count} : holder_range(DType::kU16, count, holder);

    std::vector<OneRun> expected;
    each_element(saved, [&](const auto& at) {
      const auto from = linear(at, saved);
      if (from < part.first || from >= part.last || !holds(wanted, at)) return;
      const OneRun one{.saved = (from - part.first) * 2, .wanted = linear(at, wanted) * 2, .length = 2};
      auto* last = expected.empty() ? nullptr : &expected.back();
      if (last && last->saved + last->length == one.saved && last->wanted + last->length == one.wanted)
        last->length += 2;
      else
        expected.push_back(one);
    });
    std::vector<CopyRuns> runs;
    REQUIRE(copy_runs("t", DType::kU16, saved, part, wanted, runs));
    INFO("round " << round << " saved " << text(saved) << " wanted " << text(wanted));
    REQUIRE(each_run(runs) == expected);
    REQUIRE(runs.size() <= (all ? std::min<std::size_t>(expected.size(), 1) : 2 * shape.size() + 1));

    // Cut anywhere, the parts are the whole; and each side's runs are the same bytes.
    for (const auto& set : runs) {
      const auto end = set.from().end();
      auto middle = random.in(set.saved, end), later = random.in(middle, end);
      std::vector<CopyRuns> parts;
      cut(set, 0, middle, parts);
      cut(set, middle, later, parts);
      cut(set, later, ~std::uint64_t{0}, parts);
      std::vector<std::uint64_t> from, to;
      for (const auto& part_of_it : parts) {
        for (const auto byte : each_byte(part_of_it.from())) from.push_back(byte);
        for (const auto byte : each_byte(part_of_it.to())) to.push_back(byte);
      }
      REQUIRE(from == each_byte(set.from()));
      REQUIRE(to == each_byte(set.to()));
      REQUIRE(check_strided(set.from(), end, set.bytes()));
    }
  }
}

TEST_CASE("strided runs: a cursor that skips finds what one finds that goes byte by byte", "[format]") {
  INFO("CAIRN_TEST_SEED=" << seed());
  Random random(seed());
  for (int round = 0; round < 300; ++round) {
    Strided runs{.offset = random.in(0, 9), .length = random.in(1, 5)};
    auto span = runs.length;
    for (auto steps = random.in(0, 3); steps > 0; --steps) {
      runs.steps.insert(runs.steps.begin(), {.count = random.in(2, 4), .stride = span + random.in(0, 3)});
      span += (runs.steps[0].count - 1) * runs.steps[0].stride;
    }
    const auto bytes = each_byte(runs);
    REQUIRE(bytes.size() == runs.bytes());
    REQUIRE(runs.offset + span == runs.end());
    REQUIRE(bytes.back() + 1 == runs.end());
    REQUIRE(std::ranges::is_sorted(bytes, std::less_equal<>()));
    auto joined = runs;
    join_neighbours(joined);
    REQUIRE(each_byte(joined) == bytes);
    RunCursor at(runs);
    for (std::size_t n = 0; n < bytes.size();) {
      REQUIRE(at.at() == bytes[n]);
      REQUIRE(at.left() > 0);
      const auto step = random.in(1, bytes.size() - n);
      at.skip(step);
      n += step;
    }
    REQUIRE(at.done());
  }
}

TEST_CASE("strided runs: what a peer may not say is refused without overflow", "[format]") {
  constexpr std::uint64_t kEnd = 64 << 20, kMost = 1 << 20, kHuge = ~std::uint64_t{0};
  const auto refused = [&](const Strided& runs) {
    const auto checked = check_strided(runs, kEnd, kMost);
    return !checked && checked.error().code == Errc::kInvalid;
  };
  CHECK(check_strided({.offset = kEnd - 1, .length = 1}, kEnd, kMost));
  CHECK(check_strided({.offset = 0, .length = 64, .steps = {{.count = kMost, .stride = 64}}}, kEnd, kMost));
  CHECK(refused({.offset = 1, .length = 64, .steps = {{.count = kMost, .stride = 64}}}));
  CHECK(refused({.offset = 0, .length = 0}));
  CHECK(refused({.offset = kEnd, .length = 1}));
  CHECK(refused({.offset = 1, .length = kEnd}));
  CHECK(refused({.offset = kHuge, .length = 2}));
  CHECK(refused({.offset = 0, .length = kHuge}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 1, .stride = 8}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 0, .stride = 8}}}));
  CHECK(refused({.offset = 0, .length = 9, .steps = {{.count = 2, .stride = 8}}}));  // overlaps
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 2, .stride = 0}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 2, .stride = 8}, {.count = 4, .stride = 4}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = kMost + 1, .stride = 2}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 2048, .stride = 1024}, {.count = 1024, .stride = 1}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = kHuge, .stride = kHuge}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 2, .stride = kHuge}}}));
  CHECK(refused({.offset = 0, .length = 1, .steps = {{.count = 3, .stride = kEnd / 2}}}));
}
