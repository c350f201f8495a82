#include "server/cairnd/options.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <limits>
#include <set>
#include <utility>

#include "proto/common/ids.h"
#include "proto/common/quantity.h"
#include "proto/common/text.h"
#include "proto/runtime/address.h"

namespace cairn::server {
namespace {

using enum Option::When;
using Kind = Option::Kind;
using Values = std::vector<std::string>;

constexpr std::size_t kDirectoriesMax = 64;
constexpr std::uint64_t kConnectionBytes = 16 * kKiB;  // of an idle one; measured: 13.2 KiB
constexpr auto kYear = std::chrono::hours(24 * 365);

Failure not_a(const std::string& value, std::string_view what, const std::string& allowed) {
  return fail(Errc::kInvalid, "'" + printable(value) + "' is not " + std::string(what) + "; allowed: " + allowed);
}

Option text(std::string_view key, std::string CairndOptions::* field, Option::When when, std::string allowed,
            std::string_view help, Result<void> (*check)(const std::string&) = nullptr) {
  return {.key = key,
          .kind = Kind::kText,
          .when = when,
          .help = help,
          .allowed = std::move(allowed),
          .set = [=](CairndOptions& o, const Values& v) -> Result<void> {
            if (!v[0].empty()) CHECK_OK(check_free_name("the", v[0]));
            if (check != nullptr) CHECK_OK(check(v[0]));
            o.*field = v[0];
            return {};
          },
          .get = [=](const CairndOptions& o) { return Values{o.*field}; }};
}

Option texts(std::string_view key, std::vector<std::string> CairndOptions::* field, Option::When when,
             std::string allowed, std::string_view help) {
  return {.key = key,
          .kind = Kind::kTexts,
          .when = when,
          .help = help,
          .allowed = std::move(allowed),
          .set = [=](CairndOptions& o, const Values& v) -> Result<void> {
            for (const auto& one : v) CHECK_OK(check_free_name("the", one));
            o.*field = v;
            return {};
          },
          .get = [=](const CairndOptions& o) { return o.*field; }};
}

Option lost_targets() {
  return {.key = "lost_target",
          .kind = Kind::kTexts,
          .when = kStart,
          .help =
              "The data directories with these ids are lost for good: go on without them, and put an empty one in "
              "the place of each",
          .allowed = "ids of targets, 32 hex digits each",
          .set = [](CairndOptions& o, const Values& v) -> Result<void> {
            std::set<Uuid> ids;
            for (const auto& one : v) {
              TRY(const auto id, Uuid::from_text(one));
              ids.insert(id);
            }
            o.lost_targets = std::move(ids);
            return {};
          },
          .get =
              [](const CairndOptions& o) {
                Values out;
                for (const auto& id : o.lost_targets) out.push_back(id.text());
                return out;
              }};
}

Option flag(std::string_view key, bool CairndOptions::* field, Option::When when, std::string_view help) {
  return {.key = key,
          .kind = Kind::kFlag,
          .when = when,
          .help = help,
          .allowed = "true or false",
          .set = [=](CairndOptions& o, const Values& v) -> Result<void> {
            if (v[0] != "true" && v[0] != "false") return not_a(v[0], "a switch", "true or false");
            o.*field = v[0] == "true";
            return {};
          },
          .get = [=](const CairndOptions& o) { return Values{o.*field ? "true" : "false"}; }};
}

/// A number within `min` and `max`: what kCount, kBytes and kDuration share. `parse` gives an optional<Wide>.
template <class Wide, class Field, class Parse, class Print>
Option ranged(std::string_view key, Kind kind, Field CairndOptions::* field, Wide min, Wide max, Option::When when,
              std::string_view help, std::string_view what, Parse parse, Print print) {
  const std::string allowed = print(min) + " to " + print(max);
  return {.key = key,
          .kind = kind,
          .when = when,
          .help = help,
          .allowed = allowed,
          .set = [=](CairndOptions& o, const Values& v) -> Result<void> {
            const auto value = parse(v[0]);
            if (!value) return not_a(v[0], what, allowed);
            if (*value < min || *value > max)
              return fail(Errc::kInvalid, v[0] + " is out of range; allowed: " + allowed);
            o.*field = static_cast<Field>(*value);
            return {};
          },
          .get = [=](const CairndOptions& o) { return Values{print(static_cast<Wide>(o.*field))}; }};
}

template <class Field>
Option count(std::string_view key, Field CairndOptions::* field, std::uint64_t min, std::uint64_t max,
             Option::When when, std::string_view help) {
  const auto parse = [](const std::string& s) -> std::optional<std::uint64_t> {
    std::uint64_t number = 0;
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), number);
    if (error != std::errc() || end != s.data() + s.size()) return std::nullopt;
    return number;
  };
  return ranged<std::uint64_t>(key, Kind::kCount, field, min, max, when, help, "a whole number", parse,
                               [](std::uint64_t n) { return std::to_string(n); });
}

