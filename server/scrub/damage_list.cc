#include "server/scrub/damage_list.h"

#include <utility>

#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"

namespace cairn::server {
namespace {

using storage::Table;

constexpr std::string_view kPrefix = "damage.";
constexpr std::string_view kEnd = "damage/";  // '/' follows '.'
constexpr std::size_t kPage = 256;

std::string key_of(const ChunkId& id) {
  const auto key = id.key();
  return std::string(kPrefix).append(key.data(), key.size());
}

std::string encode(const Damage& damage) {
  records::Damage out;
  auto& found = *out.mutable_found();
  wire::to_wire(damage.chunk.id, *found.mutable_chunk());
  found.set_length(damage.chunk.length);
  found.mutable_offsets()->Assign(damage.offsets.begin(), damage.offsets.end());
  found.set_reason(damage.reason);
  found.set_found_unix_nanos(damage.found_unix_nanos);
  found.set_repaired_unix_nanos(damage.repaired_unix_nanos);
  found.set_unrepaired(damage.unrepaired);
  out.set_digest(damage.chunk.digest);
  out.set_group(damage.chunk.group);
  return wire::encode(out);
}

Result<Damage> decode(std::string_view value) {
  records::Damage in;
  if (!wire::decode(value, in, "damage"))
    return fail(Errc::kDataLoss, "index: an entry of the list of damaged chunks is not one");
  const auto& found = in.found();
  Damage out;
  TRY(out.chunk.id, wire::from_wire(found.chunk()));
  out.chunk.length = found.length();
  out.chunk.digest = in.digest();
  out.chunk.group = in.group();
  out.offsets.assign(found.offsets().begin(), found.offsets().end());
  out.reason = found.reason();
  out.found_unix_nanos = found.found_unix_nanos();
  out.repaired_unix_nanos = found.repaired_unix_nanos();
  out.unrepaired = found.unrepaired();
  return out;
}

}  // namespace

Task<void> DamageList::load() {
  for (std::optional<ChunkId> after;;) {
    CO_TRY(const auto entries, co_await page(after, kPage));
    for (const auto& damage : entries) ++(damage.left() ? left_ : repaired_);
    if (entries.size() < kPage) co_return {};
    after = entries.back().chunk.id;
  }
}

Task<std::optional<Damage>> DamageList::find(ChunkId id) {
  if (left_ == 0 && repaired_ == 0) co_return std::nullopt;
  CO_TRY(const auto value, co_await target_.index().get(Table::kMeta, key_of(id)));
  if (!value) co_return std::nullopt;
  CO_TRY(auto damage, decode(*value));
  co_return std::move(damage);
}

Task<void> DamageList::put(Damage damage) {
  const auto id = damage.chunk.id;
  const bool drop = !damage.left() && repaired_ >= kRepairedMax;
  return change(id, drop ? std::nullopt : std::optional(std::move(damage)));
}

Task<void> DamageList::forget(ChunkId id) {
  return change(id, std::nullopt);
}

Task<void> DamageList::forget_repaired() {
  for (std::optional<ChunkId> after;;) {
    CO_TRY(const auto entries, co_await page(after, kPage));
    for (const auto& damage : entries)
      if (!damage.left()) CO_CHECK_OK(co_await forget(damage.chunk.id));
    if (entries.size() < kPage) co_return {};
    after = entries.back().chunk.id;
  }
}

Task<std::vector<Damage>> DamageList::page(std::optional<ChunkId> after, std::size_t limit) {
  const auto from = after ? key_of(*after) + '\0' : std::string(kPrefix);
  CO_TRY(const auto entries, co_await target_.index().scan(Table::kMeta, from, std::string(kEnd), limit));
  std::vector<Damage> out;
  for (const auto& entry : entries) {
    CO_TRY(auto damage, decode(entry.value));
    out.push_back(std::move(damage));
  }
  co_return std::move(out);
}

Task<void> DamageList::change(ChunkId id, std::optional<Damage> damage) {
  CO_TRY(const auto turn, co_await turn_.acquire(1));
  CO_TRY(const auto known, co_await find(id));
  if (!known && !damage) co_return {};
  storage::Batch batch;
  if (damage)
    batch.put(Table::kMeta, key_of(id), encode(*damage));
  else
    batch.erase(Table::kMeta, key_of(id));
  CO_CHECK_OK(co_await target_.committer().commit(std::move(batch)));
  if (known) --(known->left() ? left_ : repaired_);
  if (damage) ++(damage->left() ? left_ : repaired_);
  co_return {};
}

}  // namespace cairn::server
