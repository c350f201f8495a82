#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace cairn {

/// Element types, as in safetensors. The numbers are on disk.
enum class DType : std::uint8_t {
  boolean = 1,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

/// Half-open ranges per dimension: [offset, offset + shape), in elements. Both empty: a 0-d tensor.
struct Box {
  std::vector<std::uint64_t> offset{};
  std::vector<std::uint64_t> shape{};
};

/// A replicated tensor: this rank is holder `index` of `count` and saves only its part. All holders name the same box.
struct Holder {
  std::uint32_t index = 0;
  std::uint32_t count = 1;
};

/// What one rank holds of a tensor.
/// shapes: box inside global_shape; bytes given with it: the box, row-major, no gaps
struct TensorShard {
  std::string name{};  // any UTF-8 up to 1,024 bytes
  DType dtype = DType::f32;
  std::vector<std::uint64_t> global_shape{};
  std::optional<Box> box{};  // absent: the whole tensor
  std::optional<Holder> holder{};
};

/// A part of a saved tensor to be restored.
/// shapes: box inside the tensor's global shape; the memory given with it: the box, row-major
struct TensorSlice {
  std::string name{};
  std::optional<Box> box{};  // absent: the whole tensor
};

/// One start of a training job: (job id, restart count), equal on all its ranks. A later start of the same job has a
/// higher restart count. An empty job is taken from CAIRN_LAUNCH ("JOB" or "JOB:RESTART"), else torchrun's
/// TORCHELASTIC_RUN_ID and TORCHELASTIC_RESTART_COUNT, else SLURM_JOB_ID and SLURM_RESTART_COUNT.
struct LaunchId {
  std::string job{};
  std::uint64_t restart = 0;
};

struct ClientOptions {
  std::vector<std::string> servers = {"127.0.0.1:7420"};  // HOST:PORT or unix:PATH, tried in order
  std::string name{};                                     // for the daemon's logs; default: program and pid
  /// Memory that staged bytes wait in until they are durable; 8 MiB or more. A save larger than this stages while it
  /// drains: stage() then returns when the last byte has been copied.
  std::uint64_t arena_bytes = 256ull << 20;
  bool arena_prefault = true;                 // fault the arena's pages in behind connect(), not in the first stage()
  bool shared_memory = true;                  // hand the arena to a daemon on this host, which then copies no byte
  bool arena_wait = true;                     // false: stage() fails with kBusy when the arena is full
  std::uint32_t chunk_bytes = 16u << 20;      // 64 KiB .. 64 MiB, a multiple of 64 KiB
  std::uint32_t chunks_in_flight = 12;        // on their way at once: the disk has work while earlier ones are flushed
  std::uint32_t connections = 1;              // for bulk data
  std::chrono::milliseconds timeout{60'000};  // of a call, unless the call says otherwise
  bool unix_socket = true;                    // use the daemon's unix socket when it is on this host
};

struct BucketOptions {
  std::string name{};
  std::uint32_t copies = 1;
  std::uint64_t quota_bytes = 0;  // 0: none
  // Retention of steps: the service removes what none of these keeps. All 0: everything is kept. The newest step of a
  // run, pinned steps and the step from which the current launch resumes are kept in any case.
  std::uint32_t keep_last = 0;   // the highest so many of each run
  std::uint64_t keep_every = 0;  // those divisible by it
  std::uint32_t keep_days = 0;   // those committed in the last so many days, by the daemon's wall clock
};
/// What of a bucket's options is to change; absent: stays.
struct BucketChange {
  std::optional<std::uint64_t> quota_bytes{};  // 0: none
  std::optional<std::uint32_t> keep_last{};
  std::optional<std::uint64_t> keep_every{};
  std::optional<std::uint32_t> keep_days{};
};
struct BucketInfo {
  std::string name{};
  std::uint32_t copies = 1;
  std::uint64_t quota_bytes = 0;
  std::int64_t created_unix_nanos = 0;
  std::uint32_t keep_last = 0;
  std::uint64_t keep_every = 0;
  std::uint32_t keep_days = 0;
  std::uint64_t used_bytes = 0;  // of objects and committed steps
  std::uint64_t objects = 0;
  std::uint64_t steps = 0;
  std::uint64_t reserved_bytes = 0;  // by open uploads and saves
};

struct ObjectInfo {
  std::string key{};
  std::uint64_t size_bytes = 0;
  std::uint32_t crc32c = 0;
  std::int64_t created_unix_nanos = 0;
  std::string version{};  // names these bytes under this key: every put makes another one
};
struct PutOptions {
  bool if_absent = false;                     // kExists when the key is there
  std::string if_version{};                   // kConflict unless this version is there, which is replaced
  std::optional<std::uint64_t> size_bytes{};  // when known: refused early when it fits neither quota nor disk
};
struct RemoveOptions {
  std::string if_version{};  // kConflict when another version is there
};
struct ListOptions {
  std::string prefix{};
  std::string after{};      // keys greater than this
  std::string delimiter{};  // as "/": keys that go on behind one are told as one prefix, which ends in it
  std::string token{};      // Listing::next of the page before; instead of `after`
  std::uint32_t limit = 1000;
};
/// Items and prefixes are each sorted, and lie between those of the page before and after.
struct Listing {
  std::vector<ObjectInfo> items{};
  std::vector<std::string> prefixes{};
  bool more = false;
  std::string next{};  // token of the next page
};
template <class T>
struct Page {
  std::vector<T> items{};
  bool more = false;  // ask again with `after` = the last item's name
};

struct RunOptions {
  std::string name{};                     // "BUCKET/RUN"; RUN may contain '/'
  LaunchId launch{};                      // required when other ranks take part
  std::optional<std::uint64_t> resume{};  // default: the highest committed step
  bool discard_after = false;             // with resume: drop the steps after it
};

struct SaveOptions {
  std::uint64_t step = 0;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;
  bool overwrite = false;            // replace a committed step atomically
  bool explicit_commit = false;      // commit only when commit() is called, not at the last seal
  std::uint64_t declared_bytes = 0;  // this rank's size when known: lets the daemon refuse early for lack of space
  /// Nothing is sent before all is copied, if the arena has room for it: stage() returns sooner, and the save is
  /// durable later, by about as long as the copy takes. For those who train on meanwhile.
  bool stage_first = false;
};

struct SaveResult {
  std::uint64_t step = 0;
  std::uint64_t bytes = 0;  // of this rank
};

struct StepInfo {
  std::uint64_t step = 0;
  std::uint32_t world_size = 0;
  std::uint64_t bytes = 0;
  std::uint32_t tensors = 0;
  std::uint32_t blobs = 0;
  std::int64_t committed_unix_nanos = 0;
  LaunchId launch{};
  bool pinned = false;
};
struct RunActivity {
  bool active = false;  // ranks of an open attempt spoke lately
  LaunchId launch{};
  std::uint64_t step = 0;
  std::uint32_t ranks = 0;
};

enum class AttemptState { unknown, open, merging, committed, failed };
struct AttemptStatus {
  AttemptState state = AttemptState::unknown;
  std::uint64_t step = 0;
  std::uint32_t world_size = 0;
  std::uint32_t sealed = 0;
  std::string error{};  // failed: why, naming the rank
};

struct TensorInfo {
  std::string name{};
  DType dtype = DType::f32;
  std::vector<std::uint64_t> global_shape{};
  std::uint64_t bytes = 0;
  std::vector<Box> boxes{};  // as saved
};
struct BlobInfo {
  std::string name{};
  std::uint32_t rank = 0;
  std::uint64_t size_bytes = 0;
};
/// String metadata kept with a step, for example a safetensors file's __metadata__.
struct MetaItem {
  std::string scope{};
  std::string key{};
  std::string value{};
};

struct RestoreResult {
  std::uint64_t bytes_wanted = 0;
  std::uint64_t bytes_moved = 0;      // requests and answers, all told
  std::uint64_t bytes_from_disk = 0;  // read by the daemon for it
};

/// A data directory of the store.
struct TargetInfo {
  std::string id{};
  std::string directory{};
  std::string node{};
  bool out = false;  // failed or missing
};

/// Something that goes on in the background of the store, or the last of its kind: "scrub" looks at every copy of a
/// data directory, "repair" mends what was found damaged there, "resync" brings one up that lacks something.
enum class JobState { unknown, running, paused, done, cancelled, failed };
struct JobInfo {
  std::string id{};
  JobState state = JobState::unknown;
  std::string target{};  // id of the data directory
  std::string directory{};
  std::uint64_t chunks = 0, bytes = 0;              // looked at, or copied
  std::uint64_t chunks_total = 0, bytes_total = 0;  // of about so many; 0: nobody knows
  std::uint64_t damaged = 0;                        // chunks found damaged
  std::uint64_t repaired = 0;
  std::uint64_t left = 0;  // damaged chunks of the directory now, whoever found them
  std::int64_t started_unix_nanos = 0, ended_unix_nanos = 0;
  std::vector<std::string> errors{};  // what is wrong with the directory, other than chunks
};
enum class JobAction { pause, resume, cancel };

/// A damaged or missing copy of one chunk.
struct DamageInfo {
  enum class Kind { unknown, object, step, open };  // open: of an upload or save that has not ended
  std::string chunk{};
  std::uint32_t chunk_bytes = 0;
  std::vector<std::uint32_t>
      offsets{};         // in the chunk, of the blocks of 64 KiB that are bad; none: all of it is missing
  std::string reason{};  // of the first
  bool repaired = false;
  std::string unrepaired{};  // why it is not
  std::int64_t found_unix_nanos = 0, repaired_unix_nanos = 0;
  Kind kind = Kind::unknown;
  std::string bucket{};
  std::string name{};  // object key or run
  std::uint64_t step = 0;
  std::vector<std::string> parts{};  // of a step: names of the tensors and blobs that have bytes there
  bool in_index = false;             // of a step: it holds a part of the step's index, or of a rank's
};

}  // namespace cairn