Option bytes(std::string_view key, std::uint64_t CairndOptions::* field, std::uint64_t min, std::uint64_t max,
             Option::When when, std::string_view help) {
  return ranged<std::uint64_t>(key, Kind::kBytes, field, min, max, when, help, "a size such as 64KiB, 512MiB or 1GiB",
                               &parse_bytes, &bytes_text);
}

Option duration(std::string_view key, rt::Duration CairndOptions::* field, rt::Duration min, rt::Duration max,
                Option::When when, std::string_view help) {
  return ranged<rt::Duration>(key, Kind::kDuration, field, min, max, when, help,
                              "a duration such as 200ms, 30s, 10m or 1h", &parse_duration, &duration_text);
}

template <class Enum>
Option choice(std::string_view key, Enum CairndOptions::* field, Option::When when,
              std::initializer_list<std::pair<std::string_view, Enum>> names, std::string_view help) {
  const std::vector<std::pair<std::string_view, Enum>> all(names);
  std::string allowed;
  for (const auto& [name, value] : all)
    allowed += (allowed.empty() ? "" : name == all.back().first ? " or " : ", ") + std::string(name);
  return {.key = key,
          .kind = Kind::kChoice,
          .when = when,
          .help = help,
          .allowed = allowed,
          .set = [=](CairndOptions& o, const Values& v) -> Result<void> {
            for (const auto& [name, value] : all)
              if (name == v[0]) {
                o.*field = value;
                return {};
              }
            return not_a(v[0], "one of them", allowed);
          },
          .get =
              [=](const CairndOptions& o) {
                for (const auto& [name, value] : all)
                  if (value == o.*field) return Values{std::string(name)};
                return Values{""};
              }};
}

Result<void> check_node(const std::string& name) {
  static constexpr const char* kAllowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  if (name.size() <= 255 && name.find_first_not_of(kAllowed) == name.npos) return {};
  return not_a(name, "a name", "up to 255 letters, digits, '.', '_' or '-'");
}

