#include <sys/random.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>

#include "proto/runtime/runtime.h"

namespace cairn::rt {
namespace {

class OsRandom final : public Random {
 public:
  std::uint64_t next() override {
    std::uint64_t value = 0;
    while (getrandom(&value, sizeof value, 0) != sizeof value)
      if (errno != EINTR) std::abort();  // ids would repeat: nothing sensible can follow
    return value;
  }
};

}  // namespace

std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

std::unique_ptr<Random> make_os_random() {
  return std::make_unique<OsRandom>();
}

}  // namespace cairn::rt
