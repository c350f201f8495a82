#pragma once

#include <string>

namespace cairn::wire {
class Launch;
}
namespace cairn::records {
class Run;
}

namespace cairn::server {

enum class Verdict {
  kCurrent,  // the launch that has the run
  kNew,      // it takes the run over and fences the one that has it
  kFenced,   // a past launch
};

/// May `launch` open a run with this record?
/// - Within one job a lower restart count than one seen is past.
/// - Across jobs a launch is past when its job had the run before with this restart count or a higher one.
/// source: protocol.md 4
Verdict judge(const records::Run& run, const wire::Launch& launch);

/// The record after `launch` has taken the run over: the launch before is remembered by its job's highest restart
/// count. At most 256 jobs are, the latest ones.
void take_over(records::Run& run, const wire::Launch& launch);

std::string text(const wire::Launch& launch);  // "job-7/3"
bool same(const wire::Launch& a, const wire::Launch& b);

}  // namespace cairn::server
