#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <array>

#include "proto/common/checksum.h"
#include "proto/wire/codec.h"
#include "server/records/keys.h"
#include "storage/chunk_store/chunk_store.h"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/sample.h"

// Requests of every method to a whole daemon, with its data. What no mutation could guess is put right: the stamp, and
// ids of uploads, of which a request says the number.

namespace cairn::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using wire::FrameKind;
using wire::Method;

struct Kind {
  Method method;
  const Message* request;
};

/// All methods that this program knows, with their requests: MapRequest, else named as the method is.
const std::vector<Kind>& kinds() {
  static const auto all = [] {
    std::vector<Kind> out;
    const auto* file = wire::Hello::descriptor()->file();
    for (std::uint16_t number = 1; number < 256; ++number) {
      const auto method = static_cast<Method>(number);
      const auto name = wire::name_of(method);
      if (name == "unknown") continue;
      std::string camel;
      for (std::size_t i = 0; i < name.size(); ++i)
        if (name[i] != '_') camel += i == 0 || name[i - 1] == '_' ? static_cast<char>(name[i] - 'a' + 'A') : name[i];
      const auto* kind = file->FindMessageTypeByName(method == Method::kMap ? "MapRequest" : camel);
      must(kind != nullptr, "every method has a request: " + camel);
      out.push_back({method, google::protobuf::MessageFactory::generated_factory()->GetPrototype(kind)});
    }
    return out;
  }();
  return all;
}
std::size_t number_of(Method method) {
  return static_cast<std::size_t>(std::ranges::find(kinds(), method, &Kind::method) - kinds().begin());
}

class Peer {
 public:
  Peer() {
    served_.connect();
    served_.greet();
  }

  /// flags: 1 the stamp stays as it is; 2 CRCs stay as they are; 4 the answer is not waited for; 8 no data follows.
  void call(const Kind& kind, std::uint8_t flags, std::string_view bytes, std::string_view data) {
    const std::unique_ptr<Message> request(kind.request->New());
    std::string message(bytes);
    if (request->ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
      mend(*request);
      if (kind.method == Method::kPutChunk && !(flags & 2)) mend_crcs(static_cast<wire::PutChunk&>(*request), data);
      if (kind.method == Method::kHandover && !(flags & 2)) mend_plan(static_cast<wire::Handover&>(*request));
      if (kind.method == Method::kSeal && !(flags & 2)) static_cast<wire::Seal&>(*request).set_digest(sha256(data_));
      if (!(flags & 1)) stamp(*request);
      message = wire::encode(*request);
    }
    const auto id = ++calls_;
    auto sent =
        frame({.kind = FrameKind::kRequest, .method = static_cast<std::uint16_t>(kind.method), .call_id = id}, message);
    if (kind.method == Method::kPutChunk && !(flags & 8)) {
      data_ = std::string(data);
      std::ranges::copy(bytes_of(data_), served_.memory->bytes().begin());
      sent += frame({.kind = FrameKind::kData, .call_id = id}, wire::encode(wire::DataHeader()), data);
    }
    served_.send(std::move(sent));
    if (flags & 4) return;
    const auto answer = served_.answer(id);
    if (answer && answer->kind == FrameKind::kReply) learn(kind.method, answer->message);
  }
  void wait(std::uint32_t millis) { served_.world.run_for(std::chrono::milliseconds(millis)); }
  void end() { served_.check(); }

