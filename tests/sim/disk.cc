#include "tests/sim/disk.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

namespace cairn::sim {

namespace {

using storage::Space;

/// One sector's bytes, sharing the memory of the write they came in; null: zeros.
using Sector = std::shared_ptr<const std::byte>;

struct Version {
  Sector data;
  std::uint64_t landed = 0;  // order of landing: a flush covers those up to its submission
  bool never_durable = false;
};

struct Accounting {
  std::uint64_t capacity = 0;
  std::uint64_t used = 0;
  std::uint64_t free() const { return used >= capacity ? 0 : capacity - used; }
};

struct Inode {
  explicit Inode(std::shared_ptr<Accounting> a) : accounting(std::move(a)) {}
  Inode(const Inode&) = delete;
  ~Inode() { accounting->used -= allocated_sectors * kSectorBytes; }

  std::shared_ptr<Accounting> accounting;
  std::uint64_t size = 0, durable_size = 0, size_changed = 0;
  std::map<std::uint64_t, Sector> durable;
  std::map<std::uint64_t, std::vector<Version>> unsynced;
  std::vector<bool> allocated;  // by sector
  std::uint64_t allocated_sectors = 0;

  void allocate(std::uint64_t sector, bool want) {
    if (sector >= allocated.size()) {
      if (!want) return;
      allocated.resize(sector + 1);
    }
    if (allocated[sector] == want) return;
    allocated[sector] = want;
    if (want) {
      ++allocated_sectors;
      accounting->used += kSectorBytes;
    } else {
      --allocated_sectors;
      accounting->used -= kSectorBytes;
    }
  }
  bool is_allocated(std::uint64_t sector) const { return sector < allocated.size() && allocated[sector]; }
  Sector current(std::uint64_t sector) const {
    if (auto it = unsynced.find(sector); it != unsynced.end() && !it->second.empty()) return it->second.back().data;
    if (auto it = durable.find(sector); it != durable.end()) return it->second;
    return nullptr;
  }
  void put(std::uint64_t sector, Sector data, std::uint64_t landed) {
    unsynced[sector].push_back({std::move(data), landed, false});
  }
  void set_durable(std::uint64_t sector, Sector data) {
    if (data)
      durable[sector] = std::move(data);
    else
      durable.erase(sector);
  }
  void flush(std::uint64_t cutoff, bool succeeds) {
    for (auto it = unsynced.begin(); it != unsynced.end();) {
      auto& versions = it->second;
      std::size_t covered = 0;
      while (covered < versions.size() && versions[covered].landed <= cutoff) ++covered;
      if (!succeeds) {
        for (std::size_t i = 0; i < covered; ++i) versions[i].never_durable = true;
        ++it;
        continue;
      }
      for (std::size_t i = covered; i-- > 0;)
        if (!versions[i].never_durable) {
          set_durable(it->first, versions[i].data);
          versions.erase(versions.begin(), versions.begin() + static_cast<std::ptrdiff_t>(i) + 1);
          break;
        }
      it = versions.empty() ? unsynced.erase(it) : std::next(it);
    }
    if (succeeds && size_changed <= cutoff) durable_size = size;
  }
};

struct DirectoryChange {
  enum Kind { kCreate, kRename, kUnlink } kind;
  std::string from, to;
  std::shared_ptr<Inode> inode;
  std::uint64_t landed = 0;
};
using Names = std::map<std::string, std::shared_ptr<Inode>>;

void apply_to(Names& names, const DirectoryChange& change) {
  switch (change.kind) {
    case DirectoryChange::kCreate:
      names[change.from] = change.inode;
      break;
    case DirectoryChange::kUnlink:
      names.erase(change.from);
      break;
    case DirectoryChange::kRename:
      if (auto it = names.find(change.from); it != names.end()) {
        auto inode = it->second;
        names.erase(it);
        names[change.to] = std::move(inode);
      }
  }
}

struct PendingWrite {
  std::shared_ptr<Inode> inode;
  std::uint64_t first_sector = 0;
  std::vector<Sector> sectors;
};

std::vector<Sector> sectors_of(std::span<const std::byte> bytes) {
  auto copy = std::make_shared_for_overwrite<std::byte[]>(bytes.size());
  std::memcpy(copy.get(), bytes.data(), bytes.size());
  std::vector<Sector> out;
  out.reserve(bytes.size() / kSectorBytes);
  for (std::size_t at = 0; at < bytes.size(); at += kSectorBytes) out.emplace_back(copy, copy.get() + at);
  return out;
}

Sector torn(const Sector& head, const Sector& tail, std::size_t cut) {
  auto mix = std::make_shared_for_overwrite<std::byte[]>(kSectorBytes);
  auto copy = [&](const Sector& from, std::size_t begin, std::size_t end) {
    if (from)
      std::memcpy(mix.get() + begin, from.get() + begin, end - begin);
    else
      std::memset(mix.get() + begin, 0, end - begin);
  };
  copy(head, 0, cut);
  copy(tail, cut, kSectorBytes);
  return {mix, mix.get()};
}

bool aligned(std::uint64_t value) {
  return value % kSectorBytes == 0;
}

}  // namespace

struct DiskImage::State : std::enable_shared_from_this<DiskImage::State> {
  State(DiskImage& i, World& w, DiskOptions o)
      : image(i),
        world(w),
        random(w.seed(), "disk " + i.name_),
        options(o),
        accounting(std::make_shared<Accounting>()) {
    accounting->capacity = o.capacity_bytes;
  }

