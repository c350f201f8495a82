#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "storage/format/tensor.h"
#include "tests/sim/history.h"
#include "tests/sim/payload.h"
#include "tests/sim/prng.h"
#include "tests/sim/world.h"

namespace cairn::sim {

/// A tensor of a training job: the same in every step, saved in every launch's own layout.
struct TensorSpec {
  enum class Kind {
    kSplit,       // cut along one axis
    kHolder,      // all ranks hold all of it; "holder i of n" saves the i-th part
    kReplicated,  // all ranks save all of it, without saying so
  };
  std::string name;
  format::DType dtype = format::DType::kU8;
  format::Shape shape;
  Kind kind = Kind::kSplit;
};

/// Bytes of `box` of a tensor, row-major.
std::vector<std::byte> tensor_bytes(const Payload& payload, const TensorSpec& tensor, const format::Box& box);
/// Rank's part of `tensor` when cut along `axis` into `parts`, uneven on purpose.
format::Box part_of(const TensorSpec& tensor, std::size_t axis, std::uint32_t parts, std::uint32_t rank);

/// How a save breaks the rules on purpose.
enum class Flaw { kNone, kGap, kOverlap, kTokens };

/// One save that all ranks of a launch try.
struct Operation {
  std::uint32_t number = 0;
  std::uint64_t step_offset = 0;  // from the step that the launch resumes at
  bool overwrite = false;
  bool explicit_commit = false;
  bool reuses_id = false;  // a broken client: other bytes under a chunk id that is taken
  Flaw flaw = Flaw::kNone;
  rt::Duration before{};  // the ranks compute so long
};

struct Job;

/// One start of a job.
struct Launch {
  Job* job = nullptr;
  std::uint32_t number = 0;  // restart count
  std::uint32_t world_size = 1;
  std::size_t axis = 0;
  History::Opening opening;
  bool restores = true;
  bool healing = false;                // all is well: its save must be committed
  std::optional<std::uint64_t> again;  // healing: the step it saves, an interrupted one where there is one
  std::vector<Operation> operations;
  std::vector<Node*> nodes;
  std::uint32_t running = 0;  // ranks
  std::uint32_t committed = 0;
  bool over = false;  // told that it is fenced
  struct SaveState {
    std::uint32_t ended = 0, harmless = 0;  // ranks; harmless: it can not have committed by what this rank did
    std::set<std::string> attempts;
  };
  std::map<std::uint32_t, SaveState> saves;  // by operation
};

struct Job {
  explicit Job(std::string name) : history(std::move(name)) {}
  History history;
  std::vector<TensorSpec> tensors;
  std::vector<std::unique_ptr<Launch>> launches;
  std::size_t discard = 0;  // the removal of a launch that opens with discard_after
  bool driven = false;      // its driver has ended
};

std::vector<TensorSpec> draw_tensors(Prng& draw, std::uint32_t bytes_max);

}  // namespace cairn::sim
