#include "storage/format/page_codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "storage/format/box.h"

// Numbers are little-endian; "v" is a varint: 7 bits a byte, least first, the top bit says that more follow. A "name"
// is v bytes shared with the name before it in the page, v bytes of the rest, the rest.
//
// Page
// offset size meaning
//      0    4 magic "CnPg"
//      4    1 kind: 1 entries, 2 fences, 3 root
//      5    1 level: 0 entries; fences and root: one more than the pages they name
//      6    2 zero
//      8    4 number of entries or fences
//     12    4 bytes of the body
//     16    4 CRC32C of bytes 0 .. 15 and the body; a fence repeats it
//     20      body
//
// Body of an entry page
//   v     number of owners, then for each: 16 owner
//   v     number of writers, then for each: v number of its owner, 8 nonce (chunk ids name them by number)
//   ...   entries, each: 1 tag, then by kind (tag & 7):
//   1 shard  [tag & 8: new tensor: name, 1 dtype, v dimensions, v size of each]
//            [not tag & 32 (same box as the shard before): v mask of dimensions that are not whole,
//             v offset and v size of each of those]
//            [tag & 16: v holder index, v holder count]
//            v rank, 4 CRC32C, extents
//   2 blob   name, v rank, v size, 4 CRC32C, extents
//   3 token  name (stream), v rank, v length, bytes
//   4 meta   name (scope), v length, key, v rank, v length, value
//
// Extents: v number of runs, each: v writer, v group, v first chunk index, v count, v offset, v length, and with a
//   count over 1 v length of the last. All chunks of a run have following indices and the same offset and length, but
//   the last its own length.
//
// Fence
//   v     bytes between the end of the page before (for the first: of `begin`) and this page
//   v     bytes of the page
//   4     CRC32C of the page, as in its header
//   1     tag: kind of the first entry (bits 0-2), of the last (bits 3-5), 64: bounds follow, 128: one name
//   name  of the first entry; unless tag & 128 name of the last entry (shared bytes count from the first's)
//   v     entries below        v     tensors that begin below
//   [v dimensions, v offset and v size of each: bounds]
//
// Root body
//   4     format version       4     oldest reader's version that can read it
//   8     bytes of the index, root included
//   v x 6 tensors, shards, blobs, tokens, metadata entries, saved bytes
//   ...   fences of the level below
//   4     bytes of the root page
//   4     magic "CnRt": so the root is found from the end of an index
namespace cairn::format::pages {
namespace {

constexpr std::string_view kMagic = "CnPg";

constexpr std::uint8_t kKindMask = 7, kNewTensor = 8, kWithHolder = 16, kSameBox = 32;
constexpr std::uint8_t kBounds = 64, kOneName = 128;

void put_box(std::string& out, const Box& box) {
  for (std::size_t d = 0; d < box.shape.size(); ++d) {
    put_varint(out, box.offset[d]);
    put_varint(out, box.shape[d]);
  }
}

}  // namespace

std::string_view name_in(const Entry& entry) {
  switch (entry.index()) {
    case 0:
      return std::get<ShardEntry>(entry).tensor;
    case 1:
      return std::get<BlobEntry>(entry).name;
    case 2:
      return std::get<TokenEntry>(entry).stream;
    default:
      return std::get<MetaEntry>(entry).scope;
  }
}

namespace {

std::string_view name_before(const Entry* last) {
  return last == nullptr ? std::string_view() : name_in(*last);
}

}  // namespace

void put_name(std::string& out, std::string_view name, std::string_view before) {
  const auto shared = static_cast<std::size_t>(std::ranges::mismatch(name, before).in1 - name.begin());
  put_varint(out, shared);
  put_varint(out, name.size() - shared);
  out += name.substr(shared);
}

std::uint64_t Reader::varint() {
  std::uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    const auto byte = u8();
    const auto part = std::uint64_t{byte} & 0x7f;
    if (failed_ || (shift == 63 && part > 1) || (byte == 0 && shift != 0)) break;
    value |= part << shift;
    if (byte < 0x80) return value;
  }
  fail();
  return 0;
}

std::uint32_t Reader::varint32() {
  const auto value = varint();
  if (value > ~std::uint32_t{0}) fail();
  return failed_ ? 0 : static_cast<std::uint32_t>(value);
}

std::string Reader::name(std::string_view before) {
  const auto shared = varint(), rest = varint();
  if (shared > before.size() || rest > 1024 || shared + rest > 1024) fail();
  if (failed_) return {};
  std::string out(before.substr(0, shared));
  out += raw(rest);
  return out;
}

