#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "server/records/records.h"
#include "storage/record_store/record_store.h"

namespace cairn::wire {
class ReaderRenew;
class ReaderRenewReply;
}  // namespace cairn::wire

namespace cairn::server {

/// Who reads what, and the end of what was removed. Registrations live in memory, for a time, and are renewed by their
/// readers. Whoever removes or replaces a step or an object hides its owner: a `deleting` record beside the owner's
/// keeps the chunks alive until no registration is left.
///
/// Why no reader loses what it was promised: a registration counts only after the owner's record was seen with the
/// registration in place, and the records of an owner go only while no registration is in place, which is decided and
/// marked in one turn of the loop. After a start nothing goes for one ttl, in which readers of the process before
/// register again.
///
/// Threads:  the loop; calls overlap.
/// Lifetime: what it is given outlives it; no call may run when it is destroyed.
/// source:   protocol.md 8, 9
class Readers {
 public:
  struct Options {
    rt::Duration ttl = std::chrono::seconds(60);  // without a renewal; clients renew four times as often
    rt::Duration sweep_every = std::chrono::seconds(1);
    std::size_t readers_max = 65'536;                 // registrations in all
    std::size_t connection_readers_max = 4096;        // of these by one connection
    std::size_t batch = 256;                          // owners let go in one transaction
    bool unasked = false, takeover_unwaited = false;  // planted bugs: see SaveBugs
  };
  Readers(rt::Runtime runtime, storage::RecordStore& records, Options options);

  /// Registers a reader of `owner`. False: the owner is no more.
  /// errors: kBusy  too many readers, of this connection or in all
  Task<bool> protect(std::uint64_t reader, OwnerId owner, std::uint64_t connection);
  /// Renews and closes registrations; readers whose owner is no more are named in the reply.
  Task<wire::ReaderRenewReply> renew(wire::ReaderRenew request, std::uint64_t connection);

  /// Part of the transaction that removes or replaces what names `owner`: its record stays, and a deleting one comes.
  static void hide(const OwnerId& owner, const std::string& bucket, const std::string& name, Edit& edit);
  /// After a transaction that hid owners of `group`.
  void hidden(HomeGroup group);

  /// Lets go of what nobody reads. Runs for ever; the ttl after a start is counted from its first turn.
  Task<void> run();

  std::uint32_t ttl_millis() const;
  struct Stats {
    std::uint64_t readers = 0;  // registrations now
    std::uint64_t refused = 0;  // since start
    std::uint64_t held = 0;     // removed owners that are kept for readers, at the last look
    std::uint64_t let_go = 0;   // since start
  };
  Stats stats() const;

 private:
  struct Registration {
    rt::TimePoint expires;
    std::uint64_t connection = 0;  // that renewed it last
  };
  using OfOwner = std::map<std::uint64_t, Registration>;  // by reader
  Registration* find(std::uint64_t reader, const OwnerId& owner);
  Result<void> make_room(std::uint64_t connection);
  void refresh(Registration& registration, std::uint64_t connection);
  void leave(std::uint64_t reader, const OwnerId& owner);
  void forget(const Registration& registration);
  void forget_expired();
  bool registered(const OwnerId& owner) const;
  Task<void> sweep();
  /// The next page of deleting records after `after`, which becomes its last key; empty at the end.
  Task<void> sweep_page(HomeGroup group, std::string& after, std::uint64_t& kept);

  rt::Runtime runtime_;
  storage::RecordStore& records_;
  Options options_;
  std::map<OwnerId, OfOwner> readers_;
  std::map<std::uint64_t, std::size_t> of_connection_;
  std::size_t count_ = 0;
  std::set<OwnerId> going_;                      // whose records are being erased
  std::map<HomeGroup, std::uint64_t> deleting_;  // groups that may have deleting records; how many were kept
  rt::TimePoint started_;
  Stats stats_;
};

}  // namespace cairn::server
