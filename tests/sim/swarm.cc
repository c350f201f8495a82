#include "tests/sim/swarm.h"

namespace cairn::sim {

Swarm draw_swarm(std::uint64_t seed) {
  Prng draw(seed, "swarm");
  auto on = [&] { return draw.chance(0.5); };
  // A rate between 1/20 and all of `most`, evenly on a logarithmic scale of powers of two.
  auto rate = [&](double most) { return most / static_cast<double>(1u << draw.below(5)); };

  Swarm s;
  s.runs = 1 + static_cast<std::uint32_t>(draw.chance(0.3));
  s.launches = static_cast<std::uint32_t>(draw.between(2, 3));
  s.ranks_max = static_cast<std::uint32_t>(draw.between(1, 3));
  s.saves_max = static_cast<std::uint32_t>(draw.between(1, 4));
  s.tensor_bytes_max = draw.chance(0.2) ? 200'000 : 20'000;
  s.segment_bytes = draw.chance(0.5) ? 4 << 20 : 16 << 20;
  s.bad_saves = draw.chance(0.3);
  s.objects = draw.chance(0.4);
  s.removals = draw.chance(0.4);
  s.zombies = draw.chance(0.4);
  if (on()) s.duplicates = rate(0.3);
  if (draw.chance(0.4)) s.liveness_lies = rate(0.5);
  s.garbage_grace = std::chrono::milliseconds(draw.between(300, 15'000));
  s.garbage_interval = std::chrono::milliseconds(draw.between(100, 3000));

  if (on()) s.daemon_kills = static_cast<std::uint32_t>(draw.between(1, 4));
  s.power_loss = on();
  s.silent_death = on();
  s.rank_kills = on();
  s.pauses = draw.chance(0.25);
  if (on()) s.net.cut = rate(0.05);
  if (s.net.cut > 0 && draw.chance(0.7)) s.net.ghost = 0.8;
  if (draw.chance(0.25)) s.net.clog = rate(0.01);
  if (on()) s.net.slow = rate(0.2);
  if (on()) s.net.split_read = rate(0.5);
  if (on()) s.disk.slow = rate(0.05);
  s.disk.slow_by = std::chrono::milliseconds(draw.between(5, 2000));
  // Faults of a medium end in errors or damage on the only disk, and hide the rest: rarer.
  if (draw.chance(0.15)) s.disk.read_error = rate(0.02);
  if (draw.chance(0.15)) s.disk.write_error = rate(0.01);
  if (draw.chance(0.15)) s.disk.flush_error = rate(0.02);
  if (draw.chance(0.1)) s.index.commit_error = rate(0.01);
  if (draw.chance(0.08)) s.disk.lost_write = rate(0.01);
  if (draw.chance(0.08)) s.disk.misdirected_write = rate(0.01);
  if (draw.chance(0.1)) s.rot = static_cast<std::uint32_t>(draw.between(1, 4));
  if (draw.chance(0.04) && s.daemon_kills > 0) s.index_older = true;
  s.small_disk = draw.chance(0.1);
  s.hostile = draw.chance(0.3);
  s.shared_memory = on();
  return s;
}

namespace {
void when(FaultCounts& f, bool condition, Fault fault) {
  if (condition) f.enable(fault);
}
}  // namespace

void enable_storage(const Swarm& s, FaultCounts& f) {
  when(f, s.disk.slow > 0, Fault::kSlowDisk);
  when(f, s.disk.read_error > 0, Fault::kReadError);
  when(f, s.disk.write_error > 0, Fault::kWriteError);
  when(f, s.disk.flush_error > 0, Fault::kFlushError);
  when(f, s.disk.lost_write > 0, Fault::kLostWrite);
  when(f, s.disk.misdirected_write > 0, Fault::kMisdirected);
  when(f, s.index.commit_error > 0, Fault::kIndexError);
  when(f, s.rot > 0, Fault::kBitRot);
  when(f, s.index_older, Fault::kIndexOlder);
  when(f, s.small_disk, Fault::kDiskFull);
  when(f, s.power_loss, Fault::kPowerLoss);
}

void enable(const Swarm& s, FaultCounts& f) {
  auto storage = s;
  storage.power_loss = s.power_loss && s.daemon_kills > 0;
  enable_storage(storage, f);
  when(f, (s.daemon_kills > 0 && !s.power_loss) || s.rank_kills, Fault::kProcessKill);
  when(f, s.daemon_kills > 0 && s.silent_death, Fault::kSilentDeath);
  when(f, s.duplicates > 0, Fault::kDuplicate);
  when(f, s.net.cut > 0, Fault::kCut);
  when(f, s.net.ghost > 0, Fault::kGhost);
  when(f, s.net.clog > 0 || s.pauses, Fault::kClog);
  when(f, s.net.slow > 0, Fault::kSlowNet);
  when(f, s.net.split_read > 0, Fault::kSplitRead);
}

std::string Swarm::text() const {
  std::string out = "runs=" + std::to_string(runs) + " launches=" + std::to_string(launches) +
                    " ranks<=" + std::to_string(ranks_max) + " saves<=" + std::to_string(saves_max) +
                    " bytes<=" + std::to_string(tensor_bytes_max);
  auto flag = [&](bool on, const char* name) {
    if (on) out += std::string(" ") + name;
  };
  auto rate = [&](double p, const char* name) {
    if (p > 0) out += std::string(" ") + name + "=" + std::to_string(p);
  };
  flag(bad_saves, "bad_saves");
  flag(objects, "objects");
  flag(shared_memory, "shared_memory");
  flag(removals, "removals");
  flag(zombies, "zombies");
  flag(hostile, "hostile");
  rate(duplicates, "duplicates");
  rate(liveness_lies, "liveness_lies");
  if (daemon_kills > 0) out += " daemon_kills=" + std::to_string(daemon_kills);
  flag(power_loss, "power_loss");
  flag(silent_death, "silent_death");
  flag(rank_kills, "rank_kills");
  flag(pauses, "pauses");
  rate(net.cut, "cut");
  rate(net.ghost, "ghost");
  rate(net.clog, "clog");
  rate(net.slow, "slow_net");
  rate(net.split_read, "split_read");
  rate(disk.slow, "slow_disk");
  rate(disk.read_error, "read_error");
  rate(disk.write_error, "write_error");
  rate(disk.flush_error, "flush_error");
  rate(disk.lost_write, "lost_write");
  rate(disk.misdirected_write, "misdirected_write");
  rate(index.commit_error, "index_error");
  if (rot > 0) out += " rot=" + std::to_string(rot);
  flag(index_older, "index_older");
  flag(small_disk, "small_disk");
  return out;
}

}  // namespace cairn::sim
