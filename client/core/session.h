#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/core/protection.h"
#include "proto/common/ids.h"
#include "proto/rpc/rpc.h"
#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "proto/rt/unit_pool.h"

namespace cairn::client {

struct SessionOptions {
  std::vector<std::string> servers;  // HOST:PORT or unix:PATH, tried in order
  std::string name;                  // for the daemon's logs
  std::string host;                  // this host's boot id; equal to the daemon's: its unix socket is used
  std::uint32_t connections = 1;     // for bulk data, 1 .. 16
  /// Offered to a daemon on this host: it writes staged chunks from it, and reads into its first window_bytes. Those
  /// are the session's own; what is staged lies behind them, because a read that was given up may still arrive, and
  /// must never hit bytes that wait to be saved.
  std::shared_ptr<rt::SharedMemory> memory = {};
  std::uint64_t window_bytes = 0;
  /// Ranges that are shorter on average are gathered by the daemon: of the blocks around them too little is wanted.
  std::uint64_t shared_range_bytes_min = 2 * kBlockBytes;
  bool shared_unchecked = false;  // planted bug: what is read into the window is not verified
  rt::Duration dial_max = std::chrono::seconds(5);
  rt::Duration backoff_min = std::chrono::milliseconds(20);
  rt::Duration backoff_max = std::chrono::seconds(1);
};

/// One client's view of the store: connections, the map, and calls that are repeated while that is safe.
///
/// Every call here may be sent again (all mutations are idempotent by an id they carry), so a lost connection is
/// retried until the deadline. What then is still open is kUnknown when a request had been sent, else kUnavailable.
///
/// Threads:  the loop. Lifetime: close() before the runtime goes; whoever runs in background() is dropped then.
class Session : public std::enable_shared_from_this<Session> {
 public:
  /// errors: kUnavailable  no server answered: each named with its reason;  kProtocol;  kDeadline
  static Task<std::shared_ptr<Session>> connect(rt::Runtime runtime, SessionOptions options, rt::TimePoint deadline);
  ~Session();

  struct Reply {
    std::string message;
    bool repeated = false;  // sent more than once
  };
  /// A call about records of `group`; the group's epoch is added each time it is sent.
  Task<Reply> record_call(wire::Method method, HomeGroup group, std::string request, rt::TimePoint deadline);
  /// A call about no single group (listings, the map).
  Task<Reply> plain_call(wire::Method method, std::string request, rt::TimePoint deadline);
  /// Stores a chunk; `request` is a PutChunk without its stamp. Pieces that lie in the shared memory do not travel: the
  /// daemon is told where they are.
  Task<Reply> put_chunk(DataGroup group, std::string request, std::vector<rpc::Piece> pieces, rt::TimePoint deadline);
  /// Reads ranges; `request` is a ReadRanges without its stamp. A new sink is made for each try.
  Task<Reply> read_ranges(DataGroup group, std::string request, std::function<std::unique_ptr<rpc::Sink>()> sink,
                          rt::TimePoint deadline);

  /// Reads blocks into the window; `request` is a ReadShared without its stamp. Not repeated: what fails is read by
  /// read_ranges(). errors: kUnavailable  the connection shares no memory
  Task<std::string> read_shared(DataGroup group, std::string request, rt::TimePoint deadline);
  /// Where daemons on this host read to; null: there is none, or the daemon does not see it.
  rt::UnitPool* window() const { return shares_memory_ ? window_.get() : nullptr; }
  std::uint64_t shared_range_bytes_min() const { return options_.shared_range_bytes_min; }
  bool shared_unchecked() const { return options_.shared_unchecked; }
  /// The daemon sees memory(), as of the connection that was dialled last.
  bool shares_memory() const { return shares_memory_; }
  /// What SessionOptions::memory said.
  std::shared_ptr<rt::SharedMemory> memory() const { return options_.memory; }
  /// Where bytes of the shared memory lie in it; nothing for other bytes.
  std::optional<std::uint64_t> place_of(std::span<const std::byte> bytes) const;

  /// The `turn`-th, counted round and round, of those of `groups` that serve. errors: kUnavailable
  Result<DataGroup> choose_data_group(const std::vector<DataGroup>& groups, std::uint64_t turn) const;
  /// Largest payload of one data frame to the daemon, in bytes.
  std::uint32_t unit_bytes() const;
  rt::Runtime& runtime() { return runtime_; }
  rt::Scope& background() { return background_; }
  Protection& protection() { return protection_; }
  std::string description() const;
  std::uint64_t bytes_received() const;
  void close();

 private:
  struct Group {
    std::uint32_t first = 0, count = 0;
    bool home = false;
    GroupEpoch epoch;
    bool serving = false;
  };
  enum class Stamped { kNo, kRecords, kChunks };
  struct Slot {
    explicit Slot(rt::Loop& loop) : opening(loop, 1) {}
    rt::Semaphore opening;  // one dial at a time
    std::shared_ptr<rpc::Channel> channel;
  };
  using Send = std::function<Task<std::string>(std::shared_ptr<rpc::Channel>, std::string request)>;

  Session(rt::Runtime runtime, SessionOptions options);
  Task<std::shared_ptr<rpc::Channel>> channel(std::size_t slot, rt::TimePoint deadline);
  Task<std::shared_ptr<rpc::Channel>> dial(std::string address, rt::TimePoint deadline);
  Task<void> load_map(rt::TimePoint deadline);
  Result<void> take_map(std::string_view bytes);
  Task<Reply> repeat(std::string what, std::size_t slot, Stamped stamped, std::uint32_t group, std::string request,
                     Send send, rt::TimePoint deadline);
  Result<std::string> stamp(Stamped stamped, std::uint32_t group) const;

  rt::Runtime runtime_;
  SessionOptions options_;
  std::vector<std::unique_ptr<Slot>> slots_;  // 0: control; 1 ..: bulk (one connection: the same)
  std::size_t next_bulk_ = 0;
  std::vector<Group> groups_;
  std::uint64_t map_version_ = 0;
  std::string address_;  // in use
  std::uint32_t unit_bytes_ = 0;
  std::uint64_t received_before_ = 0;  // by connections that are gone
  std::unique_ptr<rt::UnitPool> window_;
  bool shares_memory_ = false;  // the connection that was dialled last
  bool closed_ = false;
  Protection protection_{*this};
  rt::Scope background_;
};

}  // namespace cairn::client
