#include "tests/sim/hostile.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <array>
#include <functional>
#include <utility>

#include "proto/common/checksum.h"
#include "proto/rpc/frame_reader.h"
#include "proto/rpc/hello.h"
#include "proto/wire/codec.h"
#include "proto/wire/frame.h"
#include "proto/wire/wire.pb.h"
#include "server/records/keys.h"

namespace cairn::sim {
namespace {

using wire::FrameHeader;
using wire::FrameKind;
using wire::Method;

struct Request {
  Method method;
  const google::protobuf::Message& prototype;
};
const std::vector<Request>& requests() {
  static const std::vector<Request> all = {
      {Method::kMap, wire::MapRequest::default_instance()},
      {Method::kPutChunk, wire::PutChunk::default_instance()},
      {Method::kReadRanges, wire::ReadRanges::default_instance()},
      {Method::kBucketCreate, wire::BucketCreate::default_instance()},
      {Method::kBucketShow, wire::BucketShow::default_instance()},
      {Method::kBucketList, wire::BucketList::default_instance()},
      {Method::kBucketRemove, wire::BucketRemove::default_instance()},
      {Method::kObjectBegin, wire::ObjectBegin::default_instance()},
      {Method::kObjectSeal, wire::ObjectSeal::default_instance()},
      {Method::kObjectStat, wire::ObjectStat::default_instance()},
      {Method::kObjectList, wire::ObjectList::default_instance()},
      {Method::kObjectRemove, wire::ObjectRemove::default_instance()},
      {Method::kOpenRun, wire::OpenRun::default_instance()},
      {Method::kBegin, wire::Begin::default_instance()},
      {Method::kSeal, wire::Seal::default_instance()},
      {Method::kCommit, wire::Commit::default_instance()},
      {Method::kAbort, wire::Abort::default_instance()},
      {Method::kHeartbeat, wire::Heartbeat::default_instance()},
      {Method::kAttemptStatus, wire::AttemptStatus::default_instance()},
      {Method::kStepOpen, wire::StepOpen::default_instance()},
      {Method::kStepList, wire::StepList::default_instance()},
      {Method::kStepRemove, wire::StepRemove::default_instance()},
      {Method::kRunList, wire::RunList::default_instance()},
      {Method::kRunActivity, wire::RunActivity::default_instance()},
  };
  return all;
}

class Peer {
 public:
  Peer(Node& node, Prng& draw) : node_(node), draw_(draw) {}

  Task<void> visit(std::string address) {
    CO_TRY(stream_, co_await node_.runtime().net.dial(std::move(address)));
    rpc::FrameReader reader(node_, *stream_);
    rpc::Channel::Options options;
    options.client_name = text();
    CO_CHECK_OK(co_await send({.kind = FrameKind::kHello}, rpc::encode_hello(options), 0));
    CO_CHECK_OK(co_await read(reader, FrameKind::kHelloReply));
    CO_CHECK_OK(co_await send({.kind = FrameKind::kRequest, .method = 1, .call_id = 1}, "", 0));
    CO_TRY(const auto map, co_await read(reader, FrameKind::kReply));
    CO_CHECK_OK(wire::decode(map, map_, "map"));
    call_ = 1;
    rt::Scope reading(node_);
    if (draw_.chance(0.7)) reading.spawn(drain(&reader));
    for (auto left = draw_.between(1, 60); left > 0; --left) {
      CO_CHECK_OK(co_await send_something());
      if (draw_.chance(0.3))
        co_await node_.sleep(draw_.between(rt::Duration(0), rt::Duration(std::chrono::milliseconds(50))));
    }
    if (draw_.chance(0.3)) co_await node_.sleep(draw_.between(rt::Duration(0), rt::Duration(std::chrono::seconds(40))));
    co_return {};
  }

 private:
  Task<void> drain(rpc::FrameReader* reader) {
    for (;;) {
      CO_TRY(const auto header, co_await reader->header());
      CO_CHECK_OK(co_await reader->message(header));
      CO_CHECK_OK(co_await reader->skip_payload());
    }
  }
  Task<std::string> read(rpc::FrameReader& reader, FrameKind wanted) {
    CO_TRY(const auto header, co_await reader.header());
    CO_TRY(auto message, co_await reader.message(header));
    CO_CHECK_OK(co_await reader.skip_payload());
    if (header.kind != wanted) co_return fail(Errc::kProtocol, "another frame came");
    co_return message;
  }
  Task<void> send(FrameHeader header, std::string message, std::size_t payload_bytes) {
    header.message_bytes = static_cast<std::uint32_t>(message.size());
    header.payload_bytes = static_cast<std::uint32_t>(payload_bytes);
    header.message_crc = crc32c(message);
    const auto encoded = header.encode();
    const std::string payload(payload_bytes, 'h');
    co_return co_await stream_->write_all({encoded, bytes_of(message), bytes_of(payload)});
  }

