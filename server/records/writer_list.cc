#include "server/records/writer_list.h"

namespace cairn::server {
namespace {

void put(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
}

std::uint64_t take(std::string_view& from, std::size_t bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(from[i]);
  from.remove_prefix(bytes);
  return value;
}

}  // namespace

Result<std::string> encode_writers(const WriterList& list) {
  std::string out;
  const auto bytes = 12 * list.writers.size() + 4 * list.abandoned.size();
  if (bytes > kWriterListBytesMax)
    return fail(Errc::kInvalid, std::to_string(list.writers.size()) + " writers with " +
                                    std::to_string(list.abandoned.size()) +
                                    " abandoned chunks are more than a list can name");
  out.reserve(bytes);
  for (const auto writer : list.writers) {
    const auto first = list.abandoned.lower_bound({writer, 0});
    auto last = first;
    std::uint32_t count = 0;
    for (; last != list.abandoned.end() && last->first == writer; ++last) ++count;
    put(out, writer, 8);
    put(out, count, 4);
    for (auto id = first; id != last; ++id) put(out, id->second, 4);
  }
  return out;
}

Result<WriterList> decode_writers(std::string_view bytes) {
  const auto bad = [] { return fail(Errc::kDataLoss, "list of writers: malformed"); };
  WriterList out;
  while (!bytes.empty()) {
    if (bytes.size() < 12) return bad();
    const auto writer = take(bytes, 8);
    const auto count = take(bytes, 4);
    if (count > bytes.size() / 4 || (!out.writers.empty() && writer <= *out.writers.rbegin())) return bad();
    out.writers.insert(out.writers.end(), writer);
    for (std::uint64_t i = 0; i < count; ++i)
      out.abandoned.emplace_hint(out.abandoned.end(), writer, static_cast<std::uint32_t>(take(bytes, 4)));
  }
  return out;
}

}  // namespace cairn::server
