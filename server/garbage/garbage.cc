#include "server/garbage/garbage.h"

#include <utility>
#include <vector>

namespace cairn::server {
namespace {

constexpr auto kLastWriter = UINT64_MAX;
constexpr auto kLastIndex = UINT32_MAX;

std::optional<ChunkId> predecessor(ChunkId id) {
  if (id.index > 0) return ChunkId{.owner = id.owner, .writer = id.writer, .index = id.index - 1};
  if (id.writer > 0) return ChunkId{.owner = id.owner, .writer = id.writer - 1, .index = kLastIndex};
  for (auto byte = id.owner.bytes.rbegin(); byte != id.owner.bytes.rend(); ++byte)
    if ((*byte)-- != 0) return ChunkId{.owner = id.owner, .writer = kLastWriter, .index = kLastIndex};
  return std::nullopt;
}

}  // namespace

bool Garbage::Range::holds(const ChunkId& id) const {
  return id.owner == owner && (!writer || id.writer == *writer) && (!index || id.index == *index);
}
std::optional<ChunkId> Garbage::Range::before() const {
  return predecessor({.owner = owner, .writer = writer.value_or(0), .index = index.value_or(0)});
}

Task<void> Garbage::run() {
  for (;;) {
    if (auto done = co_await pass(); !done)
      runtime_.log.write(rt::Level::kWarning, "garbage_pass_failed", {{"error", done.error().message}});
    co_await runtime_.loop.sleep(options_.interval);
  }
}

Task<std::optional<ChunkId>> Garbage::next(std::optional<ChunkId> after) {
  CO_TRY(const auto page, co_await chunks_.list(after, 1));
  if (page.empty()) co_return std::nullopt;
  co_return page.front().id;
}

bool Garbage::dead(const Answer& answer, const OwnerId& owner) const {
  if (answer.kind == Answer::Kind::kNone) return options_.absence_is_death;
  if (answer.loss != owner.loss()) return answer.kind == Answer::Kind::kAbsent && options_.absence_is_death;
  return answer.kind == Answer::Kind::kAbsent;
}

Task<void> Garbage::pass() {
  const auto began = runtime_.loop.now();
  std::uint64_t asked = 0;
  Suspects found;
  orphaned_ = 0;
  if (options_.ask_once) {
    for (const auto& [range, since] : std::exchange(suspects_, {})) {
      if (runtime_.loop.now() - since >= options_.grace) {
        CO_CHECK_OK(co_await remove(range));
      } else {
        suspects_.emplace(range, since);
      }
    }
  }
  for (std::optional<ChunkId> after;;) {
    CO_TRY(const auto first, co_await next(after));
    if (!first) break;
    const auto owner = first->owner;
    CO_TRY(auto answer, co_await liveness_.ask(owner));
    if (dead(answer, owner)) {
      CO_CHECK_OK(co_await examine({.owner = owner, .writer = {}, .index = {}}, found));
    } else if (answer.kind == Answer::Kind::kCommitted && answer.loss == owner.loss()) {
      CO_CHECK_OK(co_await walk_writers(owner, std::move(answer), found));
    }
    after = ChunkId{.owner = owner, .writer = kLastWriter, .index = kLastIndex};
    if (++asked % options_.page == 0) co_await runtime_.loop.sleep(options_.pause);
  }
  suspects_ = std::move(found);
  stats_.orphaned_bytes = orphaned_;
  stats_.owners = asked;
  stats_.pass_time = runtime_.loop.now() - began;
  stats_.pass_unix_nanos = runtime_.loop.wall_nanos();
  ++stats_.passes;
  co_return {};
}

Task<void> Garbage::walk_writers(OwnerId owner, Answer answer, Suspects& found) {
  for (auto after = predecessor({.owner = owner, .writer = 0, .index = 0});;) {
    CO_TRY(const auto first, co_await next(after));
    if (!first || first->owner != owner) break;
    if (!answer.writers.contains(first->writer))
      CO_CHECK_OK(co_await examine({.owner = owner, .writer = first->writer, .index = {}}, found));
    after = ChunkId{.owner = owner, .writer = first->writer, .index = kLastIndex};
  }
  for (const auto& [writer, index] : answer.abandoned) {
    if (!answer.writers.contains(writer)) continue;  // went with its writer
    CO_TRY(const auto chunk, co_await chunks_.find({.owner = owner, .writer = writer, .index = index}));
    if (chunk) CO_CHECK_OK(co_await examine({.owner = owner, .writer = writer, .index = index}, found));
  }
  co_return {};
}

Task<void> Garbage::examine(Range range, Suspects& found) {
  const auto known = suspects_.find(range);
  // Found by an earlier pass, so this pass has asked again.
  if (known != suspects_.end() && runtime_.loop.now() - known->second >= options_.grace)
    co_return co_await remove(range);
  found.emplace(range, known == suspects_.end() ? runtime_.loop.now() : known->second);
  for (auto after = range.before();;) {
    CO_TRY(const auto page, co_await chunks_.list(after, options_.page));
    for (const auto& chunk : page) {
      if (!range.holds(chunk.id)) co_return {};
      orphaned_ += chunk.length;
    }
    if (page.size() < options_.page) co_return {};
    after = page.back().id;
  }
}

Task<void> Garbage::remove(Range range) {
  std::uint64_t freed = 0;
  for (;;) {
    CO_TRY(auto page, co_await chunks_.list(range.before(), options_.page));
    std::vector<ChunkId> ids;
    std::uint64_t bytes = 0;
    for (const auto& chunk : page) {
      if (!range.holds(chunk.id)) break;
      ids.push_back(chunk.id);
      bytes += chunk.length;
    }
    if (ids.empty()) break;
    const auto count = ids.size();
    CO_CHECK_OK(co_await chunks_.remove(std::move(ids)));
    stats_.freed_chunks += count;
    stats_.freed_bytes += bytes;
    freed += bytes;
    if (count < options_.page) break;
    co_await runtime_.loop.sleep(options_.pause);
  }
  if (freed > 0)
    runtime_.log.write(rt::Level::kInfo, "garbage_freed",
                       {{"owner", range.owner.hex()}, {"bytes", std::to_string(freed)}});
  co_return {};
}

}  // namespace cairn::server
