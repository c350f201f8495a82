#pragma once

#include <expected>
#include <string>
#include <string_view>
#include <utility>

namespace cairn {

/// What went wrong, for programs. Add a code only where some caller would act differently on it.
/// The numbers are on the wire: never renumber. Exit codes of the command line: interfaces of `cairn`, exit_code().
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

struct Error {
  Errc code = Errc::kFailed;
  std::string message;

  /// The same error with what this layer knows in front: "restore step=7: open m.41: No such file".
  Error with(std::string_view context) && {
    message.insert(0, std::string(context) + ": ");
    return std::move(*this);
  }
};

template <class T>
using Result = std::expected<T, Error>;

inline std::unexpected<Error> fail(Errc code, std::string message) {
  return std::unexpected(Error{code, std::move(message)});
}

#define CAIRN_CONCAT_(a, b) a##b
#define CAIRN_CONCAT(a, b) CAIRN_CONCAT_(a, b)
#define CAIRN_TRY_(tmp, ret, decl, expr)                     \
  auto tmp = (expr);                                         \
  if (!tmp) ret ::std::unexpected(::std::move(tmp).error()); \
  decl = *::std::move(tmp)
#define CAIRN_CHECK_(tmp, ret, expr) \
  if (auto tmp = (expr); !tmp) ret ::std::unexpected(::std::move(tmp).error())

/// TRY(auto x, f()): x is the value, or this function returns the error. CHECK_OK(f()): the same without a value.
/// CO_ the same inside a coroutine.
#define TRY(decl, expr) CAIRN_TRY_(CAIRN_CONCAT(try_, __LINE__), return, decl, expr)
#define CO_TRY(decl, expr) CAIRN_TRY_(CAIRN_CONCAT(try_, __LINE__), co_return, decl, expr)
#define CHECK_OK(expr) CAIRN_CHECK_(CAIRN_CONCAT(try_, __LINE__), return, expr)
#define CO_CHECK_OK(expr) CAIRN_CHECK_(CAIRN_CONCAT(try_, __LINE__), co_return, expr)

}  // namespace cairn
