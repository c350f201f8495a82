#include <algorithm>

#include "storage/format/index_pages.h"
#include "storage/format/page_codec.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/sample.h"

// Pages of rank manifests and merged indexes: whole, and one by one behind a checksum that matches.

namespace cairn::fuzz {
namespace {

using namespace format;

void whole_index(std::string_view bytes) {
  const auto decoded = decode(bytes);
  if (!decoded) return;
  const auto again = encode(*decoded);
  must(again, "what was decoded can be encoded");
  const auto twice = decode(*again);
  must(twice && *twice == *decoded, "and is the same");
}

void entries(std::uint32_t count, std::string_view body) {
  std::uint32_t crc = 0;
  const auto bytes = pages::seal(pages::PageKind::kEntries, 0, count, body, crc);
  const auto ref = fence_of(bytes, crc, 0);
  const auto decoded = decode_entries(bytes, ref);
  if (!decoded) return;
  const auto list = entries_of(*decoded);
  must(list.size() == count, "a page has the entries that it names");
  must(std::ranges::is_sorted(list, [](const Entry& a, const Entry& b) { return order(a, b) < 0; }), "in order");
  for (const auto& entry : list) must(check_entry(entry), "each is right in itself");
  const auto index = encode(*decoded);
  must(index, "they can be encoded");
  const auto again = decode(*index);
  must(again && *again == *decoded, "and are the same");
  const auto root_bytes = root_of(*index);
  must(root_bytes, "an index has a root");
  const auto root = decode_root(*root_bytes, index->size());
  must(root, "which can be decoded");
  // A search finds what a look at every entry finds.
  for (const auto& wanted : list) {
    IndexSearch search(*root, {{.kind = kind_of(wanted), .name = std::string(pages::name_in(wanted)), .box = {}}});
    for (auto more = search.wanted(); !more.empty(); more = search.wanted())
      for (const auto& fence : more)
        must(search.supply(fence, std::string_view(*index).substr(fence.offset, fence.size)), "its pages can be read");
    const auto found = entries_of(search.take());
    must(static_cast<std::ptrdiff_t>(found.size()) ==
             std::ranges::count_if(list,
                                   [&](const Entry& entry) {
                                     return kind_of(entry) == kind_of(wanted) &&
                                            pages::name_in(entry) == pages::name_in(wanted);
                                   }),
         "a search finds all entries of a name");
  }
}

void fences(std::uint8_t level, std::uint32_t count, std::string_view body) {
  std::uint32_t crc = 0;
  const auto bytes = pages::seal(pages::PageKind::kFences, level, count, body, crc);
  auto ref = fence_of(bytes, crc, level);
  ref.offset = 1 << 20;
  const auto decoded = decode_fences(bytes, ref);
  if (!decoded) return;
  must(decoded->size() == count, "a page has the fences that it names");
  std::string again, name;
  std::uint64_t end = 0;
  for (const auto& fence : *decoded) {
    must(fence.offset >= end && fence.offset + fence.size <= ref.offset, "pages lie before their fences, apart");
    pages::put_fence(again, fence, name, end);
    end = fence.offset + fence.size;
    name = fence.name;
  }
  pages::Reader reader(again);
  const auto twice = pages::fences_in(reader, count, static_cast<std::uint8_t>(level - 1), 0, ref.offset, "again");
  must(twice && twice->size() == decoded->size(), "fences survive");
}

void root(std::uint8_t level, std::uint32_t count, std::string_view body) {
  std::uint32_t crc = 0;
  std::string tail(body);
  pages::put_u32(tail, static_cast<std::uint32_t>(body.size() + pages::kHeaderBytes + pages::kTrailerBytes));
  tail += "CnRt";
  const auto bytes = pages::seal(pages::PageKind::kRoot, level, count, tail, crc);
  const auto decoded = decode_root(bytes, 1 << 20);
  if (!decoded) return;
  IndexSearch search(*decoded, {});
  std::uint64_t end = 0;
  for (const auto& fence : search.wanted()) {
    must(fence.offset >= end && fence.offset + fence.size <= (1 << 20) - bytes.size(), "pages lie before the root");
    end = fence.offset + fence.size;
  }
}

void one(std::string_view input) {
  Input in(input);
  switch (in.byte() % 4) {
    case 0:
      return whole_index(in.rest());
    case 1: {
      const auto count = in.number(2);
      return entries(count, in.rest());
    }
    case 2: {
      const auto level = static_cast<std::uint8_t>(1 + in.byte() % 16);
      const auto count = in.number(2);
      return fences(level, count, in.rest());
    }
    default: {
      const auto level = in.byte();
      const auto count = in.number(2);
      return root(level, count, in.rest());
    }
  }
}

std::string number(std::size_t value) {
  return {static_cast<char>(value >> 8), static_cast<char>(value)};
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  for (std::uint32_t rank = 0; rank < 3; ++rank) {
    const auto contents = sample_contents(rank, 3);
    out.push_back(std::string(1, '\0') + *encode(contents));
    out.push_back("\x01" + number(entries_of(contents).size()) + entries_body(contents));
  }
  std::string fence;
  pages::put_fence(
      fence,
      {.offset = 0, .size = 100, .crc = 1, .name = "a", .last_name = "b", .entries = 2, .tensors = 2, .bounds = {}}, "",
      0);
  pages::put_fence(fence,
                   {.offset = 120,
                    .size = 200,
                    .crc = 2,
                    .name = "c",
                    .last_name = "c",
                    .entries = 2,
                    .tensors = 1,
                    .bounds = Box{.offset = {0, 4}, .shape = {8, 8}}},
                   "a", 100);
  out.push_back("\x02" + std::string(1, '\0') + number(2) + fence);
  std::string body;
  pages::put_u32(body, 1);
  pages::put_u32(body, 1);
  pages::put_u64(body, 1 << 20);
  for (int i = 0; i < 6; ++i) pages::put_varint(body, static_cast<std::uint64_t>(i));
  out.push_back("\x03" + std::string(1, '\x01') + number(2) + body + fence);
  return out;
}

const Register registered({.name = "index_pages", .bytes_max = 4096, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
