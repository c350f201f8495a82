// The arithmetic and the process handling of the example training job; its part with Cairn is proven by deploy/demo.sh.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "client/examples/char_lm/fixed_point.h"
#include "client/examples/char_lm/trainer.h"

using namespace char_lm;

namespace {

/// English-like text from a small grammar; no file of the machine is needed.
Text made_text() {
  const std::array<std::string, 12> words = {"the ",  "licence ", "grants ",  "a ",        "right ",   "to ",
                                             "copy ", "and ",     "modify, ", "provided ", "notice. ", "\n"};
  std::string raw;
  for (std::uint64_t i = 0; raw.size() < 20000; ++i) raw += words[mix(i) % words.size()];
  std::string alphabet(raw.begin(), raw.end());
  std::ranges::sort(alphabet);
  alphabet.erase(std::unique(alphabet.begin(), alphabet.end()), alphabet.end());
  Text text;
  text.alphabet.assign(alphabet.begin(), alphabet.end());
  for (char c : raw) text.tokens.push_back(static_cast<std::uint8_t>(alphabet.find(c)));
  return text;
}

/// The state of a job, joined from the parts of its ranks: what a checkpoint store keeps, in memory all can see.
struct Checkpoint {
  static constexpr std::size_t kBytesMax = 1 << 20;
  SharedMemory memory = *SharedMemory::create(kBytesMax);

  void copy(std::vector<StatePiece> pieces, bool save) {
    std::size_t at = 0;
    for (StatePiece& piece : pieces) {
      const std::size_t element = piece.type == StateType::kBfloat16 ? 2 : piece.type == StateType::kInt64 ? 8 : 4;
      std::size_t all = element, row = element;
      for (std::uint64_t n : piece.shape) all *= n;
      for (std::size_t d = 1; d < piece.shape.size(); ++d) row *= piece.shape[d];
      std::byte* part = memory.data() + at + (piece.offset.empty() ? 0 : piece.offset[0] * row);
      if (save)
        std::ranges::copy(piece.bytes, part);
      else
        std::copy_n(part, piece.bytes.size(), piece.bytes.begin());
      at += all;
      REQUIRE(at <= kBytesMax);
    }
  }
};

struct Job {
  Text text = made_text();
  TrainConfig config{.model = {.vocab = text.alphabet.size(), .hidden = 22, .table_rows = 5, .positions = 16},
                     .batch = 12};
  Checkpoint checkpoint;
  SharedMemory losses = *SharedMemory::create(1000 * sizeof(double));

  double loss(std::size_t step) { return reinterpret_cast<double*>(losses.data())[step]; }

