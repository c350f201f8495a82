#include <utility>

#include "server/coordinator/coordinator.h"

namespace cairn::server {
namespace {

constexpr const char* kMapKey = "map";

class Local final : public Coordinator {
 public:
  Local(storage::Target& target, std::optional<ClusterMap> map) : target_(target), map_(std::move(map)) {}

  const std::optional<ClusterMap>& map() const override { return map_; }

  Task<void> propose(ClusterMap next, std::uint64_t expected) override {
    if (const auto version = map_ ? map_->version : 0; version != expected || writing_)
      co_return fail(Errc::kConflict,
                     "map has version " + std::to_string(version) + ", not " + std::to_string(expected));
    writing_ = true;  // stays after a failure: the target is then fail-stop, and what is stored is unknown
    storage::Batch batch;
    batch.put(storage::Table::kMeta, kMapKey, encode_map(next));
    CO_CHECK_OK(co_await target_.committer().commit(std::move(batch)));
    map_ = std::move(next);
    writing_ = false;
    co_return {};
  }

 private:
  storage::Target& target_;
  std::optional<ClusterMap> map_;
  bool writing_ = false;
};

}  // namespace

Task<std::unique_ptr<Coordinator>> open_local_coordinator(storage::Target& target) {
  CO_TRY(auto stored, co_await target.index().get(storage::Table::kMeta, kMapKey));
  std::optional<ClusterMap> map;
  if (stored) {
    CO_TRY(map, decode_map(*stored));
  }
  std::unique_ptr<Coordinator> local = std::make_unique<Local>(target, std::move(map));
  co_return std::move(local);
}

}  // namespace cairn::server
