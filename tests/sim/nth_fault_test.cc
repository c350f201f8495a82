#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <iostream>
#include <map>
#include <optional>
#include <vector>

#include "client/core/buckets.h"
#include "client/core/object_writer.h"
#include "client/core/objects.h"
#include "client/core/save.h"
#include "client/core/session.h"
#include "client/core/step_reader.h"
#include "client/core/steps.h"
#include "proto/common/checksum.h"
#include "proto/rt/unit_pool.h"
#include "server/daemon/daemon.h"
#include "tests/sim/daemon.h"
#include "tests/sim/net.h"
#include "tests/sim/prng.h"
#include "tests/sim/world.h"

// Fail the n-th call: each operation of the unchanged client and daemon is run again and again, each time in a fresh
// world; the first time the first disk operation of a kind fails, then the second, until one passes with no fault
// reached. The same with connections and with the memory budget.
//
// Whatever failed:
// * the operation ends, in success or an error with a code that says what may be done;
// * what is visible is what was before it or what is after it, nothing else; after success only the latter;
// * with the fault gone the operation works, and what is visible then is as if nothing had happened;
// * nothing is held: buffers, reservations, readers, attempts, connections, chunks that no record names; and when all
//   is removed, space.

using namespace cairn;
using namespace cairn::sim;
using namespace std::chrono_literals;

namespace {

constexpr rt::Duration kTimeout = 20s;
constexpr std::size_t kArenaBytes = 512 * kKiB;
// A sanitizer makes a run ten times as dear, and looks for memory errors on the ways out, not for rare states.
#if __has_feature(address_sanitizer)
constexpr std::uint64_t kEachBelow = 1;
constexpr std::size_t kBuffersLeft[] = {0, 2};
#else
constexpr std::uint64_t kEachBelow = 24;
constexpr std::size_t kBuffersLeft[] = {0, 1, 2, 3, 5};
#endif

std::string content_of(const std::string& name, std::size_t size) {
  Prng draw(1, name);
  std::string out(size, '\0');
  for (auto& c : out) c = static_cast<char>(draw.next());
  return out;
}

/// What anybody can see of the store.
using View = std::map<std::string, std::string>;

std::string text(const View& view) {
  std::string out;
  for (const auto& [name, value] : view) out += "  " + name + ": " + value + "\n";
  return out;
}

class Stage {
 public:
  explicit Stage(std::size_t directories)
      : world(7),
        daemon(world, options(directories)),
        node(world.make_node("client")),
        copies(static_cast<std::uint32_t>(directories)) {
    daemon.start();
    REQUIRE(world.run_until([&] { return daemon.ready(); }, world.now() + 1min));
    connect();
  }
  Stage(const Stage&) = delete;
  ~Stage() {
    disconnect();
    node.kill(Death::kProcess);
    if (daemon.node().alive()) daemon.node().kill(Death::kProcess);
  }
  void connect() {
    client::SessionOptions options;
    options.servers = {daemon.address()};
    auto connected = run(client::Session::connect(node.runtime(), options, soon()));
    REQUIRE(connected);
    session = *connected;
    arena = *client::Arena::create(node, kArenaBytes, 64 * kKiB, session->unit_bytes());
  }
  void disconnect() {
    if (session) session->close();
    session.reset();
  }
  static SimDaemon::Options options(std::size_t directories) {
    SimDaemon::Options out;
    out.directories = directories;
    out.capacity_bytes = 64 * kMiB;
    out.garbage_grace = 2s;
    out.readers_ttl = 3s;
    return out;
  }
  rt::TimePoint soon() const { return node.now() + kTimeout; }
  template <class T>
  Result<T> run(Task<T> task) {
    return world.run(node, std::move(task), 30min);
  }
  /// Longer than anything that is given up is kept.
  void let_expire() {
    world.run_for(100s);
    // Of two ranks one may never have joined.
    if (daemon.ready() && daemon.process().stats().checkpoints.open > 0) world.run_for(11min);
  }

