#include "client/core/buckets.h"
#include "client/core/objects.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "client/core/steps.h"
#include "proto/common/checksum.h"
#include "proto/rpc/hello.h"
#include "proto/wire/codec.h"
#include "server/coordinator/changes.h"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/sample.h"

// A whole client whose daemon answers anything: each call gets the next records of the input.

namespace cairn::fuzz {
namespace {

using namespace std::chrono_literals;
using wire::FrameKind;

constexpr std::uint8_t kReply = 0, kError = 1, kData = 2, kBadData = 3, kRaw = 4, kKinds = 6;
constexpr std::uint64_t kSmall = 1 << 20;  // of objects and tensors that are read

std::string map_bytes() {
  server::Start start;
  start.targets = {{.uuid = *Uuid::from_bytes(std::string(16, 't')), .incarnation = 1, .directory = "/d"}};
  start.node = "n1";
  start.addresses = {"daemon:7420"};
  start.fresh_cluster = *Uuid::from_bytes(std::string(16, 'c'));
  return server::encode_map(*server::after_start(std::nullopt, start));
}

/// A daemon of one connection at a time. Calls for the map are answered as they should be, unless `first` says
/// otherwise.
class Daemon {
 public:
  Daemon(sim::Node& node, Input in, bool honest_map) : node_(node), in_(in), honest_map_(honest_map) {}

  static Task<void> serve(Daemon* self, rt::Listener* listener) {
    for (;;) {
      CO_TRY(auto stream, co_await listener->accept());
      (void)co_await talk(self, stream.get());
      stream->close();
    }
  }

 private:
  static Task<void> send(rt::Stream* stream, std::string bytes) {
    co_return co_await stream->write_all({bytes_of(bytes)});
  }

  static Task<void> talk(Daemon* self, rt::Stream* stream) {
    rpc::FrameReader reader(self->node_, *stream);
    CO_TRY(const auto first, co_await reader.header());
    CO_TRY(const auto hello, co_await reader.message(first));
    rpc::Agreed agreed;
    agreed.cluster = std::string(16, 'c');
    agreed.credit_units = 8;
    agreed.unit_bytes = 1 << 16;
    agreed.calls_max = 16;
    CO_TRY(const auto greeting, rpc::answer_hello(hello, agreed));
    CO_CHECK_OK(co_await send(stream, frame({.kind = FrameKind::kHelloReply}, greeting.reply)));
    for (;;) {
      CO_TRY(const auto header, co_await reader.header());
      CO_CHECK_OK(co_await reader.message(header));
      CO_CHECK_OK(co_await reader.skip_payload());
      if (header.kind == FrameKind::kPing) CO_CHECK_OK(co_await send(stream, frame({.kind = FrameKind::kPong}, "")));
      if (header.kind != FrameKind::kRequest) continue;
      if (self->honest_map_ && header.method == static_cast<std::uint16_t>(wire::Method::kMap)) {
        CO_CHECK_OK(co_await send(stream, frame({.kind = FrameKind::kReply, .call_id = header.call_id}, map_bytes())));
        continue;
      }
      if (self->in_.empty()) co_return {};
      CO_CHECK_OK(co_await send(stream, self->answer(header.call_id)));
    }
  }

  /// Frames up to the end of a call.
  std::string answer(std::uint64_t call) {
    std::string out;
    while (!in_.empty()) {
      switch (in_.byte() % kKinds) {
        case kReply:
          return out + frame({.kind = FrameKind::kReply, .call_id = call}, in_.piece());
        case kError:
          return out + frame({.kind = FrameKind::kError, .call_id = call}, in_.piece());
        case kData: {
          wire::DataHeader header;
          header.set_offset(in_.number(2));
          const auto payload = in_.piece();
          header.set_crc(crc32c(payload));
          out += frame({.kind = FrameKind::kData, .call_id = call}, wire::encode(header), payload);
          break;
        }
        case kBadData: {
          const auto message = in_.piece();
          out += frame({.kind = FrameKind::kData, .call_id = call}, message, in_.piece());
          break;
        }
        case kRaw:
          out += in_.piece();
          break;
        default:
          out += frame({.kind = FrameKind::kCredit, .method = static_cast<std::uint16_t>(in_.number(2))}, "");
          break;
      }
    }
    return out;
  }

