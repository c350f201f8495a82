// A filter for nbdkit: a disk that fails and stalls as a test wants it to. While a file of one of these names is in the
// folder faults=DIR,
//
//   fail-read, fail-write, fail-flush   such requests end with EIO
//   stall                               requests wait until it is gone
//
// and the first request that was hit makes the file hit-fail-read and so on: a fault that hit nothing has tested
// nothing.
#include <nbdkit-filter.h>

#include <cerrno>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <unistd.h>

namespace {

std::string folder;

bool is_there(const std::string& name) {
  return access((folder + name).c_str(), F_OK) == 0;
}

void note(const std::string& name) {
  if (!is_there("hit-" + name)) close(open((folder + "hit-" + name).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
}

/// 0, or -1: the request fails with *error.
int before(const char* fault, int* error) {
  while (is_there("stall")) {
    note("stall");
    if (nbdkit_nanosleep(0, 5'000'000) != 0) {  // the connection ends
      *error = ESHUTDOWN;
      return -1;
    }
  }
  if (!is_there(fault)) return 0;
  note(fault);
  *error = EIO;
  return -1;
}

int config(nbdkit_next_config* next, nbdkit_backend* backend, const char* key, const char* value) {
  if (std::strcmp(key, "faults") != 0) return next(backend, key, value);
  folder = std::string(value) + "/";
  return 0;
}

int config_complete(nbdkit_next_config_complete* next, nbdkit_backend* backend) {
  if (!folder.empty()) return next(backend);
  nbdkit_error("faults=DIR is needed");
  return -1;
}

int pread(nbdkit_next* next, void*, void* to, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
          int* error) {
  return before("fail-read", error) != 0 ? -1 : next->pread(next, to, count, offset, flags, error);
}
int pwrite(nbdkit_next* next, void*, const void* from, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
           int* error) {
  return before("fail-write", error) != 0 ? -1 : next->pwrite(next, from, count, offset, flags, error);
}
int zero(nbdkit_next* next, void*, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int* error) {
  return before("fail-write", error) != 0 ? -1 : next->zero(next, count, offset, flags, error);
}
int trim(nbdkit_next* next, void*, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int* error) {
  return before("fail-write", error) != 0 ? -1 : next->trim(next, count, offset, flags, error);
}
int flush(nbdkit_next* next, void*, std::uint32_t flags, int* error) {
  return before("fail-flush", error) != 0 ? -1 : next->flush(next, flags, error);
}

nbdkit_filter describe() {
  nbdkit_filter out{};
  out.name = "cairn-faults";
  out.longname = "failing and stalling disk";
  out.config = config;
  out.config_complete = config_complete;
  out.config_help = "faults=DIR  where files say what fails (required)";
  out.pread = pread;
  out.pwrite = pwrite;
  out.zero = zero;
  out.trim = trim;
  out.flush = flush;
  return out;
}

nbdkit_filter filter = describe();

}  // namespace

NBDKIT_REGISTER_FILTER(filter)
