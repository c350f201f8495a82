#pragma once

#include <memory>
#include <string>

#include "client/core/session.h"
#include "proto/wire/codec.h"

// For sources that include the messages.

namespace cairn::client {

/// A call about records of `group`. Errors get `what` in front.
template <class Reply, class Request>
Task<Reply> call(std::shared_ptr<Session> session, wire::Method method, HomeGroup group, Request request,
                 std::string what, rt::TimePoint deadline) {
  auto sent = co_await session->record_call(method, group, wire::encode(request), deadline);
  if (!sent) co_return fail(std::move(sent).error().with(what));
  Reply reply;
  CO_CHECK_OK(wire::decode(sent->message, reply, wire::name_of(method)));
  co_return std::move(reply);
}

}  // namespace cairn::client
