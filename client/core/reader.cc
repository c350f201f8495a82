#include "client/core/reader.h"

#include <algorithm>
#include <cstring>

#include "client/core/scatter.h"
#include "client/core/shared_reader.h"
#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

/// Shorter ones are not worth a place each: the network's side would be handed one piece of memory a row.
constexpr std::uint64_t kRunBytesMin = 1 * kKiB;

/// Places the reply's bytes by the request's scatter list and checks each frame's CRC where they lie. Short runs are
/// checked in a buffer of its own and copied.
class ScatterSink : public rpc::Sink {
 public:
  /// `moved` counts the bytes of all frames, of other tries too; `differs` is set by a CRC that is wrong here.
  ScatterSink(const format::ReadRequest& request, const std::vector<std::span<std::byte>>& destinations,
              std::uint64_t& received, std::uint64_t& moved, bool& differs)
      : request_(request), received_(received), moved_(moved), differs_(differs), next_(request, destinations) {
    received_ = 0;
  }

  Result<std::vector<std::span<std::byte>>> place(std::string_view message, std::uint32_t payload_bytes) override {
    wire::DataHeader header;
    CHECK_OK(wire::decode(message, header, "data header"));
    if (header.offset() != static_cast<std::uint32_t>(received_))
      return fail(Errc::kProtocol, "reply data out of order: offset " + std::to_string(header.offset()) +
                                       ", expected " + std::to_string(static_cast<std::uint32_t>(received_)));
    if (payload_bytes > request_.bytes - received_)
      return fail(Errc::kProtocol, "reply of more than the " + std::to_string(request_.bytes) + " bytes asked for");
    received_ += payload_bytes;
    moved_ += wire::FrameHeader::kBytes + message.size() + payload_bytes;
    placed_.clear();
    copies_ = false;
    auto at = next_;
    const auto runs_max = payload_bytes / kRunBytesMin + 16;
    for (std::uint64_t left = payload_bytes; left > 0 && !copies_;) {
      placed_.push_back(at.take(left));
      left -= placed_.back().size();
      copies_ = placed_.size() > runs_max;
    }
    if (copies_) {
      buffer_.resize(payload_bytes);
      placed_.assign(1, buffer_);
    } else {
      next_ = at;
    }
    return placed_;
  }

  Result<void> placed(std::string_view message) override {
    wire::DataHeader header;
    CHECK_OK(wire::decode(message, header, "data header"));
    std::uint32_t crc = 0;
    for (const auto& span : placed_) crc = crc32c(span, crc);
    differs_ = crc != header.crc();
    if (differs_)
      return fail(Errc::kDataLoss, "bytes are not as they were stored: CRC of reply data at offset " +
                                       std::to_string(header.offset()) + " differs");
    if (copies_)
      for (auto rest = std::span<const std::byte>(buffer_); !rest.empty();) {
        const auto to = next_.take(rest.size());
        std::memcpy(to.data(), rest.data(), to.size());
        rest = rest.subspan(to.size());
      }
    return {};
  }

 private:
  const format::ReadRequest& request_;
  std::uint64_t& received_;
  std::uint64_t& moved_;
  bool& differs_;
  ScatterCursor next_;  // where the next frame's bytes go
  std::vector<std::span<std::byte>> placed_;
  bool copies_ = false;  // the frame is in the buffer, not yet where it belongs
  std::vector<std::byte> buffer_;
};

