#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "proto/common/ids.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/wire/frame.h"

namespace cairn::client {

class Session;

/// What a session has open for reading. The daemon keeps it, also when it is removed or replaced meanwhile, as long as
/// this says so four times per time-to-live, in the background; a daemon that restarts learns it anew.
///
/// Threads: the loop. source: protocol.md 8
class Protection {
  struct Open;
  struct State;

 public:
  explicit Protection(Session& session);
  ~Protection();

  /// One opened step or version of an object; dropping it ends the registration.
  class Held {
   public:
    Held(std::shared_ptr<State> state, std::uint64_t reader);
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    ~Held();
    /// The daemon has let go of it, because it heard nothing of this reader for too long: reads end with kDeleted.
    bool lost() const;
    /// The longest time so far in which the daemon may not have heard of this reader. As long as it is below the
    /// time-to-live, nothing is let go.
    rt::Duration silence() const;

   private:
    std::shared_ptr<State> state_;
    std::uint64_t reader_;
  };
  /// A new reader's id, for the request that opens.
  std::uint64_t draw();
  /// After that request's answer, which names owner and time-to-live; `asked`: when it was sent.
  std::shared_ptr<const Held> hold(std::uint64_t reader, OwnerId owner, rt::Duration ttl, rt::TimePoint asked);
  /// Until the daemon was told of everything that was closed; at once while something is open. For a client that ends:
  /// what is removed then need not wait for the time-to-live of a reader that has gone.
  Task<void> settled() { return settled_on(state_); }

 private:
  static Task<void> settled_on(std::shared_ptr<State> state);
  static Task<void> renew(Session* session, std::shared_ptr<State> state);
  static Task<void> send(Session* session, std::shared_ptr<State> state, HomeGroup group,
                         std::vector<std::uint64_t> open, std::vector<std::pair<std::uint64_t, OwnerId>> closed,
                         rt::TimePoint deadline);

  Session& session_;
  std::shared_ptr<State> state_;
};

}  // namespace cairn::client
