#include "client/core/object_writer.h"

#include <algorithm>

#include "client/core/call.h"
#include "proto/common/units.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr rt::Duration kGiveUpMax = std::chrono::seconds(10);
constexpr std::uint64_t kListPieceBytes = 4 * kMiB;  // of equal size, so that they are one run

}  // namespace

ObjectWriter::ObjectWriter(std::shared_ptr<Session> session, Arena& arena, OwnerId owner, ChunkWriter::Options options,
                           ExtentList::Limits limits)
    : session_(session),
      arena_(arena),
      options_(options),
      writer_(session, arena, owner, options),
      owner_(owner),
      list_(owner, limits),
      turn_(session->runtime().loop, 1) {}

std::string ObjectWriter::what() const {
  return "put cairn://" + bucket_ + "/" + key_;
}

Task<std::shared_ptr<ObjectWriter>> ObjectWriter::begin(std::shared_ptr<Session> session, Arena& arena,
                                                        std::string bucket, std::string key, PutTerms terms,
                                                        ChunkWriter::Options options, ExtentList::Limits limits) {
  CO_CHECK_OK(check_bucket_name(bucket));
  CO_CHECK_OK(check_free_name("object", key));
  wire::ObjectBegin begin;
  begin.set_bucket(bucket);
  begin.set_key(key);
  begin.set_if_absent(terms.if_absent);
  if (terms.if_version) begin.set_if_owner(std::string(terms.if_version->view()));
  begin.set_declared_bytes(terms.size_bytes.value_or(0));
  CO_TRY(const auto reply, co_await call<wire::ObjectBeginReply>(
                               session, wire::Method::kObjectBegin, home_group_of(bucket, key), std::move(begin),
                               "put cairn://" + bucket + "/" + key, session->runtime().loop.now() + options.timeout));
  CO_TRY(auto owner, OwnerId::from_bytes(reply.owner()));
  options.groups = groups_in(reply);
  auto self = std::shared_ptr<ObjectWriter>(new ObjectWriter(session, arena, owner, options, limits));
  self->bucket_ = std::move(bucket);
  self->key_ = std::move(key);
  self->terms_ = terms;
  if (terms.size_bytes) self->writer_.expect(*terms.size_bytes);
  co_return self;
}

Task<void> ObjectWriter::write(std::span<const std::byte> bytes) {
  CO_TRY(const auto turn, co_await turn_.acquire(1));
  if (terms_.size_bytes && bytes.size() > *terms_.size_bytes - size_)
    co_return fail(Errc::kInvalid,
                   what() + ": more than the " + std::to_string(*terms_.size_bytes) + " bytes that were announced");
  auto added = co_await add(bytes);
  if (!added) co_return fail(std::move(added).error().with(what()));
  co_return {};
}

Task<void> ObjectWriter::add(std::span<const std::byte> bytes) {
  CO_TRY(const auto appended, co_await writer_.append(bytes, ChunkWriter::Align::kNone, crc_));
  for (const auto& extent : appended.extents) list_.add(extent);
  crc_ = appended.crc;
  size_ += bytes.size();
  co_return co_await store_list(false);
}

Task<void> ObjectWriter::store_list(bool all) {
  auto& ready = list_.ready();
  const auto piece = std::min<std::uint64_t>(kListPieceBytes, arena_.chunk_bytes());
  if (ready.size() < piece && !(all && !ready.empty())) co_return {};
  // Memory is waited for below, so none may be held here (see Arena).
  CO_CHECK_OK(co_await writer_.cut());
  if (!list_writer_) list_writer_ = std::make_unique<ChunkWriter>(session_, arena_, owner_, options_);
  while (ready.size() >= piece || (all && !ready.empty())) {
    const auto size = std::min<std::uint64_t>(ready.size(), piece);
    list_writer_->expect(size);
    CO_TRY(const auto appended,
           co_await list_writer_->append(bytes_of(std::string_view(ready).substr(0, size)), ChunkWriter::Align::kNone));
    CO_CHECK_OK(co_await list_writer_->cut());
    list_extents_.insert(list_extents_.end(), appended.extents.begin(), appended.extents.end());
    ready.erase(0, size);
  }
  co_return {};
}

Task<void> ObjectWriter::flush() {
  CO_TRY(const auto turn, co_await turn_.acquire(1));
  auto drained = co_await writer_.drain();
  if (!drained) co_return fail(std::move(drained).error().with(what()));
  co_return {};
}

Task<ObjectSummary> ObjectWriter::seal() {
  CO_TRY(const auto turn, co_await turn_.acquire(1));
  if (terms_.size_bytes && size_ != *terms_.size_bytes)
    co_return fail(Errc::kInvalid, what() + ": " + std::to_string(size_) + " bytes written of the " +
                                       std::to_string(*terms_.size_bytes) + " that were announced");
  auto sealed = co_await send_seal();
  if (!sealed) co_return fail(std::move(sealed).error().with(what()));
  co_return *std::move(sealed);
}

Task<ObjectSummary> ObjectWriter::send_seal() {
  CO_CHECK_OK(co_await writer_.drain());
  std::vector<std::uint64_t> writers{writer_.writer()};
  if (list_.finish()) {
    CO_CHECK_OK(co_await store_list(true));
    CO_CHECK_OK(co_await list_writer_->drain());
    writers.push_back(list_writer_->writer());
  }
  wire::ObjectSeal seal;
  seal.set_bucket(bucket_);
  seal.set_key(key_);
  seal.set_owner(std::string(owner_.view()));
  seal.set_if_absent(terms_.if_absent);
  if (terms_.if_version) seal.set_if_owner(std::string(terms_.if_version->view()));
  seal.set_size(size_);
  seal.set_crc32c(crc_);
  list_.fill(seal, list_extents_, writers);
  CO_TRY(const auto info,
         co_await call<wire::ObjectInfo>(session_, wire::Method::kObjectSeal, home_group_of(bucket_, key_),
                                         std::move(seal), "seal", session_->runtime().loop.now() + options_.timeout));
  sealed_ = true;
  co_return ObjectSummary{key_, size_, crc_, owner_, info.created_unix_nanos()};
}

Task<void> ObjectWriter::abort(rt::TimePoint deadline) {
  wire::ObjectAbort abort;
  abort.set_bucket(bucket_);
  abort.set_key(key_);
  abort.set_owner(std::string(owner_.view()));
  CO_CHECK_OK(co_await call<wire::Empty>(session_, wire::Method::kObjectAbort, home_group_of(bucket_, key_),
                                         std::move(abort), what() + ": give up", deadline));
  co_return {};
}

void ObjectWriter::give_up(std::shared_ptr<ObjectWriter> writer) {
  if (writer->sealed_) return;
  auto session = writer->session_;
  session->background().spawn([](std::shared_ptr<ObjectWriter> self) -> Task<void> {
    (void)co_await self->abort(self->session_->runtime().loop.now() + kGiveUpMax);
    co_return {};
  }(std::move(writer)));
}

}  // namespace cairn::client