std::string seal(PageKind kind, std::uint8_t level, std::uint32_t count, std::string_view body, std::uint32_t& crc) {
  std::string out(kMagic);
  out.reserve(kHeaderBytes + body.size());
  out += static_cast<char>(kind);
  out += static_cast<char>(level);
  out.append(2, '\0');
  put_u32(out, count);
  put_u32(out, static_cast<std::uint32_t>(body.size()));
  crc = crc32c(body, crc32c(out));
  put_u32(out, crc);
  out += body;
  return out;
}

Result<Page> open(std::string_view bytes, std::string_view what) {
  Reader reader(bytes);
  const auto magic = reader.raw(4);
  Page page;
  page.kind = static_cast<PageKind>(reader.u8());
  page.level = reader.u8();
  const auto zero = reader.fixed(2);
  page.count = reader.u32();
  const auto body_bytes = reader.u32();
  page.crc = reader.u32();
  if (reader.failed() || magic != kMagic || zero != 0 || body_bytes != reader.left())
    return cairn::fail(Errc::kDataLoss, fmt::format("{}: not an index page", what));
  page.body = reader.raw(body_bytes);
  if (const auto crc = crc32c(page.body, crc32c(bytes.substr(0, 16))); crc != page.crc)
    return cairn::fail(Errc::kDataLoss, fmt::format("{}: CRC {:08x}, not {:08x}", what, crc, page.crc));
  return page;
}

Result<bool> EntriesBuilder::add(const Entry& entry, const Entry* last) {
  if (count_ == 0) last = nullptr;
  // Encoded behind the page so far; undone when it does not fit.
  const auto owners = owners_.size(), writers = writers_.size(), bytes = entries_.size(), extents = extents_;
  std::visit([&](const auto& one) { put(one, last); }, entry);
  const auto size =
      kHeaderBytes + 20 + owners_.size() * 16 + writers_.size() * (owners_.size() > 127 ? 13 : 9) + entries_.size();
  if (count_ == 0) {
    if (size > kEntryBytesMax || extents_ > kExtentsMax)
      return cairn::fail(Errc::kInvalid,
                         fmt::format("'{}': {} bytes and {} extents are more than an index entry can have",
                                     name_in(entry), entries_.size(), extents_));
  } else if (size > kPageBytes || extents_ > kExtentsMax) {
    owners_.resize(owners);
    forget_writers(writers);
    entries_.resize(bytes);
    extents_ = extents;
    return false;
  }
  ++count_;
  return true;
}

std::string EntriesBuilder::body() const {
  std::string out;
  put_varint(out, owners_.size());
  for (const auto& owner : owners_) out += owner.view();
  put_varint(out, writers_.size());
  for (const auto& writer : writers_) {
    put_varint(out, writer.owner);
    put_u64(out, writer.nonce);
  }
  return out += entries_;
}

void EntriesBuilder::clear() {
  owners_.clear();
  forget_writers(0);
  entries_.clear();
  extents_ = 0;
  count_ = 0;
}

std::size_t EntriesBuilder::writer_number(const ChunkId& chunk) {
  const auto same = [&](const Writer& writer) {
    return writer.nonce == chunk.writer && owners_[writer.owner] == chunk.owner;
  };
  if (!writers_.empty() && same(writers_.back())) return writers_.size() - 1;  // neighbours often share it
  if (slots_.size() < 2 * (writers_.size() + 1)) {
    slots_.assign(std::max<std::size_t>(2 * slots_.size(), 64), 0);
    for (std::uint32_t i = 0; i < writers_.size(); ++i) *slot_of(writers_[i].nonce, [](auto) { return false; }) = i + 1;
  }
  auto* slot = slot_of(chunk.writer, [&](std::uint32_t number) { return same(writers_[number]); });
  if (*slot != 0) return *slot - 1;
  // A page seldom knows more than one.
  const auto owner = static_cast<std::uint32_t>(std::ranges::find(owners_, chunk.owner) - owners_.begin());
  if (owner == owners_.size()) owners_.push_back(chunk.owner);
  writers_.push_back({.owner = owner, .nonce = chunk.writer});
  *slot = static_cast<std::uint32_t>(writers_.size());
  return writers_.size() - 1;
}

void EntriesBuilder::forget_writers(std::size_t first) {
  if (first == writers_.size()) return;
  writers_.resize(first);
  std::ranges::fill(slots_, 0);
  for (std::uint32_t i = 0; i < first; ++i) *slot_of(writers_[i].nonce, [](auto) { return false; }) = i + 1;
}

