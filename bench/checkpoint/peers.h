#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace cairn::bench {

/// One file a rank. Empty string: done; else what failed.
/// files:   write() of 8 MiB from the page cache's side, fsync of file and directory; read() back
/// odirect: io_uring, O_DIRECT, 4 MiB x 8 in flight, fdatasync of the file, fsync of the directory
/// `memory` is 4096-aligned and, for odirect, a multiple of 4096 long.
std::string save_file(const std::string& path, std::span<const std::byte> memory);
std::string load_file(const std::string& path, std::span<std::byte> memory);
std::string save_direct(const std::string& path, std::span<const std::byte> memory);
std::string load_direct(const std::string& path, std::span<std::byte> memory);

}  // namespace cairn::bench
