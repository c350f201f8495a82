#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/cli/context.h"

/// One function per command; main.cc reads the command line and calls them. Arguments as in `cairn COMMAND --help`.
namespace cairn::cli {

struct BucketCreate {
  std::string bucket;
  std::uint32_t copies = 1;
  std::string quota;
  std::uint32_t keep_last = 0;
  std::uint64_t keep_every = 0;
  std::uint32_t keep_days = 0;
};
Result<void> bucket_create(Context& context, const BucketCreate& args);
struct BucketSet {
  std::string bucket;
  BucketChange change;  // but for the quota
  std::string quota;    // "none" or a size
};
Result<void> bucket_set(Context& context, const BucketSet& args);
Result<void> bucket_list(Context& context);
Result<void> bucket_show(Context& context, const std::string& bucket);
Result<void> bucket_remove(Context& context, const std::string& bucket);

struct Put {
  std::string file;  // or "-"
  std::string url;
  bool if_absent = false;
  std::string if_version;
};
Result<void> put(Context& context, const Put& args);
struct Get {
  std::string url;
  std::string file;  // or "-"
  std::string range;
};
Result<void> get(Context& context, const Get& args);
struct List {
  std::string url;
  std::string delimiter, after;
};
Result<void> list(Context& context, const List& args);
Result<void> stat(Context& context, const std::string& url);
struct Remove {
  std::string url;
  std::string if_version;
};
Result<void> remove(Context& context, const Remove& args);

struct CkptSave {
  std::string run;
  std::uint64_t step = 0;
  std::vector<std::string> paths;
  bool overwrite = false;
  bool force = false;
  std::string launch;  // JOB or JOB:RESTART; empty: one of its own
};
Result<void> ckpt_save(Context& context, const CkptSave& args);
struct CkptRestore {
  std::string run;
  std::optional<std::uint64_t> step;
  std::string folder;
  std::vector<std::string> globs;
};
Result<void> ckpt_restore(Context& context, const CkptRestore& args);
Result<void> ckpt_list(Context& context, const std::string& bucket_or_run);
struct CkptStep {
  std::string run;
  std::optional<std::uint64_t> step;
};
Result<void> ckpt_show(Context& context, const CkptStep& args);
Result<void> ckpt_verify(Context& context, const CkptStep& args);
struct CkptPin {
  std::string run;
  std::uint64_t step = 0;
};
Result<void> ckpt_pin(Context& context, const CkptPin& args);
Result<void> ckpt_unpin(Context& context, const CkptPin& args);
struct CkptRemove {
  std::string run;
  std::optional<std::uint64_t> step, after;
};
Result<void> ckpt_remove(Context& context, const CkptRemove& args);

struct Verify {
  std::vector<std::string> targets;  // ids or directories; none: all
  std::string pace;                  // bytes a second of each; "none", "configured"; empty: none
};
/// errors: kDataLoss  damage is left
Result<void> verify(Context& context, const Verify& args);
Result<void> job_list(Context& context);
Result<void> job_show(Context& context, const std::string& id);
Result<void> job_control(Context& context, const std::string& id, JobAction action);

}  // namespace cairn::cli
