#include "server/chunks/chunks.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace cairn::server {
namespace {

Failure no_member(DataGroup group) {
  return fail(Errc::kUnavailable,
              "data group " + std::to_string(group) + ": the data directories that hold it have failed or are missing");
}

}  // namespace

Result<void> Chunks::Upload::failed(Part& part, Error why) {
  part.failed = true;
  if (!part.target->committer().failure()) return fail(std::move(why));
  const bool others = std::ranges::any_of(parts_, [](const Part& p) { return p.writing() || p.has; });
  return others ? Result<void>() : fail(std::move(why));
}

Task<void> Chunks::Upload::write(std::uint32_t offset, rt::MutableBuffer memory, std::uint32_t size) {
  const auto first = std::ranges::find_if(parts_, &Part::writing);
  if (first == parts_.end()) co_return no_member(group_);
  CO_TRY(const auto checked, first->upload->check(offset, std::move(memory), size));
  // All are waited for, also when one fails: the kernel may still write, and the others go on.
  Result<void> outcome;
  rt::Scope writes(runtime_.loop);
  for (auto& part : parts_) {
    if (!part.writing()) continue;
    writes.spawn(part.upload->write_checked(offset, checked), [this, &part, &outcome](Result<void> done) {
      if (done) return;
      if (auto rest = failed(part, std::move(done).error()); !rest && outcome) outcome = std::move(rest);
    });
  }
  CO_CHECK_OK(co_await writes.join());
  co_return outcome;
}

Task<void> Chunks::Upload::finish() {
  Result<void> outcome;
  rt::Scope ends(runtime_.loop);
  for (auto& part : parts_) {
    if (!part.writing()) continue;
    ends.spawn(part.upload->finish(), [this, &part, &outcome](Result<void> done) {
      if (done) {
        part.has = true;
        return;
      }
      if (auto rest = failed(part, std::move(done).error()); !rest && outcome) outcome = std::move(rest);
    });
  }
  CO_CHECK_OK(co_await ends.join());
  CO_CHECK_OK(outcome);
  co_return co_await acknowledge();
}

Task<void> Chunks::Upload::acknowledge() {
  std::set<Uuid> have;
  for (const auto& part : parts_)
    if (part.has) have.insert(part.target->uuid());
  co_return co_await members_.may_acknowledge(false, group_, std::move(have));
}

Task<std::unique_ptr<Chunks::Upload>> Chunks::start(DataGroup number, ChunkId id, std::uint32_t length,
                                                    std::vector<std::uint32_t> block_crcs) {
  CO_TRY(auto group, members_.group(false, number));
  auto targets = std::move(group.serving);
  if (targets.empty()) co_return no_member(number);
  targets.insert(targets.end(), group.syncing.begin(), group.syncing.end());
  std::unique_ptr<Upload> out(new Upload(runtime_, members_, number));
  bool wanted = false;
  for (auto* target : targets) {
    auto upload = co_await target->chunks().start(id, length, block_crcs, number);
    out->parts_.push_back({.target = target, .upload = {}, .has = false});
    auto& part = out->parts_.back();
    if (!upload) {
      if (!target->committer().failure()) co_return fail(std::move(upload).error());
      continue;
    }
    part.upload = *std::move(upload);
    part.has = part.upload == nullptr;
    wanted |= part.upload != nullptr;
  }
  if (wanted) co_return std::move(out);
  CO_CHECK_OK(co_await out->acknowledge());
  co_return nullptr;
}

std::vector<storage::Target*> Chunks::readable(DataGroup number, const ChunkId& id) const {
  const auto group = members_.group(false, number);
  if (!group) return {};
  auto out = group->serving;
  // Neighbours are read from different disks.
  if (!out.empty()) std::ranges::rotate(out, out.begin() + static_cast<std::ptrdiff_t>(id.index % out.size()));
  // One that has failed takes nothing more, but what it has can be read.
  const auto* range = members_.map().find(false, number);
  for (const auto& uuid : group->missing)
    if (auto* target = members_.targets().find(uuid); target != nullptr && range->member(uuid)->serving)
      out.push_back(target);
  return out;
}

