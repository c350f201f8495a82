#include "server/records/owners.h"

#include <optional>
#include <utility>

#include "proto/wire/records.pb.h"
#include "server/records/keys.h"
#include "server/records/records.h"

namespace cairn::server {
namespace {

std::optional<Owners::Kind> open_kind(const records::Owner& owner) {
  if (owner.kind() == records::Owner::UPLOAD) return Owners::Kind::kUpload;
  if (owner.kind() == records::Owner::ATTEMPT) return Owners::Kind::kAttempt;
  return std::nullopt;
}

}  // namespace

Task<std::vector<Owners::Found>> Owners::load() {
  std::vector<Found> found;
  constexpr std::size_t kPage = 64;
  for (HomeGroup group = 0; group < kHomeGroups; ++group) {
    for (std::string after;;) {
      CO_TRY(const auto page, co_await records_.scan(group, std::string(kOwnerPrefix), after, kPage));
      for (const auto& record : page) {
        records::Owner owner;
        CO_CHECK_OK(parse_record(record, owner));
        CO_TRY(const auto id, OwnerId::from_bytes(std::string_view(record.key).substr(kOwnerPrefix.size())));
        const auto kind = open_kind(owner);
        if (!kind) continue;
        opened(id, *kind);
        found.push_back({.id = id, .bucket = owner.bucket(), .declared_bytes = owner.declared_bytes()});
      }
      if (page.size() < kPage) break;
      after = page.back().key;
    }
  }
  co_return std::move(found);
}

Task<void> Owners::check_open(OwnerId owner) {
  if (open_.contains(owner)) {
    touch(owner);
    co_return {};
  }
  if (owner.home_group() >= kHomeGroups)
    co_return fail(Errc::kInvalid, "owner " + owner.hex() + " names home group " + std::to_string(owner.home_group()));
  const auto ends = ends_;
  CO_TRY(const auto record, co_await server::load<records::Owner>(records_, owner.home_group(), owner_key(owner)));
  const auto kind = open_kind(record.value);
  if (!record.exists() || !kind)
    co_return fail(Errc::kFenced, "owner " + owner.hex() + " is not open: its upload or save has ended or never began");
  if (ends == ends_) opened(owner, *kind);
  co_return {};
}

Task<bool> Owners::named(OwnerId owner) {
  if (owner.home_group() >= kHomeGroups) co_return false;
  CO_TRY(const auto record, co_await records_.get(owner.home_group(), owner_key(owner)));
  co_return record.has_value();
}

void Owners::touch(const OwnerId& owner) {
  if (auto known = open_.find(owner); known != open_.end()) known->second.last_used = loop_.now();
}
void Owners::opened(const OwnerId& owner, Kind kind) {
  open_[owner] = {kind, loop_.now()};
}
void Owners::ended(const OwnerId& owner) {
  open_.erase(owner);
  ++ends_;
}

std::vector<OwnerId> Owners::idle_uploads(rt::Duration duration) const {
  std::vector<OwnerId> out;
  for (const auto& [owner, open] : open_)
    if (open.kind == Kind::kUpload && loop_.now() - open.last_used >= duration) out.push_back(owner);
  return out;
}

}  // namespace cairn::server
