#pragma once

#include "cairn/client.h"
#include "client/api/loop_thread.h"
#include "client/core/objects.h"
#include "client/core/save.h"
#include "client/core/step_reader.h"

// What the public handles point to. Each keeps the client alive and sends what belongs to the loop home when dropped.

namespace cairn {

struct RunImpl {
  std::shared_ptr<ClientImpl> client;
  client::OpenedRun opened;
  std::string name;
};

struct SaveImpl {
  std::shared_ptr<ClientImpl> client;
  std::shared_ptr<client::SaveAttempt> attempt;
  std::uint32_t rank = 0;
  ~SaveImpl() { client->release(std::move(attempt)); }
};

struct TicketImpl {
  std::shared_ptr<SaveImpl> save;
  bool survives = false;
};

struct StepImpl {
  std::shared_ptr<ClientImpl> client;
  std::shared_ptr<client::StepReader> reader;
  StepInfo info;
  ~StepImpl() { client->release(std::move(reader)); }
};

struct RestoreImpl {
  std::shared_ptr<StepImpl> step;
  std::vector<client::StepReader::Wanted> wanted;
  std::vector<std::span<std::byte>> out;
};

format::DType to_core(DType dtype);
DType from_core(format::DType dtype);
StepInfo from_core(const client::StepSummary& summary);
ObjectInfo from_core(const client::ObjectSummary& summary);
/// Ids as they are printed. errors: kInvalid  with `what` it should be
Result<OwnerId> owner_of_text(std::string_view what, const std::string& text);
/// "BUCKET/RUN" -> both. errors: kInvalid
Result<std::pair<std::string, std::string>> split_run(const std::string& name);
/// Empty job: from the environment. errors: kInvalid  nowhere to be found
Result<client::Launch> resolve_launch(const LaunchId& launch);
Result<std::shared_ptr<StepImpl>> wrap(std::shared_ptr<ClientImpl> client,
                                       Result<std::shared_ptr<client::StepReader>> reader);

/// Future<A> -> Future<B> by `convert`, on the client's thread.
template <class B, class A, class F>
Future<B> convert(Future<A> from, F convert) {
  auto state = std::make_shared<typename Future<B>::State>();
  state->on_cancel([from]() mutable { from.cancel(); });
  from.then([state, convert = std::move(convert)](Result<A> result) mutable {
    if (!result)
      state->set(fail(std::move(result).error()));
    else
      state->set(convert(std::move(*result)));
  });
  return Future<B>(std::move(state));
}

}  // namespace cairn
