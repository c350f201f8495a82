// The command line of Cairn: reads arguments, calls one function of commands.h, turns its outcome into an exit code.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "client/cli/commands.h"
#include "client/cli/output.h"

namespace {

using namespace cairn;
using namespace cairn::cli;

constexpr const char* kDefaultServer = "127.0.0.1:7420";

/// Digits alone: a conversion would take "-1" for a very large number.
std::string whole_number(const std::string& text) {
  std::uint64_t value = 0;
  const auto end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, value);
  return read.ec == std::errc() && read.ptr == end ? "" : fmt::format("'{}' is not a whole number", text);
}

/// One command line: fills `run` when a command was given.
class CommandLine {
 public:
  CommandLine() {
    app_.description("Checkpoints and objects on a Cairn store.");
    app_.set_help_flag("-h,--help", "Print this help and exit");
    app_.set_version_flag("--version", CAIRN_VERSION);
    app_.require_subcommand(1);
    app_.fallthrough();
    app_.add_option("--server", servers_, "HOST:PORT[,HOST:PORT...] or unix:PATH of the store")
        ->envname("CAIRN_SERVER")
        ->capture_default_str();
    app_.add_option("--transport", context.transport,
                    "tcp; unix: the daemon's socket where it is on this host; auto: its memory too")
        ->envname("CAIRN_TRANSPORT")
        ->check(CLI::IsMember({"auto", "tcp", "unix"}))
        ->capture_default_str();
    app_.add_flag("--json", context.json, "Print JSON: one document, or one line per item of a listing");
    app_.footer("Example: cairn bucket create models && cairn put README.md cairn://models/readme");
    bucket_commands();
    object_commands();
    checkpoint_commands();
    job_commands();
  }