  /// Trains up to `steps`, from the beginning or from the checkpoint, leaves one, and returns the final weights.
  std::vector<float> train(int ranks, std::uint64_t steps, bool resume = false) {
    REQUIRE(check(config, text, ranks));
    Shared shared = *Shared::create(config, ranks);
    auto done = run_ranks(ranks, [&](int rank) {
      Trainer trainer(config, text, shared, rank, ranks);
      if (resume)
        checkpoint.copy(trainer.state(), false);
      else
        trainer.initialise();
      if (!trainer.weights_agree()) return 1;
      while (trainer.steps_done() < steps) {
        double loss = trainer.step();
        if (rank == 0) reinterpret_cast<double*>(losses.data())[trainer.steps_done()] = loss;
      }
      shared.head().barrier.wait();
      checkpoint.copy(trainer.state(), true);
      trainer.gather();
      return 0;
    });
    INFO((done ? "" : done.error()));
    REQUIRE(done);
    CHECK(shared.head().clipped == 0);
    auto weights = shared.gathered();
    return {weights.begin(), weights.end()};
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("char_lm: gradients agree with finite differences", "[char_lm]") {
  // Goal: the hand-written backward pass is that of the forward pass. Method: central differences in double, in a few
  // hundred random weights of every tensor and in all table rows used.
  Text text = made_text();
  ModelConfig config{.vocab = text.alphabet.size(), .context = 4, .embed = 3, .hidden = 7, .positions = 5};
  Model<double> model(config);
  std::span<const std::uint8_t> tokens(text.tokens.data() + 11, config.sample_tokens());
  std::vector<double> dense(dense_size(config)), table(config.positions * config.hidden);
  std::mt19937_64 random(5);
  for (double& x : dense) x = std::uniform_real_distribution(-0.7, 0.7)(random);
  for (double& x : table) x = std::uniform_real_distribution(-0.7, 0.7)(random);
  std::vector<double> gradient(dense.size()), table_gradient(table.size()), unused(dense.size()),
      unused_table(table.size());
  model.loss_and_gradient(tokens, dense, table, gradient, table_gradient);

  auto check_one = [&](double& weight, double expected) {
    const double kept = weight, h = 1e-5;
    weight = kept + h;
    double above = model.loss_and_gradient(tokens, dense, table, unused, unused_table);
    weight = kept - h;
    double below = model.loss_and_gradient(tokens, dense, table, unused, unused_table);
    weight = kept;
    return std::abs((above - below) / (2 * h) - expected) < 1e-8;
  };
  for (const WeightTensor& tensor : weight_tensors(config)) {
    if (tensor.name == "table") continue;
    INFO(tensor.name);
    std::size_t wrong = 0, nonzero = 0;
    for (std::size_t i = tensor.offset; i < tensor.offset + tensor.size(); ++i) {
      wrong += !check_one(dense[i], gradient[i]);
      nonzero += gradient[i] != 0;
    }
    CHECK(wrong == 0);
    CHECK(nonzero > 0);
  }
  for (std::size_t i = 0; i < table.size(); ++i) CHECK(check_one(table[i], table_gradient[i]));
}

TEST_CASE("char_lm: the float model is the double model up to rounding", "[char_lm]") {
  // Goal: float's own exp and tanh are right. Method: same weights in both.
  Text text = made_text();
  ModelConfig config{.vocab = text.alphabet.size()};
  std::span<const std::uint8_t> tokens(text.tokens.data(), config.sample_tokens());
  std::vector<float> dense(dense_size(config)), table(config.positions * config.hidden);
  std::mt19937_64 random(6);
  for (float& x : dense) x = std::uniform_real_distribution(-0.3F, 0.3F)(random);
  for (float& x : table) x = std::uniform_real_distribution(-0.3F, 0.3F)(random);
  std::vector<double> wide(dense.begin(), dense.end()), wide_table(table.begin(), table.end());
  std::vector<float> gradient(dense.size()), table_gradient(table.size());
  std::vector<double> wide_gradient(dense.size()), wide_table_gradient(table.size());
  double loss = Model<float>(config).loss_and_gradient(tokens, dense, table, gradient, table_gradient);
  double exact = Model<double>(config).loss_and_gradient(tokens, wide, wide_table, wide_gradient, wide_table_gradient);
  CHECK(loss == Approx(exact).epsilon(1e-5));
  double worst = 0;
  for (std::size_t i = 0; i < gradient.size(); ++i) worst = std::max(worst, std::abs(gradient[i] - wide_gradient[i]));
  CHECK(worst < 1e-5);
}

TEST_CASE("char_lm: training has the same bits on 1, 3 and 4 ranks, and learns", "[char_lm]") {
  Job job;
  auto one = job.train(1, 40);
  double first = job.loss(1), last = job.loss(40);
  CHECK(last < first - 1);
  for (int ranks : {3, 4}) {
    INFO("ranks " << ranks);
    CHECK(same_bits(job.train(ranks, 40), one));
    CHECK(job.loss(40) == last);
  }
  job.config.seed = 2;
  CHECK_FALSE(same_bits(job.train(3, 40), one));
}

TEST_CASE("char_lm: a job resumed on other ranks gives the weights of an uninterrupted one", "[char_lm]") {
  // Goal: state() is complete: nothing the training needs lives outside of it.
  Job job;
  auto straight = job.train(2, 25);
  job.train(4, 10);
  job.train(3, 17, true);
  CHECK(same_bits(job.train(6, 25, true), straight));
}

TEST_CASE("char_lm: the parts of all ranks tile every tensor, also with fewer rows than ranks", "[char_lm]") {
  Job job;
  for (int ranks : {1, 2, 3, 4, 6, 12}) {
    Shared shared = *Shared::create(job.config, ranks);
    std::map<std::string, std::uint64_t> next;  // rows of each tensor covered so far
    std::size_t empty = 0;
    std::map<std::string, std::uint64_t> rows;
    for (int rank = 0; rank < ranks; ++rank) {
      Trainer trainer(job.config, job.text, shared, rank, ranks);
      for (const StatePiece& piece : trainer.state()) {
        if (piece.replicated) continue;
        CHECK(piece.offset[0] == next[piece.name]);
        next[piece.name] += piece.part[0];
        rows[piece.name] = piece.shape[0];
        empty += piece.part[0] == 0;
        std::size_t elements = 1;
        for (std::uint64_t n : piece.part) elements *= n;
        CHECK(piece.bytes.size() == elements * sizeof(float));
      }
    }
    CHECK(next == rows);
    CHECK((empty > 0) == (ranks > 1));
  }
  CHECK(rows_of(10, 3, 4).count() == 1);
  CHECK(rows_of(9, 3, 4).count() == 0);
  CHECK(rows_of(0, 0, 4).count() == 0);
}

TEST_CASE("char_lm: fixed point is exact in range, rounds to nearest, and clips what is outside", "[char_lm]") {
  CHECK(to_fixed(1.0F) == std::int64_t{1} << kFractionBits);
  CHECK(from_fixed(to_fixed(-0.375F)) == -0.375);
  CHECK(to_fixed(0x1.8p-41F) == 1);
  CHECK(to_fixed(0x1p-41F) == 0);  // ties to even
  CHECK(to_fixed(0x1.8p-40F) == 2);
  CHECK(to_fixed(-0x1.8p-40F) == -2);
  CHECK(to_fixed(128.0F) * kContributionsMax == std::int64_t{1} << 62);

  std::vector<float> values = {1, 500, -1e30F, NAN, INFINITY, -128};
  CHECK(clip(values) == 4);
  CHECK(values == std::vector<float>{1, 128, -128, 0, 128, -128});
  std::int64_t sum[2] = {5, 0};
  add_fixed(sum, std::array<float, 2>{0.5F, -2.0F}.data(), 2);
  CHECK(sum[0] == 5 + (std::int64_t{1} << (kFractionBits - 1)));
  CHECK(sum[1] == -(std::int64_t{2} << kFractionBits));
}

TEST_CASE("char_lm: a batch that could overflow the sum, or that the ranks cannot share, is refused", "[char_lm]") {
  Job job;
  CHECK(check(job.config, job.text, 4));
  CHECK(check(job.config, job.text, 5).error().find("5 ranks") != std::string::npos);
  CHECK_FALSE(check(job.config, job.text, 0));
  job.config.batch = 4800;
  CHECK(check(job.config, job.text, 4).error().find("fixed-point") != std::string::npos);
  job.config.batch = 12;
  job.text.tokens.resize(20);
  CHECK_FALSE(check(job.config, job.text, 4));
}

TEST_CASE("char_lm: bf16 rounds to nearest, ties to even", "[char_lm]") {
  CHECK(bf16_of_float(1.0F) == 0x3f80);
  CHECK(bf16_of_float(-2.0F) == 0xc000);
  CHECK(bf16_of_float(1.0F + 0x1p-8F) == 0x3f80);
  CHECK(bf16_of_float(1.0F + 0x1.8p-7F) == 0x3f82);
  CHECK(float_of_bf16(bf16_of_float(0.15625F)) == 0.15625F);
}

TEST_CASE("char_lm: sample starts depend on seed, step and slot alone and fill their range", "[char_lm]") {
  CHECK(sample_start(1, 7, 3, 1000) == sample_start(1, 7, 3, 1000));
  std::vector<int> seen(16);
  for (std::uint64_t step = 0; step < 40; ++step)
    for (std::uint64_t slot = 0; slot < 48; ++slot) seen.at(sample_start(1, step, slot, 16))++;
  CHECK(*std::ranges::min_element(seen) > 60);
  CHECK(sample_start(1, 7, 3, 1 << 30) != sample_start(2, 7, 3, 1 << 30));
  CHECK(sample_start(1, 7, 3, 1 << 30) != sample_start(1, 3, 7, 1 << 30));
}

TEST_CASE("char_lm: a dead rank does not hang the others", "[char_lm]") {
  // Method: rank 1 of 3 dies while the others wait in a barrier for it, for ever unless they are ended.
  auto memory = *SharedMemory::create(sizeof(Barrier));
  auto& barrier = *reinterpret_cast<Barrier*>(memory.data());
  barrier.init(3);
  std::vector<pid_t> pids;
  auto killed = run_ranks(
      3,
      [&](int rank) {
        if (rank == 1) std::raise(SIGKILL);
        barrier.wait();
        return 0;
      },
      [&](std::span<const pid_t> started) { pids.assign(started.begin(), started.end()); });
  REQUIRE_FALSE(killed);
  CHECK(killed.error() == "rank 1 was killed by signal 9 (Killed); the other ranks were ended");
  REQUIRE(pids.size() == 3);
  for (pid_t pid : pids) CHECK(kill(pid, 0) == -1);  // gone, and reaped

  auto failed = run_ranks(2, [&](int rank) { return rank == 0 ? 3 : 0; });
  CHECK(failed.error().starts_with("rank 0 exited with 3"));
  CHECK(run_ranks(2, [](int) { return 0; }));
}

TEST_CASE("char_lm: the text is the regular files of a folder in order of name, without links", "[char_lm]") {
  namespace fs = std::filesystem;
  fs::path folder = fs::temp_directory_path() / ("char_lm_test." + std::to_string(getpid()));
  fs::create_directory(folder);
  std::ofstream(folder / "b") << "ca";
  std::ofstream(folder / "a") << "abc";
  fs::create_symlink("a", folder / "aa");
  auto text = load_text(folder);
  fs::remove_all(folder);
  REQUIRE(text);
  CHECK(text->files == 2);
  CHECK(text->tokens == std::vector<std::uint8_t>{0, 1, 2, 2, 0});
  CHECK(text->alphabet == std::vector<std::uint8_t>{'a', 'b', 'c'});
  CHECK(text->sha256 == "e8448e8636b52a55c2ac328189063e90b9c5130b3ffcc874aefbc19e4b6d22e1");
  CHECK_FALSE(load_text(folder));
}
