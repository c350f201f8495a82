#pragma once

// For callers that use Asio: co_await cairn::async(future, asio::use_awaitable) on their own executor.
// Needs Asio 1.22 or newer; nothing else in the library's headers does.

#include <asio/associated_executor.hpp>
#include <asio/async_result.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/post.hpp>
#include <memory>
#include <utility>

#include "cairn/future.h"

namespace cairn {

/// Completes `token` with the future's Result<T>, on the token's associated executor.
template <class T, class Token>
auto async(Future<T> future, Token&& token) {
  return asio::async_initiate<Token, void(Result<T>)>(
      [](auto handler, Future<T> waiting) {
        auto executor = asio::get_associated_executor(handler);
        auto work = asio::make_work_guard(executor);
        auto shared = std::make_shared<decltype(handler)>(std::move(handler));
        waiting.then([shared, executor, work](Result<T> result) mutable {
          auto moved = std::make_shared<Result<T>>(std::move(result));
          asio::post(executor, [shared, moved]() mutable { (*shared)(std::move(*moved)); });
          work.reset();
        });
      },
      token, std::move(future));
}

}  // namespace cairn
