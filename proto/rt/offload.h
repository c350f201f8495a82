#pragma once

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"

namespace cairn::rt {

/// Runs `work`, which returns a Result<T>, away from the loop and yields what it returned.
/// A dropped Task does not stop work that was submitted; what `work` holds is released on the loop afterwards.
template <class Work>
auto away(Loop& loop, Offload& offload, Work work) -> Task<typename std::invoke_result_t<Work&>::value_type> {
  using Outcome = std::invoke_result_t<Work&>;
  struct State {
    Work work;
    std::optional<Outcome> outcome;
  };
  auto state = std::make_shared<State>(State{std::move(work), {}});
  OneShot<bool> finished(loop);
  offload.submit([state] { state->outcome.emplace(state->work()); },
                 [state, setter = finished.setter()] { setter.set(true); });
  co_await finished;
  co_return *std::move(state->outcome);
}

}  // namespace cairn::rt
