#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <string>
#include <vector>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "proto/common/crc_join.h"
#include "proto/common/ids.h"
#include "proto/common/quantity.h"
#include "proto/common/result.h"
#include "proto/common/text.h"
#include "proto/common/units.h"

using namespace cairn;

TEST_CASE("checksum: crc32c is the standard one, and continues", "[common]") {
  CHECK(crc32c("123456789") == 0xe3069283u);
  CHECK(crc32c("6789", crc32c("12345")) == 0xe3069283u);
  std::array<std::byte, 9> out{};
  CHECK(copy_with_crc32c(out, bytes_of("123456789")) == 0xe3069283u);

  // Of all sizes and alignments, and joined from parts.
  std::string bytes(3 * kBlockBytes + 100, '\0'), copy(bytes.size() + 64, '\0');
  std::uint32_t state = 1;
  for (auto& c : bytes) c = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
  for (const std::size_t size : {0ul, 1ul, kBlockBytes - 1, kBlockBytes + 0ul, kBlockBytes + 1, 3 * kBlockBytes + 77ul})
    for (const std::size_t to : {0ul, 1ul, 8ul, 24ul})
      for (const std::size_t from : {0ul, 3ul, 8ul}) {
        std::ranges::fill(copy, '-');
        const auto source = std::string_view(bytes).substr(from, size);
        const auto span = std::as_writable_bytes(std::span(copy)).subspan(to, size);
        CHECK(copy_with_crc32c(span, bytes_of(source), 99) == crc32c(source, 99));
        CHECK(std::string_view(copy).substr(to, size) == source);
        CHECK(std::ranges::count(copy.substr(0, to), '-') == static_cast<std::ptrdiff_t>(to));
        CHECK(copy[to + size] == '-');
        CHECK(crc32c_join(crc32c("before", 5), crc32c(source), size) == crc32c(source, crc32c("before", 5)));
      }
  CHECK(text_of(out) == "123456789");
}

TEST_CASE("checksum: the right bytes under another chunk id or block number fail", "[common]") {
  ChunkId a{.owner = OwnerId::make(7, 0, 1, 2), .writer = 9, .index = 3};
  ChunkId b = a;
  b.index = 4;
  CHECK(crc32c("same", block_seed(a, 0)) != crc32c("same", block_seed(b, 0)));
  CHECK(crc32c("same", block_seed(a, 0)) != crc32c("same", block_seed(a, 1)));
}

TEST_CASE("ids: a chunk id survives its key form and keys sort by owner, writer, index", "[common]") {
  ChunkId a{.owner = OwnerId::make(258, 77, 0x1122334455667788, 0x99aa), .writer = 0xdeadbeef, .index = 1 << 20};
  auto key = a.key();
  CHECK(*ChunkId::from_key({key.data(), key.size()}) == a);
  CHECK(a.owner.home_group() == 258);
  CHECK(a.owner.loss() == 77);
  ChunkId next = a;
  next.index++;
  CHECK(a.key() < next.key());
  CHECK_FALSE(ChunkId::from_key("short").has_value());
}