  sim::Node& node_;
  Input in_;
  bool honest_map_;
};

Task<void> get(std::shared_ptr<client::Session> session, rt::TimePoint until) {
  CO_TRY(auto opened, co_await client::open_object(session, "b", "k", until));
  const auto object = std::make_shared<const client::OpenedObject>(std::move(opened));
  const auto size = std::min(object->summary.size, kSmall);
  std::string bytes(size, '\0');
  const auto all = std::as_writable_bytes(std::span(bytes));
  CO_CHECK_OK(co_await client::read_object(session, "b", object, object->summary.size - size, all, 1s));
  co_return co_await client::read_object(session, "b", object, size / 3, all.subspan(0, size - size / 3), 1s);
}

Task<void> restore(std::shared_ptr<client::Session> session) {
  CO_TRY(const auto step, co_await client::StepReader::open(session, "b", "r", std::nullopt, 1s));
  CO_TRY(const auto contents, co_await step->find({}));
  std::vector<client::StepReader::Wanted> wanted;
  std::vector<std::string> memory;
  for (const auto& shard : contents.shards) {
    if (!wanted.empty() && wanted.back().tensor == shard.tensor) continue;
    const auto count = format::elements(shard.global_shape);
    const auto bytes = count ? format::bytes_of(shard.dtype, *count) : fail(count.error());
    if (!bytes || *bytes > kSmall || wanted.size() == 8) continue;
    wanted.push_back({.tensor = shard.tensor, .box = {}});
    memory.emplace_back(*bytes, '\0');
  }
  std::vector<std::span<std::byte>> destinations;
  for (auto& one : memory) destinations.push_back(std::as_writable_bytes(std::span(one)));
  CO_CHECK_OK(co_await step->restore(wanted, destinations));
  for (const auto& blob : contents.blobs)
    if (blob.size <= kSmall) CO_CHECK_OK(co_await step->blob(blob));
  CO_CHECK_OK(co_await step->verify({}));
  co_return {};
}

Task<void> list(std::shared_ptr<client::Session> session, rt::TimePoint until) {
  (void)co_await client::list_objects(session, "b", {.prefix = {}, .after = {}, .delimiter = "/", .token = {}}, until);
  (void)co_await client::list_steps(session, "b", "r", std::nullopt, 10, until);
  (void)co_await client::list_runs(session, "b", "", 10, until);
  (void)co_await client::run_activity(session, "b", "r", until);
  (void)co_await client::list_buckets(session, until);
  (void)co_await client::show_bucket(session, "b", until);
  (void)co_await client::set_bucket(session, "b", {.keep_last = 3}, until);
  (void)co_await client::pin_step(session, "b", "r", 7, true, until);
  (void)co_await client::remove_step(session, "b", "r", 7, until);
  (void)co_await client::remove_steps_after(session, "b", "r", 7, 1s);
  co_return {};
}

Task<void> use(sim::Node* node, std::uint8_t what) {
  const auto until = node->now() + 2s;
  CO_TRY(const auto session, co_await client::Session::connect(
                                 node->runtime(), {.servers = {"daemon:7420"}, .name = "fuzz", .host = {}}, until));
  Result<void> done;
  if (what % 3 == 0) done = co_await get(session, until);
  if (what % 3 == 1) done = co_await restore(session);
  if (what % 3 == 2) done = co_await list(session, until);
  session->close();
  co_return done;
}

void one(std::string_view input) {
  Input in(input);
  const auto what = in.byte();
  sim::World world(1);
  auto& daemon = world.make_node("daemon");
  auto& client = world.make_node("client");
  const auto listener = *daemon.runtime().net.listen("daemon:7420");
  Daemon logic(daemon, in, !(what & 0x80));
  daemon.spawn(Daemon::serve(&logic, listener.get()));
  // A typed error or success, but an end.
  const auto used = world.run(client, use(&client, what & 0x7f), 10min);
  must(used || used.error().message.find("World::run") == std::string::npos, "every call of a client ends");
  client.kill(sim::Death::kProcess);
  daemon.kill(sim::Death::kProcess);
}

std::string record(std::uint8_t kind, std::string_view bytes) {
  return std::string(1, static_cast<char>(kind)) + piece_of(bytes);
}
std::string data(std::string_view bytes) {
  wire::ReadReply reply;
  reply.set_bytes(bytes.size());
  return std::string("\x02\0\0", 3) + piece_of(bytes) + record(kReply, wire::encode(reply));
}

std::vector<std::string> seeds() {
  const std::string bytes = "the bytes of an object";
  wire::ObjectInfo info;
  info.set_key("k");
  info.set_size(bytes.size());
  info.set_owner(std::string(kSampleOwner));
  info.set_reader_ttl_millis(60'000);
  auto& run = *info.add_runs();
  run.set_group(1);
  run.set_writer(5);
  run.set_count(1);
  run.set_chunk_bytes(static_cast<std::uint32_t>(bytes.size()));
  run.set_last_bytes(run.chunk_bytes());
  const auto object =
      std::string(1, '\0') + record(kReply, wire::encode(info)) + data(bytes) + data(bytes.substr(bytes.size() / 3));

  // The index of a step is read first, then its tensors and its blob.
  const auto contents = sample_contents(0, 1);
  const auto index = *format::encode(contents);
  wire::StepInfo step;
  step.set_step(7);
  step.set_owner(std::string(kSampleOwner));
  step.set_world_size(1);
  step.set_index_bytes(index.size());
  step.set_reader_ttl_millis(60'000);
  const auto root = *format::root_of(index);
  step.set_root_bytes(static_cast<std::uint32_t>(root.size()));
  step.set_root_digest(sha256(root));
  auto& extent = *step.add_index();
  extent.set_group(1);
  extent.set_count(1);
  extent.set_chunk_bytes(static_cast<std::uint32_t>(index.size()));
  extent.set_last_bytes(extent.chunk_bytes());
  const auto opened = "\x01" + record(kReply, wire::encode(step)) + data(root) +
                      data(std::string_view(index).substr(0, index.size() - root.size())) + data(std::string(48, 'x')) +
                      data("xxxxx");

  wire::ObjectListReply objects;
  objects.add_objects()->CopyFrom(info);
  objects.set_more(true);
  wire::StepListReply steps;
  steps.add_steps()->CopyFrom(step);
  wire::RunListReply runs;
  runs.add_runs("r");
  wire::BucketListReply buckets;
  buckets.add_buckets()->set_bucket("b");
  const auto lists = "\x02" + record(kReply, wire::encode(objects)) + record(kReply, wire::encode(steps)) +
                     record(kReply, wire::encode(runs)) + record(kReply, wire::encode(wire::RunActivityReply())) +
                     record(kReply, wire::encode(buckets)) + record(kReply, wire::encode(buckets.buckets(0))) +
                     record(kError, rpc::encode_error({.code = Errc::kConflict, .message = "changed"}, "")) +
                     record(kReply, wire::encode(step));
  return {
      object, opened, lists, "\x80" + record(kReply, map_bytes()) + object.substr(1),
      std::string(1, '\0') + record(kError, rpc::encode_error({.code = Errc::kStale, .message = "old"}, map_bytes()))};
}

const Register registered({.name = "client", .bytes_max = 4096, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
