// Writes to a daemon and prints one line for each operation that was acknowledged, so that a test can kill anything at
// any moment and know what must still be there. Content is a function of its address: the right bytes in the wrong
// place are noticed too.
//
//   ack_writer objects --server S --bucket B --seed N --first-version V [--check 1]
//       puts, overwrites and removes objects from several threads until killed; --check 1: also streams of several
//       chunks, some given up in the middle, and reads, ranges and listings of what it has just done
//   ack_writer steps --server S --run B/RUN --job J --restart N --world W [--rank R] [--keep K] [--until STEP]
//       one launch of a job: resumes and saves step after step; without --rank all ranks in this process
//   ack_writer verify --server S [--layout N] [--removals 1]        < expectations
//       reads everything back; see verify() for the lines it takes and prints. --layout: in how many parts tensors are
//       restored; --removals 1: others remove steps meanwhile
//
// All: --transport tcp|unix|shm, and --pause MS between operations.
//
// Lines printed: "start WHAT ..." before an operation that may or may not have happened if no "ack WHAT ..." follows.

#include <cairn/client.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using Arguments = std::map<std::string, std::string>;

std::uint64_t mix(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

std::uint64_t hash_of(const std::string& text) {
  std::uint64_t h = 14695981039346656037ull;
  for (unsigned char c : text) h = (h ^ c) * 1099511628211ull;
  return mix(h);
}

void say(const std::string& line) {
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);  // the test must see the line before whatever comes next
}