std::vector<Option> make_table() {
  using std::chrono::milliseconds;
  using std::chrono::seconds;
  using O = CairndOptions;
  return {
      // ---- Without a section
      texts(
          "data", &O::data, kStart, "one directory or more",
          "Data directory, made when missing (its parent must exist). Several are several targets: buckets may ask for "
          "as many copies, up to three, and one that fails is served around"),
      lost_targets(),
      text("listen", &O::listen, kStart, "HOST:PORT", "Address for clients; port 0: a free one"),
      text("http", &O::http, kStart, "HOST:PORT", "Address of /healthz, /readyz and /metrics; port 0: a free one"),
      flag("insecure_listen", &O::insecure_listen, kStart,
           "Allow other addresses than loopback: anybody who reaches them can read and delete everything"),
      text("unix_socket", &O::unix_socket, kStart, "a path, or none",
           "Socket for clients on this host; empty: cairn.sock in the first data directory"),
      text("node", &O::node, kStart, "up to 255 letters, digits, '.', '_' or '-'",
           "Name of this node; empty: the host's name", &check_node),
      bytes("memory", &O::memory_bytes, 64 * kMiB, 1024 * kGiB, kStart,
            "Budget of memory: buffers, index, messages and merges together"),
      choice<storage::IoBackend>("io", &O::io, kStart,
                                 {{"auto", storage::IoBackend::kAuto},
                                  {"uring", storage::IoBackend::kUring},
                                  {"threads", storage::IoBackend::kThreads}},
                                 "How bytes reach the disk; auto: io_uring where the kernel allows it"),

      // ---- [log]
      choice<rt::Level>("log.level", &O::log_level, kLive,
                        {{"debug", rt::Level::kDebug},
                         {"info", rt::Level::kInfo},
                         {"warning", rt::Level::kWarning},
                         {"error", rt::Level::kError}},
                        "Least level of the lines on stderr"),
      choice<rt::LogFormat>("log.format", &O::log_format, kLive,
                            {{"text", rt::LogFormat::kText}, {"json", rt::LogFormat::kJson}},
                            "Lines of key=value pairs, or of JSON objects"),
      count("log.lines", &O::log_lines, 1, 1'000'000, kLive,
            "Lines a second of one event; what is held back is counted, and the count is logged"),

      // ---- [limits]: what a peer may take. Sizes of frames are the protocol's.
      count("limits.connections", &O::connections, 1, 1'000'000, kLive,
            "Client connections together; fewer when the budget of memory or the limit of open files allows less"),
      count("limits.connections_per_peer", &O::connections_per_peer, 1, 1'000'000, kLive,
            "Client connections of one address, or of one user on the unix socket"),
      count("limits.connections_unknown", &O::connections_unknown, 1, 1'000'000, kLive,
            "Client connections that have not said who they are; beyond it the oldest is closed"),
      duration("limits.handshake", &O::handshake, milliseconds(100), kYear, kLive,
               "From the connection to the end of its hello"),
      duration("limits.header", &O::header, milliseconds(100), kYear, kLive,
               "From the first byte of a message to its end"),
      duration("limits.idle", &O::idle, seconds(10), kYear, kLive,
               "Without any byte; clients give a sign of life every 5s"),
      bytes("limits.body_rate", &O::body_rate, 0, kGiB, kLive,
            "Bytes a second, averaged over body_window, that a peer must send when it owes data, and take when it is "
            "sent some"),
      duration("limits.body_window", &O::body_window, seconds(1), kYear, kLive, "See body_rate"),
      bytes("limits.connection_bytes", &O::connection_bytes, 2 * kMiB, 1024 * kGiB, kLive,
            "Requests under way and replies not taken of one connection, each; at most a quarter of the memory for "
            "messages"),
      count("limits.http_connections", &O::http_connections, 1, 100'000, kStart,
            "Connections of the http port; beyond it the oldest that waits for a request is closed"),
      bytes("limits.http_head", &O::http_head, kKiB, kMiB, kStart, "Bytes of the head of an http request"),

      // ---- [space]: of the disk
      bytes("space.ballast", &O::ballast, kMiB, 1024 * kGiB, kStart,
            "Free space that saves and uploads leave alone, for deletes and the index"),
      bytes("space.recycle", &O::recycle, 0, 1024 * kGiB, kStart,
            "Space of deleted data, in each directory, that stays allocated to be written again, which is cheaper than "
            "new space; it counts as free, and is given back when the disk runs short and at the end; 0: none"),
      count("space.low", &O::space_low, 0, 50, kStart,
            "Percent of the disk, above the ballast: when less is free one line is logged"),

      // ---- [upload]: of an object
      duration("upload.idle", &O::upload_idle, seconds(1), kYear, kStart,
               "After which an upload that nobody goes on with is dropped and its space freed"),

      // ---- [rank]: ranks of a save
      duration("rank.silence", &O::rank_silence, milliseconds(100), kYear, kStart,
               "After which a rank that has not sealed and says nothing fails its save for all ranks"),
      duration("rank.join", &O::rank_join, seconds(1), kYear, kStart,
               "After which a rank that has not begun fails a save that others have begun"),

      // ---- [handover]: saves that the daemon finishes when their ranks have died
      bytes("handover.memory", &O::handover_memory, 0, 16 * 1024 * kGiB, kLive,
            "Memory of clients on this host that may hold saves which they have handed over: it is kept until they "
            "are written, also when the client has died; a save beyond it needs its rank until then; 0: none"),

      // ---- [reader]
      duration("reader.ttl", &O::reader_ttl, seconds(1), kYear, kStart,
               "How long what a reader has open is kept for it without a sign of life"),
      count("reader.max", &O::readers_max, 1, 10'000'000, kStart,
            "Steps and objects that all clients together may have open for reading"),
      count("reader.connection_max", &O::connection_readers_max, 1, 10'000'000, kStart,
            "Steps and objects that may be open for reading by one connection"),

      // ---- [retention]
      duration("retention.interval", &O::retention_interval, seconds(1), kYear, kLive,
               "Between looks for steps that no rule of their bucket keeps"),

      // ---- [garbage]
      duration("garbage.grace", &O::garbage_grace, milliseconds(0), kYear, kLive,
               "How long chunks must be dead before they are freed"),
      duration("garbage.interval", &O::garbage_interval, milliseconds(1), kYear, kLive,
               "Between looks for dead chunks"),

      // ---- [scrub], [repair]: looking after the copies
      bytes("scrub.pace", &O::scrub_pace, 0, 1024 * kGiB, kLive,
            "Bytes a second of each directory that are read to see whether they are whole; 0: no limit"),
      duration("scrub.interval", &O::scrub_interval, milliseconds(0), kYear, kLive,
               "From the begin of one look at every chunk to the next; 0s: only when somebody asks (cairn verify)"),
      bytes("repair.pace", &O::repair_pace, 0, 1024 * kGiB, kLive,
            "Bytes a second that are copied to directories that lack them or have them damaged; 0: no limit"),
  };
}

}  // namespace

