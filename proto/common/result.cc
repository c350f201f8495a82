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

}  // namespace cairn
