// `cairn ckpt` beside other clients: steps saved by a training job of several ranks or by a hostile client, and a job
// that is saving right now.

#include <cairn/client.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "client/cli/commands.h"
#include "client/cli/files.h"
#include "client/safetensors/safetensors.h"
#include "tests/integration/test_daemon.h"

using namespace cairn;
namespace fs = std::filesystem;

namespace {

std::string counting(std::size_t size, unsigned start) {
  std::string out(size, '\0');
  for (std::size_t i = 0; i < size; ++i) out[i] = static_cast<char>(start + i * 7);
  return out;
}
std::span<const std::byte> bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

struct Job {
  Job() {
    context.servers = {daemon.address()};
    client = *context.client();
    REQUIRE(client->create_bucket({.name = "b"}));
  }
  /// One rank's save, finished with finish().
  Save begin(std::uint64_t step, std::uint32_t rank, std::uint32_t ranks) {
    auto run = client->open_run({.name = "b/run", .launch = {.job = "job", .restart = 0}, .resume = {}});
    REQUIRE(run);
    auto save = run->begin_save({.step = step, .rank = rank, .world_size = ranks});
    REQUIRE(save);
    return *save;
  }
  void finish(std::vector<Save> saves) {
    std::vector<Save::Ticket> tickets;
    for (auto& save : saves) tickets.push_back(*save.stage());
    for (auto& ticket : tickets) REQUIRE(ticket.wait());
  }
  Result<void> restore() {
    return cli::ckpt_restore(context, {.run = "b/run", .step = {}, .folder = out(), .globs = {}});
  }
  std::string out() const { return daemon.folder() + "/deep/er/out"; }
  std::vector<std::string> everything() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(daemon.folder() + "/deep"))
      if (!entry.is_directory()) names.push_back(entry.path().lexically_relative(out()).string());
    std::ranges::sort(names);
    return names;
  }
  std::string read(const std::string& name) const {
    std::ifstream file(out() + "/" + name);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  test::TestDaemon daemon;
  cli::Context context;
  std::optional<Client> client;
};

}  // namespace

TEST_CASE("ckpt restore: a training job's step becomes one safetensors file, and its blobs plain files",
          "[integration]") {
  Job job;
  fs::create_directories(fs::path(job.out()).parent_path());
  // Columns of one tensor over two ranks, a replicated one, and blobs whose names look like paths.
  const auto w = counting(4 * 6, 1), replicated = counting(9, 100);
  std::vector<Save> saves{job.begin(5, 0, 2), job.begin(5, 1, 2)};
  std::vector<std::string> halves(2);
  const std::string blobs[2] = {"zero", "one"};
  for (std::uint32_t rank = 0; rank < 2; ++rank) {
    for (std::size_t row = 0; row < 4; ++row) halves[rank] += w.substr(row * 6 + rank * 3ull, 3);
    REQUIRE(saves[rank].add_tensor(
        {.name = "w", .dtype = DType::u8, .global_shape = {4, 6}, .box = Box{{0, rank * 3ull}, {4, 3}}, .holder = {}},
        bytes(halves[rank])));
    REQUIRE(saves[rank].add_tensor(
        {.name = "r", .dtype = DType::i8, .global_shape = {9}, .box = {}, .holder = Holder{rank, 2}},
        bytes(replicated)));
    REQUIRE(saves[rank].add_blob("../../evil", bytes(blobs[rank])));
  }
  job.finish(std::move(saves));
  const auto restored = job.restore();
  if (!restored) FAIL(restored.error().message);
  CHECK(job.everything() == std::vector<std::string>{"blobs/rank-0/%2E.%2F..%2Fevil", "blobs/rank-1/%2E.%2F..%2Fevil",
                                                     "tensors.safetensors"});
  CHECK(job.read("blobs/rank-1/%2E.%2F..%2Fevil") == "one");
  auto file = cli::FileSource::open(job.out() + "/tensors.safetensors");
  REQUIRE(file);
  const auto header = safetensors::read_header(**file);
  REQUIRE(header);
  const auto data = job.read("tensors.safetensors").substr(header->data_offset);
  REQUIRE(header->tensors.size() == 2);
  for (const auto& tensor : header->tensors)
    CHECK(data.substr(tensor.begin, tensor.end - tensor.begin) == (tensor.name == "w" ? w : replicated));
}

