#include "server/cairnd/directories.h"

#include <optional>
#include <utility>
#include <vector>

#include "server/coordinator/coordinator.h"
#include "storage/disk/directory.h"
#include "storage/index/rocksdb_index.h"

namespace cairn::server {
namespace {

struct Directory {
  std::string path;
  std::unique_ptr<storage::Disk> disk;
  bool formatted = false;
};

/// Whether the disk may be to blame, rather than the operator.
bool of_the_disk(const Error& error) {
  return error.code == Errc::kDataLoss || error.code == Errc::kFailed || error.code == Errc::kNotFound ||
         error.code == Errc::kNoSpace;
}

class Opening {
 public:
  Opening(rt::RealRuntime& real, const CairndOptions& options, std::uint64_t index_bytes, storage::PlantedBugs bugs,
          rt::UnitPool& units)
      : real_(real), options_(options), index_bytes_(index_bytes), bugs_(bugs), units_(units) {}

  Task<Directory> examine(std::string path) {
    const auto runtime = real_.seams();
    CO_TRY(auto io, storage::Io::create(runtime, real_.loop(), {.backend = options_.io}));
    Directory out{.path = path, .disk = {}, .formatted = false};
    CO_TRY(out.disk, co_await storage::open_directory(runtime, std::move(io), path));
    // Before the index, which makes files.
    CO_TRY(out.formatted, co_await storage::Target::check(*out.disk));
    co_return out;
  }

  Task<void> open(Directory directory, TargetSet& out) {
    const auto runtime = real_.seams();
    CO_TRY(auto index,
           co_await storage::open_rocksdb_index(runtime, directory.path + "/index", {.memory_bytes = index_bytes_}));
    storage::Target::Options options;
    options.bugs = bugs_;
    options.chunks.ballast_bytes = options_.ballast;
    options.chunks.recycle_bytes = options_.recycle;
    CO_TRY(auto target,
           co_await storage::Target::open(runtime, std::move(directory.disk), std::move(index), units_, options));
    for (const auto& other : out.all())
      if (other.target->uuid() == target->uuid())
        co_return fail(Errc::kInvalid,
                       "it is a copy of " + other.directory + ": both are target " + target->uuid().text());
    out.add(directory.path, std::move(target));
    co_return {};
  }

 private:
  rt::RealRuntime& real_;
  const CairndOptions& options_;
  std::uint64_t index_bytes_;
  storage::PlantedBugs bugs_;
  rt::UnitPool& units_;
};

/// A known target that is neither here nor declared lost.
std::optional<TargetEntry> missing_target(const ClusterMap& map, const TargetSet& targets, const std::set<Uuid>& lost) {
  for (const auto& target : map.targets)
    if (targets.find(target.uuid) == nullptr && !lost.contains(target.uuid)) return target;
  return std::nullopt;
}

}  // namespace

Task<void> open_directories(rt::RealRuntime& real, const CairndOptions& options, std::uint64_t index_bytes,
                            storage::PlantedBugs bugs, rt::UnitPool& units, TargetSet& out) {
  const auto runtime = real.seams();
  Opening opening(real, options, index_bytes / options.data.size(), bugs, units);
  std::optional<Error> failed;
  const auto left_out = [&](const std::string& path, Error error) -> Result<void> {
    if (!of_the_disk(error) || options.data.size() == 1) return fail(std::move(error).with("--data " + path));
    runtime.log.write(rt::Level::kError, "directory_failed", {{"directory", path}, {"error", error.message}});
    failed = std::move(error).with("--data " + path);
    return {};
  };

  std::vector<Directory> empty;
  for (const auto& path : options.data) {
    auto directory = co_await opening.examine(path);
    if (!directory) {
      CO_CHECK_OK(left_out(path, std::move(directory).error()));
    } else if (!directory->formatted) {
      empty.push_back(*std::move(directory));
    } else if (auto opened = co_await opening.open(*std::move(directory), out); !opened) {
      CO_CHECK_OK(left_out(path, std::move(opened).error()));
    }
  }
  CO_TRY(const auto map, co_await newest_map(out));
  if (!map && failed) co_return fail(*std::move(failed));
  const auto missing = map ? missing_target(*map, out, options.lost_targets) : std::nullopt;
  for (auto& directory : empty) {
    const auto path = directory.path;
    if (missing) {
      runtime.log.write(rt::Level::kError, "directory_not_used",
                        {{"directory", path},
                         {"reason", "it is empty, and target " + missing->uuid.text() + " (last at " +
                                        missing->directory + ") is missing: mount its disk, or say --lost-target " +
                                        missing->uuid.text() + " if it is lost for good"}});
    } else if (auto opened = co_await opening.open(std::move(directory), out); !opened) {
      CO_CHECK_OK(left_out(path, std::move(opened).error()));
      if (!map) co_return fail(*std::move(failed));
    }
  }
  if (out.all().empty()) co_return fail(failed ? *std::move(failed) : Error{Errc::kInvalid, "no data directory"});
  co_return {};
}

}  // namespace cairn::server