[[noreturn]] void give_up(const std::string& what, const cairn::Error& error) {
  std::fprintf(stderr, "%s: %s: %s\n", what.c_str(), std::string(cairn::name_of(error.code)).c_str(),
               error.message.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

template <class T>
T must(cairn::Result<T> result, const std::string& what) {
  if (!result) give_up(what, result.error());
  return std::move(*result);
}
void must(cairn::Result<void> result, const std::string& what) {
  if (!result) give_up(what, result.error());
}

cairn::Client connect(const Arguments& arguments) {
  cairn::ClientOptions options;
  options.servers = {arguments.at("server")};
  options.arena_bytes = 32u << 20;
  options.chunk_bytes = 256u << 10;  // several chunks even in a small tensor
  options.timeout = std::chrono::seconds(20);
  if (arguments.contains("transport")) {
    const std::string& transport = arguments.at("transport");
    options.unix_socket = transport != "tcp";
    options.shared_memory = transport == "shm";
  }
  return must(cairn::Client::connect(options), "connect");
}

// Bounds the load of a test that runs for long.
void pause(const Arguments& arguments) {
  if (arguments.contains("pause"))
    std::this_thread::sleep_for(std::chrono::milliseconds(std::stoul(arguments.at("pause"))));
}

std::atomic<bool> bad = false;
void complain(const std::string& what) {
  bad = true;
  say("bad " + what);
}

// ---- Objects ----

std::size_t object_size(const std::string& key, std::uint64_t version) {
  const std::uint64_t h = mix(hash_of(key) ^ version);
  if (key.starts_with("stream-")) return h % 2'500'000;
  switch (h % 4) {
    case 0:
      return h / 4 % 5000;  // tiny, sometimes empty
    case 1:
      return 65536 * (1 + h / 4 % 5);  // whole blocks
    default:
      return h / 4 % 700'000;
  }
}

std::vector<std::byte> object_content(const std::string& key, std::uint64_t version) {
  std::vector<std::byte> bytes(object_size(key, version));
  const std::uint64_t seed = mix(hash_of(key) + version);
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    const std::uint64_t word = mix(seed + i);
    std::memcpy(bytes.data() + i, &word, std::min<std::size_t>(8, bytes.size() - i));
  }
  return bytes;
}

// Written in pieces. False: given up in the middle, as `abandon` says, so that nothing of it may be seen.
bool put_stream(cairn::Client& client, const std::string& bucket, const std::string& key,
                std::span<const std::byte> bytes, std::uint64_t random, bool abandon) {
  auto writer = must(client.create_object(bucket, key, {}), "create " + key);
  const std::size_t end = abandon ? bytes.size() / 2 : bytes.size();
  for (std::size_t at = 0; at < end;) {
    random = mix(random);
    const std::size_t piece = std::min<std::size_t>(end - at, 1 + random % 900'000);
    must(writer.write(bytes.subspan(at, piece)), "write " + key);
    at += piece;
  }
  if (!abandon) {
    must(writer.finish(), "finish " + key);
  } else if (random % 2 == 0) {
    must(writer.abort(), "abort " + key);
  }  // else dropped
  return !abandon;
}

// One thread's keys. Nobody else writes them, so what it has just done is what a read must find.
class ObjectWriting {
 public:
  ObjectWriting(cairn::Client client, const Arguments& arguments, std::uint64_t thread)
      : client_(std::move(client)),
        arguments_(arguments),
        bucket_(arguments.at("bucket")),
        thread_(thread),
        check_(arguments.contains("check")),
        random_(mix(std::stoull(arguments.at("seed")) * kThreads + thread)),
        next_version_(std::stoull(arguments.at("first-version")) + thread) {
    for (std::uint64_t k = 0; k < kKeys; ++k) {
      // With checks half of the keys are streams; those of other tests have no such keys.
      const std::string kind = check_ && k % 2 == 1 ? "stream-" : "key-";
      keys_.push_back(kind + std::to_string(thread) + "-" + std::to_string(k));
    }
  }

  static constexpr std::uint64_t kThreads = 4;

  void forever() {
    for (;;) {
      random_ = mix(random_);
      const std::uint64_t k = random_ % kKeys;
      if (random_ / 16 % 6 == 0 && known_[k] != 0u) {
        remove(k);
      } else {
        put(k);
      }
      if (check_) {
        random_ = mix(random_);
        read(random_ % kKeys);
        if (random_ / 16 % 8 == 0) list();
      }
      pause(arguments_);
    }
  }

 private:
  static constexpr std::uint64_t kKeys = 10;

  void remove(std::uint64_t k) {
    const std::string address = keys_[k] + " " + std::to_string(next_version_);
    next_version_ += kThreads;
    say("start rm " + address);
    auto removed = client_.remove(bucket_, keys_[k]);
    if (!removed && removed.error().code != cairn::Errc::kNotFound) give_up("rm " + keys_[k], removed.error());
    say("ack rm " + address);
    known_[k] = 0;
  }

  void put(std::uint64_t k) {
    const std::string& key = keys_[k];
    const std::uint64_t version = next_version_;
    next_version_ += kThreads;
    const std::string address = key + " " + std::to_string(version);
    const auto bytes = object_content(key, version);
    const bool abandon = random_ / 128 % 8 == 0;
    if (key.starts_with("stream-")) {
      if (!abandon) say("start put " + address);
      if (!put_stream(client_, bucket_, key, bytes, random_, abandon)) return;
    } else {
      say("start put " + address);
      must(client_.put(bucket_, key, bytes), "put " + key);
    }
    say("ack put " + address);
    known_[k] = version;
  }

  void read(std::uint64_t k) {
    if (!known_[k]) return;
    const std::string& key = keys_[k];
    const std::string name = "object " + key + " " + std::to_string(*known_[k]);
    auto opened = client_.open_object(bucket_, key);
    if (*known_[k] == 0) {
      if (opened || opened.error().code != cairn::Errc::kNotFound)
        complain(name + ": removed, and " + (opened ? "there" : opened.error().message));
      say("check absent " + key);
      return;
    }
    if (!opened && opened.error().code == cairn::Errc::kNotFound) return complain(name + ": gone");
    auto object = must(std::move(opened), "open " + key);
    const auto wanted = object_content(key, *known_[k]);
    std::size_t first = 0, last = wanted.size();
    if (random_ % 4 != 0 && !wanted.empty()) {  // a range
      first = mix(random_ + 1) % wanted.size();
      last = first + mix(random_ + 2) % (wanted.size() - first + 1);
    }
    std::vector<std::byte> found;
    must(object.stream(first, last,
                       [&](std::span<const std::byte> piece) -> cairn::Result<void> {
                         found.insert(found.end(), piece.begin(), piece.end());
                         return {};
                       }),
         "read " + key);
    if (!std::ranges::equal(found, std::span(wanted).subspan(first, last - first)))
      complain(name + ": wrong bytes in [" + std::to_string(first) + ", " + std::to_string(last) + ")");
    say("check read " + key + " " + std::to_string(found.size()));
  }

  void list() {
    for (const std::string kind : {"key-", "stream-"}) {
      cairn::ListOptions options;
      options.prefix = kind + std::to_string(thread_) + "-";
      options.limit = 3;
      std::map<std::string, std::uint64_t> found;
      for (;;) {
        auto page = must(client_.list(bucket_, options), "list " + options.prefix);
        for (const auto& item : page.items) found[item.key] = item.size_bytes;
        if (!page.more) break;
        options.token = page.next;
      }
      for (std::uint64_t k = 0; k < kKeys; ++k) {
        if (!known_[k] || !keys_[k].starts_with(kind)) continue;
        const auto item = found.find(keys_[k]);
        const bool right = *known_[k] == 0 ? item == found.end()
                                           : item != found.end() && item->second == object_size(keys_[k], *known_[k]);
        if (!right) complain("listing of " + options.prefix + ": " + keys_[k] + " is not as it was left");
      }
      say("check list " + options.prefix);
    }
  }

  cairn::Client client_;
  const Arguments& arguments_;
  std::string bucket_;
  std::uint64_t thread_;
  bool check_;
  std::uint64_t random_, next_version_;
  std::vector<std::string> keys_;
  std::array<std::optional<std::uint64_t>, kKeys> known_;  // 0: absent; nothing: perhaps there, from an earlier round
};

int write_objects(const Arguments& arguments) {
  auto client = connect(arguments);
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < ObjectWriting::kThreads; ++t)
    threads.emplace_back([&, t] { ObjectWriting(client, arguments, t).forever(); });
  for (auto& thread : threads) thread.join();
  return 0;
}

// ---- Steps ----

// A tensor of the model; elements are u64, element e of (run, step, restart, tensor) is one fixed number.
struct Tensor {
  std::string name;
  std::vector<std::uint64_t> shape;
};

struct Address {
  std::string run;
  std::uint64_t step;
  std::uint64_t restart;  // of the launch that saved it: a step that mixes launches is noticed
};

std::vector<Tensor> tensors_of(const std::string& run, std::uint64_t step) {
  const std::uint64_t rows = 300 + mix(hash_of(run) + step) % 900;
  return {{"w", {rows, 128}}, {"m", {96, 1000}}, {"shared", {4096}}, {"scalar", {}}, {"empty", {0, 4}}};
}

std::vector<std::byte> box_content(const Address& address, const Tensor& tensor, const cairn::Box& box) {
  const std::uint64_t seed =
      mix(hash_of(address.run + "/" + tensor.name) + mix(address.step) + mix(mix(address.restart)));
  std::uint64_t count = 1;
  for (auto extent : box.shape) count *= extent;
  std::vector<std::byte> bytes(count * 8);
  std::vector<std::uint64_t> at(box.shape.size(), 0);
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t element = 0;
    for (std::size_t d = 0; d < at.size(); ++d) element = element * tensor.shape[d] + box.offset[d] + at[d];
    const std::uint64_t word = mix(seed + element);
    std::memcpy(bytes.data() + i * 8, &word, 8);
    for (std::size_t d = at.size(); d-- > 0;) {
      if (++at[d] < box.shape[d]) break;
      at[d] = 0;
    }
  }
  return bytes;
}

