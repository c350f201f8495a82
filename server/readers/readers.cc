#include "server/readers/readers.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/wire/records.pb.h"
#include "proto/wire/wire.pb.h"
#include "server/records/keys.h"

namespace cairn::server {

Readers::Readers(rt::Runtime runtime, storage::RecordStore& records, Options options)
    : runtime_(runtime), records_(records), options_(options), started_(runtime.loop.now()) {
  for (HomeGroup group = 0; group < kHomeGroups; ++group) deleting_[group] = 0;
}

std::uint32_t Readers::ttl_millis() const {
  return static_cast<std::uint32_t>(std::chrono::duration_cast<std::chrono::milliseconds>(options_.ttl).count());
}

Readers::Stats Readers::stats() const {
  auto out = stats_;
  out.readers = count_;
  for (const auto& [group, kept] : deleting_) out.held += kept;
  return out;
}

// ---- Registrations

Readers::Registration* Readers::find(std::uint64_t reader, const OwnerId& owner) {
  const auto of_owner = readers_.find(owner);
  if (of_owner == readers_.end()) return nullptr;
  const auto known = of_owner->second.find(reader);
  return known == of_owner->second.end() ? nullptr : &known->second;
}

bool Readers::registered(const OwnerId& owner) const {
  const auto of_owner = readers_.find(owner);
  return of_owner != readers_.end() &&
         std::any_of(of_owner->second.begin(), of_owner->second.end(),
                     [&](const auto& known) { return runtime_.loop.now() < known.second.expires; });
}

Result<void> Readers::make_room(std::uint64_t connection) {
  const auto full = [&] {
    const auto of = of_connection_.find(connection);
    return count_ >= options_.readers_max ||
           (of != of_connection_.end() && of->second >= options_.connection_readers_max);
  };
  if (full()) forget_expired();
  if (!full()) return {};
  ++stats_.refused;
  const bool all = count_ >= options_.readers_max;
  return fail(Errc::kBusy, std::to_string(all ? options_.readers_max : options_.connection_readers_max) +
                               (all ? " steps and objects are open for reading on this daemon"
                                    : " steps and objects are open for reading on this connection") +
                               ", which is the limit: close some, or try again later");
}

void Readers::refresh(Registration& registration, std::uint64_t connection) {
  if (registration.connection != connection) {
    forget(registration);
    registration.connection = connection;
    ++of_connection_[connection];
    ++count_;
  }
  registration.expires = runtime_.loop.now() + options_.ttl;
}

void Readers::forget(const Registration& registration) {
  --count_;
  const auto of = of_connection_.find(registration.connection);
  if (--of->second == 0) of_connection_.erase(of);
}

void Readers::leave(std::uint64_t reader, const OwnerId& owner) {
  const auto of_owner = readers_.find(owner);
  if (of_owner == readers_.end()) return;
  const auto known = of_owner->second.find(reader);
  if (known == of_owner->second.end()) return;
  forget(known->second);
  of_owner->second.erase(known);
  if (of_owner->second.empty()) readers_.erase(of_owner);
}

void Readers::forget_expired() {
  const auto now = runtime_.loop.now();
  for (auto of_owner = readers_.begin(); of_owner != readers_.end();) {
    std::erase_if(of_owner->second, [&](const auto& known) {
      const bool expired = known.second.expires <= now;
      if (expired) forget(known.second);
      return expired;
    });
    of_owner = of_owner->second.empty() ? readers_.erase(of_owner) : std::next(of_owner);
  }
}

Task<bool> Readers::protect(std::uint64_t reader, OwnerId owner, std::uint64_t connection) {
  if (owner.home_group() >= kHomeGroups) co_return fail(Errc::kInvalid, "not an owner id: " + owner.hex());
  if (going_.contains(owner)) co_return false;
  if (auto* known = find(reader, owner)) {
    refresh(*known, connection);
  } else {
    CO_CHECK_OK(make_room(connection));
    readers_[owner][reader] = {.expires = runtime_.loop.now() + options_.ttl, .connection = connection};
    ++of_connection_[connection];
    ++count_;
  }
  // Only now: what is there with the registration in place does not go.
  auto named = co_await records_.get(owner.home_group(), owner_key(owner));
  if (named && *named) co_return true;
  leave(reader, owner);
  if (!named) co_return fail(std::move(named).error());
  co_return false;
}

Task<wire::ReaderRenewReply> Readers::renew(wire::ReaderRenew request, std::uint64_t connection) {
  const auto owner_of = [&](const wire::Reader& reader) -> Result<OwnerId> {
    TRY(const auto owner, owner_from(reader.owner()));
    if (owner.home_group() != request.home_group())
      return fail(Errc::kInvalid,
                  "readers: owner " + owner.hex() + " is not of home group " + std::to_string(request.home_group()));
    return owner;
  };
  for (const auto& reader : request.closed()) {
    CO_TRY(const auto owner, owner_of(reader));
    leave(reader.id(), owner);
  }
  // First those that need no look at the records, so that they do not expire while the others are looked up.
  std::vector<std::pair<std::uint64_t, OwnerId>> unknown;
  for (const auto& reader : request.readers()) {
    CO_TRY(const auto owner, owner_of(reader));
    auto* known = find(reader.id(), owner);
    if (known != nullptr && runtime_.loop.now() < known->expires)
      refresh(*known, connection);
    else
      unknown.emplace_back(reader.id(), owner);
  }
  wire::ReaderRenewReply reply;
  for (const auto& [reader, owner] : unknown) {
    auto alive = co_await protect(reader, owner, connection);
    if (!alive && alive.error().code == Errc::kBusy) continue;  // not protected, but not gone either
    if (!alive) co_return fail(std::move(alive).error());
    if (!*alive) reply.add_gone(reader);
  }
  co_return std::move(reply);
}

// ---- The end of what was removed

void Readers::hide(const OwnerId& owner, const std::string& bucket, const std::string& name, Edit& edit) {
  records::Deleting record;
  record.set_bucket(bucket);
  record.set_name(name);
  edit.put(deleting_key(owner), record);
}

void Readers::hidden(HomeGroup group) {
  deleting_.try_emplace(group, 0);
}

Task<void> Readers::run() {
  started_ = runtime_.loop.now();
  for (;;) {
    const auto due = runtime_.loop.now() + options_.sweep_every;
    if (auto done = co_await sweep(); !done)
      runtime_.log.write(rt::Level::kWarning, "readers_sweep_failed", {{"error", done.error().message}});
    co_await runtime_.loop.sleep_until(due);
    // When this process was stopped, renewals wait in the sockets: the readers are not to blame for the gap.
    if (const auto late = runtime_.loop.now() - due; late > options_.sweep_every) {
      started_ += late;
      for (auto& [owner, of_owner] : readers_)
        for (auto& [reader, registration] : of_owner) registration.expires += late;
    }
  }
}

Task<void> Readers::sweep() {
  forget_expired();
  if (runtime_.loop.now() - started_ < options_.ttl && !options_.takeover_unwaited) co_return {};
  std::vector<HomeGroup> groups;
  for (const auto& [group, kept] : deleting_) groups.push_back(group);
  for (const auto group : groups) {
    deleting_.erase(group);  // whoever hides something from now on names it again
    std::uint64_t kept = 0;
    Result<void> swept;
    std::string after;
    do swept = co_await sweep_page(group, after, kept);
    while (swept && !after.empty());
    if (!swept || kept > 0) deleting_[group] = kept;
    if (!swept) co_return fail(std::move(swept).error());
  }
  co_return {};
}

Task<void> Readers::sweep_page(HomeGroup group, std::string& after, std::uint64_t& kept) {
  CO_TRY(const auto page, co_await records_.scan(group, std::string(kDeletingPrefix), after, options_.batch));
  after = page.size() < options_.batch ? std::string() : page.back().key;
  struct Going {
    std::set<OwnerId>& all;
    std::vector<OwnerId> these = {};
    ~Going() {
      for (const auto& owner : these) all.erase(owner);
    }
  } going{going_};
  Edit edit(group);
  for (const auto& record : page) {
    CO_TRY(const auto owner, OwnerId::from_bytes(std::string_view(record.key).substr(kDeletingPrefix.size())));
    if (registered(owner) && !options_.unasked) {
      ++kept;
      continue;
    }
    going_.insert(owner);
    going.these.push_back(owner);
    edit.unchanged(record.key, record.version).erase(record.key).erase(owner_key(owner));
  }
  if (going.these.empty()) co_return {};
  CO_CHECK_OK(co_await edit.apply(records_));
  stats_.let_go += going.these.size();
  co_return {};
}

}  // namespace cairn::server