 private:
  /// Ids of uploads of one byte stand for those that were handed out.
  void mend(Message& message) {
    const auto* reflection = message.GetReflection();
    std::vector<const FieldDescriptor*> fields;
    reflection->ListFields(message, &fields);
    for (const auto* field : fields) {
      const int count = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
      for (int i = 0; i < count; ++i) {
        if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
          mend(field->is_repeated() ? *reflection->MutableRepeatedMessage(&message, field, i)
                                    : *reflection->MutableMessage(&message, field));
        } else if (field->type() == FieldDescriptor::TYPE_BYTES && !owners_.empty()) {
          const auto value = field->is_repeated() ? reflection->GetRepeatedString(message, field, i)
                                                  : reflection->GetString(message, field);
          if (value.size() != 1) continue;
          const auto& owner = owners_[static_cast<std::uint8_t>(value[0]) % owners_.size()];
          if (field->is_repeated())
            reflection->SetRepeatedString(&message, field, i, owner);
          else
            reflection->SetString(&message, field, owner);
        }
      }
    }
  }

  static void mend_crcs(wire::PutChunk& put, std::string_view data) {
    const auto id = wire::from_wire(put.id());
    if (!id) return;
    put.set_length(static_cast<std::uint32_t>(data.size()));
    put.clear_block_crcs();
    std::vector<std::uint32_t> crcs;
    for (std::size_t at = 0; at < data.size(); at += kBlockBytes)
      crcs.push_back(
          crc32c(data.substr(at, kBlockBytes), block_seed(*id, static_cast<std::uint32_t>(at / kBlockBytes))));
    put.mutable_block_crcs()->Assign(crcs.begin(), crcs.end());
    put.set_digest(storage::chunk_digest(crcs));
  }

  /// The chunks that it names are what the memory holds where they are to lie; the manifest is the chunk put last.
  void mend_plan(wire::Handover& plan) {
    for (auto& put : *plan.mutable_chunks()) {
      const auto all = served_.memory->bytes();
      if (put.shared_size() == 1 && put.shared(0) < all.size())
        mend_crcs(put, text_of(all.subspan(put.shared(0), std::min(put.length(), 64U << 10))));
    }
    if (plan.has_seal()) plan.mutable_seal()->set_digest(sha256(data_));
  }

  void stamp(Message& message) const {
    const auto* kind = message.GetDescriptor();
    const auto* stamp = kind->FindFieldByName("stamp");
    if (stamp == nullptr) return;
    const auto* reflection = message.GetReflection();
    const auto text = [&](const char* name) {
      const auto* field = kind->FindFieldByName(name);
      return field == nullptr ? std::string() : reflection->GetString(message, field);
    };
    const bool home = stamp->number() == 15;
    std::uint32_t group = 1;
    if (home && kind->FindFieldByName("key") != nullptr)
      group = server::home_group(text("bucket"), text("key"));
    else if (home && kind->FindFieldByName("run") != nullptr)
      group = server::home_group(text("bucket"), text("run"));
    else if (home)
      group = server::bucket_group(text("bucket"));
    auto& to = static_cast<wire::Stamp&>(*reflection->MutableMessage(&message, stamp));
    for (const auto& range : served_.map().groups()) {
      if (range.home() != home || group < range.first() || group - range.first() >= range.count()) continue;
      to.set_group(group);
      to.set_generation(range.generation());
      to.set_epoch(range.epoch());
    }
  }

  void learn(Method method, const std::string& message) {
    const auto owner = [&](auto reply) {
      if (wire::decode(message, reply, "reply") && reply.owner().size() == 16) owners_.push_back(reply.owner());
    };
    if (method == Method::kObjectBegin) owner(wire::ObjectBeginReply());
    if (method == Method::kBegin) owner(wire::BeginReply());
  }

  Served served_;
  std::vector<std::string> owners_;
  std::string data_;  // of the chunk put last: what a seal names
  std::uint64_t calls_ = 1;
};

void one(std::string_view input) {
  Input in(input);
  Peer peer;
  // Each takes time; more of them find nothing that fewer do not.
  for (int left = 24; left > 0 && !in.empty(); --left) {
    const auto number = in.byte();
    if (number == 0xff) {
      peer.wait(in.number(2));
      continue;
    }
    const auto& kind = kinds()[number % kinds().size()];
    const auto flags = in.byte();
    const auto message = in.piece();
    peer.call(kind, flags, message, kind.method == Method::kPutChunk ? in.piece() : std::string_view());
  }
  peer.end();
}