TEST_CASE("ckpt restore: file names that leave the folder, or say what is not so, write nothing", "[integration]") {
  Job job;
  fs::create_directories(fs::path(job.out()).parent_path());
  struct Case {
    std::vector<MetaItem> meta;
    Errc code;
  };
  const std::string header = R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})";
  const Case cases[] = {
      {{{"../../evil", "cairn.file", "blob"}, {"../../evil", "cairn.size", "4"}}, Errc::kInvalid},
      {{{"/evil", "cairn.file", "blob"}, {"/evil", "cairn.size", "4"}}, Errc::kInvalid},
      {{{"blob", "cairn.file", "blob"}, {"blob", "cairn.size", "5"}}, Errc::kDataLoss},
      {{{"blob", "cairn.file", "blob"}, {"blob", "cairn.size", "x"}}, Errc::kDataLoss},
      {{{"absent", "cairn.file", "blob"}, {"absent", "cairn.size", "4"}}, Errc::kNotFound},
      // Tensor v is not in the step; w has another length than the header says; the file is shorter than its header.
      {{{"f", "cairn.file", "safetensors"},
        {"f", "cairn.size", "12"},
        {"f", "cairn.header", R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})"}},
       Errc::kDataLoss},
      {{{"f", "cairn.file", "safetensors"}, {"f", "cairn.size", "66"}, {"f", "cairn.header", header}}, Errc::kDataLoss},
      {{{"f", "cairn.file", "safetensors"}, {"f", "cairn.size", "3"}, {"f", "cairn.header", header}}, Errc::kDataLoss},
  };
  std::uint64_t step = 1;
  const auto w = counting(4, 1);
  for (const auto& one : cases) {
    INFO(one.meta[0].scope << " step " << step);
    auto save = job.begin(step++, 0, 1);
    REQUIRE(save.add_tensor({.name = "w", .dtype = DType::u8, .global_shape = {4}, .box = {}, .holder = {}}, bytes(w)));
    REQUIRE(save.add_blob("blob", bytes(w)));
    for (const auto& item : one.meta) REQUIRE(save.add_meta(item));
    job.finish({save});
    const auto restored = job.restore();
    REQUIRE_FALSE(restored);
    CHECK(restored.error().code == one.code);
    CHECK(job.everything().empty());
    CHECK_FALSE(fs::exists(job.out()));
  }
}

TEST_CASE("ckpt save: refused while ranks of another launch are saving, unless forced", "[integration]") {
  Job job;
  const auto path = job.daemon.folder() + "/file";
  std::ofstream(path) << "x";
  cli::CkptSave args{.run = "b/run", .step = 10, .paths = {path}, .overwrite = false, .force = false, .launch = {}};
  REQUIRE(cli::ckpt_save(job.context, args));
  auto open = job.begin(20, 0, 2);  // rank 1 has not come yet
  args.step = 11;
  const auto refused = cli::ckpt_save(job.context, args);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kConflict);
  CHECK_THAT(refused.error().message, Catch::Contains("'job:0'") && Catch::Contains("step 20"));
  args.launch = "job:0";  // of that launch itself: not another's
  CHECK(cli::ckpt_save(job.context, args));
  args.launch = {}, args.step = 12, args.force = true;
  CHECK(cli::ckpt_save(job.context, args));
  auto ticket = open.stage();
  CHECK((!ticket || ticket->wait().error().code == Errc::kFenced));
}