cairn::Box whole(const Tensor& tensor) {
  return {std::vector<std::uint64_t>(tensor.shape.size(), 0), tensor.shape};
}

// Uneven parts: rank r holds [cut(r), cut(r + 1)).
std::uint64_t cut(std::uint64_t extent, std::uint64_t rank, std::uint64_t world) {
  return extent * (rank * rank + rank) / (world * world + world);
}

void save_steps(const Arguments& arguments, std::uint64_t rank, std::uint64_t world) {
  const std::string name = arguments.at("run");
  const std::uint64_t restart = std::stoull(arguments.at("restart"));
  const std::uint64_t keep = arguments.contains("keep") ? std::stoull(arguments.at("keep")) : 0;
  const std::uint64_t until = arguments.contains("until") ? std::stoull(arguments.at("until")) : ~0ull;
  const std::string who = " rank " + std::to_string(rank);
  auto client = connect(arguments);

  cairn::RunOptions run_options;
  run_options.name = name;
  run_options.launch = {arguments.at("job"), restart};
  auto run = must(client.open_run(run_options), "open_run" + who);
  const auto resume = run.resume_step();
  say("resume " + (resume ? std::to_string(*resume) : std::string("-")) + who);

  for (std::uint64_t step = resume ? *resume + 1 : 1; step <= until; ++step) {
    const Address address{name, step, restart};
    const std::string step_name = "step " + std::to_string(step) + " " + std::to_string(restart) + who;
    cairn::SaveOptions options;
    options.step = step;
    options.rank = static_cast<std::uint32_t>(rank);
    options.world_size = static_cast<std::uint32_t>(world);
    say("start " + step_name);
    auto save = must(run.begin_save(options), "begin_save " + step_name);

    std::vector<std::vector<std::byte>> held;  // until staged
    auto add = [&](const Tensor& tensor, cairn::Box box, std::optional<cairn::Holder> holder) {
      held.push_back(box_content(address, tensor, box));
      cairn::TensorShard shard;
      shard.name = tensor.name;
      shard.dtype = cairn::DType::u64;
      shard.global_shape = tensor.shape;
      shard.box = std::move(box);
      shard.holder = holder;
      must(save.add_tensor(std::move(shard), held.back()), "add_tensor " + tensor.name + who);
    };
    for (const auto& tensor : tensors_of(name, step)) {
      if (tensor.name == "w") {  // by rows
        const std::uint64_t first = cut(tensor.shape[0], rank, world), last = cut(tensor.shape[0], rank + 1, world);
        add(tensor, {{first, 0}, {last - first, tensor.shape[1]}}, {});
      } else if (tensor.name == "m") {  // by columns
        const std::uint64_t first = cut(tensor.shape[1], rank, world), last = cut(tensor.shape[1], rank + 1, world);
        add(tensor, {{0, first}, {tensor.shape[0], last - first}}, {});
      } else if (tensor.name == "shared") {
        add(tensor, whole(tensor), cairn::Holder{static_cast<std::uint32_t>(rank), static_cast<std::uint32_t>(world)});
      } else if (rank == world - 1) {
        add(tensor, whole(tensor), {});
      }
    }
    const std::string blob = std::to_string(restart);
    must(save.add_blob("restart", std::as_bytes(std::span(blob))), "add_blob" + who);
    const std::string token = "consumed " + std::to_string(step);
    must(save.add_token("data", std::as_bytes(std::span(token))), "add_token" + who);

    auto ticket = must(save.stage(), "stage " + step_name);
    must(ticket.wait(), "wait " + step_name);
    say("ack " + step_name);

    if (keep != 0 && rank == 0 && step > keep) {
      const std::string old = "rmstep " + std::to_string(step - keep);
      say("start " + old);
      auto removed = client.remove_step(name, step - keep);
      if (!removed && removed.error().code != cairn::Errc::kNotFound) give_up(old, removed.error());
      say("ack " + old);
    }
    pause(arguments);
  }
}

