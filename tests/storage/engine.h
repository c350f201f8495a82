#pragma once

#include <catch2/catch.hpp>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/common/checksum.h"
#include "storage/target/target.h"
#include "tests/sim/disk.h"
#include "tests/sim/index.h"
#include "tests/sim/world.h"

// A small language for tests of the storage engine: one machine with one target.

namespace cairn::storage {

inline constexpr std::size_t kTestUnitBytes = 128 * kKiB;

/// Where a target lives: a simulated machine, or a temporary directory of this one.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual rt::Runtime runtime() = 0;
  /// Runs `task` to its end, with everything else that is under way.
  virtual void drive(Task<void> task) = 0;
  virtual Result<std::unique_ptr<Disk>> disk() = 0;
  virtual Result<std::unique_ptr<Index>> index() = 0;
  /// The directory; empty when simulated.
  virtual std::string path() const { return {}; }
  /// The process that had this target ends; the next disk() and index() are those of a new one.
  virtual void end_process(std::unique_ptr<rt::UnitPool> units, std::unique_ptr<Target> target) = 0;
};

/// "sim"; "threads" and, where the kernel allows it, "uring": the real disk, in a temporary directory, with RocksDB.
std::vector<std::string> machine_kinds();
std::unique_ptr<Machine> make_machine(const std::string& kind);

template <class T>
Result<T> run_on(Machine& machine, Task<T> task) {
  struct Into {
    static Task<void> run(Task<T> inner, std::optional<Result<T>>& out) {
      out.emplace(co_await std::move(inner));
      co_return {};
    }
  };
  std::optional<Result<T>> out;
  machine.drive(Into::run(std::move(task), out));
  REQUIRE(out);
  return *std::move(out);
}

class SimMachine final : public Machine {
 public:
  explicit SimMachine(std::uint64_t seed = 1, sim::DiskOptions options = {});
  rt::Runtime runtime() override { return node.runtime(); }
  void drive(Task<void> task) override;
  Result<std::unique_ptr<Disk>> disk() override { return image.attach(node); }
  Result<std::unique_ptr<Index>> index() override { return index_image.attach(node); }
  void end_process(std::unique_ptr<rt::UnitPool> units, std::unique_ptr<Target> target) override;

  sim::World world;
  sim::Node& node;
  sim::DiskImage& image;
  sim::IndexImage& index_image;
};

/// Bytes that depend on `seed` and the position, so that right bytes in the wrong place are seen.
std::string pattern(std::uint64_t seed, std::size_t size);

/// Of a result that is expected to be an error.
Errc code_of(const auto& result) {
  REQUIRE_FALSE(result);
  return result.error().code;
}
ChunkId chunk(std::uint32_t index, std::uint64_t owner = 1);
std::vector<std::uint32_t> crcs_of(const ChunkId& id, const std::string& bytes);

Task<rt::MutableBuffer> piece_of(rt::UnitPool& units, const std::string& bytes, std::size_t offset);
Task<void> write_pieces(ChunkStore::Upload& upload, rt::UnitPool& units, std::string bytes);
/// start, all pieces at once, finish.
Task<void> put_chunk(rt::Loop& loop, ChunkStore& store, rt::UnitPool& units, ChunkId id, std::string bytes);
Task<std::string> get_chunk(ChunkStore& store, ChunkId id);

/// An open target and the words to drive it.
class Engine {
 public:
  /// Segments of 4 MiB, 1 MiB of ballast.
  static Target::Options small(PlantedBugs bugs);
  static Target::Options small() { return small(PlantedBugs{}); }
  explicit Engine(const std::string& kind, Target::Options options = small())
      : Engine(make_machine(kind), std::move(options)) {}
  explicit Engine(std::unique_ptr<Machine> machine, Target::Options options = small());
  ~Engine();
  Machine& machine() { return *machine_; }
  SimMachine& sim() { return dynamic_cast<SimMachine&>(*machine_); }
  Target::Options options;

  Result<void> try_open();
  void open();
  void close();  // orderly: close(), then the process ends
  void reopen() {
    close();
    open();
  }
  /// The process is killed, or the power goes. Simulated machines only.
  void crash(sim::Death death);

  Target& target() { return *target_; }
  ChunkStore& chunks() { return target_->chunks(); }
  RecordStore& records() { return target_->records(); }
  rt::UnitPool& units() { return *units_; }
  rt::Loop& loop() { return machine_->runtime().loop; }
  bool is_open() const { return target_ != nullptr; }

  template <class T>
  Result<T> run(Task<T> task) {
    return run_on(*machine_, std::move(task));
  }
  Result<void> put(ChunkId id, std::string bytes) {
    return run(put_chunk(loop(), chunks(), units(), id, std::move(bytes)));
  }
  Result<std::string> get(ChunkId id) { return run(get_chunk(chunks(), id)); }
  bool holds(ChunkId id, const std::string& bytes) {
    auto got = get(id);
    return got && *got == bytes;
  }
  Result<void> remove(std::vector<ChunkId> ids) { return run(chunks().remove(std::move(ids))); }
  std::vector<ChunkId> list();
  /// Lets background work go on until `done`; false when it does not come to that.
  bool eventually(const std::function<bool()>& done);

 private:
  std::unique_ptr<Machine> machine_;
  std::unique_ptr<rt::UnitPool> units_;
  std::unique_ptr<Target> target_;
};

}  // namespace cairn::storage
