#pragma once

#include <cassert>
#include <concepts>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <version>
#if defined(__cpp_lib_expected)
#include <expected>
#endif

namespace cairn {

/// What went wrong, for programs. Add a code only where some caller would act differently on it.
/// The numbers are on the wire: never renumber.
enum class Errc : int {
  kFailed = 1,          // anything without a better name
  kInvalid = 2,         // the request can never succeed as it is
  kNotFound = 3,        //
  kExists = 4,          // already there
  kConflict = 5,        // another writer was first, or different bytes under one id
  kFenced = 6,          // a newer launch opened the run
  kDenied = 7,          //
  kDataLoss = 8,        // bytes do not match their checksum, or are gone
  kUnavailable = 9,     // not now; trying again may help
  kDeadline = 10,       // the caller's time ran out
  kUnknown = 11,        // may or may not have happened: ask with status()
  kNoSpace = 12,        // disk full or quota
  kStale = 13,          // the request names an old group epoch; the newer map is needed
  kCancelled = 14,      // the caller gave up
  kProtocol = 15,       // the peer broke the wire rules; the connection is closed
  kAttemptFailed = 16,  // the save attempt failed for all ranks; the message names the rank
  kBusy = 17,           // a bounded resource is full and the caller asked not to wait
  kDeleted = 18,        // what was being read has been deleted
};

std::string_view name_of(Errc code);

/// What a program ends with: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 exists or conflict, 5 not allowed,
/// 6 corruption, 7 unavailable or timed out (trying again may help), 8 no space or quota.
int exit_code(Errc code);

/// The code is for programs, the message for people: what was tried, on what, why it failed.
struct Error {
  Errc code = Errc::kFailed;
  std::string message;

  /// The same error with what this layer knows in front: "restore step=7: open m.41: No such file".
  Error with(std::string_view context) && {
    message.insert(0, std::string(context) + ": ");
    return std::move(*this);
  }
};

/// An error on its way into a Result.
struct Failure {
  Error error;
};
inline Failure fail(Errc code, std::string message) {
  return {Error{code, std::move(message)}};
}
inline Failure fail(Error error) {
  return {std::move(error)};
}

/// A value or an Error, with the members of std::expected (which C++20 callers do not have).
template <class T = void>
class [[nodiscard]] Result {
 public:
  using value_type = T;
  using error_type = Error;

  Result()
    requires std::default_initializable<T>
  = default;
  template <class U = T>
    requires(std::convertible_to<U, T> && !std::same_as<std::remove_cvref_t<U>, Result> &&
             !std::same_as<std::remove_cvref_t<U>, Failure> && !std::same_as<std::remove_cvref_t<U>, Error>)
  Result(U&& value) : state_(std::in_place_index<0>, std::forward<U>(value)) {}          // NOLINT: implicit on purpose
  Result(Failure failure) : state_(std::in_place_index<1>, std::move(failure.error)) {}  // NOLINT
#if defined(__cpp_lib_expected)
  Result(std::unexpected<Error> failure) : state_(std::in_place_index<1>, std::move(failure).error()) {}  // NOLINT
#endif

  bool has_value() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(value()); }
  T* operator->() { return std::addressof(value()); }
  const T* operator->() const { return std::addressof(value()); }
  T& value() & {
    assert(has_value());
    return *std::get_if<0>(&state_);
  }
  const T& value() const& {
    assert(has_value());
    return *std::get_if<0>(&state_);
  }
  T&& value() && { return std::move(value()); }
  template <class U>
  T value_or(U&& other) && {
    return has_value() ? std::move(value()) : static_cast<T>(std::forward<U>(other));
  }
  template <class U>
  T value_or(U&& other) const& {
    return has_value() ? value() : static_cast<T>(std::forward<U>(other));
  }
  Error& error() & {
    assert(!has_value());
    return *std::get_if<1>(&state_);
  }
  const Error& error() const& {
    assert(!has_value());
    return *std::get_if<1>(&state_);
  }
  Error&& error() && { return std::move(error()); }

 private:
  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;
  using error_type = Error;

  Result() = default;
  Result(Failure failure) : error_(std::move(failure.error)) {}  // NOLINT: implicit on purpose
#if defined(__cpp_lib_expected)
  Result(std::unexpected<Error> failure) : error_(std::move(failure).error()) {}  // NOLINT
#endif

  bool has_value() const noexcept { return !error_.has_value(); }
  explicit operator bool() const noexcept { return has_value(); }
  void operator*() const { assert(has_value()); }
  void value() const { assert(has_value()); }
  Error& error() & {
    assert(error_);
    return *error_;
  }
  const Error& error() const& {
    assert(error_);
    return *error_;
  }
  Error&& error() && { return std::move(error()); }

 private:
  std::optional<Error> error_;
};

}  // namespace cairn
