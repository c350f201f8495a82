#!/usr/bin/env python3
"""kill -9 of the daemon and of the ranks of a training job, at random points, again and again. Some ranks are frozen
instead, and go on when a newer launch has opened the run.

After each kill a fresh process reads everything: only committed steps are visible, each is whole and of one launch, and
what any rank was told is committed is there. The next launch of the job resumes and saves the interrupted step again.
At the end no bytes of interrupted saves are left, and after removing all steps no bytes at all.
"""

import argparse
import random
import signal
import statistics
import sys
import time

from expected import Expected
from harness import Cairn, Daemon, Failure, Scratch, Writer, freeze

RUN = "bucket/train"
WORLD = 3


class Job:
    """One launch of the training job: a process per rank."""

    def __init__(self, options, daemon, restart, *more, ranks=range(WORLD)):
        self.restart, self.resume, self.started, self.acked = restart, {}, set(), {}
        self.options, self.server, self.more, self.ranks = options, daemon.server, more, []
        self.start(ranks)

    def start(self, ranks):
        self.ranks += [
            Writer(self.options.writer, "steps", "--server", self.server, "--run", RUN, "--job", "job",
                   "--restart", self.restart, "--world", WORLD, "--rank", rank, "--keep", 4, *self.more) for rank in ranks]

    def wake(self):
        for rank in self.ranks:
            rank.process.send_signal(signal.SIGCONT)

    def note(self, lines, expected):
        for line in lines:
            words = line.split()
            if words[0] == "resume":
                self.resume[int(words[3])] = None if words[1] == "-" else int(words[1])
                expected.resumes[self.restart] = self.resume[int(words[3])]
            elif words[:2] == ["start", "step"]:
                self.started.add(int(words[2]))
            elif words[:2] == ["ack", "step"]:
                self.acked.setdefault(int(words[2]), set()).add(int(words[5]))
            expected.note(line)

    def poll(self, expected):
        for rank in self.ranks:
            self.note(rank.lines.available(), expected)

    def ended(self):
        return [rank for rank in self.ranks if rank.process.poll() is not None]

    def kill(self, expected):
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            self.note(rank.lines.rest(), expected)

    def check_resume(self, committed_before):
        """All ranks of a launch got the same answer, and it does not forget a committed step."""
        answers = set(self.resume.values())
        if len(answers) > 1:
            raise Failure(f"launch {self.restart}: the ranks resume from different steps: {self.resume}")
        if answers and committed_before and (answers == {None} or max(answers) < max(committed_before)):
            raise Failure(f"launch {self.restart} resumes from {answers}, although step {max(committed_before)} is committed")


def wait_for(what, condition, seconds, tick):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"not within {seconds} s: {what}")
        tick()
        time.sleep(0.002)


def saved_again(job, expected):
    """Waits until every rank was told that the step after the resumed one is committed."""

    def done():
        if len(job.resume) < WORLD:
            return False
        first = next(iter(job.resume.values()))
        return len(job.acked.get(1 if first is None else first + 1, ())) == WORLD

    def tick():
        job.poll(expected)
        if ended := job.ended():
            raise Failure(f"launch {job.restart}: a rank ended by itself: {ended[0].errors()}")

    wait_for(f"launch {job.restart} saves the interrupted step again", done, 60, tick)


def wake_zombies(zombies, job, expected):
    """The ranks of an older launch, frozen in the middle of a step, go on after a newer one has opened the run and
    before it can save: they must fail, by themselves, and nothing of theirs may become visible."""
    wait_for("the newer launch opens the run", lambda: job.resume, 60, lambda: job.poll(expected))
    zombies.wake()
    wait_for("fenced ranks end by themselves", lambda: len(zombies.ended()) == WORLD, 60, lambda: zombies.poll(expected))


