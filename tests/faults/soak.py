#!/usr/bin/env python3
"""One daemon on two data directories, with a budget of memory, under a mixed load for as long as wanted, while it and its
clients are killed.

    tests/faults/soak.py --minutes 60 --daemon build/release/bin/cairnd --cairn build/release/bin/cairn \\
                         --writer build/release/tests/faults/ack_writer

Load: objects and streams put, replaced, removed, read and listed (TCP; unix socket); two training jobs of four ranks,
each rank a process, with shared memory; one removes its old steps, the other's bucket keeps the last few; restores of
every step into other layouts. The daemon is killed every one to two minutes, clients more often.

Checked all the time: what a writer has done is what it reads; what was acknowledged is there, bit for bit; nothing is
visible that was not saved whole; memory, descriptors, threads and the disk stay within bounds, and go back to what
they were at the start when the clients have gone. At the end everything is removed, and nothing may be left.
The last line is one JSON object with the figures.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import statistics
import sys
import time

from expected import Expected
from harness import Cairn, Daemon, Failure, Scratch, Writer

MIB = 1 << 20
BUDGET = 192 * MIB
LIVE = 1 << 30
DISK = 5 << 30  # segments are preallocated
WORLD = 4
KEEP = 4
# What writers say when the daemon, or another rank, was killed under them.
CUT_OFF = ("unavailable", "outcome unknown", "deadline exceeded", "attempt failed", "fenced", "deleted", "exists")


def process_figures(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    read = lambda name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
    # What clients share with the daemon is theirs.
    return {"rss_bytes": (read("RssAnon") + read("RssFile")) * 1024, "shared_bytes": read("RssShmem") * 1024,
            "threads": read("Threads"), "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}


def allocated(directory):
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            pass
    return total


class Objects:
    """A process that writes objects, started again whenever it has ended."""

    def __init__(self, soak, bucket, transport):
        self.soak, self.bucket, self.transport = soak, bucket, transport
        self.expected, self.process, self.generation = Expected(), None, 0

    def start(self):
        # Versions of a later process are higher, so no content comes twice.
        self.process = self.soak.writer(
            "objects", "--bucket", self.bucket, "--seed", self.soak.rng.getrandbits(32), "--first-version",
            1 + self.generation * 10_000_000, "--check", 1, "--transport", self.transport, "--pause", 800)
        self.generation += 1

    def processes(self):
        return [self.process] if self.process else []

    def note(self, process, line):
        self.expected.note(line)

    def gone(self, process):
        self.process = None


class Job:
    """A training job: a process for each rank. When one has ended the others are ended too, and it starts again."""

    def __init__(self, soak, run, keeps_itself):
        self.soak, self.run, self.ranks, self.restart, self.incomplete_since = soak, run, [], -1, None
        self.keeps_itself = keeps_itself
        self.expected = Expected(None if keeps_itself else KEEP)
        self.resume = {}

    def start(self, *more):
        self.restart += 1
        self.resume, self.incomplete_since = {}, None
        keep = ("--keep", KEEP) if self.keeps_itself else ()
        self.ranks = [self.soak.writer("steps", "--run", self.run, "--job", "job", "--restart", self.restart, "--world",
                                       WORLD, "--rank", rank, "--pause", 1500, *keep, *more) for rank in range(WORLD)]

    def processes(self):
        return list(self.ranks)

    def note(self, process, line):
        words = line.split()
        if words[0] == "resume":
            self.resume[words[3]] = words[1]
            if len(set(self.resume.values())) > 1:
                raise Failure(f"{self.run} launch {self.restart}: the ranks resume from different steps: {self.resume}")
            self.expected.resumes[self.restart] = None if words[1] == "-" else int(words[1])
        self.expected.note(line)

    def gone(self, process):
        self.ranks.remove(process)
        self.incomplete_since = time.monotonic()


class Soak:
    def __init__(self, options, scratch):
        self.options, self.rng, self.cairn = options, random.Random(options.seed), Cairn(options.cairn)
        self.data = [scratch / "a", scratch / "b"]
        self.log = scratch / "log"
        self.daemon, self.listen, self.at_start = None, "127.0.0.1:0", None
        self.ready, self.first_ack = [], []
        self.killed_at = time.monotonic() - 3600
        self.waiting_for_ack = None
        self.kills, self.acked, self.checks, self.cut_off = (collections.Counter() for _ in range(4))
        self.bytes, self.highest, self.last_metrics = collections.Counter(), collections.Counter(), {}
        self.loads = [Objects(self, "tcp", "tcp"), Objects(self, "unix", "unix"), Job(self, "own/train", True),
                      Job(self, "policy/train", False)]
        self.reader, self.next_sample = None, 0

    # Daemon.

    def writer(self, mode, *arguments, **more):
        return Writer(self.options.writer, mode, "--server", self.daemon.server, *arguments, **more)

    def start_daemon(self):
        self.daemon = Daemon(self.options.daemon, self.data[0], self.log, [
            "--data", self.data[1], "--memory", f"{BUDGET // MIB}MiB", "--garbage-grace", "2s", "--garbage-interval", "2s",
            "--reader-ttl", "5s", "--retention-interval", "2s", "--upload-idle", "15s", "--rank-silence", "5s",
            "--space-recycle", "512MiB"],
            listen=self.listen)
        self.listen = self.daemon.server
        self.ready.append(self.daemon.seconds_to_ready)
        self.at_start = process_figures(self.daemon.process.pid)

    def sample(self):
        """Once a second: figures that must stay within bounds."""
        if time.monotonic() < self.next_sample:
            return
        self.next_sample = time.monotonic() + 1
        if self.daemon.process.poll() is not None:
            raise Failure(f"the daemon ended by itself: {self.daemon.process.returncode}")
        figures = process_figures(self.daemon.process.pid)
        figures["disk_bytes"] = sum(allocated(directory) for directory in self.data)
        for name, value in figures.items():
            self.highest[name] = max(self.highest[name], value)
        if figures["rss_bytes"] > BUDGET:
            raise Failure(f"{figures['rss_bytes']} bytes of memory, the budget is {BUDGET}")
        if figures["descriptors"] > 400 or figures["threads"] > self.at_start["threads"] + 16:
            raise Failure(f"descriptors or threads without bound: {figures}, at the start {self.at_start}")
        if figures["disk_bytes"] > DISK:
            raise Failure(f"{figures['disk_bytes']} bytes of disk for a few steps and objects")
        self.read_metrics()
        if self.last_metrics["cairn_chunk_store_live_bytes"] > LIVE:
            raise Failure(f"{self.last_metrics['cairn_chunk_store_live_bytes']:.0f} bytes live, of a few steps and objects")

    COUNTED = ("cairn_chunk_store_written_bytes_total", "cairn_daemon_read_bytes_total", "cairn_garbage_freed_bytes_total",
               "cairn_checkpoints_committed_total", "cairn_retention_removed_steps_total")
    NEVER = ("cairn_chunk_store_bad_blocks_total", "cairn_committer_failed", "cairn_repair_damaged_chunks_total",
             "cairn_chunks_reads_elsewhere_total", "cairn_rpc_protocol_errors_total")

    def read_metrics(self):
        metrics = self.daemon.metrics()
        for name in self.NEVER:
            if metrics[name] != 0:
                raise Failure(f"{name} is {metrics[name]:.0f}, on sound disks and with honest peers")
        self.last_metrics = metrics

    def daemon_ended(self):
        for name in self.COUNTED:
            self.bytes[name] += int(self.last_metrics.get(name, 0))
        self.last_metrics = {}
        self.killed_at = time.monotonic()

    # Clients.

    def start_clients(self):
        for load in self.loads:
            if not load.processes():
                load.start()

    def take(self, load, process, lines):
        for line in lines:
            words = line.split()
            if words[0] == "bad":
                raise Failure(f"a writer found: {line}")
            if words[0] == "check":
                self.checks[words[1]] += 1
                continue
            if words[0] == "ack":
                self.acked[words[1]] += 1
                if self.waiting_for_ack is not None:
                    self.first_ack.append(time.monotonic() - self.waiting_for_ack)
                    self.waiting_for_ack = None
            load.note(process, line)

    def end(self, load, process):
        process.kill()
        self.take(load, process, process.lines.rest())
        load.gone(process)

    def poll(self):
        """Takes what the clients say. One may end by itself only when a kill has cut it off."""
        for load in self.loads:
            ended = []
            for process in load.processes():
                self.take(load, process, process.lines.available())
                if process.process.poll() is not None:
                    ended.append(process)
            # Ranks wait long for one that has never joined; whoever launches them does not.
            incomplete = isinstance(load, Job) and load.incomplete_since and time.monotonic() - load.incomplete_since > 15
            if not ended and not incomplete:
                continue
            for process in ended:
                said = process.errors()
                codes = [code for code in CUT_OFF if f": {code}: " in said]
                if not codes or time.monotonic() - self.killed_at > 60:
                    raise Failure(f"a client ended by itself: exit {process.process.returncode}: {said}")
                self.cut_off[codes[0]] += 1
                self.end(load, process)
            for process in load.processes():  # of a job all ranks start again
                self.end(load, process)
            load.start()
        self.poll_reader()
        self.sample()

    def start_reader(self):
        """A fresh process that reads all steps of one run, in some layout, while they are saved and removed."""
        job = self.rng.choice(self.loads[2:])
        committed = {step for step, state in job.expected.steps.items() if state == "committed"}
        process = self.writer("verify", "--layout", self.rng.randrange(1, 9), "--removals", 1, "--transport",
                              self.rng.choice(["tcp", "unix", "shm"]), stdin=f"run {job.run}\n")
        self.reader = (process, job, committed, time.monotonic(), [])

    def poll_reader(self):
        if self.reader is None:
            return self.start_reader()
        process, job, committed, began, lines = self.reader
        lines += process.lines.available()
        if process.process.poll() is None:
            if time.monotonic() - began > 120:
                raise Failure("a reader does not end")
            return
        lines += process.lines.rest()
        self.reader = None
        for load in self.loads:  # what was removed, and said so, meanwhile
            for other in load.processes():
                self.take(load, other, other.lines.available())
        if process.process.returncode != 0:
            if self.killed_at < began - 30:
                raise Failure(f"a reader of {job.run} found: {[l for l in lines if l.startswith('bad')]} {process.errors()}")
            return
        visible = {int(line.split()[1]) for line in lines if line.startswith("visible ")}
        self.checks["restore"] += len(visible)
        for step in committed - visible:
            if job.expected.steps[step] == "committed" and not job.expected.may_be_gone(step):
                raise Failure(f"{job.run} step {step}: acknowledged, and a reader did not see it")

    def stop_reader(self):
        if self.reader is not None:
            self.reader[0].kill()
            self.reader = None

    def wait(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll()
            time.sleep(0.05)

    def settle(self, what, condition, seconds=90):
        """Without clients of ours: waits until it is so."""
        deadline = time.monotonic() + seconds
        while not condition(self.daemon.metrics()):
            if time.monotonic() > deadline:
                raise Failure(f"not within {seconds} s: {what}; metrics: "
                              f"{ {k: v for k, v in self.daemon.metrics().items() if v and not k.endswith('_total')} }")
            time.sleep(0.1)

    # Faults.

    def kill_clients(self):
        self.stop_reader()
        for load in self.loads:
            for process in load.processes():
                process.process.kill()
        for load in self.loads:
            for process in load.processes():
                self.end(load, process)

    def kill_some_client(self):
        load = self.rng.choice(self.loads)
        self.killed_at = time.monotonic()
        if isinstance(load, Job) and self.rng.random() < 0.5:
            self.kills["rank"] += 1
            victim = self.rng.choice(load.processes())
            victim.kill()
            self.take(load, victim, victim.lines.rest())
            load.gone(victim)
            if self.rng.random() < 0.5:  # the others find out by themselves that one is missing
                return
        else:
            self.kills["job" if isinstance(load, Job) else "writer"] += 1
        self.stop_reader()
        for process in load.processes():
            self.end(load, process)
        # What the killed process had asked for may still be carried out; then the next one writes the same keys.
        others = sum(len(other.processes()) for other in self.loads)
        self.settle("calls of killed clients end", lambda metrics: metrics["cairn_rpc_connections"] <= 3 * others)
        time.sleep(1)
        load.start()

    def verify(self):
        for load in self.loads:
            if isinstance(load, Job):
                load.expected.verify(self.options.writer, self.daemon, "-", load.run)
                self.checks["restore"] += len(load.expected.launch_of)
            else:
                load.expected.verify(self.options.writer, self.daemon, load.bucket, "own/none")
                self.checks["read"] += len(load.expected.objects)

    def quiet(self):
        """Without clients: nothing is held for them any more."""
        self.settle("nothing is held for clients that have gone", lambda m: all(m[name] == 0 for name in (
            "cairn_rpc_connections", "cairn_rpc_calls_running", "cairn_readers_open", "cairn_checkpoints_merging_attempts",
            "cairn_usage_reserved_bytes", "cairn_chunk_store_uploading_bytes")))
        figures = process_figures(self.daemon.process.pid)
        more = self.last_metrics.get("cairn_chunk_store_segments", 0) + 24  # tables of the index, mostly
        if figures["descriptors"] > self.at_start["descriptors"] + more or figures["threads"] > self.at_start["threads"] + 8:
            raise Failure(f"a leak: {figures}, at the start {self.at_start}")

    def kill_daemon(self):
        everybody = self.rng.random() < 0.5
        if everybody:
            self.kill_clients()
            if self.rng.random() < 0.5:
                self.verify()
                self.quiet()
        self.stop_reader()
        if self.rng.random() < 0.15:
            self.kills["daemon stopped"] += 1
            self.daemon.stop()
        else:
            self.kills["daemon"] += 1
            self.daemon.kill()
        self.daemon_ended()
        self.start_daemon()
        self.waiting_for_ack = self.killed_at
        if everybody:
            self.verify()
            self.start_clients()

    # The whole.

    def run(self):
        seconds = self.options.minutes * 60
        self.start_daemon()
        for bucket, more in (("tcp", ()), ("unix", ()), ("own", ()), ("policy", ("--keep-last", KEEP))):
            self.cairn(self.daemon, "bucket", "create", bucket, "--copies", 2, *more)
        self.start_clients()
        end = time.monotonic() + seconds
        pace = min(1.0, seconds / 600)  # a short run has kills too
        next_daemon = time.monotonic() + self.rng.uniform(60, 120) * pace
        next_client = time.monotonic() + self.rng.uniform(15, 45) * pace
        next_word = time.monotonic() + 60
        while time.monotonic() < end:
            self.poll()
            time.sleep(0.05)
            if time.monotonic() > next_client:
                self.kill_some_client()
                next_client = time.monotonic() + self.rng.uniform(15, 45) * pace
            if time.monotonic() > next_daemon:
                self.kill_daemon()
                next_daemon = time.monotonic() + self.rng.uniform(60, 120) * pace
            if time.monotonic() > next_word:
                print(f"{(seconds - end + time.monotonic()) / 60:.1f} min: {dict(self.kills)} {dict(self.acked)} {dict(self.checks)} "
                      f"{dict(self.highest)}", flush=True)
                next_word = time.monotonic() + 60
        self.kill_clients()
        self.fence()
        self.verify()
        self.nothing_is_left()
        self.read_metrics()
        self.daemon.stop()
        self.daemon_ended()

    def fence(self):
        """The attempts that were cut off wait for ranks that will not come; a newer launch ends them."""
        for job in self.loads[2:]:
            job.start("--until", 0)
        while any(job.processes() for job in self.loads[2:]):
            for job in self.loads[2:]:
                for process in job.processes():
                    if process.process.poll() is not None:
                        if process.process.returncode != 0:
                            raise Failure(f"the last launch: {process.errors()}")
                        self.end(job, process)
            time.sleep(0.05)
        self.settle("no attempt is open", lambda metrics: metrics["cairn_checkpoints_open_attempts"] == 0)

    def nothing_is_left(self):
        last = self.cairn.json_lines(self.daemon, "ckpt", "ls", "policy/train")
        self.settle("the policy's steps", lambda _: len(self.cairn.json_lines(self.daemon, "ckpt", "ls", "policy/train")) <= KEEP)
        self.quiet()
        passes = self.daemon.metrics()["cairn_garbage_passes_total"] + 3
        self.settle("no orphaned bytes", lambda metrics: metrics["cairn_garbage_passes_total"] >= passes and
                    metrics["cairn_chunk_store_orphaned_bytes"] == 0)
        for run in ("own/train", "policy/train"):
            self.cairn(self.daemon, "ckpt", "rm", run, "--after", 0)
        for bucket in ("tcp", "unix"):
            for item in self.cairn.json_lines(self.daemon, "ls", f"cairn://{bucket}/"):
                self.cairn(self.daemon, "rm", f"cairn://{bucket}/{item['key']}")
        self.settle("nothing lives after everything was removed", lambda metrics: all(metrics[name] == 0 for name in (
            "cairn_chunk_store_live_bytes", "cairn_chunk_store_chunks", "cairn_chunk_store_orphaned_bytes", "cairn_readers_held")))
        self.quiet()
        # A process keeps empty segments to write them again.
        self.daemon.stop()
        self.daemon_ended()
        self.start_daemon()
        self.left = sum(allocated(path) for directory in self.data for path in directory.glob("segment-*"))
        if last and self.left > 2 * 64 * MIB:
            raise Failure(f"{self.left} bytes of segments are left, although nothing lives")

    def report(self):
        ready, first = sorted(self.ready), sorted(self.first_ack)
        return {
            "seed": self.options.seed, "minutes": self.options.minutes, "acknowledged": dict(self.acked),
            "checks": dict(self.checks), "kills": dict(self.kills), "clients_cut_off": dict(self.cut_off),
            **{name.removeprefix("cairn_").removesuffix("_total"): self.bytes[name] for name in self.COUNTED},
            **{f"max_{name}": value for name, value in self.highest.items()}, "budget_bytes": BUDGET,
            "ready_seconds": {"median": round(statistics.median(ready), 3), "max": round(ready[-1], 3)},
            "kill_to_first_acknowledgement_seconds":
                {"median": round(statistics.median(first), 3), "max": round(first[-1], 3)} if first else None,
            "segment_bytes_left": self.left}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(random.randbytes(4), "little"))
    parser.add_argument("--daemon", required=True, help="the cairnd program")
    parser.add_argument("--cairn", required=True, help="the cairn program")
    parser.add_argument("--writer", required=True, help="the ack_writer program")
    options = parser.parse_args()
    print(f"soak: minutes={options.minutes} seed={options.seed}", flush=True)
    with Scratch("soak") as scratch:
        soak = Soak(options, scratch)
        try:
            soak.run()
        except Failure as failure:
            print(f"after {dict(soak.kills)}: {failure}\nthe daemon's log ends: {soak.daemon.log_tail() if soak.daemon else ''}\n"
                  f"again: soak.py --seed {options.seed} --minutes {options.minutes} with the same arguments")
            return 1
        finally:
            soak.kill_clients()
            if soak.daemon:
                soak.daemon.kill()
    print(json.dumps(soak.report()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
