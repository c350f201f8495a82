#pragma once

#include <memory>

#include "storage/disk/directory.h"
#include "tests/storage/engine.h"

namespace cairn::storage {

bool has_uring();

/// A temporary directory of this machine with the real disk and RocksDB.
std::unique_ptr<Machine> make_real_machine(IoBackend backend);

}  // namespace cairn::storage
