#include "client/core/extent_list.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"
#include "server/records/runs.h"
#include "tests/fuzz/fuzz.h"
#include "tests/sim/world.h"

// Where an object lies, as a daemon tells a client: ObjectInfo with its runs of chunks.

namespace cairn::fuzz {
namespace {

void one(std::string_view input) {
  Input in(input);
  std::uint64_t offset = in.number(2);
  std::uint64_t length = in.number(2);
  if (in.byte() & 1) offset <<= 24;
  wire::ObjectInfo info;
  if (!wire::decode(in.rest(), info, "object info")) return;
  const auto map = client::ExtentMap::from(info);
  if (!map || info.has_pages()) return;
  // find() is asked for what lies inside the object.
  if (offset > info.size()) return;
  length = std::min(length, info.size() - offset);
  sim::World world(1);
  auto& node = world.make_node("client");
  const auto found = world.run(node, client::ExtentMap::find(*map, nullptr, offset, length, std::chrono::seconds(1)));
  if (!found) return;
  std::uint64_t bytes = 0;
  for (const auto& extent : *found) {
    must(extent.length > 0 && extent.length <= 64 * kMiB && extent.offset <= 64 * kMiB - extent.length,
         "each extent lies in a chunk");
    bytes += extent.length;
  }
  must(bytes == length, "extents are as long as what was asked for");
  // The daemon takes the same runs in a seal.
  const auto owner = OwnerId::from_bytes(info.owner());
  for (const auto& run : info.runs())
    if (owner) (void)server::check_run(run, *owner, "run");
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  wire::ObjectInfo info;
  info.set_key("k");
  info.set_owner(std::string(16, 'o'));
  for (const std::uint32_t count : {1u, 3u, 100u}) {
    auto& run = *info.add_runs();
    run.set_group(1);
    run.set_writer(5);
    run.set_first_index(count);
    run.set_count(count);
    run.set_chunk_bytes(1 << 20);
    run.set_last_bytes(1000);
    info.set_size(info.size() + (count - 1) * (std::uint64_t{1} << 20) + 1000);
    out.push_back(std::string("\0\x10\x10\0\0", 5) + wire::encode(info));
    out.push_back(std::string("\0\0\x10\0\0", 5) + wire::encode(info));
  }
  auto& pages = *info.mutable_pages();
  pages.mutable_runs()->Assign(info.runs().begin(), info.runs().end());
  pages.set_bytes(5000);
  pages.set_root_bytes(100);
  info.clear_runs();
  out.push_back(std::string("\0\0\x10\0\0", 5) + wire::encode(info));
  return out;
}

const Register registered({.name = "extents", .bytes_max = 1024, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