std::string Option::flag() const {
  std::string out = "--" + std::string(key);
  std::ranges::replace_if(out, [](char c) { return c == '.' || c == '_'; }, '-');
  return out;
}

const std::vector<Option>& option_table() {
  static const auto table = make_table();
  return table;
}

MemoryShares memory_shares(const CairndOptions& options) {
  const auto memory = options.memory_bytes;
  return {.units = static_cast<std::size_t>(memory / 2 / kUnitBytes),
          .index_bytes = std::clamp<std::uint64_t>(memory / 8, 8 * kMiB, 512 * kMiB),
          .message_bytes = std::clamp<std::uint64_t>(memory / 16, 4 * kMiB, 64 * kMiB),
          .merge_bytes = std::min<std::uint64_t>(memory * 3 / 16, 256 * kMiB),
          .connections = static_cast<std::uint32_t>(
              std::min<std::uint64_t>({memory / 8 / kConnectionBytes, options.connections}))};
}

Result<void> check_listen(const CairndOptions& options, const std::string& address) {
  if (auto parsed = rt::parse_address(address); !parsed) return fail(std::move(parsed).error());
  if (rt::is_loopback(address) || options.insecure_listen) return {};
  return fail(Errc::kDenied,
              "only loopback addresses, because connections are neither encrypted nor authenticated; "
              "--insecure-listen allows it all the same");
}

std::vector<Error> contradictions(const CairndOptions& options) {
  std::vector<Error> out;
  if (options.data.empty())
    out.push_back({Errc::kInvalid, "data: no data directory: give --data DIR, or data = [\"DIR\"] in the file"});
  if (options.data.size() > kDirectoriesMax)
    out.push_back({Errc::kInvalid, "--data is given " + std::to_string(options.data.size()) + " times, at most " +
                                       std::to_string(kDirectoriesMax) + " are allowed"});
  std::set<std::string> seen;
  for (const auto& dir : options.data)
    if (!seen.insert(dir).second) out.push_back({Errc::kInvalid, "data: '" + printable(dir) + "' is given twice"});
  for (const auto& [key, address] : {std::pair("listen", options.listen), std::pair("http", options.http)})
    if (auto allowed = check_listen(options, address); !allowed)
      out.push_back(std::move(allowed).error().with("--" + std::string(key) + " " + printable(address)));
  return out;
}

}  // namespace cairn::server
