#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <memory>

#include "proto/wire/codec.h"
#include "proto/wire/records.pb.h"
#include "proto/wire/wire.pb.h"
#include "tests/fuzz/fuzz.h"

// Every message of the wire and every record, by number: those that are added later too.

namespace cairn::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

std::vector<const google::protobuf::Descriptor*> kinds() {
  std::vector<const google::protobuf::Descriptor*> out;
  for (const auto* file : {wire::Hello::descriptor()->file(), records::Bucket::descriptor()->file()})
    for (int i = 0; i < file->message_type_count(); ++i) out.push_back(file->message_type(i));
  return out;
}
std::unique_ptr<Message> make(const google::protobuf::Descriptor* kind) {
  return std::unique_ptr<Message>(google::protobuf::MessageFactory::generated_factory()->GetPrototype(kind)->New());
}

void one(std::string_view input) {
  static const auto all = kinds();
  Input in(input);
  const auto message = make(all[in.byte() % all.size()]);
  if (!wire::decode(in.rest(), *message, "message")) return;
  const auto encoded = wire::encode(*message);
  const std::unique_ptr<Message> again(message->New());
  must(wire::decode(encoded, *again, "message"), "what was decoded is encoded so that it decodes");
  must(wire::encode(*again) == encoded, "and is the same");
  if (const auto* key = dynamic_cast<const wire::ChunkKey*>(message.get())) {
    const auto id = wire::from_wire(*key);
    if (!id) return;
    wire::ChunkKey back;
    wire::to_wire(*id, back);
    must(back.owner() == key->owner() && back.writer() == key->writer() && back.index() == key->index(),
         "a chunk's id survives");
  }
}

/// Every field set to something.
void fill(Message& message, int depth) {
  const auto* reflection = message.GetReflection();
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const auto* field = message.GetDescriptor()->field(i);
    if (field->is_repeated()) {
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && depth > 0)
        fill(*reflection->AddMessage(&message, field), depth - 1);
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_UINT32) reflection->AddUInt32(&message, field, 7);
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) reflection->AddString(&message, field, "name");
      continue;
    }
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_MESSAGE:
        if (depth > 0) fill(*reflection->MutableMessage(&message, field), depth - 1);
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        reflection->SetString(&message, field,
                              field->type() == FieldDescriptor::TYPE_BYTES ? std::string(16, 'o') : "name");
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        reflection->SetUInt32(&message, field, 5);
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        reflection->SetUInt64(&message, field, 1'000'000);
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection->SetBool(&message, field, true);
        break;
      default:
        break;
    }
  }
}

std::vector<std::string> seeds() {
  std::vector<std::string> out;
  for (const auto* kind : kinds()) {
    const auto message = make(kind);
    fill(*message, 2);
    out.push_back(std::string(1, static_cast<char>(out.size())) + wire::encode(*message));
  }
  return out;
}

const Register registered({.name = "messages", .bytes_max = 1024, .one = one, .seeds = seeds});

}  // namespace
}  // namespace cairn::fuzz
