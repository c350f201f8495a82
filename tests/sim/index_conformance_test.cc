#include <catch2/catch.hpp>

#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"
#include "tests/storage/index_conformance.h"

using namespace cairn;
using namespace cairn::sim;

namespace {

/// The simulated index as the conformance cases want it. A crash is a power loss.
struct SimIndexWorld {
  explicit SimIndexWorld(std::uint64_t seed)
      : world(seed), node(world.make_node("node")), image(world.make_index("i0")), open(image.attach(node)) {}

  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task));
  }
  storage::Index& index() { return *open; }
  void reopen() {
    open.reset();
    open = image.attach(node);
  }
  rt::Loop& loop() { return node; }
  void synced() {}
  void crash(std::uint64_t) {
    open.reset();
    node.kill(Death::kPowerLoss);
    node.restart();
    open = image.attach(node);
  }

  World world;
  Node& node;
  IndexImage& image;
  std::unique_ptr<storage::Index> open;
};

}  // namespace

TEST_CASE("index twin: behaves like a map, through reopening and power losses", "[sim]") {
  const auto make = [](std::uint64_t seed) { return std::make_unique<SimIndexWorld>(seed); };
  for (std::uint64_t seed = 0; seed < 100; ++seed) tests::index_behaves_like_a_map(make, seed, 300);
}

TEST_CASE("index twin: orders changes, and a synced commit covers what came before it", "[sim]") {
  SimIndexWorld a(1), b(2);
  tests::index_orders_changes_inside_a_batch(a);
  tests::index_sync_covers_what_came_before(b);
}
