// cairn_char_lm: the launcher and its ranks. What a rank does with Cairn is in checkpoint.cc.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "client/examples/char_lm/checkpoint.h"
#include "client/examples/char_lm/options.h"
#include "client/examples/char_lm/progress.h"
#include "client/examples/char_lm/ranks.h"
#include "client/examples/char_lm/text.h"
#include "client/examples/char_lm/trainer.h"

namespace {

using namespace char_lm;

int complain(const std::string& what) {
  std::fprintf(stderr, "cairn_char_lm: %s\n", what.c_str());
  return 1;
}

/// "JOB" or "JOB:RESTART"; a job of our own when empty.
cairn::LaunchId launch_of(const std::string& text) {
  if (text.empty())
    return {.job = "char_lm-" + std::to_string(std::chrono::system_clock::now().time_since_epoch().count()) + "-" +
                   std::to_string(getpid())};
  cairn::LaunchId launch{.job = text};
  const std::size_t colon = text.rfind(':');
  std::uint64_t restart = 0;
  const char* end = text.data() + text.size();
  if (colon != std::string::npos && colon > 0) {
    auto [stop, error] = std::from_chars(text.data() + colon + 1, end, restart);
    if (error == std::errc() && stop == end) launch = {.job = text.substr(0, colon), .restart = restart};
  }
  return launch;
}

/// What must be equal for a checkpoint to be continued.
std::string description_of(const TrainConfig& config, const Text& text) {
  char rate[32];
  std::snprintf(rate, sizeof rate, "%.9g", static_cast<double>(config.learning_rate));
  return "seed=" + std::to_string(config.seed) + " batch=" + std::to_string(config.batch) +
         " hidden=" + std::to_string(config.model.hidden) + " table_rows=" + std::to_string(config.model.table_rows) +
         " learning_rate=" + rate + " text_sha256=" + text.sha256;
}

/// One rank, from the start of its process to its end.
class Rank {
 public:
  Rank(const Options& options, const cairn::LaunchId& launch, const Text& text, Shared& shared, Board& board, int rank)
      : options_(options),
        launch_(launch),
        text_(text),
        shared_(shared),
        board_(board),
        rank_(rank),
        trainer_(options.train, text, shared, rank, options.ranks) {}

  int run() {
    if (auto done = train(); !done)
      return complain("rank " + std::to_string(rank_) + ": " + std::move(done).error().message);
    return 0;
  }

 private:
  bool prints() const { return rank_ == 0; }

  cairn::Result<void> train() {
    auto opened = Checkpoints::open({.servers = options_.servers,
                                     .run = options_.run,
                                     .launch = launch_,
                                     .rank = rank_,
                                     .ranks = options_.ranks,
                                     .job = description_of(options_.train, text_)});
    if (!opened) return cairn::fail(std::move(opened).error());
    Checkpoints checkpoints = std::move(*opened);
    if (auto begun = begin(checkpoints); !begun) return begun;

    first_step_ = trainer_.steps_done();
    since_ = seconds_now();
    for (std::uint64_t step = first_step_ + 1; step <= options_.steps; ++step) {
      const double loss = trainer_.step();
      if (options_.stop_in_save == step) return stop_in_save(checkpoints);
      if (options_.save_every > 0 && step % options_.save_every == 0)
        if (auto saving = checkpoints.start_save(trainer_, board_.save(saves_++, rank_)); !saving) return saving;
      if (prints()) print_progress(step, loss);
    }
    if (auto done = checkpoints.finish_save(); !done) return done;
    trainer_.gather();  // and waits for the last rank's save
    if (prints()) print_finished_saves();
    return {};
  }

  cairn::Result<void> begin(Checkpoints& checkpoints) {
    const auto resume = checkpoints.resume_step();
    if (!resume) {
      trainer_.initialise();
      if (prints()) std::printf("nothing saved yet: starts from the beginning\n");
      return {};
    }
    Board::RestoreTimes& times = board_.restore(rank_);
    times.started = seconds_now();
    auto restored = checkpoints.restore(trainer_);
    if (!restored) return cairn::fail(std::move(restored).error());
    times.done = seconds_now();
    times.bytes_wanted = restored->bytes_wanted;
    times.bytes_moved = restored->bytes_moved;
    shared_.head().barrier.wait();
    if (prints()) {
      const auto all = board_.restore_summary();
      std::printf("resumes from step %lu: restored %s over %d ranks in %.3f s\n", *resume,
                  text_of_bytes(all.bytes_wanted).c_str(), options_.ranks, all.done - all.started);
    }
    return {};
  }