std::string record(Method method, const Message& message, std::uint8_t flags = 0) {
  std::string out;
  out += static_cast<char>(number_of(method));
  out += static_cast<char>(flags);
  return out += piece_of(wire::encode(message));
}

template <class M>
M in_bucket() {
  M out;
  out.set_bucket("b");
  return out;
}
template <class M>
M of_object() {
  auto out = in_bucket<M>();
  out.set_key("k");
  return out;
}
template <class M>
M of_run() {
  auto out = in_bucket<M>();
  out.set_run("r");
  return out;
}

std::string put(std::uint64_t writer, std::uint32_t index, std::string_view data) {
  wire::PutChunk out;
  out.mutable_id()->set_owner(std::string(1, '\0'));
  out.mutable_id()->set_writer(writer);
  out.mutable_id()->set_index(index);
  return record(Method::kPutChunk, out) + piece_of(data);
}
void fill(wire::ExtentRun& run, std::uint64_t writer, std::uint32_t index, std::size_t bytes) {
  run.set_group(1);
  run.set_writer(writer);
  run.set_first_index(index);
  run.set_count(1);
  run.set_chunk_bytes(static_cast<std::uint32_t>(bytes));
  run.set_last_bytes(static_cast<std::uint32_t>(bytes));
}

std::string object() {
  const std::string data = "the bytes of an object";
  auto seal = of_object<wire::ObjectSeal>();
  seal.set_owner(std::string(1, '\0'));
  seal.set_size(data.size());
  seal.set_crc32c(crc32c(data));
  fill(*seal.add_runs(), 5, 0, data.size());
  auto read = wire::ReadRanges();
  auto& chunk = *read.add_chunks();
  chunk.mutable_id()->set_owner(std::string(1, '\0'));
  chunk.mutable_id()->set_writer(5);
  chunk.add_offsets(3);
  chunk.add_lengths(7);
  auto list = in_bucket<wire::ObjectList>();
  list.set_prefix("k");
  list.set_delimiter("/");
  list.set_limit(10);
  auto stat = of_object<wire::ObjectStat>();
  stat.set_reader(9);
  auto remove = of_object<wire::ObjectRemove>();
  remove.set_owner(std::string(1, '\0'));
  return record(Method::kObjectBegin, of_object<wire::ObjectBegin>()) + put(5, 0, data) +
         record(Method::kObjectSeal, seal) + record(Method::kObjectStat, stat) + record(Method::kReadRanges, read) +
         record(Method::kObjectList, list) + record(Method::kObjectRemove, remove);
}

std::string step(bool last) {
  auto launch = wire::Launch();
  launch.set_job("job");
  auto open = of_run<wire::OpenRun>();
  *open.mutable_launch() = launch;
  auto begin = of_run<wire::Begin>();
  *begin.mutable_launch() = launch;
  begin.mutable_run_epoch()->set_count(1);
  begin.set_step(7);
  begin.set_world_size(1);
  begin.set_explicit_commit(!last);
  // A manifest without chunks: the owner is not known before.
  auto contents = format::Contents();
  contents.tokens.push_back({.stream = "train", .bytes = "epoch 1", .rank = 0});
  const auto manifest = *format::encode(std::move(contents));
  auto seal = of_run<wire::Seal>();
  seal.set_owner(std::string(1, '\0'));
  seal.set_writer(1000);
  seal.set_manifest_bytes(manifest.size());
  fill(*seal.add_manifest(), 1000, 0, manifest.size());
  seal.add_groups(1);
  auto heartbeat = of_run<wire::Heartbeat>();
  heartbeat.set_owner(std::string(1, '\0'));
  auto status = of_run<wire::AttemptStatus>();
  status.set_owner(std::string(1, '\0'));
  auto commit = of_run<wire::Commit>();
  commit.set_owner(std::string(1, '\0'));
  auto opened = of_run<wire::StepOpen>();
  opened.set_reader(3);
  auto pin = of_run<wire::StepPin>();
  pin.set_step(7);
  pin.set_pinned(true);
  pin.set_owner(std::string(1, '\0'));
  auto remove = of_run<wire::StepRemove>();
  remove.mutable_step()->set_step(7);
  auto abort = of_run<wire::Abort>();
  abort.set_owner(std::string(1, '\0'));
  abort.set_reason("no more");
  auto out = record(Method::kOpenRun, open) + record(Method::kBegin, begin) + record(Method::kHeartbeat, heartbeat) +
             put(1000, 0, manifest) + record(Method::kSeal, seal) + record(Method::kAttemptStatus, status);
  if (last)
    out += record(Method::kStepOpen, opened) + record(Method::kStepPin, pin) + record(Method::kStepRemove, remove) +
           record(Method::kStepList, of_run<wire::StepList>()) + record(Method::kRunList, in_bucket<wire::RunList>());
  else
    out += record(Method::kRunActivity, of_run<wire::RunActivity>()) + record(Method::kCommit, commit) +
           record(Method::kAbort, abort);
  return out;
}