  DiskImage& image;
  World& world;
  Prng random;
  DiskOptions options;
  std::shared_ptr<Accounting> accounting;
  Names names, durable_names;
  std::vector<DirectoryChange> changes;  // not durable, in order of landing
  std::map<std::uint64_t, PendingWrite> in_flight;
  std::uint64_t landed = 0, next_write = 0;
  std::uint64_t power = 0;  // operations of an earlier one never land

  rt::Duration delay(std::uint64_t bytes) {
    auto d = random.between(options.latency_min, options.latency_max) +
             rt::Duration(static_cast<std::int64_t>(bytes * 1'000'000'000 / options.bytes_per_second));
    if (random.chance(image.faults.slow)) {
      world.injected(Fault::kSlowDisk, image.name_);
      d += image.faults.slow_by;
    }
    return d;
  }
  /// Of operations that only directed tests fail.
  static bool counted_down(std::uint64_t& countdown) { return countdown > 0 && --countdown == 0; }
  bool draw(double probability, std::uint64_t& countdown) {
    return counted_down(countdown) || random.chance(probability);
  }
  bool room_for(const Inode& inode, std::uint64_t first, std::uint64_t count) {
    std::uint64_t wanted = 0;
    for (std::uint64_t s = first; s < first + count; ++s) wanted += inode.is_allocated(s) ? 0 : kSectorBytes;
    if (wanted <= accounting->free()) return true;
    world.injected(Fault::kDiskFull, image.name_);
    return false;
  }
  void land(PendingWrite write) {
    ++landed;
    if (write.sectors.empty()) return;
    auto& inode = *write.inode;
    for (std::size_t i = 0; i < write.sectors.size(); ++i) {
      inode.allocate(write.first_sector + i, true);
      inode.put(write.first_sector + i, std::move(write.sectors[i]), landed);
    }
    const auto end = (write.first_sector + write.sectors.size()) * kSectorBytes;
    if (end > inode.size) {
      inode.size = end;
      inode.size_changed = landed;
    }
  }
};

namespace {

using State = DiskImage::State;

/// The process that an operation belongs to: its completion is seen by that incarnation only.
struct Caller {
  Node* node;
  std::uint32_t incarnation;
  bool gone() const { return !node->alive() || node->incarnation() != incarnation; }
};

/// Runs `effect` on the image after `delay` unless the power went, then tells the caller if it still lives. The effect
/// owns the operation's memory, so a dropped Task changes nothing.
template <class T, class Effect>
Task<T> submit(std::shared_ptr<State> state, Caller caller, rt::Duration delay, Effect effect) {
  rt::OneShot<Result<T>> done(*caller.node);
  state->world.after(
      delay, [state, caller, power = state->power, effect = std::move(effect), setter = done.setter()]() mutable {
        if (state->power != power) return;
        auto result = effect();
        if (!caller.gone()) setter.set(std::move(result));
      });
  co_return co_await done;
}

Error io_error(const std::string& name, const char* what) {
  return {Errc::kFailed, std::string(what) + " " + name + ": Input/output error"};
}
Error failed(State& state, const std::string& name, const char* what) {
  state.world.injected(Fault::kWriteError, std::string(what) + " " + name);
  return io_error(name, what);
}
Failure gone(Caller caller) {
  return fail(Errc::kFailed, "disk handle of a process that is gone (" + caller.node->name() + ")");
}

class SimFile final : public storage::File {
 public:
  SimFile(std::shared_ptr<State> state, Caller caller, std::shared_ptr<Inode> inode, std::string name)
      : state_(std::move(state)), caller_(caller), inode_(std::move(inode)), name_(std::move(name)) {}

  Task<void> write(std::uint64_t offset, Buffer bytes) override {
    return write_on(state_, caller_, inode_, name_, offset, std::move(bytes));
  }
  Task<rt::MutableBuffer> read(std::uint64_t offset, rt::MutableBuffer into) override {
    return read_on(state_, caller_, inode_, name_, offset, std::move(into));
  }
  Task<void> flush() override { return flush_on(state_, caller_, inode_, name_); }
  Task<void> punch(std::uint64_t offset, std::uint64_t size) override {
    return punch_on(state_, caller_, inode_, name_, offset, size);
  }
  std::uint64_t size() const override { return inode_->size; }
  std::uint64_t allocated() const override { return inode_->allocated_sectors * kSectorBytes; }

 private:
  static Task<void> write_on(std::shared_ptr<State> state, Caller caller, std::shared_ptr<Inode> inode,
                             std::string name, std::uint64_t offset, Buffer bytes) {
    if (caller.gone()) co_return gone(caller);
    if (!aligned(offset) || !aligned(bytes.size()) || !aligned(reinterpret_cast<std::uintptr_t>(bytes.bytes().data())))
      co_return fail(Errc::kInvalid, "write " + name + ": not aligned to 4096");
    auto& s = *state;
    ++s.image.counts.writes;
    s.image.counts.bytes_written += bytes.size();
    const bool error = s.draw(s.image.faults.write_error, s.image.fail_write_in);
    const bool lost = s.random.chance(s.image.faults.lost_write);
    const bool elsewhere = s.random.chance(s.image.faults.misdirected_write);
    const auto delay = s.delay(bytes.size());
    // The bytes count from now on: a power loss may keep any of them.
    const auto number = s.next_write++;
    PendingWrite pending{inode, offset / kSectorBytes, sectors_of(bytes.bytes())};
    if (error) {  // some of it lands
      pending.sectors.resize(s.random.below(pending.sectors.size() + 1));
    } else if (lost) {
      s.world.injected(Fault::kLostWrite, name + " at " + std::to_string(offset));
      pending.sectors.clear();
    } else if (elsewhere) {
      s.world.injected(Fault::kMisdirected, name + " at " + std::to_string(offset));
      const auto sectors = std::max<std::uint64_t>(inode->size / kSectorBytes, 1);
      pending.first_sector = s.random.below(sectors);
      pending.sectors.resize(std::min<std::size_t>(pending.sectors.size(), sectors - pending.first_sector));
    }
    s.in_flight.emplace(number, std::move(pending));
    co_return co_await submit<void>(
        state, caller, delay, [state, inode, name, number, error, offset, bytes = std::move(bytes)]() -> Result<void> {
          auto node = state->in_flight.extract(number);
          auto& write = node.mapped();
          if (!state->room_for(*inode, write.first_sector, write.sectors.size()))
            return fail(Errc::kNoSpace, "write " + name + ": No space left on device");
          state->land(std::move(write));
          if (!error) return {};
          state->world.injected(Fault::kWriteError, name + " at " + std::to_string(offset));
          return fail(io_error(name, "write"));
        });
  }

  static Task<rt::MutableBuffer> read_on(std::shared_ptr<State> state, Caller caller, std::shared_ptr<Inode> inode,
                                         std::string name, std::uint64_t offset, rt::MutableBuffer into) {
    if (caller.gone()) co_return gone(caller);
    if (!aligned(offset) || !aligned(into.bytes.size()) ||
        !aligned(reinterpret_cast<std::uintptr_t>(into.bytes.data())))
      co_return fail(Errc::kInvalid, "read " + name + ": not aligned to 4096");
    auto& s = *state;
    ++s.image.counts.reads;
    s.image.counts.bytes_read += into.bytes.size();
    const bool error = s.draw(s.image.faults.read_error, s.image.fail_read_in);
    const auto delay = s.delay(into.bytes.size());
    co_return co_await submit<rt::MutableBuffer>(
        state, caller, delay,
        [state, inode, name, error, offset, into = std::move(into)]() mutable -> Result<rt::MutableBuffer> {
          if (error) {
            state->world.injected(Fault::kReadError, name + " at " + std::to_string(offset));
            return fail(io_error(name, "read"));
          }
          if (offset + into.bytes.size() > inode->size)
            return fail(Errc::kDataLoss, "read " + name + ": " + std::to_string(into.bytes.size()) + " bytes at " +
                                             std::to_string(offset) + " reach past its end at " +
                                             std::to_string(inode->size));
          for (std::size_t at = 0; at < into.bytes.size(); at += kSectorBytes) {
            if (auto sector = inode->current((offset + at) / kSectorBytes))
              std::memcpy(into.bytes.data() + at, sector.get(), kSectorBytes);
            else
              std::memset(into.bytes.data() + at, 0, kSectorBytes);
          }
          return std::move(into);
        });
  }

  static Task<void> flush_on(std::shared_ptr<State> state, Caller caller, std::shared_ptr<Inode> inode,
                             std::string name) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.flushes;
    const bool error = s.draw(s.image.faults.flush_error, s.image.fail_flush_in);
    co_return co_await submit<void>(state, caller, s.delay(0),
                                    [state, inode, name, error, cutoff = s.landed]() -> Result<void> {
                                      inode->flush(cutoff, !error);
                                      if (!error) return {};
                                      state->world.injected(Fault::kFlushError, name);
                                      return fail(io_error(name, "fdatasync"));
                                    });
  }

  static Task<void> punch_on(std::shared_ptr<State> state, Caller caller, std::shared_ptr<Inode> inode,
                             std::string name, std::uint64_t offset, std::uint64_t size) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.punches;
    const bool error = State::counted_down(s.image.fail_punch_in);
    co_return co_await submit<void>(state, caller, s.delay(0), [=]() -> Result<void> {
      if (error) return fail(failed(*state, name, "punch"));
      // Like fallocate: whole sectors inside the range go, the ragged ends become zeros.
      ++state->landed;
      const auto end = std::min(offset + size, inode->size);
      for (auto s = offset / kSectorBytes; s * kSectorBytes < end; ++s) {
        const auto from = std::max(offset, s * kSectorBytes) - s * kSectorBytes;
        const auto to = std::min(end, (s + 1) * kSectorBytes) - s * kSectorBytes;
        auto old = inode->current(s);
        if (from == 0 && to == kSectorBytes) {
          inode->allocate(s, false);
          if (old) inode->put(s, nullptr, state->landed);
        } else if (old) {
          inode->put(s, torn(torn(old, nullptr, from), old, to), state->landed);
        }
      }
      return {};
    });
  }

  std::shared_ptr<State> state_;
  Caller caller_;
  std::shared_ptr<Inode> inode_;
  std::string name_;
};

class SimDisk final : public storage::Disk {
 public:
  SimDisk(std::shared_ptr<State> state, Caller caller) : state_(std::move(state)), caller_(caller) {}

