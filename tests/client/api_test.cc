#include <cairn/client.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <thread>

#include "client/api/handles.h"

using namespace cairn;

namespace {

struct Environment {
  ~Environment() {
    for (const char* name :
         {"CAIRN_LAUNCH", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"})
      unsetenv(name);
  }
  void set(const char* name, const char* value) { setenv(name, value, 1); }
};

}  // namespace

TEST_CASE("launch: comes from the caller, else CAIRN_LAUNCH, else torchrun, else Slurm, else is an error", "[client]") {
  Environment env;
  CHECK(resolve_launch({}).error().code == Errc::kInvalid);
  env.set("SLURM_JOB_ID", "991");
  env.set("SLURM_RESTART_COUNT", "2");
  CHECK(resolve_launch({})->job == "991");
  CHECK(resolve_launch({})->restart == 2);
  env.set("TORCHELASTIC_RUN_ID", "torch");
  CHECK(resolve_launch({})->job == "torch");
  env.set("CAIRN_LAUNCH", "own:7");
  CHECK(resolve_launch({})->job == "own");
  CHECK(resolve_launch({})->restart == 7);
  env.set("CAIRN_LAUNCH", "own:7x");
  CHECK(resolve_launch({}).error().code == Errc::kInvalid);
  CHECK(resolve_launch({.job = "mine", .restart = 1})->job == "mine");
}

TEST_CASE("future: outcome by get, by callback before and after, cancel after the end changes nothing", "[client]") {
  auto state = std::make_shared<Future<int>::State>();
  Future<int> future(state);
  CHECK_FALSE(future.ready());
  CHECK(future.get_for(std::chrono::milliseconds(1)).error().code == Errc::kDeadline);
  int called = 0;
  std::thread setter([&] { state->set(5); });
  CHECK(future.get().value() == 5);
  setter.join();
  CHECK_FALSE(future.get());  // taken

  auto second = std::make_shared<Future<int>::State>();
  Future<int> early(second);
  early.then([&](Result<int> r) { called = *r; });
  second->set(9);
  second->set(10);
  CHECK(called == 9);
  auto third = std::make_shared<Future<int>::State>();
  third->set(fail(Errc::kBusy, "full"));
  Future<int>(third).then([&](Result<int> r) { called = r ? 0 : -1; });
  CHECK(called == -1);
}

TEST_CASE("connect: wrong options and unreachable servers are named", "[client]") {
  CHECK(Client::connect({.servers = {}}).error().code == Errc::kInvalid);
  CHECK(Client::connect({.chunk_bytes = 1000}).error().message.find("chunk_bytes") != std::string::npos);
  CHECK(Client::connect({.arena_bytes = 1000}).error().message.find("arena_bytes") != std::string::npos);
  // A port that nobody listens on: 1 is reserved.
  auto refused = Client::connect({.servers = {"127.0.0.1:1"}, .timeout = std::chrono::milliseconds(300)});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::kUnavailable);
  CHECK(refused.error().message.find("127.0.0.1:1") != std::string::npos);
}

TEST_CASE("run names: BUCKET/RUN, with both parts", "[client]") {
  CHECK(split_run("b/jobs/x")->second == "jobs/x");
  for (const char* bad : {"", "b", "/x", "b/"}) CHECK_FALSE(split_run(bad));
}