void EntriesBuilder::put_run(const Extent& first, std::uint32_t count, std::uint32_t last_length) {
  put_varint(runs_, writer_number(first.chunk));
  put_varint(runs_, first.group);
  put_varint(runs_, first.chunk.index);
  put_varint(runs_, count);
  put_varint(runs_, first.offset);
  put_varint(runs_, first.length);
  if (count > 1) put_varint(runs_, last_length);
}

void EntriesBuilder::put_extents(const std::vector<Extent>& extents) {
  runs_.clear();
  std::size_t runs = 0;
  for (std::size_t begin = 0; begin < extents.size(); ++runs) {
    const auto& first = extents[begin];
    auto end = begin + 1;
    for (; end < extents.size() && extents[end - 1].length == first.length; ++end) {
      auto next = first;
      next.chunk.index += static_cast<std::uint32_t>(end - begin);
      next.length = extents[end].length;
      if (next != extents[end] || next.chunk.index < first.chunk.index) break;
    }
    put_run(first, static_cast<std::uint32_t>(end - begin), extents[end - 1].length);
    begin = end;
  }
  put_varint(entries_, runs);
  entries_ += runs_;
  extents_ += extents.size();
}

void EntriesBuilder::put(const ShardEntry& shard, const Entry* last) {
  const auto* before = last == nullptr ? nullptr : std::get_if<ShardEntry>(last);
  const bool new_tensor = before == nullptr || before->tensor != shard.tensor || before->dtype != shard.dtype ||
                          before->global_shape != shard.global_shape;
  const bool same_box = !new_tensor && before->box == shard.box;
  entries_ += static_cast<char>(static_cast<std::uint8_t>(Kind::kShard) | (new_tensor ? kNewTensor : 0) |
                                (same_box ? kSameBox : 0) | (shard.holder ? kWithHolder : 0));
  if (new_tensor) {
    put_name(entries_, shard.tensor, name_before(last));
    entries_ += static_cast<char>(shard.dtype);
    put_varint(entries_, shard.global_shape.size());
    for (const auto size : shard.global_shape) put_varint(entries_, size);
  }
  if (!same_box) {
    std::uint64_t mask = 0;
    for (std::size_t d = 0; d < shard.box.shape.size(); ++d)
      if (shard.box.offset[d] != 0 || shard.box.shape[d] != shard.global_shape[d]) mask |= 1ull << d;
    put_varint(entries_, mask);
    for (std::size_t d = 0; d < shard.box.shape.size(); ++d)
      if (mask >> d & 1) put_varint(entries_, shard.box.offset[d]), put_varint(entries_, shard.box.shape[d]);
  }
  if (shard.holder) put_varint(entries_, shard.holder->index), put_varint(entries_, shard.holder->count);
  put_varint(entries_, shard.rank);
  put_u32(entries_, shard.crc);
  put_extents(shard.extents);
}

void EntriesBuilder::put(const BlobEntry& blob, const Entry* last) {
  entries_ += static_cast<char>(Kind::kBlob);
  put_name(entries_, blob.name, name_before(last));
  put_varint(entries_, blob.rank);
  put_varint(entries_, blob.size);
  put_u32(entries_, blob.crc);
  put_extents(blob.extents);
}

void EntriesBuilder::put(const TokenEntry& token, const Entry* last) {
  entries_ += static_cast<char>(Kind::kToken);
  put_name(entries_, token.stream, name_before(last));
  put_varint(entries_, token.rank);
  put_varint(entries_, token.bytes.size());
  entries_ += token.bytes;
}

void EntriesBuilder::put(const MetaEntry& meta, const Entry* last) {
  entries_ += static_cast<char>(Kind::kMeta);
  put_name(entries_, meta.scope, name_before(last));
  put_varint(entries_, meta.key.size());
  entries_ += meta.key;
  put_varint(entries_, meta.rank);
  put_varint(entries_, meta.value.size());
  entries_ += meta.value;
}

void EntriesReader::read_writers() {
  std::vector<OwnerId> owners;
  const auto owner_count = reader_.varint();
  if (owner_count > reader_.left() / 16) reader_.fail();
  for (std::uint64_t i = 0; i < owner_count && !reader_.failed(); ++i) {
    const auto owner = reader_.raw(16);
    if (!reader_.failed()) owners.push_back(*OwnerId::from_bytes(owner));
  }
  const auto count = reader_.varint();
  if (count > reader_.left() / 9) reader_.fail();
  if (!reader_.failed()) writers_.reserve(count);
  for (std::uint64_t i = 0; i < count && !reader_.failed(); ++i) {
    const auto owner = reader_.varint();
    const auto nonce = reader_.u64();
    if (owner >= owners.size()) reader_.fail();
    if (!reader_.failed()) writers_.push_back({.owner = owners[owner], .writer = nonce, .index = 0});
  }
}