  Task<std::shared_ptr<storage::File>> create(std::string name, std::uint64_t size) override {
    return create_on(state_, caller_, std::move(name), size);
  }
  Task<std::shared_ptr<storage::File>> open(std::string name) override {
    return open_on(state_, caller_, std::move(name));
  }
  Task<void> rename(std::string from, std::string to) override {
    return change_on(state_, caller_, {DirectoryChange::kRename, std::move(from), std::move(to), nullptr});
  }
  Task<void> unlink(std::string name) override {
    return change_on(state_, caller_, {DirectoryChange::kUnlink, std::move(name), {}, nullptr});
  }
  Task<void> sync_directory() override { return sync_on(state_, caller_); }
  Task<std::vector<std::string>> list() override { return list_on(state_, caller_); }
  Task<Space> space() override { return space_on(state_, caller_); }
  void register_memory(std::span<std::byte>) override {}
  std::string description() const override { return "simulated"; }

 private:
  using FilePtr = std::shared_ptr<storage::File>;
  static Task<FilePtr> create_on(std::shared_ptr<State> state, Caller caller, std::string name, std::uint64_t size) {
    if (caller.gone()) co_return gone(caller);
    const bool error = State::counted_down(state->image.fail_create_in);
    co_return co_await submit<FilePtr>(
        state, caller, state->delay(0), [state, caller, error, name = std::move(name), size]() -> Result<FilePtr> {
          if (error) return fail(failed(*state, name, "create"));
          if (state->names.contains(name)) return fail(Errc::kExists, "create " + name + ": File exists");
          auto inode = std::make_shared<Inode>(state->accounting);
          const auto sectors = round_up(size, kSectorBytes) / kSectorBytes;
          if (!state->room_for(*inode, 0, sectors))
            return fail(Errc::kNoSpace, "create " + name + ": No space left on device");
          for (std::uint64_t s = 0; s < sectors; ++s) inode->allocate(s, true);
          inode->size = size;
          inode->size_changed = ++state->landed;
          DirectoryChange change{DirectoryChange::kCreate, name, {}, inode, state->landed};
          apply_to(state->names, change);
          state->changes.push_back(std::move(change));
          return std::make_shared<SimFile>(state, caller, std::move(inode), name);
        });
  }
  static Task<FilePtr> open_on(std::shared_ptr<State> state, Caller caller, std::string name) {
    if (caller.gone()) co_return gone(caller);
    const bool error = State::counted_down(state->image.fail_open_in);
    co_return co_await submit<FilePtr>(state, caller, state->delay(0),
                                       [state, caller, error, name = std::move(name)]() -> Result<FilePtr> {
                                         if (error) return fail(failed(*state, name, "open"));
                                         auto it = state->names.find(name);
                                         if (it == state->names.end())
                                           return fail(Errc::kNotFound, "open " + name + ": No such file or directory");
                                         return std::make_shared<SimFile>(state, caller, it->second, name);
                                       });
  }
  static Task<void> change_on(std::shared_ptr<State> state, Caller caller, DirectoryChange change) {
    if (caller.gone()) co_return gone(caller);
    const bool unlink = change.kind == DirectoryChange::kUnlink;
    const bool error = State::counted_down(unlink ? state->image.fail_unlink_in : state->image.fail_rename_in);
    co_return co_await submit<void>(state, caller, state->delay(0),
                                    [state, error, change = std::move(change)]() mutable -> Result<void> {
                                      if (error) return fail(failed(*state, change.from, "rename or unlink"));
                                      if (!state->names.contains(change.from))
                                        return fail(Errc::kNotFound, change.from + ": No such file or directory");
                                      change.landed = ++state->landed;
                                      apply_to(state->names, change);
                                      state->changes.push_back(std::move(change));
                                      return {};
                                    });
  }
  static Task<void> sync_on(std::shared_ptr<State> state, Caller caller) {
    if (caller.gone()) co_return gone(caller);
    auto& s = *state;
    ++s.image.counts.directory_syncs;
    const bool error = s.draw(s.image.faults.flush_error, s.image.fail_flush_in);
    co_return co_await submit<void>(state, caller, s.delay(0), [state, error, cutoff = s.landed]() -> Result<void> {
      if (error) {
        state->world.injected(Fault::kFlushError, "directory");
        return fail(io_error("the directory", "fsync"));
      }
      auto& changes = state->changes;
      auto end = changes.begin();
      while (end != changes.end() && end->landed <= cutoff) apply_to(state->durable_names, *end++);
      changes.erase(changes.begin(), end);
      return {};
    });
  }
  static Task<std::vector<std::string>> list_on(std::shared_ptr<State> state, Caller caller) {
    if (caller.gone()) co_return gone(caller);
    const bool error = State::counted_down(state->image.fail_list_in);
    co_return co_await submit<std::vector<std::string>>(state, caller, state->delay(0),
                                                        [state, error]() -> Result<std::vector<std::string>> {
                                                          if (error)
                                                            return fail(failed(*state, "the directory", "list"));
                                                          std::vector<std::string> out;
                                                          for (const auto& [name, _] : state->names)
                                                            out.push_back(name);
                                                          return out;
                                                        });
  }
  static Task<Space> space_on(std::shared_ptr<State> state, Caller caller) {
    if (caller.gone()) co_return gone(caller);
    const bool error = State::counted_down(state->image.fail_space_in);
    co_return co_await submit<Space>(state, caller, state->delay(0), [state, error]() -> Result<Space> {
      if (error) return fail(failed(*state, "the file system", "statfs"));
      return Space{.total_bytes = state->accounting->capacity, .free_bytes = state->accounting->free()};
    });
  }

