#pragma once

#include <string>

#include "storage/format/index_pages.h"

// A small checkpoint, and its bytes as pages hold them.

namespace cairn::fuzz {

inline constexpr std::string_view kSampleOwner = "oooooooooooooooo";

/// A fence that names this page, at the beginning of an index.
format::Fence fence_of(std::string_view page, std::uint32_t crc, std::uint8_t level);
/// What rank `rank` of `ranks` saves: a row of a tensor, its part of a replicated one, a blob, a token, metadata.
format::Contents sample_contents(std::uint32_t rank, std::uint32_t ranks);
/// The body of an entry page with all of it.
std::string entries_body(const format::Contents& contents);
/// What such a body holds, when its checksum is right; nothing when it is no such body.
Result<format::Contents> contents_of(std::string_view body, std::uint32_t count);

}  // namespace cairn::fuzz
