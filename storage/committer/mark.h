#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "proto/common/units.h"

namespace cairn::storage {

/// File "mark": the number of the last synced index batch, kept outside the index. Two slots of 4096 bytes, written in
/// place by turns, so that a torn write leaves the other; the higher number counts. Each start replaces the whole file
/// (written as "mark.new", renamed), both slots equal. A slot:
///
/// offset size meaning
///      0    8 magic "CAIRNMRK"
///      8    8 batch number, little-endian
///     16 4076 zero
///   4092    4 CRC32C of bytes 0 .. 4091
inline constexpr std::size_t kMarkSlots = 2;
inline constexpr std::size_t kMarkSlotBytes = kSectorBytes;
inline constexpr std::size_t kMarkBytes = kMarkSlots * kMarkSlotBytes;

/// Fills one slot.
void encode_mark(std::span<std::byte> slot, std::uint64_t batch);
/// nullopt: torn or damaged.
std::optional<std::uint64_t> decode_mark(std::span<const std::byte> slot);

}  // namespace cairn::storage