  /// Leaves a save open for ever, so that whoever kills the ranks now kills them in the middle of it.
  cairn::Result<void> stop_in_save(Checkpoints& checkpoints) {
    if (auto done = checkpoints.finish_save(); !done) return done;
    shared_.head().barrier.wait();
    if (prints()) {
      print_finished_saves();
      std::printf("step %4lu   is being saved; holds in the middle of it and waits to be killed\n",
                  trainer_.steps_done());
      std::fflush(stdout);
    }
    if (auto saving = checkpoints.start_save_and_hold(trainer_, board_.save(saves_++, rank_)); !saving) return saving;
    const std::string line =
        "rank=" + std::to_string(rank_) + " step=" + std::to_string(trainer_.steps_done()) + " staged";
    if (!append_line(options_.status_file, line))
      return cairn::fail(cairn::Errc::kFailed, options_.status_file + ": " + std::strerror(errno));
    for (;;) pause();
  }

  void print_progress(std::uint64_t step, double loss) {
    print_finished_saves();
    ++steps_since_;
    if (step % options_.log_every != 0 && step != options_.steps) return;
    const double now = seconds_now();
    const auto characters = static_cast<double>(steps_since_ * options_.train.batch * options_.train.model.positions);
    std::printf("step %4lu   loss %.4f   %6.0f characters/s\n", step, loss, characters / (now - since_));
    std::fflush(stdout);
    since_ = now;
    steps_since_ = 0;
  }

  void print_finished_saves() {
    for (; printed_ < saves_ && board_.committed(printed_); ++printed_) {
      const auto save = board_.summary(printed_);
      std::printf("saved step %lu: %s, training stalled %.3f s, durable and committed after %.3f s\n",
                  (first_step_ / options_.save_every + 1 + printed_) * options_.save_every,
                  text_of_bytes(save.bytes).c_str(), save.stall_seconds, save.seconds);
      std::fflush(stdout);
    }
  }

  const Options& options_;
  const cairn::LaunchId& launch_;
  const Text& text_;
  Shared& shared_;
  Board& board_;
  const int rank_;
  Trainer trainer_;
  std::uint64_t first_step_ = 0;  // where this launch began
  std::size_t saves_ = 0;         // begun by this launch
  std::size_t printed_ = 0;       // of them
  double since_ = 0;              // the last line of progress, and the steps after it
  std::uint64_t steps_since_ = 0;
};

double middle(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

/// The lines at the end, for the reader and for scripts.
void print_summary(const Options& options, Shared& shared, Board& board) {
  std::vector<double> stalls, seconds;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < board.saves() && board.committed(i); ++i) {
    const auto save = board.summary(i);
    stalls.push_back(save.stall_seconds);
    seconds.push_back(save.seconds);
    bytes = save.bytes;
  }
  if (!stalls.empty())
    std::printf(
        "%zu saves of %s by %d ranks: stall median %.3f s, max %.3f s; durable and committed median %.3f s, max %.3f "
        "s\n",
        stalls.size(), text_of_bytes(bytes).c_str(), options.ranks, middle(stalls), std::ranges::max(stalls),
        middle(seconds), std::ranges::max(seconds));
  if (std::uint64_t clipped = shared.head().clipped; clipped > 0)
    std::printf("%lu gradient contributions were clipped to the fixed-point range\n", clipped);
  std::printf("weights sha256 %s\n", sha256_hex(std::as_bytes(shared.gathered())).c_str());
}

}  // namespace

int main(int count, char** arguments) {
  auto parsed = parse(count, arguments);
  if (!parsed) {
    complain(parsed.error());
    return 2;
  }
  Options& options = *parsed;
  if (options.help) {
    std::fputs(usage(), stdout);
    return 0;
  }
  auto text = load_text(options.text);
  if (!text) return complain(text.error());
  options.train.model.vocab = text->alphabet.size();
  if (auto checked = check(options.train, *text, options.ranks); !checked) {
    complain(checked.error());
    return 2;
  }
  const std::size_t saves = 1 + (options.save_every > 0 ? options.steps / options.save_every : 0);
  auto shared = Shared::create(options.train, options.ranks);
  if (!shared) return complain(shared.error());
  auto board = Board::create(options.ranks, saves);
  if (!board) return complain(board.error());
  const cairn::LaunchId launch = launch_of(options.launch);

  const std::size_t weights = weight_count(options.train.model);
  std::printf("%d ranks, %zu weights (%s of state), %zu characters of %zu files, launch %s:%lu\n", options.ranks,
              weights, text_of_bytes(weights * 14).c_str(), text->tokens.size(), text->files, launch.job.c_str(),
              launch.restart);

  // Clients of Cairn have threads of their own: they are made after the fork, one per rank.
  bool noted = true;
  auto done = run_ranks(
      options.ranks, [&](int rank) { return Rank(options, launch, *text, *shared, *board, rank).run(); },
      [&](std::span<const pid_t> pids) {
        if (options.status_file.empty()) return;
        noted = append_line(options.status_file, "launcher pid=" + std::to_string(getpid()));
        for (std::size_t rank = 0; rank < pids.size(); ++rank)
          noted = noted && append_line(options.status_file,
                                       "rank=" + std::to_string(rank) + " pid=" + std::to_string(pids[rank]));
      });
  if (!noted) return complain("cannot write " + options.status_file);
  if (!done) return complain(done.error());
  print_summary(options, *shared, *board);
  return 0;
}
