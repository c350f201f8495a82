#include "server/targets/target_set.h"

namespace cairn::server {

storage::Target* TargetSet::find(const Uuid& uuid) const {
  for (const auto& entry : entries_)
    if (entry.target->uuid() == uuid) return entry.target.get();
  return nullptr;
}

std::set<Uuid> TargetSet::failed() const {
  std::set<Uuid> out;
  for (const auto& entry : entries_)
    if (entry.target->committer().failure()) out.insert(entry.target->uuid());
  return out;
}

Task<void> TargetSet::close() {
  Result<void> first;
  for (std::size_t i = 0; i < entries_.size(); ++i)
    if (auto closed = co_await entries_[i].target->close(); !closed && first) first = std::move(closed);
  co_return first;
}

}  // namespace cairn::server