int write_steps(const Arguments& arguments) {
  const std::uint64_t world = std::stoull(arguments.at("world"));
  if (arguments.contains("rank")) {
    save_steps(arguments, std::stoull(arguments.at("rank")), world);
    return 0;
  }
  std::vector<std::thread> ranks;
  for (std::uint64_t rank = 0; rank < world; ++rank)
    ranks.emplace_back([&arguments, rank, world] { save_steps(arguments, rank, world); });
  for (auto& rank : ranks) rank.join();
  return 0;
}

// ---- Reading back ----

// One version of the key must be there, whole: "object BUCKET KEY VERSION...". Version 0 stands for absent.
void verify_object(cairn::Client& client, std::istringstream& line) {
  std::string bucket, key;
  line >> bucket >> key;
  std::vector<std::uint64_t> versions;
  for (std::uint64_t version; line >> version;) versions.push_back(version);
  auto found = client.get(bucket, key);
  for (auto version : versions) {
    const bool matches = version == 0 ? !found && found.error().code == cairn::Errc::kNotFound
                                      : found.has_value() && *found == object_content(key, version);
    if (matches) {
      say("object " + key + " " + std::to_string(version));
      return;
    }
  }
  std::string wanted;
  for (auto version : versions) wanted += " " + std::to_string(version);
  complain("object " + key + ": none of the versions" + wanted + ": " +
           (found ? std::to_string(found->size()) + " bytes of something else"
                  : std::string(cairn::name_of(found.error().code)) + ": " + found.error().message));
}