TEST_CASE("ids: names with dots, slashes, NUL or broken UTF-8 are refused", "[common]") {
  CHECK(check_bucket_name("models-2.x_y"));
  for (const char* bad : {"", ".", "..", "a/b", "a b", "caf\xc3\xa9"}) CHECK_FALSE(check_bucket_name(bad));
  CHECK(check_run_name("jobs/llama/try.2"));
  for (const char* bad : {"", "/a", "a/", "a//b", "a/../b", "a/./b"}) CHECK_FALSE(check_run_name(bad));
  CHECK(check_free_name("tensor", "caf\xc3\xa9 \xf0\x9f\x98\x80"));
  CHECK_FALSE(check_free_name("tensor", std::string_view("a\0b", 3)));
  for (const char* bad : {"\xff", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82"})
    CHECK_FALSE(check_free_name("tensor", bad));
  CHECK_FALSE(check_free_name("tensor", std::string(1025, 'a')));
}

TEST_CASE("text: strings of others cannot steer a terminal, and are cut between characters", "[common]") {
  CHECK(printable("plain \xc3\xa9 \xf0\x9f\x98\x80") == "plain \xc3\xa9 \xf0\x9f\x98\x80");
  CHECK(printable("a\x1b[2Jb\r\nc\x7f") == "a?[2Jb??c?");
  CHECK(printable("\xc2\x9b"
                  "2J|\xe2\x80\xae|\xe2\x80\xa8|\xe2\x81\xa6|\xe2\x80\x8f") == "?2J|?|?|?|?");
  CHECK(printable("\xff\xc3") == "??");
  CHECK(printable("abcdef", 3) == "abc...");
  CHECK(printable("ab\xc3\xa9", 3) == "ab...");
  CHECK(printable("ab\xc3\xa9", 4) == "ab\xc3\xa9");
}

TEST_CASE("quantity: sizes and durations are exact, and what is printed is read again", "[common]") {
  CHECK(parse_bytes("0") == 0u);
  CHECK(parse_bytes("4096") == 4096u);
  CHECK(parse_bytes("64KiB") == 65536u);
  CHECK(parse_bytes("2m") == 2u << 20);
  CHECK(parse_bytes("1T") == std::uint64_t{1} << 40);
  CHECK(parse_bytes("18446744073709551615") == UINT64_MAX);
  for (const char* bad :
       {"", "x", "-1", "1 K", "1MB", "1.5G", "1KiBx", "18446744073709551616", "18446744073709551615K"})
    CHECK_FALSE(parse_bytes(bad));
  for (const std::uint64_t n : {0ull, 1ull, 1023ull, 1024ull, 1536ull, 1ull << 30, (1ull << 40) + 1, 3ull << 40, ~0ull})
    CHECK(parse_bytes(bytes_text(n)) == n);
  CHECK(bytes_text(512 << 20) == "512MiB");

  using namespace std::chrono;
  CHECK(parse_duration("200ms") == milliseconds(200));
  CHECK(parse_duration("7d") == hours(168));
  for (const char* bad : {"", "10", "-1s", "1 s", "1.5s", "1y", "s", "99999999999999999999s", "36501d"})
    CHECK_FALSE(parse_duration(bad));
  for (const nanoseconds d :
       {nanoseconds(0), nanoseconds(milliseconds(1)), nanoseconds(seconds(60)), nanoseconds(seconds(61)),
        nanoseconds(hours(24 * 365)), nanoseconds(milliseconds(90'001))})
    CHECK(parse_duration(duration_text(d)) == d);
  CHECK(duration_text(minutes(10)) == "10m");
}

TEST_CASE("errors: docs/errors.md has a row for every code, with its number and exit code", "[common]") {
  std::ifstream file(CAIRN_SOURCE_DIR "/docs/errors.md");
  REQUIRE(file);
  std::vector<std::string> rows;
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("| `")) rows.push_back(line);
  int codes = 0;
  for (int number = 1; name_of(static_cast<Errc>(number)) != name_of(static_cast<Errc>(0)); ++number, ++codes) {
    const auto code = static_cast<Errc>(number);
    const auto begin = "| `" + std::string(name_of(code)) + "` | " + std::to_string(number) + " | " +
                       std::to_string(exit_code(code)) + " | ";
    INFO("wanted: " << begin << "yes|ask|no | meaning | cause and action |");
    REQUIRE(static_cast<std::size_t>(codes) < rows.size());
    const auto& row = rows[static_cast<std::size_t>(codes)];
    CHECK(row.starts_with(begin));
    CHECK(std::ranges::count(row, '|') == 7);
    const auto rest = row.substr(std::min(begin.size(), row.size()));
    CHECK((rest.starts_with("yes | ") || rest.starts_with("ask | ") || rest.starts_with("no | ")));
  }
  CHECK(codes >= 18);
  CHECK(rows.size() == static_cast<std::size_t>(codes));
}