std::vector<storage::Target*> Chunks::usable() const {
  std::vector<storage::Target*> out;
  for (const auto& entry : members_.targets().all())
    if (!entry.target->committer().failure()) out.push_back(entry.target.get());
  return out;
}

Task<std::vector<storage::ChunkInfo>> Chunks::list(std::optional<ChunkId> after, std::size_t limit) {
  return list_of(usable(), after, limit);
}

Task<std::vector<storage::ChunkInfo>> list_of(std::vector<storage::Target*> targets, std::optional<ChunkId> after,
                                              std::size_t limit) {
  std::map<ChunkId, storage::ChunkInfo> found;
  for (auto* target : targets) {
    CO_TRY(auto page, co_await target->chunks().list(after, limit));
    for (auto& chunk : page) found.emplace(chunk.id, chunk);
  }
  std::vector<storage::ChunkInfo> out;
  for (auto& [id, chunk] : found)
    if (out.size() < limit) out.push_back(chunk);
  co_return out;
}

Task<std::optional<storage::ChunkInfo>> Chunks::find(ChunkId id) {
  for (auto* target : usable()) {
    CO_TRY(auto found, co_await target->chunks().find(id));
    if (found) co_return found;
  }
  co_return std::nullopt;
}

Task<void> Chunks::remove(std::vector<ChunkId> ids) {
  for (auto* target : usable())
    if (auto removed = co_await target->chunks().remove(ids); !removed && !target->committer().failure())
      co_return fail(std::move(removed).error());
  co_return {};
}

Task<void> Chunks::look() {
  for (auto* target : usable())
    if (auto looked = co_await target->chunks().look(); !looked && !target->committer().failure())
      co_return fail(std::move(looked).error());
  co_return {};
}

storage::ChunkStore::Room Chunks::room() const {
  storage::ChunkStore::Room out;
  for (auto* target : usable()) {
    const auto one = target->chunks().room();
    out.total_bytes += one.total_bytes;
    out.free_bytes += one.free_bytes;
    out.open_bytes += one.open_bytes;
    out.ballast_bytes += one.ballast_bytes;
  }
  return out;
}

template <class T, class Read>
Task<T> Chunks::from_any(DataGroup group, ChunkId id, Read read) {
  std::optional<Error> first;
  std::vector<storage::Target*> lacking;
  for (auto* target : readable(group, id)) {
    auto got = co_await read(target->chunks());
    if (got) {
      if (first) ++reads_elsewhere_;
      for (auto* other : lacking)
        if (on_bad_copy) on_bad_copy(*other, id);
      co_return got;
    }
    const auto code = got.error().code;
    if (code == Errc::kInvalid || code == Errc::kUnavailable) co_return got;
    if (code == Errc::kNotFound)
      lacking.push_back(target);
    else if (on_bad_copy)
      on_bad_copy(*target, id);
    // Damage says more than absence.
    if (!first || first->code == Errc::kNotFound) first = std::move(got).error();
  }
  if (!first) co_return no_member(group);
  co_return fail(*std::move(first));
}

Task<storage::CheckedBytes> Chunks::read(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                         storage::Verify verify) {
  return from_any<storage::CheckedBytes>(
      group, id, [=](storage::ChunkStore& chunks) { return chunks.read(id, offset, size, verify); });
}

Task<std::uint32_t> Chunks::read_into(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                      rt::MutableBuffer into) {
  return from_any<std::uint32_t>(group, id,
                                 [=](storage::ChunkStore& chunks) { return chunks.read_into(id, offset, size, into); });
}

Task<storage::ChunkStore::Raw> Chunks::read_raw(DataGroup group, ChunkId id, std::uint32_t offset, std::uint32_t size,
                                                rt::MutableBuffer into) {
  return from_any<storage::ChunkStore::Raw>(
      group, id, [=](storage::ChunkStore& chunks) { return chunks.read_raw(id, offset, size, into); });
}

}  // namespace cairn::server
