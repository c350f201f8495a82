#include "server/records/runs.h"

#include "proto/common/units.h"
#include "proto/wire/wire.pb.h"

namespace cairn::server {

Result<std::uint64_t> check_run(const wire::ExtentRun& run, const OwnerId& owner, std::string_view what) {
  const auto bad = [&](std::string why) { return fail(Errc::kInvalid, std::string(what) + ": " + std::move(why)); };
  if (!run.owner().empty() && run.owner() != owner.view()) return bad("chunks of another owner than " + owner.hex());
  if (run.count() == 0) return bad("a run without chunks");
  if (run.chunk_bytes() == 0 || run.chunk_bytes() > kChunkBytesMax || run.last_bytes() == 0 ||
      run.last_bytes() > run.chunk_bytes())
    return bad("chunks of " + std::to_string(run.chunk_bytes()) + " bytes, the last of " +
               std::to_string(run.last_bytes()) + ": 1 .. 64 MiB, the last no longer");
  if (std::uint64_t{run.first_index()} + run.count() > std::uint64_t{UINT32_MAX} + 1)
    return bad("chunk indices beyond 2^32");
  return std::uint64_t{run.count() - 1} * run.chunk_bytes() + run.last_bytes();  // below 2^32 * 2^26
}

}  // namespace cairn::server
