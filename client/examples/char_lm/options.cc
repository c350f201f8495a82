#include "client/examples/char_lm/options.h"

#include <charconv>
#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>
#include <string_view>

namespace char_lm {
namespace {

template <class Number>
bool parse_number(std::string_view text, Number& out) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

}  // namespace

const char* usage() {
  return R"(Trains a small character-level language model with several rank processes on this host, whose only lasting state
are its checkpoints in Cairn. Started again, on any number of ranks that divides the batch, it goes on from the last
committed step and computes the same numbers to the bit. The bucket must exist.

  cairn bucket create demo
  cairn_char_lm --run demo/charlm --ranks 4 --steps 60 --save-every 10

  --server HOST:PORT[,...]   daemons (default: $CAIRN_SERVER, else 127.0.0.1:7420)
  --run BUCKET/RUN           name of the training on the store (required)
  --launch JOB[:RESTART]     id of this start (default: a new one)
  --ranks N                  rank processes (4); must divide --batch
  --steps N                  train up to this step (60)
  --save-every N             save after every N steps, while training goes on (10; 0: never)
  --seed N                   of the weights and the order of samples (1)
  --batch N                  samples per step, of 64 characters each (48)
  --hidden N                 width of the hidden layer (158)
  --table-rows N             rows of the trigram table, each --hidden wide (2039): makes the state larger, steps hardly slower
  --learning-rate X          of Adam (0.006)
  --log-every N              print the loss every N steps (5)
  --text DIR                 read the files of this folder (/usr/share/common-licenses)
  --status-file FILE         append the process ids, and what --stop-in-save reports
  --stop-in-save STEP        save STEP, but never complete that save: the last rank holds one tensor back. Every rank
                             notes "rank=R step=STEP staged" in the status file and waits to be killed.

Exit codes: 0 done, 1 failed, 2 wrong usage.
)";
}

std::expected<Options, std::string> parse(int count, char** arguments) {
  Options options;
  const char* server = std::getenv("CAIRN_SERVER");
  options.servers = split(server && *server ? server : "127.0.0.1:7420");

  using Setter = std::function<bool(const std::string&)>;
  auto number = [](auto& field) { return [&field](const std::string& value) { return parse_number(value, field); }; };
  auto text = [](std::string& field) {
    return [&field](const std::string& value) {
      field = value;
      return !value.empty();
    };
  };
  std::map<std::string, Setter, std::less<>> flags;
  flags["--server"] = [&](const std::string& value) {
    options.servers = split(value);
    return !options.servers.empty();
  };
  flags["--run"] = text(options.run);
  flags["--launch"] = text(options.launch);
  flags["--ranks"] = number(options.ranks);
  flags["--steps"] = number(options.steps);
  flags["--save-every"] = number(options.save_every);
  flags["--seed"] = number(options.train.seed);
  flags["--batch"] = number(options.train.batch);
  flags["--hidden"] = number(options.train.model.hidden);
  flags["--table-rows"] = number(options.train.model.table_rows);
  flags["--learning-rate"] = number(options.train.learning_rate);
  flags["--log-every"] = number(options.log_every);
  flags["--text"] = text(options.text);
  flags["--status-file"] = text(options.status_file);
  flags["--stop-in-save"] = [&](const std::string& value) {
    return parse_number(value, options.stop_in_save.emplace());
  };

  for (int i = 1; i < count; ++i) {
    std::string flag = arguments[i], value;
    if (flag == "--help" || flag == "-h") {
      options.help = true;
      return options;
    }
    const std::size_t equals = flag.find('=');
    const bool joined = equals != std::string::npos;
    if (joined) {
      value = flag.substr(equals + 1);
      flag.resize(equals);
    }
    auto setter = flags.find(flag);
    if (setter == flags.end()) return std::unexpected("unknown argument (see --help): " + flag);
    if (!joined) {
      if (++i == count) return std::unexpected(flag + " needs a value");
      value = arguments[i];
    }
    if (!setter->second(value)) return std::unexpected(flag.append(": not a good value: ").append(value));
  }
  if (options.run.empty()) return std::unexpected("--run BUCKET/RUN is missing (see --help)");
  if (options.log_every == 0) return std::unexpected("--log-every must be 1 or more");
  if (options.ranks < 1 || options.ranks > 256) return std::unexpected("--ranks must be 1 to 256");
  if (options.train.model.hidden > 65536 || options.train.model.table_rows > (std::size_t{1} << 28))
    return std::unexpected("--hidden is at most 65536, --table-rows at most 268435456");
  if (options.stop_in_save && (options.status_file.empty() || options.ranks < 2))
    return std::unexpected("--stop-in-save needs --status-file and two ranks or more");
  return options;
}

}  // namespace char_lm
