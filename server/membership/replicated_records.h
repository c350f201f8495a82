#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/membership/membership.h"
#include "storage/record_store/record_store.h"

namespace cairn::server {

/// Records on every member of the home groups. A round is committed on all of them, serving and syncing, before it is
/// acknowledged; one that fails is taken from the groups first. Reads come from the primary; one whose index turns out
/// to be damaged has failed, and the next serves.
///
/// A round also writes which keys it changes: table kLog, key group 2 big-endian, value: version before it 20, version
/// after it 20, then for each key its length 4 and its bytes. As a group has one round under way at most, that is all
/// by which members can differ after a crash: take_over() brings those behind up to the one that is furthest.
///
/// Threads:  the loop.
/// Lifetime: `members` outlives it.
/// source:   protocol.md 2, 5; ARCHITECTURE.md, "Several data directories"
class ReplicatedRecords final : public storage::RecordMedium {
 public:
  ReplicatedRecords(rt::Runtime runtime, Membership& members, MembershipBugs bugs)
      : runtime_(runtime), members_(members), bugs_(bugs), background_(runtime.loop) {}

  /// Makes the serving members equal. Before the first call of the others.
  Task<void> take_over();
  /// Brings syncing members up to date, in pages, and lets them serve. Runs for ever. `store` lies on this medium.
  Task<void> bring_up(storage::RecordStore& store);

  // ---- storage::RecordMedium
  Task<std::optional<std::string>> get(storage::Table table, std::string key) override;
  Task<std::vector<storage::IndexEntry>> scan(storage::Table table, std::string from, std::string to,
                                              std::size_t limit) override;
  Task<void> commit(storage::RecordRound round) override;
  Result<void> usable() const override;

 private:
  /// nullptr: none is here.
  storage::Target* primary() const;
  /// Whether to read from the next one: `target` is damaged, and others serve.
  bool give_up(storage::Target& target, const Error& error);
  Task<void> level(HomeGroup group, std::vector<storage::Target*> members);
  Task<void> bring_up(storage::RecordStore& store, Member newcomer);
  Task<void> copy_group(storage::RecordStore& store, HomeGroup group, storage::Target& to);

  rt::Runtime runtime_;
  Membership& members_;
  MembershipBugs bugs_;
  rt::Scope background_;  // for the planted bug
};

}  // namespace cairn::server
