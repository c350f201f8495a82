#include "tests/storage/real_machine.h"

#include <stdlib.h>

#include <filesystem>

#include "storage/index/rocksdb_index.h"

namespace cairn::storage {
namespace {

struct NoLog final : rt::Log {
  void write(rt::Level, std::string_view, std::initializer_list<rt::Field>) override {}
};

std::unique_ptr<rt::RealRuntime> make_runtime() {
  rt::RealRuntime::Options options;
  options.log = std::make_unique<NoLog>();  // many tests fail on purpose
  auto made = rt::RealRuntime::create(std::move(options));
  REQUIRE(made);
  return *std::move(made);
}

class RealMachine final : public Machine {
 public:
  explicit RealMachine(IoBackend backend) : runtime_(make_runtime()) {
    path_ = (std::filesystem::temp_directory_path() / "cairn-engine-XXXXXX").string();
    REQUIRE(mkdtemp(path_.data()) != nullptr);
    options_.backend = backend;
  }
  ~RealMachine() override {
    io_.reset();
    std::filesystem::remove_all(path_);
  }

  rt::Runtime runtime() override { return runtime_->seams(); }
  void drive(Task<void> task) override {
    auto done = rt::run(runtime_->loop(), std::move(task));
    REQUIRE(done);
  }
  Result<std::unique_ptr<Disk>> disk() override {
    if (!io_) {
      TRY(io_, Io::create(runtime(), runtime_->loop(), options_));
    }
    return rt::run(runtime_->loop(), open_directory(runtime(), io_, path_));
  }
  Result<std::unique_ptr<Index>> index() override {
    RocksDbOptions options;
    options.memory_bytes = 8 * kMiB;
    return rt::run(runtime_->loop(), open_rocksdb_index(runtime(), path_ + "/index", options));
  }
  std::string path() const override { return path_; }
  void end_process(std::unique_ptr<rt::UnitPool> units, std::unique_ptr<Target> target) override {
    target.reset();
    units.reset();
    io_.reset();
  }

 private:
  std::unique_ptr<rt::RealRuntime> runtime_;
  std::string path_;
  IoOptions options_;
  std::shared_ptr<Io> io_;
};

}  // namespace

bool has_uring() {
  auto runtime = make_runtime();
  IoOptions options;
  options.backend = IoBackend::kUring;
  return Io::create(runtime->seams(), runtime->loop(), options).has_value();
}

std::unique_ptr<Machine> make_real_machine(IoBackend backend) {
  return std::make_unique<RealMachine>(backend);
}

}  // namespace cairn::storage