  std::shared_ptr<State> state_;
  Caller caller_;
};

}  // namespace

DiskImage::DiskImage(World& world, std::string name, DiskOptions options)
    : world_(world), name_(std::move(name)), state_(std::make_shared<State>(*this, world, options)) {}
DiskImage::~DiskImage() = default;

std::unique_ptr<storage::Disk> DiskImage::attach(Node& node) {
  if (std::find(node.disks_.begin(), node.disks_.end(), this) == node.disks_.end()) node.disks_.push_back(this);
  return std::make_unique<SimDisk>(state_, Caller{&node, node.incarnation()});
}

void DiskImage::power_loss() {
  auto& s = *state_;
  ++s.power;
  // Writes in flight: as if they had landed last, unsynced.
  auto in_flight = std::exchange(s.in_flight, {});
  for (auto& [_, write] : in_flight) {
    s.land(std::move(write));
  }

  const bool any_order = s.random.chance(0.5);
  const auto kept = s.random.below(s.changes.size() + 1);
  for (std::size_t i = 0; i < s.changes.size(); ++i)
    if (any_order ? s.random.chance(0.5) : i < kept)
      apply_to(s.durable_names, s.changes[i]);
    else
      world_.injected(Fault::kEntryDropped, s.changes[i].from);
  s.changes.clear();
  s.names = s.durable_names;

  std::set<Inode*> seen;
  for (const auto& [name, inode] : s.names) {  // by name: never by address
    if (!seen.insert(inode.get()).second) continue;
    for (auto& [sector, versions] : inode->unsynced) {
      auto old = inode->durable.contains(sector) ? inode->durable[sector] : Sector{};
      std::erase_if(versions, [&](const Version& v) { return v.never_durable && s.random.chance(0.5); });
      const auto pick = s.random.below(versions.size() + 1);
      auto chosen = pick == 0 ? old : versions[pick - 1].data;
      if (pick < versions.size()) {
        world_.injected(Fault::kSectorDropped, name + " sector " + std::to_string(sector));
        if (s.random.chance(0.3)) {
          const auto cut = 512 * s.random.between(1, kSectorBytes / 512 - 1);
          chosen =
              s.random.chance(0.5) ? torn(chosen, versions[pick].data, cut) : torn(versions[pick].data, chosen, cut);
          world_.injected(Fault::kSectorTorn, name + " sector " + std::to_string(sector));
        }
      }
      inode->set_durable(sector, chosen);
    }
    inode->unsynced.clear();
    if (inode->size != inode->durable_size && s.random.chance(0.5)) inode->size = inode->durable_size;
    inode->durable_size = inode->size;
    const auto sectors = round_up(inode->size, kSectorBytes) / kSectorBytes;
    for (auto sector = sectors; sector < inode->allocated.size(); ++sector) inode->allocate(sector, false);
    inode->durable.erase(inode->durable.lower_bound(sectors), inode->durable.end());
    for (const auto& [sector, _] : inode->durable) inode->allocate(sector, true);
  }
}

bool DiskImage::rot(std::string_view prefix) {
  auto& s = *state_;
  std::uint64_t total = 0;
  auto wanted = [&](const std::string& name) { return name.starts_with(prefix); };
  for (const auto& [name, inode] : s.names)
    if (wanted(name)) total += inode->durable.size();
  if (total == 0) return false;
  auto pick = s.random.below(total);
  for (const auto& [name, inode] : s.names) {
    if (!wanted(name)) continue;
    if (pick < inode->durable.size()) {
      auto it = std::next(inode->durable.begin(), static_cast<std::ptrdiff_t>(pick));
      return flip(name, it->first * kSectorBytes + s.random.below(kSectorBytes),
                  static_cast<unsigned>(s.random.below(8)));
    }
    pick -= inode->durable.size();
  }
  return false;
}

bool DiskImage::flip(const std::string& name, std::uint64_t offset, unsigned bit) {
  auto it = state_->names.find(name);
  if (it == state_->names.end()) return false;
  auto sector = it->second->durable.find(offset / kSectorBytes);
  if (sector == it->second->durable.end()) return false;
  auto bytes = std::make_shared_for_overwrite<std::byte[]>(kSectorBytes);
  std::memcpy(bytes.get(), sector->second.get(), kSectorBytes);
  bytes[offset % kSectorBytes] ^= std::byte{1} << bit;
  sector->second = Sector(bytes, bytes.get());
  world_.injected(Fault::kBitRot, name + " at " + std::to_string(offset));
  return true;
}

void DiskImage::set_capacity(std::uint64_t bytes) {
  state_->accounting->capacity = bytes;
}
std::uint64_t DiskImage::used_bytes() const {
  return state_->accounting->used;
}
std::uint64_t DiskImage::free_bytes() const {
  return state_->accounting->free();
}
std::vector<std::string> DiskImage::names() const {
  std::vector<std::string> out;
  for (const auto& [name, _] : state_->names) out.push_back(name);
  return out;
}
std::optional<std::string> DiskImage::contents(const std::string& name) const {
  auto it = state_->names.find(name);
  if (it == state_->names.end()) return std::nullopt;
  std::string out(it->second->size, '\0');
  for (std::size_t at = 0; at < out.size(); at += kSectorBytes)
    if (auto sector = it->second->current(at / kSectorBytes))
      std::memcpy(out.data() + at, sector.get(), std::min<std::size_t>(kSectorBytes, out.size() - at));
  return out;
}
bool DiskImage::all_durable() const {
  if (!state_->changes.empty() || !state_->in_flight.empty()) return false;
  for (const auto& [_, inode] : state_->names)
    if (!inode->unsynced.empty() || inode->size != inode->durable_size) return false;
  return true;
}

}  // namespace cairn::sim