def one_kill(number, state, options, rng):
    expected, daemon, zombies = state["expected"], state["daemon"], state["zombies"]
    committed_before = {step for step, how in expected.steps.items() if how == "committed"}
    job = Job(options, daemon, number, ranks=range(1) if zombies else range(WORLD))
    try:
        if zombies:
            wake_zombies(zombies, job, expected)
            job.start(range(1, WORLD))
        # One launch in four must get through a step; the others are killed wherever they are.
        if rng.random() < 0.25:
            saved_again(job, expected)
        elif rng.random() < 0.7:
            wait_for("a rank starts a step", lambda: job.started, 60, lambda: job.poll(expected))
        wanted = time.monotonic() + rng.random() * 0.25
        while time.monotonic() < wanted:
            job.poll(expected)
            time.sleep(0.001)
        victim = rng.choice(["daemon", "ranks", "one rank", "both", "zombies"])
        state["victims"][victim] = state["victims"].get(victim, 0) + 1
        if victim in ("daemon", "both"):
            daemon.kill()
        if victim in ("ranks", "both"):
            job.kill(expected)
        if victim == "one rank":
            rng.choice(job.ranks).kill()
        if victim == "zombies":
            for rank in job.ranks:
                freeze(rank.process.pid)
            job.poll(expected)
        if victim in ("daemon", "both"):
            # The same address: ranks that are still alive may find it again.
            daemon = state["daemon"] = Daemon(options.daemon, state["data"], state["log"], state["flags"],
                                              state["environment"], listen=state["listen"])
            state["ready"].append(daemon.seconds_to_ready)
        if victim in ("daemon", "one rank"):
            time.sleep(rng.random() * 0.1)  # the others go on for a while
    except BaseException:
        victim = None
        raise
    finally:
        if zombies:
            zombies.kill(expected)
        if victim == "zombies":
            state["zombies"] = job
        else:
            state["zombies"] = None
            job.kill(expected)
    job.check_resume(committed_before)
    expected.verify(options.writer, daemon, "bucket", RUN)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(random.randbytes(4), "little"))
    parser.add_argument("--daemon", required=True, help="the cairnd program")
    parser.add_argument("--cairn", required=True, help="the cairn program")
    parser.add_argument("--writer", required=True, help="the ack_writer program")
    parser.add_argument("--mutant", help="value of CAIRN_TEST_FAULTS, or no_garbage; passes if the fault is noticed")
    parser.add_argument("--noticed-as", action="append", help="with --mutant: what the failure must say; or another")
    options = parser.parse_args()
    print(f"kills: kills={options.kills} seed={options.seed} mutant={options.mutant}", flush=True)

    rng = random.Random(options.seed)
    cairn = Cairn(options.cairn)
    with Scratch("kill") as scratch:
        no_garbage = options.mutant == "no_garbage"
        patience = 10 if no_garbage else 120
        state = {"expected": Expected(), "victims": {}, "ready": [], "zombies": None, "data": scratch / "data", "log": scratch / "log",
                 "flags": ["--garbage-grace", "1s", "--garbage-interval", "1h" if no_garbage else "1s", "--reader-ttl", "2s"],
                 "environment": {"CAIRN_TEST_FAULTS": options.mutant} if options.mutant and not no_garbage else {}}
        state["daemon"] = Daemon(options.daemon, state["data"], state["log"], state["flags"], state["environment"])
        state["listen"] = state["daemon"].server
        number = 0
        try:
            cairn(state["daemon"], "bucket", "create", "bucket")
            for number in range(options.kills):
                one_kill(number, state, options, rng)

            if state["zombies"]:
                state["zombies"].kill(state["expected"])

            # A launch that is left alone: it fences the interrupted ones, saves, and their bytes are freed.
            expected, daemon = state["expected"], state["daemon"]
            job = Job(options, daemon, options.kills)
            try:
                saved_again(job, expected)
            finally:
                job.kill(expected)
            last = Job(options, daemon, options.kills + 1, "--until", 0)  # fences the one just killed, saves nothing
            try:
                wait_for("the last launch opens the run", lambda: len(last.ended()) == WORLD, 60, lambda: None)
            finally:
                last.kill(expected)
            expected.verify(options.writer, daemon, "bucket", RUN)
            cairn(daemon, "ckpt", "verify", RUN)
            passes = daemon.metric("cairn_garbage_passes_total") + 2  # one may be under way
            wait_for("no orphaned bytes", lambda: daemon.metric("cairn_garbage_passes_total") >= passes and
                     daemon.metric("cairn_chunk_store_orphaned_bytes") == 0, patience, lambda: time.sleep(0.2))
            # What lives is the steps, their manifests and the padding to sectors; no more.
            named = sum(step["bytes"] for step in cairn.json_lines(daemon, "ckpt", "ls", RUN))
            # What was removed is kept for readers for a while.
            wait_for(f"no more bytes live than the {named} of the steps",
                     lambda: daemon.metric("cairn_chunk_store_live_bytes") <= 1.1 * named, patience, lambda: time.sleep(0.2))
            live = daemon.metric("cairn_chunk_store_live_bytes")
            if live < named:
                raise Failure(f"{live:.0f} bytes live, the steps have {named}")
            cairn(daemon, "ckpt", "rm", RUN, "--after", 0)
            wait_for("no bytes live after all steps are removed",
                     lambda: daemon.metric("cairn_chunk_store_live_bytes") == 0, patience, lambda: time.sleep(0.2))
            daemon.stop()
        except Failure as failure:
            if options.mutant and any(words in str(failure) for words in options.noticed_as or [""]):
                print(f"the mutant {options.mutant} was noticed at kill {number + 1}: {str(failure)[:500]}")
                return 0
            print(f"kill {number + 1}: {failure}\nthe daemon's log ends: {state['daemon'].log_tail()}\n"
                  f"again: kill.py --seed {options.seed} with the same arguments")
            return 1
        finally:
            state["daemon"].kill()
        if options.mutant:
            print(f"the mutant {options.mutant} was not noticed in {options.kills} kills")
            return 1
        ready = sorted(state["ready"])
        print(f"{options.kills} kills ({', '.join(f'{count} {victim}' for victim, count in sorted(state['victims'].items()))}): "
              f"{state['expected'].acknowledged} acknowledged operations, none lost; no orphaned bytes")
        if ready:
            print(f"daemon ready again after {statistics.median(ready):.2f} s (median), {ready[-1]:.2f} s (worst)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
