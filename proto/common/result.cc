#include "proto/common/result.h"

namespace cairn {

std::string_view name_of(Errc code) {
  switch (code) {
    case Errc::kFailed:
      return "failed";
    case Errc::kInvalid:
      return "invalid";
    case Errc::kNotFound:
      return "not found";
    case Errc::kExists:
      return "exists";
    case Errc::kConflict:
      return "conflict";
    case Errc::kFenced:
      return "fenced";
    case Errc::kDenied:
      return "denied";
    case Errc::kDataLoss:
      return "data loss";
    case Errc::kUnavailable:
      return "unavailable";
    case Errc::kDeadline:
      return "deadline exceeded";
    case Errc::kUnknown:
      return "outcome unknown";
    case Errc::kNoSpace:
      return "no space";
    case Errc::kStale:
      return "stale map";
    case Errc::kCancelled:
      return "cancelled";
    case Errc::kProtocol:
      return "protocol violation";
    case Errc::kAttemptFailed:
      return "attempt failed";
    case Errc::kBusy:
      return "busy";
    case Errc::kDeleted:
      return "deleted";
  }
  return "unlisted error";
}

int exit_code(Errc code) {
  switch (code) {
    case Errc::kInvalid:
      return 2;
    case Errc::kNotFound:
    case Errc::kDeleted:
      return 3;
    case Errc::kExists:
    case Errc::kConflict:
    case Errc::kFenced:
      return 4;
    case Errc::kDenied:
      return 5;
    case Errc::kDataLoss:
      return 6;
    case Errc::kUnavailable:
    case Errc::kDeadline:
    case Errc::kUnknown:
    case Errc::kStale:
    case Errc::kBusy:
      return 7;
    case Errc::kNoSpace:
      return 8;
    case Errc::kFailed:
    case Errc::kCancelled:
    case Errc::kProtocol:
    case Errc::kAttemptFailed:
      return 1;
  }
  return 1;
}

}  // namespace cairn
