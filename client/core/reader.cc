#include "client/core/reader.h"

#include <algorithm>

#include "client/core/shared_reader.h"
#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

/// Places the reply's bytes by the request's scatter list and checks their CRCs where they lie.
class ScatterSink : public rpc::Sink {
 public:
  ScatterSink(const format::ReadRequest& request, const std::vector<std::span<std::byte>>& destinations,
              std::uint64_t& received)
      : request_(request), destinations_(destinations), received_(received) {
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
    if (static_cast<std::uint64_t>(header.crcs_size()) != round_up(payload_bytes, kBlockBytes) / kBlockBytes)
      return fail(Errc::kProtocol, "reply data with " + std::to_string(header.crcs_size()) + " checksums for " +
                                       std::to_string(payload_bytes) + " bytes");
    placed_.clear();
    for (std::uint64_t left = payload_bytes; left > 0;) {
      const auto& to = request_.scatter[next_];
      const auto size = std::min<std::uint64_t>(left, to.length - in_scatter_);
      placed_.push_back(destinations_[to.want].subspan(to.offset + in_scatter_, size));
      left -= size;
      in_scatter_ += size;
      if (in_scatter_ == to.length) {
        ++next_;
        in_scatter_ = 0;
      }
    }
    received_ += payload_bytes;
    return placed_;
  }

  Result<void> placed(std::string_view message) override {
    wire::DataHeader header;
    CHECK_OK(wire::decode(message, header, "data header"));
    std::uint32_t crc = 0;
    std::uint64_t in_block = 0;
    int block = 0;
    const auto check = [&]() -> Result<void> {
      if (header.crcs(block++) != crc)
        return fail(Errc::kDataLoss,
                    "bytes changed on their way: CRC of reply block " + std::to_string(block - 1) + " differs");
      crc = 0;
      in_block = 0;
      return {};
    };
    for (auto span : placed_)
      while (!span.empty()) {
        const auto piece = span.first(std::min<std::uint64_t>(span.size(), kBlockBytes - in_block));
        crc = crc32c(piece, crc);
        in_block += piece.size();
        span = span.subspan(piece.size());
        if (in_block == kBlockBytes) CHECK_OK(check());
      }
    if (in_block > 0) CHECK_OK(check());
    return {};
  }

 private:
  const format::ReadRequest& request_;
  const std::vector<std::span<std::byte>>& destinations_;
  std::uint64_t& received_;
  std::size_t next_ = 0;          // in scatter
  std::uint64_t in_scatter_ = 0;  // bytes of it that are placed
  std::vector<std::span<std::byte>> placed_;
};

Task<void> read_one(std::shared_ptr<Session> session, const format::ReadRequest* request,
                    const std::vector<std::span<std::byte>>* destinations, rt::Semaphore* in_flight,
                    rt::Duration timeout, ReadStats* stats, const std::function<void(std::uint64_t)>* progress) {
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
  for (const auto& chunk : request->chunks) {
    auto* to = read.add_chunks();
    wire::to_wire(chunk.id, *to->mutable_id());
    to->mutable_offsets()->Add(chunk.offsets.begin(), chunk.offsets.end());
    to->mutable_lengths()->Add(chunk.lengths.begin(), chunk.lengths.end());
  }
  std::uint64_t received = 0;
  auto new_sink = [request, destinations, &received]() -> std::unique_ptr<rpc::Sink> {
    return std::make_unique<ScatterSink>(*request, *destinations, received);
  };
  auto sent = co_await session->read_ranges(request->group, wire::encode(read), std::move(new_sink), deadline);
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
  stats->bytes_moved += received;
  stats->bytes_from_disk += reply.bytes_from_disk();
  if (*progress) (*progress)(request->bytes);
  co_return {};
}

}  // namespace

Task<ReadStats> read_all(std::shared_ptr<Session> session, std::vector<format::ReadRequest> requests,
                         std::vector<std::span<std::byte>> destinations, std::uint32_t in_flight, rt::Duration timeout,
                         std::function<void(std::uint64_t)> progress) {
  ReadStats stats;
  auto& loop = session->runtime().loop;
  rt::Semaphore turns(loop, std::max(1u, in_flight));
  std::vector<Task<void>> reads;
  for (const auto& request : requests)
    reads.push_back(read_one(session, &request, &destinations, &turns, timeout, &stats, &progress));
  CO_CHECK_OK(co_await rt::all(loop, std::move(reads)));
  co_return stats;
}

Task<ReadStats> read_extents(std::shared_ptr<Session> session, std::vector<format::Extent> extents,
                             std::span<std::byte> out, rt::Duration timeout) {
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
    request.chunks.push_back({e.chunk, {e.offset}, {e.length}});
    request.scatter.push_back({e.length, 0, at});
    request.bytes += e.length;
    at += e.length;
  }
  assert(at == out.size());
  std::vector<std::span<std::byte>> destinations{out};
  co_return co_await read_all(session, std::move(requests), std::move(destinations), 4, timeout);
}

}  // namespace cairn::client