Result<bool> EntriesReader::next() {
  if (!begun_) {
    begun_ = true;
    read_writers();
    if (left_ > reader_.left()) reader_.fail();
  }
  if (reader_.failed() || (left_ == 0 && reader_.left() != 0))
    return cairn::fail(Errc::kDataLoss, "entries do not fill the page exactly");
  if (left_ == 0) return false;
  --left_;
  const auto tag = reader_.u8();
  bool rises = true;
  if ((tag & kKindMask) == static_cast<std::uint8_t>(Kind::kShard)) {
    rises = read_shard(tag);
  } else {
    auto next = read_other(tag);
    if (!reader_.failed()) {
      if (auto ok = check_entry(next); !ok) return cairn::fail(Errc::kDataLoss, std::move(ok.error().message));
      rises = !any_ || order(entry_, next) < 0;
      entry_ = std::move(next);
    }
  }
  if (reader_.failed()) return cairn::fail(Errc::kDataLoss, "entries do not fill the page exactly");
  if (const auto* shard = std::get_if<ShardEntry>(&entry_)) {
    if (auto ok = tag & kNewTensor ? check_entry(entry_) : check_part(*shard); !ok)
      return cairn::fail(Errc::kDataLoss, std::move(ok.error().message));
  }
  if (!rises) return cairn::fail(Errc::kDataLoss, fmt::format("entry '{}' is out of order", name_in(entry_)));
  any_ = true;
  return true;
}

/// Whether it comes after the entry before.
bool EntriesReader::read_shard(std::uint8_t tag) {
  const bool new_tensor = tag & kNewTensor, same_box = tag & kSameBox;
  auto* shard = any_ ? std::get_if<ShardEntry>(&entry_) : nullptr;
  // A page's first shard brings its tensor, and a tensor's first shard its box.
  if ((shard == nullptr && !new_tensor) || (new_tensor && same_box) ||
      (tag & ~(kKindMask | kNewTensor | kWithHolder | kSameBox)))
    reader_.fail();
  if (reader_.failed()) return false;
  auto after = std::strong_ordering::greater;
  if (new_tensor) {
    if (shard == nullptr) {
      if (any_) after = std::strong_ordering::less;  // shards come first
      shard = &entry_.emplace<ShardEntry>();
    }
    auto tensor = name();
    if (any_ && after > 0) after = tensor <=> shard->tensor;
    shard->tensor = std::move(tensor);
    const auto dtype = dtype_of(reader_.u8());
    const auto dimensions = reader_.varint();
    if (!dtype || dimensions > kDimensionsMax) reader_.fail();
    if (reader_.failed()) return false;
    shard->dtype = *dtype;
    shard->global_shape.resize(dimensions);
    for (auto& size : shard->global_shape) size = reader_.varint();
  } else {
    after = std::strong_ordering::equal;
  }
  const auto holder = shard->holder;
  const auto rank = shard->rank;
  if (!same_box) {
    std::swap(before_, shard->box);
    auto& [offset, shape] = shard->box;
    const auto dimensions = shard->global_shape.size();
    offset.assign(dimensions, 0);
    shape = shard->global_shape;
    const auto mask = reader_.varint();
    if (mask >> dimensions != 0) reader_.fail();  // at most 32
    for (std::size_t d = 0; d < dimensions && !reader_.failed(); ++d)
      if (mask >> d & 1) offset[d] = reader_.varint(), shape[d] = reader_.varint();
    if (after == 0) after = shard->box <=> before_;
  }
  shard->holder.reset();
  if (tag & kWithHolder) {
    const auto index = reader_.varint32(), count = reader_.varint32();
    shard->holder = Holder{.index = index, .count = count};
  }
  shard->rank = reader_.varint32();
  if (after == 0) after = order_of_parts(shard->holder, shard->rank, holder, rank);
  shard->crc = reader_.u32();
  read_extents(shard->extents);
  return after > 0;
}

Entry EntriesReader::read_other(std::uint8_t tag) {
  switch (static_cast<Kind>(tag)) {
    case Kind::kBlob: {
      BlobEntry out;
      out.name = name();
      out.rank = reader_.varint32();
      out.size = reader_.varint();
      out.crc = reader_.u32();
      read_extents(out.extents);
      return out;
    }
    case Kind::kToken: {
      TokenEntry out;
      out.stream = name();
      out.rank = reader_.varint32();
      out.bytes = reader_.raw(reader_.varint());
      return out;
    }
    case Kind::kMeta: {
      MetaEntry out;
      out.scope = name();
      out.key = reader_.raw(reader_.varint());
      out.rank = reader_.varint32();
      out.value = reader_.raw(reader_.varint());
      return out;
    }
    default:
      reader_.fail();
      return {};
  }
}

