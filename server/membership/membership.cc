#include "server/membership/membership.h"

#include <algorithm>
#include <utility>

namespace cairn::server {
namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(200);

Uuid fresh_id(rt::Random& random) {
  Uuid id;
  for (std::size_t i = 0; i < id.bytes.size(); i += 8)
    for (std::uint64_t draw = random.next(), k = 0; k < 8; ++k, draw >>= 8)
      id.bytes[i + k] = static_cast<std::uint8_t>(draw);
  return id;
}

ClusterMap unchanged(const ClusterMap& map) {
  return map;
}

}  // namespace

Task<void> Membership::start(Options options) {
  Start start;
  start.lost = std::move(options.lost);
  start.forced = options.forced;
  start.node = std::move(options.node);
  start.addresses = std::move(options.addresses);
  start.fresh_cluster = fresh_id(runtime_.random);
  for (;;) {
    // A target that fails now is missing, as one that could not be opened.
    const auto failed = targets_.failed();
    start.targets.clear();
    for (const auto& entry : targets_.all())
      if (!failed.contains(entry.target->uuid()))
        start.targets.push_back({entry.target->uuid(), entry.target->incarnation(), entry.directory});
    const auto& known = coordinator_.map();
    CO_TRY(auto next, after_start(known, start));
    auto done = co_await coordinator_.propose(std::move(next), known ? known->version : 0);
    if (done) break;
    if (targets_.failed() == failed) co_return fail(std::move(done).error());
    if (known) CO_CHECK_OK(may_start_here(*known, targets_, start.lost));
  }
  for (const auto& target : map().targets)
    if (target.out)
      runtime_.log.write(rt::Level::kError, "target_missing",
                         {{"target", target.uuid.text()}, {"last_directory", target.directory}});
  co_return {};
}

Task<void> Membership::watch() {
  for (;;) {
    co_await runtime_.loop.sleep(kLookEvery);
    if (after_failures(map(), targets_.failed()).value_or(map()) == map()) continue;
    if (auto done = co_await change(unchanged, "failure"); !done)
      runtime_.log.write(rt::Level::kError, "map_change_failed", {{"error", done.error().message}});
  }
}

Result<Membership::Group> Membership::group(bool home, std::uint32_t number) const {
  const auto* range = map().find(home, number);
  if (range == nullptr)
    return fail(Errc::kStale,
                std::string(home ? "home" : "data") + " group " + std::to_string(number) + " does not exist");
  Group out{.epoch = range->epoch, .loss = range->loss, .serving = {}, .syncing = {}, .missing = {}};
  for (const auto& member : range->members) {
    auto* target = targets_.find(member.target);
    if (target == nullptr || target->committer().failure())
      out.missing.push_back(member.target);
    else
      (member.serving ? out.serving : out.syncing).push_back(target);
  }
  return out;
}

Task<void> Membership::may_acknowledge(bool home, std::uint32_t group, std::set<Uuid> have) {
  for (bool changed = false;; changed = true) {
    const auto* range = map().find(home, group);
    if (range == nullptr) co_return fail(Errc::kStale, "group " + std::to_string(group) + " does not exist");
    std::optional<Uuid> lacks;
    for (const auto& member : range->members)
      if (!have.contains(member.target)) lacks = member.target;
    if (!lacks) co_return {};
    auto* target = targets_.find(*lacks);
    if (target != nullptr && !target->committer().failure())
      co_return fail(Errc::kUnavailable, "target " + lacks->text() + " became a member meanwhile");
    const auto why = target == nullptr ? Error{Errc::kFailed, "it is missing"} : Error(*target->committer().failure());
    const auto failed = [&] {
      return fail(why.code == Errc::kNoSpace ? Errc::kNoSpace : Errc::kFailed,
                  "the target " + lacks->text() + " has failed and acknowledges nothing more: " + why.message);
    };
    if (changed) co_return failed();
    if (bugs_.acknowledge_before_map && range->members.size() > 1) {
      background_.spawn(change(unchanged, "failure"));
      co_return {};
    }
    if (auto done = co_await change(unchanged, "failure"); !done) co_return failed();
  }
}

Task<void> Membership::promote(bool home, std::uint32_t group, Uuid target, std::uint64_t joined) {
  return change([=](const ClusterMap& map) { return after_sync(map, home, group, target, joined); }, "synced");
}

Task<void> Membership::demote(bool home, std::uint32_t group, Uuid target) {
  return change([=](const ClusterMap& map) { return after_lack(map, home, group, target); }, "lacks something");
}

std::optional<Error> Membership::failure() const {
  const auto failed = targets_.failed();
  if (failed.empty()) return std::nullopt;
  auto next = after_failures(map(), failed);
  if (next) return std::nullopt;
  for (const auto& entry : targets_.all())
    if (const auto& why = entry.target->committer().failure())
      return Error{why->code, entry.directory + ": " + why->message};
  return std::move(next).error();
}

Task<void> Membership::change(std::function<ClusterMap(const ClusterMap&)> step, std::string why) {
  CO_TRY(const auto turn, co_await turn_.acquire(1));
  for (;;) {
    const auto failed = targets_.failed();
    CO_TRY(auto next, after_failures(step(map()), failed));
    if (next == map()) co_return {};
    auto done = co_await coordinator_.propose(std::move(next), map().version);
    if (done) break;
    if (targets_.failed() == failed) co_return fail(std::move(done).error());  // else: without that one
  }
  std::string out;
  for (const auto& target : map().targets)
    if (target.out) out += (out.empty() ? "" : " ") + target.uuid.text();
  runtime_.log.write(out.empty() ? rt::Level::kInfo : rt::Level::kError, "map_changed",
                     {{"version", std::to_string(map().version)}, {"why", why}, {"targets_out", out}});
  if (on_change) on_change();
  changed_.notify_all();
  co_return {};
}

}  // namespace cairn::server