Task<void> read_one(std::shared_ptr<Session> session, const format::ReadRequest* request,
                    const std::vector<std::span<std::byte>>* destinations, rt::Semaphore* in_flight,
                    rt::Duration timeout, bool fresh, ReadStats* stats,
                    const std::function<void(std::uint64_t)>* progress) {
  CO_TRY(auto turn, co_await in_flight->acquire(1));
  const auto deadline = session->runtime().loop.now() + timeout;
  if (fits_shared(*session, *request)) {
    auto shared = co_await read_shared(session, request, destinations, deadline);
    if (shared) {
      *stats += *shared;
      if (*progress) (*progress)(request->bytes);
      co_return {};
    }
    // Whatever it was: the way below finds out, and tells.
  }
  wire::ReadRanges read;
  read.set_fresh(fresh);
  read.set_client_verifies(!fresh);
  for (const auto& chunk : request->chunks) {
    auto* to = read.add_chunks();
    wire::to_wire(chunk.id, *to->mutable_id());
    to->mutable_offsets()->Add(chunk.offsets.begin(), chunk.offsets.end());
    to->mutable_lengths()->Add(chunk.lengths.begin(), chunk.lengths.end());
    for (const auto& runs : chunk.strided) {
      auto* strided = to->add_strided();
      strided->set_offset(static_cast<std::uint32_t>(runs.offset));
      strided->set_length(static_cast<std::uint32_t>(runs.length));
      for (const auto& step : runs.steps) {
        strided->add_counts(static_cast<std::uint32_t>(step.count));
        strided->add_strides(static_cast<std::uint32_t>(step.stride));
      }
    }
  }
  std::uint64_t received = 0, moved = 0;
  bool differs = false;
  const auto ask = [&] {
    auto message = wire::encode(read);
    auto new_sink = [request, destinations, &received, &moved, &differs,
                     request_bytes = wire::FrameHeader::kBytes + message.size()]() -> std::unique_ptr<rpc::Sink> {
      moved += request_bytes;
      return std::make_unique<ScatterSink>(*request, *destinations, received, moved, differs);
    };
    return session->read_ranges(request->group, std::move(message), std::move(new_sink), deadline);
  };
  auto sent = co_await ask();
  if (!sent && differs && read.client_verifies()) {
    // The daemon has not looked: now it does, reads another copy where it has one, and says what is damaged.
    session->runtime().log.write(rt::Level::kWarning, "read_again", {{"reason", sent.error().message}});
    read.set_client_verifies(false);
    sent = co_await ask();
  }
  if (!sent) {
    auto error = std::move(sent).error();
    if (error.code == Errc::kUnknown) error.code = Errc::kUnavailable;  // a read changes nothing
    co_return fail(std::move(error));
  }
  if (received != request->bytes)
    co_return fail(Errc::kDataLoss, "read: reply of " + std::to_string(received) + " bytes instead of " +
                                        std::to_string(request->bytes));
  wire::ReadReply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, "read reply"));
  stats->bytes_wanted += request->bytes;
  stats->bytes_moved += moved + wire::FrameHeader::kBytes + sent->message.size();
  stats->bytes_from_disk += reply.bytes_from_disk();
  if (*progress) (*progress)(request->bytes);
  co_return {};
}

}  // namespace

Task<ReadStats> read_all(std::shared_ptr<Session> session, std::vector<format::ReadRequest> requests,
                         std::vector<std::span<std::byte>> destinations, std::uint32_t in_flight, rt::Duration timeout,
                         std::function<void(std::uint64_t)> progress, bool fresh) {
  ReadStats stats;
  auto& loop = session->runtime().loop;
  rt::Semaphore turns(loop, std::max(1u, in_flight));
  std::vector<Task<void>> reads;
  for (const auto& request : requests)
    reads.push_back(read_one(session, &request, &destinations, &turns, timeout, fresh, &stats, &progress));
  CO_CHECK_OK(co_await rt::all(loop, std::move(reads)));
  co_return stats;
}

Task<ReadStats> read_extents(std::shared_ptr<Session> session, std::vector<format::Extent> extents,
                             std::span<std::byte> out, rt::Duration timeout, bool fresh) {
  // One request per group and 32 MiB; the scatter list keeps the order of `out`.
  constexpr std::uint64_t kRequestBytesMax = 32 * kMiB;
  constexpr std::size_t kRequestChunksMax = 1024;
  std::vector<format::ReadRequest> requests;
  std::uint64_t at = 0;
  for (const auto& e : extents) {
    if (requests.empty() || requests.back().group != e.group || requests.back().bytes + e.length > kRequestBytesMax ||
        requests.back().chunks.size() >= kRequestChunksMax)
      requests.push_back({.group = e.group, .chunks = {}, .scatter = {}, .bytes = 0});
    auto& request = requests.back();
    request.chunks.push_back({.id = e.chunk, .offsets = {e.offset}, .lengths = {e.length}});
    request.scatter.push_back({.want = 0, .to = {.offset = at, .length = e.length}});
    request.bytes += e.length;
    at += e.length;
  }
  assert(at == out.size());
  std::vector<std::span<std::byte>> destinations{out};
  co_return co_await read_all(session, std::move(requests), std::move(destinations), 4, timeout, {}, fresh);
}

}  // namespace cairn::client