  World world;
  SimDaemon daemon;
  Node& node;
  std::uint32_t copies;
  std::shared_ptr<client::Session> session;
  std::unique_ptr<client::Arena> arena;
  std::uint64_t launches = 0;
};

// ---- Operations

Task<void> put(Stage* s, std::string key, std::size_t size, client::PutTerms terms, client::ExtentList::Limits limits) {
  const auto bytes = content_of(key + std::to_string(size), size);
  client::ChunkWriter::Options options;
  options.timeout = kTimeout;
  CO_TRY(auto writer, co_await client::ObjectWriter::begin(s->session, *s->arena, "b", key, terms, options, limits));
  Result<void> done;
  for (std::size_t at = 0; done && at < size; at += 20'000) {
    done = co_await writer->write(bytes_of(std::string_view(bytes).substr(at, 20'000)));
    // Several small chunks, so that their extents need pages.
    if (done && limits.inline_runs < 10) done = co_await writer->flush();
  }
  if (done) {
    auto sealed = co_await writer->seal();
    if (!sealed) done = fail(sealed.error());
  }
  if (!done) client::ObjectWriter::give_up(writer);
  co_return done;
}

Task<std::string> read_object(Stage* s, std::string key, std::uint64_t first, std::uint64_t size) {
  CO_TRY(auto opened, co_await client::open_object(s->session, "b", key, s->soon()));
  auto object = std::make_shared<const client::OpenedObject>(std::move(opened));
  std::string out(std::min(size, object->summary.size - first), '\0');
  CO_CHECK_OK(
      co_await client::read_object(s->session, "b", object, first, std::as_writable_bytes(std::span(out)), kTimeout));
  if (out.size() == object->summary.size && crc32c(bytes_of(out)) != object->summary.crc)
    co_return fail(Errc::kFailed, "BROKEN: other bytes than were put");
  co_return out;
}

constexpr std::uint64_t kRows = 64, kColumns = 1024;

std::string tensor_content(std::uint64_t step) {
  return content_of("tensor " + std::to_string(step), kRows * kColumns);
}

/// Two ranks, half of the rows each.
Task<void> save(Stage* s, std::uint64_t step) {
  auto run = co_await client::open_run(
      s->session, {.bucket = "b", .run = "r", .launch = {"job", s->launches++}, .resume = {}, .discard_after = false},
      s->soon());
  if (!run) co_return fail(run.error());
  const auto all = tensor_content(step);
  client::SaveTuning tuning;
  tuning.timeout = kTimeout;
  std::array<std::shared_ptr<client::SaveAttempt>, 2> ranks;
  Result<void> done;
  for (std::uint32_t rank = 0; done && rank < 2; ++rank) {
    auto begun = co_await client::SaveAttempt::begin(
        s->session, *s->arena, *run, {.step = step, .rank = rank, .world_size = 2, .declared_bytes = all.size() / 2},
        tuning);
    if (begun)
      ranks[rank] = *begun;
    else
      done = fail(begun.error());
  }
  for (std::uint32_t rank = 0; done && rank < 2; ++rank) {
    format::ShardEntry entry;
    entry.tensor = "w";
    entry.dtype = format::DType::kU8;
    entry.global_shape = {kRows, kColumns};
    entry.box = {{rank * kRows / 2, 0}, {kRows / 2, kColumns}};
    const auto half = std::string_view(all).substr(rank * all.size() / 2, all.size() / 2);
    CO_CHECK_OK(ranks[rank]->add_tensor(std::move(entry), bytes_of(half)));
    CO_CHECK_OK(ranks[rank]->add_blob("state", bytes_of(std::string_view("of a rank"))));
    done = co_await ranks[rank]->stage(true);
  }
  for (auto& rank : ranks) {
    if (!done) break;
    auto outcome = co_await rank->outcome(s->node.now() + 5min);
    if (!outcome) done = fail(outcome.error());
  }
  // As a job does that gives up.
  if (!done && ranks[0]) (void)co_await ranks[0]->abort("a rank gave up", s->soon());
  co_return done;
}

Task<void> restore(Stage* s, std::uint64_t step) {
  CO_TRY(auto reader, co_await client::StepReader::open(s->session, "b", "r", step, kTimeout));
  CO_TRY(auto contents, co_await reader->find({}));
  const auto all = tensor_content(step);
  // By columns.
  std::string left(all.size() / 2, '\0'), right(all.size() / 2, '\0');
  CO_CHECK_OK(co_await reader->restore(
      {{"w", format::Box{{0, 0}, {kRows, kColumns / 2}}}, {"w", format::Box{{0, kColumns / 2}, {kRows, kColumns / 2}}}},
      {std::as_writable_bytes(std::span(left)), std::as_writable_bytes(std::span(right))}));
  for (std::uint64_t row = 0; row < kRows; ++row)
    if (left.compare(row * kColumns / 2, kColumns / 2, all, row * kColumns, kColumns / 2) != 0 ||
        right.compare(row * kColumns / 2, kColumns / 2, all, row * kColumns + kColumns / 2, kColumns / 2) != 0)
      co_return fail(Errc::kFailed, "BROKEN: wrong bytes in the tensor");
  if (contents.blobs.size() != 2) co_return fail(Errc::kFailed, "BROKEN: blobs are missing");
  for (auto& entry : contents.blobs) {
    CO_TRY(const auto blob, co_await reader->blob(entry));
    if (blob != "of a rank") co_return fail(Errc::kFailed, "BROKEN: wrong bytes in a blob");
  }
  co_return {};
}

Task<View> look(Stage* s) {
  View view;
  CO_TRY(const auto buckets, co_await client::list_buckets(s->session, s->soon()));
  for (const auto& listed : buckets) {
    CO_TRY(const auto b, co_await client::show_bucket(s->session, listed.name, s->soon()));
    view["bucket " + b.name] = "copies " + std::to_string(b.copies) + " quota " + std::to_string(b.quota_bytes) +
                               " keep " + std::to_string(b.keep_last) + " used " + std::to_string(b.used_bytes) +
                               " objects " + std::to_string(b.objects) + " steps " + std::to_string(b.steps) +
                               " reserved " + std::to_string(b.reserved_bytes);
  }
  client::ListRequest page;
  page.limit = 2;
  for (bool more = true; more;) {
    CO_TRY(const auto objects, co_await client::list_objects(s->session, "b", page, s->soon()));
    for (const auto& object : objects.objects) {
      CO_TRY(const auto bytes, co_await read_object(s, object.key, 0, ~0ull));
      view["object " + object.key] = bytes == content_of(object.key + std::to_string(bytes.size()), bytes.size())
                                         ? std::to_string(bytes.size()) + " bytes"
                                         : "BROKEN: wrong bytes";
    }
    more = objects.more;
    page.token = objects.next;
  }
  auto steps = co_await client::list_steps(s->session, "b", "r", std::nullopt, 100, s->soon());
  if (!steps && steps.error().code != Errc::kNotFound) co_return fail(steps.error());
  if (steps)
    for (const auto& step : steps->steps) {
      CO_CHECK_OK(co_await restore(s, step.step));
      view["step " + std::to_string(step.step)] = step.pinned ? "pinned" : "whole";
    }
  co_return view;
}

Task<void> create_bucket(Stage* s, std::string name) {
  client::BucketSummary bucket;
  bucket.name = name;
  bucket.copies = s->copies;
  co_return co_await client::create_bucket(s->session, std::move(bucket), s->soon());
}

/// The store before each operation.
Task<void> furnish(Stage* s) {
  CO_CHECK_OK(co_await create_bucket(s, "b"));
  CO_CHECK_OK(co_await create_bucket(s, "empty"));
  for (const char* key : {"old", "gone", "z"}) CO_CHECK_OK(co_await put(s, key, 150'000, {}, {}));
  CO_CHECK_OK(co_await put(s, "paged", 260'000, {}, {.inline_runs = 4, .page_runs = 5}));
  for (std::uint64_t step = 1; step <= 3; ++step) CO_CHECK_OK(co_await save(s, step));
  co_return {};
}

template <class T>
Task<void> only(Task<T> task) {
  auto done = co_await std::move(task);
  if (!done) co_return fail(done.error());
  co_return {};
}

Task<void> list(Stage* s) {
  client::ListRequest request;
  request.limit = 2;
  CO_TRY(auto page, co_await client::list_objects(s->session, "b", request, s->soon()));
  if (page.objects.size() != 2 || !page.more) co_return fail(Errc::kFailed, "BROKEN: a listing with gaps");
  request.token = page.next;
  CO_TRY(page, co_await client::list_objects(s->session, "b", request, s->soon()));
  if (page.objects.size() != 2 || page.objects.back().key != "z")
    co_return fail(Errc::kFailed, "BROKEN: a listing with gaps");
  CO_TRY(const auto steps, co_await client::list_steps(s->session, "b", "r", 1, 10, s->soon()));
  if (steps.steps.size() != 2) co_return fail(Errc::kFailed, "BROKEN: a listing with gaps");
  co_return {};
}

Task<void> abort_upload(Stage* s) {
  client::ChunkWriter::Options options;
  options.timeout = kTimeout;
  CO_TRY(auto writer, co_await client::ObjectWriter::begin(s->session, *s->arena, "b", "never", {}, options));
  const auto bytes = content_of("never", 100'000);
  CO_CHECK_OK(co_await writer->write(bytes_of(bytes)));
  CO_CHECK_OK(co_await writer->flush());
  co_return co_await writer->abort(s->soon());
}

Task<void> collect_garbage(Stage* s) {
  CO_CHECK_OK(co_await client::remove_object(s->session, "b", "gone", {}, s->soon()));
  co_await s->node.sleep(60s);
  co_return {};
}

Task<void> restart(Stage* s) {
  s->world.after(rt::Duration(0), [s] { s->daemon.kill(Death::kPowerLoss, false, 100ms); });
  co_await s->node.sleep(1ms);
  for (int i = 0; i < 600; ++i) {
    if (s->daemon.ready()) co_return {};
    if (s->daemon.refused()) co_return fail(*s->daemon.refused());
    co_await s->node.sleep(200ms);
  }
  co_return fail(Errc::kFailed, "BROKEN: the daemon does not start: " + s->daemon.last_error());
}

struct Operation {
  const char* name;
  Task<void> (*run)(Stage*);
};

const Operation kOperations[] = {
    {"put", [](Stage* s) { return put(s, "new", 100'000, {}, {}); }},
    {"put if absent", [](Stage* s) { return put(s, "new", 70'000, {.if_absent = true, .size_bytes = 70'000}, {}); }},
    {"replace", [](Stage* s) { return put(s, "old", 90'000, {}, {}); }},
    {"stream with pages", [](Stage* s) { return put(s, "new", 160'000, {}, {.inline_runs = 3, .page_runs = 4}); }},
    {"abort an upload", [](Stage* s) { return abort_upload(s); }},
    {"get", [](Stage* s) { return only(read_object(s, "old", 0, ~0ull)); }},
    {"get a range", [](Stage* s) { return only(read_object(s, "paged", 70'000, 50'000)); }},
    {"list", [](Stage* s) { return list(s); }},
    {"remove an object", [](Stage* s) { return client::remove_object(s->session, "b", "gone", {}, s->soon()); }},
    {"create a bucket", [](Stage* s) { return create_bucket(s, "new"); }},
    {"change a bucket",
     [](Stage* s) {
       return only(client::set_bucket(s->session, "b", {.quota_bytes = 50 * kMiB, .keep_last = 10}, s->soon()));
     }},
    {"show a bucket", [](Stage* s) { return only(client::show_bucket(s->session, "b", s->soon())); }},
    {"remove a bucket", [](Stage* s) { return client::remove_bucket(s->session, "empty", s->soon()); }},
    {"save", [](Stage* s) { return save(s, 4); }},
    {"restore", [](Stage* s) { return restore(s, 1); }},
    {"remove a step", [](Stage* s) { return client::remove_step(s->session, "b", "r", 2, s->soon()); }},
    {"remove steps", [](Stage* s) { return only(client::remove_steps_after(s->session, "b", "r", 1, kTimeout)); }},
    {"pin a step", [](Stage* s) { return client::pin_step(s->session, "b", "r", 2, true, s->soon()); }},
    {"collect garbage", [](Stage* s) { return collect_garbage(s); }},
    {"start the daemon", [](Stage* s) { return restart(s); }},
};

// ---- Faults

/// Fails the n-th call of one kind; n counts from 1.
struct FaultKind {
  const char* name;
  std::uint64_t* (*countdown)(Stage&, std::size_t directory);
  double ghost = 0;
  bool of_a_directory = true;
};

const FaultKind kFaultKinds[] = {
    {"disk create", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_create_in; }},
    {"disk open", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_open_in; }},
    {"disk write", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_write_in; }},
    {"disk read", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_read_in; }},
    {"disk flush", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_flush_in; }},
    {"disk punch", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_punch_in; }},
    {"disk rename", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_rename_in; }},
    {"disk unlink", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_unlink_in; }},
    {"disk list", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_list_in; }},
    {"disk space", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].disk->fail_space_in; }},
    {"index commit", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].index->fail_commit_in; }},
    {"index get", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].index->fail_get_in; }},
    {"index scan", [](Stage& s, std::size_t d) { return &s.daemon.directories()[d].index->fail_scan_in; }},
    {"dial", [](Stage& s, std::size_t) { return &s.world.net().refuse_dial_in; }, 0, false},
    {"read of a connection", [](Stage& s, std::size_t) { return &s.world.net().cut_read_in; }, 0, false},
    {"write of a connection", [](Stage& s, std::size_t) { return &s.world.net().cut_write_in; }, 0, false},
    {"write that arrives", [](Stage& s, std::size_t) { return &s.world.net().cut_write_in; }, 1, false},
};

/// What failed calls may say. Not among them: NOT_FOUND, EXISTS, CONFLICT, which would be lies here.
bool honest(Errc code) {
  return code == Errc::kFailed || code == Errc::kUnavailable || code == Errc::kDeadline || code == Errc::kUnknown ||
         code == Errc::kDataLoss || code == Errc::kAttemptFailed || code == Errc::kNoSpace;
}

View view_of(Stage& s) {
  auto seen = s.run(look(&s));
  INFO((seen ? std::string() : seen.error().message));
  REQUIRE(seen);
  for (const auto& [name, value] : *seen) {
    INFO(name << ": " << value);
    REQUIRE_FALSE(value.starts_with("BROKEN"));
  }
  return *std::move(seen);
}

/// Segments that the process has open count until it is gone.
std::uint64_t bytes_when_restarted(Stage& s) {
  s.disconnect();
  s.daemon.kill(Death::kProcess, false, 100ms);
  REQUIRE(s.world.run_until([&] { return s.daemon.ready(); }, s.world.now() + 10min));
  s.world.run_for(5s);
  std::uint64_t bytes = 0;
  for (const auto& directory : s.daemon.directories()) bytes += directory.disk->used_bytes();
  return bytes;
}

Task<void> remove_all(Stage* s) {
  CO_TRY(const auto objects, co_await client::list_objects(s->session, "b", {}, s->soon()));
  for (const auto& object : objects.objects)
    CO_CHECK_OK(co_await client::remove_object(s->session, "b", object.key, {}, s->soon()));
  (void)co_await client::pin_step(s->session, "b", "r", 2, false, s->soon());
  CO_CHECK_OK(co_await client::remove_steps_after(s->session, "b", "r", 0, kTimeout));
  co_return {};
}

/// What the operation makes of the store when nothing fails.
struct Reference {
  View before, after;
  std::uint64_t empty_bytes = 0;  // of the disks, when the store holds nothing
};
Reference reference(const Operation& operation, std::size_t directories) {
  Stage s(directories);
  Reference out;
  out.empty_bytes = bytes_when_restarted(s);
  s.connect();
  REQUIRE(s.run(furnish(&s)));
  out.before = view_of(s);
  const auto done = s.run(operation.run(&s));
  INFO(operation.name << ": " << (done ? "" : done.error().message));
  REQUIRE(done);
  s.let_expire();
  out.after = view_of(s);
  return out;
}

void heal(Stage& s) {
  for (const auto& kind : kFaultKinds)
    for (std::size_t d = 0; d < s.copies; ++d) *kind.countdown(s, d) = 0;
  s.world.net().faults.ghost = 0;
  // An index that calls itself damaged is refused until somebody starts the daemon again.
  if (s.daemon.refused() || (s.daemon.ready() && (s.daemon.fail_stopped() || s.daemon.any_failed())))
    s.daemon.kill(Death::kProcess, false, 100ms);
  const bool up = s.world.run_until([&] { return s.daemon.ready() && s.daemon.redundant(); }, s.world.now() + 10min);
  INFO("the daemon: " << s.daemon.last_error() << (s.daemon.refused() ? s.daemon.refused()->message : ""));
  REQUIRE(up);
}

void nothing_is_held(Stage& s) {
  s.disconnect();
  s.world.run_for(15s);  // readers, mostly
  CHECK(s.arena->free_bytes() == s.arena->total_bytes());
  // A scrub may be looking at a chunk just now: it gives its buffer back between two of them.
  const auto& units = s.daemon.units();
  CHECK(s.world.run_until([&] { return units.available() == units.units(); }, s.world.now() + 1min));
  CHECK(s.world.net().connections() == 0);
  const auto stats = s.daemon.process().stats();
  CHECK(stats.readers.readers == 0);
  CHECK(stats.checkpoints.open == 0);
  CHECK(stats.checkpoints.merging == 0);
  CHECK(stats.garbage.orphaned_bytes == 0);
}

/// The rest, once the operation has ended as `done` says. `space_too`: also removes all and looks at the disk.
void judge(Stage& s, const Operation& operation, const Reference& expected, const Result<void>& done, bool space_too) {
  if (!done) {
    INFO("it said: " << name_of(done.error().code) << ": " << done.error().message);
    REQUIRE(honest(done.error().code));
    REQUIRE_FALSE(done.error().message.empty());
    REQUIRE_FALSE(done.error().message.starts_with("BROKEN"));
    REQUIRE_FALSE(done.error().message.find("limit of World::run") != std::string::npos);
  }
  heal(s);
  s.let_expire();
  const auto seen = view_of(s);
  {
    INFO("it said " << (done ? "done" : done.error().message) << ", visible is\n"
                    << text(seen) << "before\n"
                    << text(expected.before) << "after success\n"
                    << text(expected.after));
    REQUIRE((seen == expected.after || (!done && seen == expected.before)));
  }
  const auto again = s.run(operation.run(&s));
  INFO("again: " << (again ? "done" : again.error().message));
  if (!again) {
    REQUIRE(seen == expected.after);  // it had happened, and says so
    const auto code = again.error().code;
    REQUIRE((code == Errc::kExists || code == Errc::kNotFound || code == Errc::kConflict));
  }
  s.let_expire();
  const auto last = view_of(s);
  INFO("visible at the end\n" << text(last) << "should be\n" << text(expected.after));
  REQUIRE(last == expected.after);
  nothing_is_held(s);
  if (!space_too) return;
  s.connect();
  const auto removed = s.run(remove_all(&s));
  INFO("removing all: " << (removed ? "done" : removed.error().message));
  REQUIRE(removed);
  s.let_expire();
  REQUIRE(bytes_when_restarted(s) <= expected.empty_bytes);
}

/// Fails call after call, until one run reaches none. Returns how many runs met a fault.
std::uint64_t fail_each(const Operation& operation, const FaultKind& kind, std::size_t directories,
                        std::size_t directory, const Reference& expected) {
  // Of many calls of one kind, as scans of all groups, not each.
  for (std::uint64_t n = 1, met = 0;; n += 1 + n / kEachBelow, ++met) {
    Stage s(directories);
    REQUIRE(s.run(furnish(&s)));
    INFO(operation.name << ", " << kind.name << " " << n << " of directory " << directory << " fails");
    auto* countdown = kind.countdown(s, directory);
    *countdown = n;
    s.world.net().faults.ghost = kind.ghost;
    const auto done = s.run(operation.run(&s));
    const bool reached = *countdown == 0;
    *countdown = 0;
    if (!reached) {
      INFO((done ? "" : done.error().message));
      REQUIRE(done);
    }
    judge(s, operation, expected, done, n % 5 == 1);
    if (!reached) return met;
  }
}

void fail_all(std::size_t directories, std::initializer_list<std::string_view> names) {
  std::uint64_t faults = 0;
  for (const auto name : names) {
    const auto operation = std::ranges::find(kOperations, name, &Operation::name);
    REQUIRE(operation != std::end(kOperations));
    const auto expected = reference(*operation, directories);
    for (const auto& kind : kFaultKinds)
      for (std::size_t d = 0; d < (kind.of_a_directory ? directories : 1); ++d)
        faults += fail_each(*operation, kind, directories, d, expected);
  }
  std::cout << faults << " faults met by " << names.size() << " operations on " << directories << " directories\n";
  CHECK(faults > 0);
}

}  // namespace

TEST_CASE("nth fault: puts, replacements and streams survive each call that fails", "[sim]") {
  fail_all(1, {"put", "put if absent", "replace", "stream with pages", "abort an upload"});
}
TEST_CASE("nth fault: reads and listings survive each call that fails", "[sim]") {
  fail_all(1, {"get", "get a range", "list", "restore", "show a bucket"});
}
TEST_CASE("nth fault: buckets, removals and pins survive each call that fails", "[sim]") {
  fail_all(1, {"create a bucket", "change a bucket", "remove a bucket", "remove an object", "remove a step",
               "remove steps", "pin a step"});
}
TEST_CASE("nth fault: saves survive each call that fails", "[sim]") {
  fail_all(1, {"save"});
}
TEST_CASE("nth fault: the daemon's start and garbage survive each call that fails", "[sim]") {
  fail_all(1, {"start the daemon", "collect garbage"});
}
TEST_CASE("nth fault: puts and restores on two directories survive each call that fails in either", "[sim]") {
  fail_all(2, {"put", "restore"});
}
TEST_CASE("nth fault: saves and a start on two directories survive each call that fails in either", "[sim]") {
  fail_all(2, {"save", "start the daemon"});
}

TEST_CASE("nth fault: operations wait for buffers that others hold, or say that they cannot", "[sim]") {
  // Of the daemon's buffers, then of the client's, only `left` are free, for 2 s, which every call waits for, or for a
  // minute, which is longer than a call may take.
  for (const auto& operation : kOperations) {
    const auto expected = reference(operation, 1);
    for (const bool of_daemon : {true, false})
      for (const auto held_for : {rt::Duration(2s), rt::Duration(1min)})
        for (const std::size_t left : kBuffersLeft) {
          Stage s(1);
          REQUIRE(s.run(furnish(&s)));
          INFO(operation.name << " with " << left << " buffers of the " << (of_daemon ? "daemon" : "client") << " for "
                              << held_for / 1s << " s");
          std::vector<rt::MutableBuffer> held;
          if (of_daemon) {
            while (s.daemon.units().available() > left) held.push_back(*s.daemon.units().try_acquire());
          } else {
            // A whole chunk at a time, as everybody takes it.
            while (s.arena->free_bytes() > left * s.arena->unit_bytes())
              held.push_back(s.run(s.arena->take(s.arena->unit_bytes())).value().front());
          }
          // A daemon that is killed meanwhile takes its buffers along.
          s.node.spawn([](Stage* stage, std::vector<rt::MutableBuffer>* buffers, rt::Duration wait) -> Task<void> {
            co_await stage->node.sleep(wait);
            buffers->clear();
            co_return {};
          }(&s, &held, held_for));
          const auto done = s.run(operation.run(&s));
          if (held_for < kTimeout) {
            INFO("it said " << (done ? "done" : done.error().message));
            REQUIRE(done);
          }
          s.world.run_for(held_for);
          REQUIRE(held.empty());
          judge(s, operation, expected, done, left == 1);
        }
  }
}
