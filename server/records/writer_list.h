#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "proto/common/result.h"

namespace cairn::server {

/// Which chunks of a committed owner live: those of `writers`, less the abandoned ones. A step has as many writers as
/// ranks, so a record cannot hold them: they lie behind the index in its chunks.
struct WriterList {
  std::set<std::uint64_t> writers;
  std::set<std::pair<std::uint64_t, std::uint32_t>> abandoned;  // writer, chunk index
};

/// By rising writer: 8 writer, 4 number of its abandoned chunks, 4 the index of each, rising; little-endian.
/// sizes:  kWriterListBytesMax
/// errors: kInvalid  longer
Result<std::string> encode_writers(const WriterList& list);
inline constexpr std::size_t kWriterListBytesMax = 16 << 20;

/// errors: kDataLoss  not such a list
Result<WriterList> decode_writers(std::string_view bytes);

}  // namespace cairn::server
