#include <catch2/catch.hpp>

#include "proto/common/buffer.h"
#include "proto/common/checksum.h"
#include "proto/common/ids.h"

using namespace cairn;

TEST_CASE("checksum: crc32c is the standard one, and continues", "[common]") {
  CHECK(crc32c("123456789") == 0xe3069283u);
  CHECK(crc32c("6789", crc32c("12345")) == 0xe3069283u);
  std::array<std::byte, 9> out{};
  CHECK(copy_with_crc32c(out, bytes_of("123456789")) == 0xe3069283u);
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
