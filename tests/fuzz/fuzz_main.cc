#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/fuzz/fuzz.h"

namespace cairn::fuzz {

std::map<std::string_view, Target>& targets() {
  static std::map<std::string_view, Target> all;
  return all;
}
Register::Register(const Target& target) {
  targets().emplace(target.name, target);
}

void must(bool holds, std::string_view what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: broken: %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

namespace {

namespace fs = std::filesystem;

const Target* chosen = nullptr;

/// Handles what is ours of the command line; libFuzzer leaves words that begin with "--" alone.
void take_options(int argc, char** argv) {
  std::string seeds;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--list") {
      for (const auto& [name, target] : targets())
        std::printf("%.*s %zu\n", static_cast<int>(name.size()), name.data(), target.bytes_max);
      std::exit(0);
    }
    if (word.starts_with("--target=")) {
      const auto found = targets().find(word.substr(9));
      if (found != targets().end()) chosen = &found->second;
    }
    if (word.starts_with("--seeds=")) seeds = word.substr(8);
  }
  if (chosen == nullptr) {
    std::fputs("usage: cairn-fuzz --target=NAME [--seeds=FOLDER] [FILE or FOLDER ...]; --list prints the names\n",
               stderr);
    std::exit(2);
  }
  if (seeds.empty()) return;
  fs::create_directories(seeds);
  std::size_t number = 0;
  for (const auto& seed : chosen->seeds())
    std::ofstream(fs::path(seeds) / ("seed" + std::to_string(number++)), std::ios::binary) << seed;
  std::exit(0);
}

}  // namespace
}  // namespace cairn::fuzz

#ifdef CAIRN_LIBFUZZER

// NOLINTNEXTLINE(readability-identifier-naming): libFuzzer's names
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  cairn::fuzz::take_options(*argc, *argv);
  return 0;
}
// NOLINTNEXTLINE(readability-identifier-naming)
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cairn::fuzz::chosen->one({reinterpret_cast<const char*>(data), size});
  return 0;
}

#else

/// Replays the target's own seeds and the files named.
int main(int argc, char** argv) {
  using namespace cairn::fuzz;
  take_options(argc, argv);
  std::vector<std::string> inputs = chosen->seeds();
  const auto add = [&](const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  };
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]).starts_with("-")) continue;
    if (!fs::exists(argv[i])) continue;
    if (!fs::is_directory(argv[i])) {
      add(argv[i]);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(argv[i])) add(entry.path());
  }
  chosen->one({});
  for (const auto& input : inputs) chosen->one(input);
  std::printf("%.*s: %zu inputs\n", static_cast<int>(chosen->name.size()), chosen->name.data(), inputs.size());
  return 0;
}

#endif