  Task<void> send_something() {
    const auto kind = draw_.below(10);
    if (kind < 6) {
      const auto& request = requests()[draw_.below(requests().size())];
      auto message = request_of(request);
      if (draw_.chance(0.1) && !message.empty()) message[draw_.below(message.size())] ^= 1;
      co_return co_await send({.kind = FrameKind::kRequest,
                               .method = static_cast<std::uint16_t>(draw_.chance(0.95) ? request.method : Method(99)),
                               .call_id = ++call_},
                              std::move(message), 0);
    }
    const auto id = 1 + draw_.below(call_);
    if (kind < 8) {
      wire::DataHeader header;
      fill(header, 2);
      co_return co_await send({.kind = FrameKind::kData, .call_id = id}, wire::encode(header), draw_.below(70'000));
    }
    if (kind == 8) co_return co_await send({.kind = FrameKind::kCancel, .call_id = id}, "", 0);
    co_return co_await send({.kind = FrameKind::kPing}, "", 0);
  }

  /// Drawn fields; then, mostly, a stamp that is accepted, so that the service behind it has to judge the rest.
  std::string request_of(const Request& request) {
    const std::unique_ptr<google::protobuf::Message> message(request.prototype.New());
    fill(*message, 3);
    const auto* fields = message->GetDescriptor();
    const auto* stamp = fields->FindFieldByName("stamp");
    if (stamp == nullptr || draw_.chance(0.05)) return wire::encode(*message);
    const auto* reflection = message->GetReflection();
    const auto value_of = [&](const char* name) {
      const auto* field = fields->FindFieldByName(name);
      return field == nullptr ? std::string() : reflection->GetString(*message, field);
    };
    const bool home = stamp->number() == 15;
    std::uint32_t group = 0;
    if (home && fields->FindFieldByName("key") != nullptr)
      group = server::home_group(value_of("bucket"), value_of("key"));
    else if (home && fields->FindFieldByName("run") != nullptr)
      group = server::home_group(value_of("bucket"), value_of("run"));
    else if (home)
      group = server::bucket_group(value_of("bucket"));
    auto& to = static_cast<wire::Stamp&>(*reflection->MutableMessage(message.get(), stamp));
    for (const auto& range : map_.groups()) {
      if (range.home() != home || (home && (group < range.first() || group - range.first() >= range.count()))) continue;
      to.set_group(home ? group : range.first());
      to.set_generation(range.generation());
      to.set_epoch(range.epoch());
    }
    return wire::encode(*message);
  }

  void fill(google::protobuf::Message& message, int depth) {
    using Field = google::protobuf::FieldDescriptor;
    const auto* reflection = message.GetReflection();
    const auto* fields = message.GetDescriptor();
    for (int i = 0; i < fields->field_count(); ++i) {
      const auto* field = fields->field(i);
      const auto times = field->is_repeated() ? draw_.below(4) : (draw_.chance(0.8) ? 1u : 0u);
      for (std::uint64_t k = 0; k < times; ++k) {
        const bool many = field->is_repeated();
        switch (field->cpp_type()) {
          case Field::CPPTYPE_MESSAGE:
            if (depth > 0)
              fill(many ? *reflection->AddMessage(&message, field) : *reflection->MutableMessage(&message, field),
                   depth - 1);
            break;
          case Field::CPPTYPE_STRING: {
            auto value = field->type() == Field::TYPE_BYTES ? bytes() : text();
            many ? reflection->AddString(&message, field, value) : reflection->SetString(&message, field, value);
            break;
          }
          case Field::CPPTYPE_BOOL:
            many ? reflection->AddBool(&message, field, draw_.chance(0.5))
                 : reflection->SetBool(&message, field, draw_.chance(0.5));
            break;
          case Field::CPPTYPE_UINT32: {
            const auto value = static_cast<std::uint32_t>(number());
            many ? reflection->AddUInt32(&message, field, value) : reflection->SetUInt32(&message, field, value);
            break;
          }
          case Field::CPPTYPE_INT32: {
            const auto value = static_cast<std::int32_t>(number());
            many ? reflection->AddInt32(&message, field, value) : reflection->SetInt32(&message, field, value);
            break;
          }
          case Field::CPPTYPE_UINT64:
            many ? reflection->AddUInt64(&message, field, number()) : reflection->SetUInt64(&message, field, number());
            break;
          case Field::CPPTYPE_INT64: {
            const auto value = static_cast<std::int64_t>(number());
            many ? reflection->AddInt64(&message, field, value) : reflection->SetInt64(&message, field, value);
            break;
          }
          default:
            break;
        }
      }
    }
  }
  std::uint64_t number() {
    static constexpr std::array<std::uint64_t, 12> kEdges = {
        0, 1, 2, 3, 4096, 65'536, 1 << 20, (1 << 20) + 1, 0x7fff'ffff, 0xffff'ffff, 0x7fff'ffff'ffff'ffff, ~0ull};
    return draw_.chance(0.7) ? kEdges[draw_.below(kEdges.size())] : draw_.next();
  }
  /// Names of its own, right and wrong.
  std::string text() {
    static constexpr std::array<std::string_view, 6> kNames = {"hostile0",      "hostile1",  "",
                                                               "../etc/passwd", "\x1b[2J\n", "\xe2\x80\xae"};
    return draw_.chance(0.9) ? std::string(kNames[draw_.below(draw_.chance(0.6) ? 2 : kNames.size())])
                             : std::string(draw_.below(2000), 'x');
  }
  std::string bytes() {
    std::string out(draw_.chance(0.8) ? 16 : draw_.below(100), '\0');
    for (auto& c : out) c = static_cast<char>(draw_.next());
    return out;
  }

  Node& node_;
  Prng& draw_;
  std::unique_ptr<rt::Stream> stream_;
  wire::Map map_;
  std::uint64_t call_ = 0;
};

}  // namespace

Task<void> hostile_peer(Node* node, std::string address, Prng draw) {
  for (;;) {
    Peer peer(*node, draw);
    (void)co_await peer.visit(address);
    co_await node->sleep(
        draw.between(rt::Duration(std::chrono::milliseconds(20)), rt::Duration(std::chrono::seconds(2))));
  }
}

}  // namespace cairn::sim