void EntriesReader::read_extents(std::vector<Extent>& out) {
  out.clear();
  const auto runs = reader_.varint();
  if (runs > reader_.left()) reader_.fail();
  for (std::uint64_t i = 0; i < runs && !reader_.failed(); ++i) {
    const auto writer = reader_.varint();
    const auto group = reader_.varint32(), index = reader_.varint32();
    const auto count = reader_.varint();
    const auto offset = reader_.varint32(), length = reader_.varint32();
    const auto last_length = count > 1 ? reader_.varint32() : length;
    // A few bytes can name many extents: bounded by the page's limit and the chunk indices there are.
    if (writer >= writers_.size() || count == 0 || count > kExtentsMax - extents_ ||
        count - 1 > ~std::uint32_t{0} - index)
      reader_.fail();
    if (reader_.failed()) break;
    extents_ += count;
    for (std::uint64_t k = 0; k < count; ++k) {
      out.push_back({.group = group,
                     .chunk = writers_[writer],
                     .offset = offset,
                     .length = k + 1 == count ? last_length : length});
      out.back().chunk.index = index + static_cast<std::uint32_t>(k);
    }
  }
}

void put_fence(std::string& out, const Fence& fence, std::string_view name_before, std::uint64_t end) {
  const bool one_name = fence.name == fence.last_name;
  put_varint(out, fence.offset - end);
  put_varint(out, fence.size);
  put_u32(out, fence.crc);
  out += static_cast<char>(static_cast<std::uint8_t>(fence.kind) | static_cast<std::uint8_t>(fence.last_kind) << 3 |
                           (fence.bounds ? kBounds : 0) | (one_name ? kOneName : 0));
  put_name(out, fence.name, name_before);
  if (!one_name) put_name(out, fence.last_name, fence.name);
  put_varint(out, fence.entries);
  put_varint(out, fence.tensors);
  if (fence.bounds) {
    put_varint(out, fence.bounds->shape.size());
    put_box(out, *fence.bounds);
  }
}

Result<std::vector<Fence>> fences_in(Reader& reader, std::uint32_t count, std::uint8_t level, std::uint64_t begin,
                                     std::uint64_t end, std::string_view what) {
  std::vector<Fence> out;
  if (count > reader.left()) reader.fail();
  std::string name;
  for (std::uint32_t i = 0; i < count && !reader.failed(); ++i) {
    Fence fence;
    fence.begin = begin;
    fence.level = level;
    const auto between = reader.varint(), size = reader.varint();
    fence.crc = reader.u32();
    const auto tag = reader.u8();
    fence.kind = static_cast<Kind>(tag & 7);
    fence.last_kind = static_cast<Kind>(tag >> 3 & 7);
    fence.name = reader.name(name);
    fence.last_name = tag & kOneName ? fence.name : reader.name(fence.name);
    fence.entries = reader.varint();
    fence.tensors = reader.varint();
    if (tag & kBounds) {
      const auto dimensions = reader.varint();
      if (dimensions > kDimensionsMax) reader.fail();
      if (reader.failed()) break;
      fence.bounds = whole(Shape(dimensions));
      for (std::size_t d = 0; d < dimensions; ++d) {
        fence.bounds->offset[d] = reader.varint(), fence.bounds->shape[d] = reader.varint();
        std::uint64_t last = 0;
        if (!add_checked(fence.bounds->offset[d], fence.bounds->shape[d], last)) reader.fail();
      }
    }
    // Pages lie one after the other, so no page is below two fences: reading all costs at most the index's bytes.
    if (fence.kind < Kind::kShard || fence.last_kind > Kind::kMeta || fence.last_kind < fence.kind ||
        between > end - begin || size > end - begin - between || size < kHeaderBytes || size > kEntryBytesMax ||
        (fence.kind == fence.last_kind && fence.last_name < fence.name))
      reader.fail();
    if (reader.failed()) break;
    fence.offset = begin + between;
    fence.size = static_cast<std::uint32_t>(size);
    begin = fence.offset + fence.size;
    name = fence.name;
    out.push_back(std::move(fence));
  }
  if (reader.failed()) return cairn::fail(Errc::kDataLoss, fmt::format("{}: fences do not make sense", what));
  return out;
}

}  // namespace cairn::format::pages
