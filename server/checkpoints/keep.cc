#include "server/checkpoints/keep.h"

#include <algorithm>

namespace cairn::server {

std::vector<std::uint64_t> steps_to_remove(const KeepPolicy& policy, const std::vector<CommittedStep>& steps,
                                           std::optional<std::uint64_t> held, std::int64_t now_unix_nanos) {
  std::vector<std::uint64_t> out;
  if (!policy.any()) return out;
  constexpr std::int64_t kSecond = 1'000'000'000, kDaySeconds = 86'400;
  // In seconds: differences of times that somebody made up do not overflow.
  const auto young = [&](std::int64_t committed) {
    return policy.days > 0 && now_unix_nanos / kSecond - committed / kSecond < policy.days * kDaySeconds;
  };
  const auto last = std::max<std::size_t>(policy.last, 1);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const auto& step = steps[i];
    if (steps.size() - i <= last || step.pinned || held == step.step || young(step.committed_unix_nanos) ||
        (policy.every > 0 && step.step % policy.every == 0))
      continue;
    out.push_back(step.step);
  }
  return out;
}

}  // namespace cairn::server