  /// Nothing: run the command. Otherwise the exit code.
  std::optional<int> parse(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::Success& help) {
      return app_.exit(help);
    } catch (const CLI::ParseError& error) {
      return usage_error(error.what());
    }
    for (std::size_t start = 0; start <= servers_.size();) {
      const auto end = std::min(servers_.find(',', start), servers_.size());
      if (end > start) context.servers.push_back(servers_.substr(start, end - start));
      start = end + 1;
    }
    return std::nullopt;
  }

  Context context;
  std::string what;  // command and its subject, for messages
  std::function<Result<void>()> run;

 private:
  static CLI::App* command(CLI::App* parent, const char* name, const char* description, const char* example) {
    auto* app = parent->add_subcommand(name, description);
    app->footer(std::string("Example: ") + example);
    app->fallthrough();
    return app;
  }

  int usage_error(std::string_view why) const {
    std::string name = "cairn";
    const CLI::App* app = &app_;
    while (!app->get_subcommands().empty()) {
      app = app->get_subcommands().front();
      name += " " + app->get_name();
    }
    const auto rest = app_.remaining(true);  // a subcommand hands up what it does not know
    const bool unknown = app->get_require_subcommand_min() > 0 && !rest.empty();
    print_error(fmt::format("{}: {}; see {} --help", name,
                            unknown ? fmt::format("there is no command '{}'", rest.front()) : why, name));
    return 2;
  }

  template <class Function>
  void on(CLI::App* app, std::string name, const std::string& subject, Function function) {
    app->callback([this, name = std::move(name), &subject, function] {
      what = subject.empty() ? name : fmt::format("{} {}", name, subject);
      run = function;
    });
  }

  void bucket_commands() {
    auto* bucket = command(&app_, "bucket", "Create, change, list, show and remove buckets", "cairn bucket ls");
    bucket->require_subcommand(1);
    auto* create = command(bucket, "create", "Create a bucket", "cairn bucket create models --quota 2TiB");
    create->add_option("BUCKET", create_.bucket, "Letters, digits, '.', '_' and '-'")->required();
    create->add_option("--copies", create_.copies, "Copies of every byte")
        ->check(CLI::Range(1, 8))
        ->capture_default_str();
    create->add_option("--quota", create_.quota, "Most bytes it may hold, for example 500GiB");
    const auto keep = [](CLI::App* app, auto& last, auto& every, auto& days) {
      app->add_option("--keep-last", last, "Keep the highest K steps of each run")->type_name("K")->check(whole_number);
      app->add_option("--keep-every", every, "Keep steps divisible by N")->type_name("N")->check(whole_number);
      app->add_option("--keep-days", days, "Keep steps committed in the last D days")
          ->type_name("D")
          ->check(whole_number);
    };
    keep(create, create_.keep_last, create_.keep_every, create_.keep_days);
    on(create, "bucket create", create_.bucket, [this] { return bucket_create(context, create_); });
    auto* set = command(bucket, "set",
                        "Change the quota, or which steps are kept: those that one of the rules names; 0 ends a rule",
                        "cairn bucket set models --quota 2TiB --keep-last 5 --keep-every 1000");
    set->add_option("BUCKET", set_.bucket)->required();
    set->add_option("--quota", set_.quota, "Most bytes it may hold, or none");
    keep(set, set_.change.keep_last, set_.change.keep_every, set_.change.keep_days);
    on(set, "bucket set", set_.bucket, [this] { return bucket_set(context, set_); });
    auto* ls = command(bucket, "ls", "List buckets", "cairn bucket ls --json");
    on(ls, "bucket ls", nothing_, [this] { return bucket_list(context); });
    auto* show = command(bucket, "show", "Show one bucket", "cairn bucket show models");
    show->add_option("BUCKET", name_)->required();
    on(show, "bucket show", name_, [this] { return bucket_show(context, name_); });
    auto* rm = command(bucket, "rm", "Remove an empty bucket", "cairn bucket rm models");
    rm->add_option("BUCKET", name_)->required();
    on(rm, "bucket rm", name_, [this] { return bucket_remove(context, name_); });
  }

  void object_commands() {
    auto* put =
        command(&app_, "put", "Store a file or stdin as an object", "cairn put model.tar cairn://models/v1/model.tar");
    put->add_option("FILE", put_.file, "A file, or - for stdin")->required();
    put->add_option("URL", put_.url, "cairn://BUCKET/KEY")->required();
    put->add_flag("--if-absent", put_.if_absent, "Fail (exit 4) when the key is there");
    put->add_option("--if-version", put_.if_version, "Fail (exit 4) unless this version (see stat) is there")
        ->excludes("--if-absent");
    on(put, "put", put_.url, [this] { return cli::put(context, put_); });
    auto* get = command(&app_, "get", "Write an object to a file or stdout",
                        "cairn get cairn://models/v1/model.tar - --range 0-1024");
    get->add_option("URL", get_.url, "cairn://BUCKET/KEY")->required();
    get->add_option("FILE", get_.file, "A file, or - for stdout")->required();
    get->add_option("--range", get_.range,
                    "FIRST-LAST bytes, LAST not included; FIRST-: to the end; --range=-N: the last N");
    on(get, "get", get_.url, [this] { return cli::get(context, get_); });
    auto* ls = command(&app_, "ls", "List objects", "cairn ls cairn://models/v1/");
    ls->add_option("URL", list_.url, "cairn://BUCKET/PREFIX")->required();
    ls->add_option("--delimiter", list_.delimiter, "Fold keys that go on behind this text, for example /");
    ls->add_option("--after", list_.after, "Only keys greater than this");
    on(ls, "ls", list_.url, [this] { return cli::list(context, list_); });
    auto* stat = command(&app_, "stat", "Show an object", "cairn stat cairn://models/v1/model.tar --json");
    stat->add_option("URL", name_, "cairn://BUCKET/KEY")->required();
    on(stat, "stat", name_, [this] { return cli::stat(context, name_); });
    auto* rm = command(&app_, "rm", "Remove an object", "cairn rm cairn://models/v1/model.tar");
    rm->add_option("URL", remove_object_.url, "cairn://BUCKET/KEY")->required();
    rm->add_option("--if-version", remove_object_.if_version, "Fail (exit 4) when another version is there");
    on(rm, "rm", remove_object_.url, [this] { return cli::remove(context, remove_object_); });
  }

  void checkpoint_commands() {
    auto* ckpt =
        command(&app_, "ckpt", "Save, restore, list, show, verify, pin and remove checkpoints", "cairn ckpt ls models");
    ckpt->require_subcommand(1);
    auto* save = command(ckpt, "save", "Save files as a step: safetensors files by tensor, others as they are",
                         "cairn ckpt save models/llama --step 1000 ./llama-8b/");
    save->add_option("RUN", save_.run, "BUCKET/RUN")->required();
    save->add_option("PATH", save_.paths, "Files and folders")->required();
    save->add_option("--step", save_.step, "Number of the step")->check(whole_number)->required();
    save->add_flag("--overwrite", save_.overwrite, "Replace a committed step");
    save->add_flag("--force", save_.force, "Save even while ranks of another launch are saving (it fences them)");
    save->add_option("--launch", save_.launch, "JOB or JOB:RESTART to save as; default: a launch of its own");
    on(save, "ckpt save", save_.run, [this] { return ckpt_save(context, save_); });
    auto* restore = command(ckpt, "restore", "Write a step's files into a new or empty folder",
                            "cairn ckpt restore models/llama ./llama-8b --tensor 'model.layers.0.*'");
    restore->add_option("RUN", restore_.run, "BUCKET/RUN")->required();
    restore->add_option("DIR", restore_.folder, "New or empty")->required();
    restore->add_option("--step", restore_.step, "Default: the highest")->check(whole_number);
    restore->add_option("--tensor", restore_.globs, "Only tensors whose names match; can be repeated");
    on(restore, "ckpt restore", restore_.run, [this] { return ckpt_restore(context, restore_); });
    auto* ls = command(ckpt, "ls", "List the steps of a run, or of all runs of a bucket", "cairn ckpt ls models/llama");
    ls->add_option("RUN", name_, "BUCKET or BUCKET/RUN")->required();
    on(ls, "ckpt ls", name_, [this] { return ckpt_list(context, name_); });
    auto* show =
        command(ckpt, "show", "Show a step: files, tensors, blobs", "cairn ckpt show models/llama --step 1000");
    show->add_option("RUN", step_.run, "BUCKET/RUN")->required();
    show->add_option("--step", step_.step, "Default: the highest")->check(whole_number);
    on(show, "ckpt show", step_.run, [this] { return ckpt_show(context, step_); });
    auto* verify = command(ckpt, "verify", "Read every byte of a step (default: of all steps) and check it",
                           "cairn ckpt verify models/llama");
    verify->add_option("RUN", step_.run, "BUCKET/RUN")->required();
    verify->add_option("--step", step_.step, "Default: all")->check(whole_number);
    on(verify, "ckpt verify", step_.run, [this] { return ckpt_verify(context, step_); });
    auto* pin = command(ckpt, "pin", "Keep a step from being removed or replaced, by anybody",
                        "cairn ckpt pin models/llama --step 1000");
    auto* unpin =
        command(ckpt, "unpin", "Let a pinned step be removed again", "cairn ckpt unpin models/llama --step 1000");
    for (auto* app : {pin, unpin}) {
      app->add_option("RUN", pin_.run, "BUCKET/RUN")->required();
      app->add_option("--step", pin_.step, "Number of the step")->check(whole_number)->required();
    }
    on(pin, "ckpt pin", pin_.run, [this] { return ckpt_pin(context, pin_); });
    on(unpin, "ckpt unpin", pin_.run, [this] { return ckpt_unpin(context, pin_); });
    auto* rm = command(ckpt, "rm", "Remove a step, or all steps after one", "cairn ckpt rm models/llama --after 1000");
    rm->add_option("RUN", remove_.run, "BUCKET/RUN")->required();
    auto* which = rm->add_option_group("which");
    which->add_option("--step", remove_.step, "This step")->check(whole_number);
    which->add_option("--after", remove_.after, "All later steps")->check(whole_number);
    which->require_option(1);
    on(rm, "ckpt rm", remove_.run, [this] { return ckpt_remove(context, remove_); });
  }

  void job_commands() {
    auto* verify = command(&app_, "verify",
                           "Read every copy of every chunk now, report what is damaged (exit 6 when it stays so), and "
                           "repair it where a good copy exists",
                           "cairn verify --json");
    verify->add_option("--target", verify_.targets, "Only this data directory, by path or id; can be repeated");
    verify->add_option(
        "--pace", verify_.pace,
        "Bytes a second of each directory, for example 100MiB; configured: as the daemon is; default: no "
        "limit");
    on(verify, "verify", nothing_, [this] { return cli::verify(context, verify_); });
    auto* job =
        command(&app_, "job", "Show and steer what goes on in the background: scrub, repair, resync", "cairn job ls");
    job->require_subcommand(1);
    auto* ls = command(job, "ls", "List jobs: those under way, and the last scrub of each directory", "cairn job ls");
    on(ls, "job ls", nothing_, [this] { return job_list(context); });
    auto* show = command(job, "show", "Show one job", "cairn job show scrub-1f2e3d4c");
    show->add_option("ID", name_, "As job ls lists it")->required();
    on(show, "job show", name_, [this] { return job_show(context, name_); });
    const auto control = [&](const char* name, const char* what, JobAction action) {
      const auto example = fmt::format("cairn job {} scrub-1f2e3d4c", name);
      auto* app = command(job, name, what, example.c_str());
      app->add_option("ID", name_, "As job ls lists it")->required();
      on(app, fmt::format("job {}", name), name_, [this, action] { return job_control(context, name_, action); });
    };
    control("pause", "Let a job rest; a scrub also over a restart of the daemon", JobAction::pause);
    control("resume", "Let a paused job go on where it was", JobAction::resume);
    control("cancel", "End a scrub; what it has found stays known", JobAction::cancel);
  }

  CLI::App app_{"", "cairn"};
  std::string servers_ = kDefaultServer;
  const std::string nothing_;
  std::string name_;
  BucketCreate create_;
  BucketSet set_;
  CkptPin pin_;
  Put put_;
  List list_;
  Remove remove_object_;
  Get get_;
  CkptSave save_;
  CkptRestore restore_;
  CkptStep step_;
  CkptRemove remove_;
  Verify verify_;
};

}  // namespace

int main(int argc, char** argv) {
  stop_on_signals();
  CommandLine line;
  if (const auto code = line.parse(argc, argv)) return *code;
  auto done = line.run();
  if (done) done = flush_output();
  return done ? 0 : report(line.what, done.error());
}