void verify_step(cairn::Client& client, const Arguments& arguments, const std::string& run, std::uint64_t number) {
  const std::string name = run + " step " + std::to_string(number);
  auto step = client.open_step(run, number);
  if (!step && step.error().code == cairn::Errc::kNotFound && arguments.contains("removals")) return;
  if (!step) return complain(name + " is listed, but open: " + step.error().message);
  auto blob = step->blob("restart", 0);
  if (!blob) return complain(name + " blob: " + blob.error().message);
  const std::string restart(reinterpret_cast<const char*>(blob->data()), blob->size());
  if (restart != std::to_string(step->info().launch.restart))
    return complain(name + ": blob of launch " + restart + ", committed by launch " +
                    std::to_string(step->info().launch.restart));
  for (std::uint32_t rank = 1; rank < step->info().world_size; ++rank) {
    auto other = step->blob("restart", rank);
    if (!other) return complain(name + " blob of rank " + std::to_string(rank) + ": " + other.error().message);
    if (*other != *blob) return complain(name + ": rank " + std::to_string(rank) + " is of another launch");
  }
  auto token = step->token("data");
  const std::string wanted_token = "consumed " + std::to_string(number);
  if (!token) return complain(name + " token: " + token.error().message);
  if (std::string(reinterpret_cast<const char*>(token->data()), token->size()) != wanted_token)
    return complain(name + ": wrong token");

  // In another layout than it was saved in: what was saved by rows is restored by columns, and the other way round.
  const std::uint64_t layout = arguments.contains("layout") ? std::stoull(arguments.at("layout")) : 2;
  const Address address{run, number, std::stoull(restart)};
  struct Part {
    Tensor tensor;
    cairn::Box box;
    std::vector<std::byte> out;
  };
  std::vector<Part> parts;
  for (const auto& tensor : tensors_of(run, number)) {
    std::vector<cairn::Box> boxes = {whole(tensor)};
    if (tensor.name == "w" || tensor.name == "m") {
      const std::size_t split = tensor.name == "w" ? 1 : 0;
      boxes.clear();
      for (std::uint64_t part = 0; part < layout; ++part) {
        cairn::Box box = whole(tensor);
        box.offset[split] = tensor.shape[split] * part / layout;
        box.shape[split] = tensor.shape[split] * (part + 1) / layout - box.offset[split];
        boxes.push_back(std::move(box));
      }
    }
    for (auto& box : boxes) {
      const std::size_t size = box_content(address, tensor, box).size();
      parts.push_back({tensor, std::move(box), std::vector<std::byte>(size)});
    }
  }
  auto restore = step->restore();
  for (auto& part : parts) restore.want({part.tensor.name, part.box}, part.out);
  auto done = restore.run();
  if (!done) return complain(name + " restore: " + done.error().message);
  for (auto& part : parts)
    if (part.out != box_content(address, part.tensor, part.box))
      return complain(name + ": wrong bytes in tensor " + part.tensor.name);
  say("visible " + std::to_string(number) + " " + restart);
}

// Every step that is visible must be whole: "run BUCKET/RUN" prints "visible STEP RESTART" for each.
void verify_run(cairn::Client& client, const Arguments& arguments, std::istringstream& line) {
  std::string run;
  line >> run;
  std::optional<std::uint64_t> after;
  for (;;) {
    auto page = client.steps(run, after, 100);
    if (!page && page.error().code == cairn::Errc::kNotFound) return;  // killed before the run was opened
    if (!page) return complain("list " + run + ": " + page.error().message);
    for (const auto& step : page->items) {
      verify_step(client, arguments, run, step.step);
      after = step.step;
    }
    if (!page->more) return;
  }
}

int verify(const Arguments& arguments) {
  auto client = connect(arguments);
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    std::string what;
    line >> what;
    if (what == "object") {
      verify_object(client, line);
    } else if (what == "run") {
      verify_run(client, arguments, line);
    } else {
      complain("no such expectation: " + text);
    }
  }
  return bad ? 1 : 0;
}

}  // namespace

int main(int count, char** words) {
  Arguments arguments;
  for (int i = 2; i + 1 < count; i += 2) arguments[std::string(words[i]).substr(2)] = words[i + 1];
  const std::string mode = count > 1 ? words[1] : "";
  if (mode == "objects") return write_objects(arguments);
  if (mode == "steps") return write_steps(arguments);
  if (mode == "verify") return verify(arguments);
  std::fprintf(stderr, "usage: ack_writer objects|steps|verify --server HOST:PORT ...\n");
  return 2;
}
