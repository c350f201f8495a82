#pragma once

#include <string>

#include "tests/sim/prng.h"
#include "tests/sim/world.h"

namespace cairn::sim {

/// A peer that finishes the handshake and then sends what looks right, at random: every method with messages whose
/// fields are drawn (names, ids, numbers at the edges; stamps as the map says them, or not), data with and without
/// credit, cancels, pings; it reads replies, or never, and leaves at any moment. What it names is its own, so it can
/// harm others only by what it costs. Runs until its node is killed.
Task<void> hostile_peer(Node* node, std::string address, Prng draw);

}  // namespace cairn::sim
