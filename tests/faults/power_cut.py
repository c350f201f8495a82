#!/usr/bin/env python3
"""Power cuts: whatever was acknowledged before the power went is there, whole, after it came back.

Each round: a daemon on a loop mount, writers that report acknowledged operations; the daemon is stopped (SIGSTOP), the
acknowledgements that have arrived are noted, the file system is shut down as by a power cut (everything that was not
flushed is lost), the daemon is killed, the file system mounted again, a daemon started on it, and a fresh process reads
everything back. The order matters: an acknowledgement that arrives while the power goes proves nothing.

With --mutant the daemon is one that acknowledges without flushing, and the test passes when a loss is noticed.
"""

import argparse
import os
import random
import sys
import time

from expected import Expected
from harness import Cairn, Daemon, Failure, Scratch, Volume, Writer, freeze

RUN = "bucket/train"


class Lost(Failure):
    """What the cut has shown; other failures are of the test itself."""


class Disks:
    """The data directory: one volume, or a second one for its index folder, as a journal that both share would write
    the one's changes when the other is flushed."""

    def __init__(self, options, scratch):
        self.data, self.log = scratch / "mnt" / "data", scratch / "log"
        self.volumes = [Volume(options.fs, scratch / "data.img", scratch / "mnt", 2 << 30)]
        if options.index_apart:
            self.data.mkdir(mode=0o700)
            index = Volume(options.fs, scratch / "index.img", self.data / "index", 1 << 30)
            if (index.mountpoint / "lost+found").exists():
                (index.mountpoint / "lost+found").rmdir()
            os.sync()  # the set-up is not what is tested
            self.volumes.append(index)

    def cut_power(self):
        for volume in self.volumes:
            volume.cut_power()

    def power_again(self):
        for volume in reversed(self.volumes):
            volume.unmount()
        for volume in self.volumes:
            volume.mount()  # with a cold cache: what is read now comes from the disk

    def close(self):
        for volume in reversed(self.volumes):
            volume.close()


def one_round(number, disks, options, rng, expected, environment):
    data, log = disks.data, disks.log
    daemon = Daemon(options.daemon, data, log, options.flag, environment)
    writers = []
    try:
        cairn = Cairn(options.cairn)
        if number == 0:
            cairn(daemon, "bucket", "create", "bucket")
        writers = [
            Writer(options.writer, "objects", "--server", daemon.server, "--bucket", "bucket",
                   "--seed", rng.getrandbits(32), "--first-version", 1 + number * 1_000_000),
            Writer(options.writer, "steps", "--server", daemon.server, "--run", RUN, "--job", "job",
                   "--restart", number, "--world", 3, "--keep", 3),
        ]
        # The cut falls a random moment after a random acknowledgement.
        target, seen = rng.randrange(3, 40), 0
        deadline = time.monotonic() + 60
        while seen < target:
            for writer in writers:
                for line in writer.lines.available():
                    seen += line.startswith("ack ")
                    expected.note(line)
                if writer.process.poll() is not None:
                    raise Failure(f"a writer ended by itself: {writer.errors()}; the daemon's log ends: {daemon.log_tail()}")
            if time.monotonic() > deadline:
                raise Failure(f"only {seen} acknowledgements in 60 s; the daemon's log ends: {daemon.log_tail()}")
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)

        freeze(daemon.process.pid)
        for writer in writers:
            for line in writer.lines.available():
                expected.note(line)
        disks.cut_power()
    finally:
        daemon.kill()
        for writer in writers:
            writer.kill()
    for writer in writers:
        for line in writer.lines.rest():
            expected.note(line, certain=False)
    disks.power_again()

    try:
        daemon = Daemon(options.daemon, data, log, options.flag, environment)
        try:
            expected.verify(options.writer, daemon, "bucket", RUN)
            if number % 5 == 0 and "committed" in expected.steps.values():
                cairn(daemon, "ckpt", "verify", RUN)
            daemon.stop()
        finally:
            daemon.kill()
    except Failure as failure:
        raise Lost(f"after the cut: {failure}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fs", choices=["ext4", "xfs"], required=True)
    parser.add_argument("--index-apart", action="store_true", help="the index on a file system of its own")
    parser.add_argument("--cuts", type=int, default=25)
    parser.add_argument("--seed", type=int, default=int.from_bytes(random.randbytes(4), "little"))
    parser.add_argument("--daemon", required=True, help="the cairnd program")
    parser.add_argument("--cairn", required=True, help="the cairn program")
    parser.add_argument("--writer", required=True, help="the ack_writer program")
    parser.add_argument("--flag", action="append", default=[], help="further flag of the daemon; may be repeated")
    parser.add_argument("--mutant", help="value of CAIRN_TEST_FAULTS; passes if a loss is noticed within --cuts")
    options = parser.parse_args()

    Volume.require(options.fs)
    print(f"power cuts: fs={options.fs} index_apart={options.index_apart} cuts={options.cuts} seed={options.seed} mutant={options.mutant}", flush=True)
    rng = random.Random(options.seed)
    environment = {"CAIRN_TEST_FAULTS": options.mutant} if options.mutant else {}
    expected = Expected()
    noticed = None
    with Scratch("power-cut") as scratch:
        disks = Disks(options, scratch)
        try:
            for number in range(options.cuts):
                try:
                    one_round(number, disks, options, rng, expected, environment)
                except Lost as lost:
                    noticed = f"cut {number + 1}: {lost}"
                    break
        finally:
            disks.close()

    if options.mutant:
        if noticed is None:
            print(f"the mutant {options.mutant} was not noticed in {options.cuts} cuts")
            return 1
        print(f"the mutant {options.mutant} was noticed at {noticed[:500]}")
        return 0
    if noticed is not None:
        print(f"{noticed}\nagain: power_cut.py --seed {options.seed} with the same arguments")
        return 1
    print(f"{options.cuts} power cuts on {options.fs}: {expected.acknowledged} acknowledged operations, none lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