/// A save whose rank falls silent when it has handed over what is left.
std::string handed_over() {
  auto open = of_run<wire::OpenRun>();
  open.mutable_launch()->set_job("job");
  auto begin = of_run<wire::Begin>();
  *begin.mutable_launch() = open.launch();
  begin.mutable_run_epoch()->set_count(1);
  begin.set_step(7);
  begin.set_world_size(1);
  auto contents = format::Contents();
  contents.tokens.push_back({.stream = "train", .bytes = "epoch 1", .rank = 0});
  const auto manifest = *format::encode(std::move(contents));
  auto plan = of_run<wire::Handover>();
  plan.set_owner(std::string(1, '\0'));
  plan.set_writer(1000);
  for (std::uint32_t index = 0; index < 2; ++index) {
    auto& chunk = *plan.add_chunks();
    chunk.mutable_stamp()->set_group(1);
    chunk.mutable_id()->set_owner(std::string(1, '\0'));
    chunk.mutable_id()->set_writer(1000);
    chunk.mutable_id()->set_index(index);
    chunk.set_length(static_cast<std::uint32_t>(manifest.size()));
    chunk.add_shared(index * 64 * kKiB);
  }
  auto& seal = *plan.mutable_seal();
  seal.set_manifest_bytes(manifest.size());
  fill(*seal.add_manifest(), 1000, 0, manifest.size());
  seal.add_groups(1);
  auto status = of_run<wire::AttemptStatus>();
  status.set_owner(std::string(1, '\0'));
  auto first = plan;
  first.clear_seal();
  plan.clear_chunks();
  plan.set_part(1);
  // The first chunk is there already, by the rank itself.
  return record(Method::kOpenRun, open) + record(Method::kBegin, begin) + put(1000, 0, manifest) +
         record(Method::kHandover, first) + record(Method::kHandover, plan) + "\xff\x7f\x7f" +
         record(Method::kAttemptStatus, status);
}

std::vector<std::string> seeds() {
  auto create = in_bucket<wire::BucketCreate>();
  create.mutable_policy()->set_keep_last(2);
  create.mutable_policy()->set_quota_bytes(1 << 20);
  const auto made = record(Method::kBucketCreate, create);
  auto set = in_bucket<wire::BucketSet>();
  set.mutable_change()->set_keep_days(1);
  auto renew = wire::ReaderRenew();
  auto& reader = *renew.add_readers();
  reader.set_id(9);
  reader.set_owner(std::string(1, '\0'));
  return {made + object(),
          made + step(true),
          made + step(false),
          made + handed_over(),
          made + record(Method::kBucketShow, in_bucket<wire::BucketShow>()) + record(Method::kBucketSet, set) +
              record(Method::kBucketList, wire::BucketList()) +
              record(Method::kBucketRemove, in_bucket<wire::BucketRemove>()),
          record(Method::kMap, wire::MapRequest()) + record(Method::kReaderRenew, renew) + "\xff\x20\x20" +
              record(Method::kReadShared, wire::ReadShared())};
}

const Register registered({.name = "requests", .bytes_max = 2048, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
