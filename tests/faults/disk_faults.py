#!/usr/bin/env python3
"""Failing and stalling disks under a real daemon: what is acknowledged stays, what fails is said, the rest goes on.

    tests/faults/disk_faults.py --daemon D --cairn C --filter F SCENARIO
"""
import argparse
import pathlib
import random
import re
import sys
import time
import urllib.error
import urllib.request

import faulty_disk
from faulty_disk import FaultyDisk
from harness import Cairn, Daemon, Failure, Scratch, run, spawn

MIB = 1 << 20
FLAGS = ["--memory", "256MiB"]


def check(condition, what):
    if not condition:
        raise Failure(what)


def eventually(what, condition, limit=120):
    until = time.monotonic() + limit
    while not condition():
        check(time.monotonic() < until, f"{what}: not within {limit} s")
        time.sleep(0.01)


class Store:
    """A daemon on directories of which some lie on disks that can fail, and the command line."""

    def __init__(self, options, scratch, disks, plain=0):
        self.options, self.scratch = options, scratch
        self.disks = [FaultyDisk(scratch, f"disk{i}", options.filter) for i in range(disks)]
        self.data = [d.data for d in self.disks] + [scratch / f"plain{i}" for i in range(plain)]
        self.log = scratch / "cairnd.log"
        self.cairn = Cairn(options.cairn)
        self.daemon = None

    def start(self):
        more = [flag for data in self.data[1:] for flag in ("--data", data)]
        self.daemon = Daemon(self.options.daemon, self.data[0], self.log, [*FLAGS, *more])

    def close(self):
        for disk in self.disks:  # a process that waits for a disk cannot be killed
            disk.clear("stall")
        if self.daemon:
            self.daemon.kill()
        for disk in self.disks:
            disk.close()

    def __call__(self, *args, code=0):
        done = self.cairn(self.daemon, *args, check=False)
        check(done.returncode == code, f"cairn {args}: exit {done.returncode}, not {code}: {done.stderr}; "
                                       f"the daemon's log ends: {self.daemon.log_tail()}")
        return done

    def begin(self, *args):
        """A command that runs beside the test."""
        return spawn([self.options.cairn, *args, "--server", self.daemon.server], stdout=-1, stderr=-1, text=True)

    def end(self, process, code=0):
        _, errors = process.communicate(timeout=120)
        check(process.returncode == code, f"{process.args}: exit {process.returncode}, not {code}: {errors}; "
                                          f"the daemon's log ends: {self.daemon.log_tail()}")
        return errors

    def page(self, path):
        try:
            with urllib.request.urlopen(f"http://{self.daemon.http}{path}", timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def states(self):
        """Directory -> serving, syncing, failed or missing."""
        text = self.page("/metrics")[1]
        return {m[1]: m[2] for m in re.finditer(r'^cairn_target_state\{[^}]*directory="([^"]*)",state="(\w+)"\} 1$', text, re.M)}

    def restores(self, run_name, step, expected):
        out = self.scratch / f"out-{random.random()}"
        self("ckpt", "restore", run_name, out, "--step", step)
        for name, data in expected.items():
            check((out / name).read_bytes() == data, f"step {step}: {name} came back with other bytes")
            (out / name).unlink()

    def log_has(self, *words):
        return any(all(word in line for word in words) for line in self.log.read_text().splitlines())

    def tells_failure(self, directory):
        """ext4 makes itself read-only when its journal meets the fault first."""
        return any(self.log_has("event=target_failed", directory, why)
                   for why in ("Input/output error", "Read-only file system"))


def files(scratch, name, count, size, seed):
    """A folder of random files; returns it and what is in it."""
    folder = scratch / name
    folder.mkdir()
    rng = random.Random(seed)
    content = {f"f{i}": rng.randbytes(size) for i in range(count)}
    for file, data in content.items():
        (folder / file).write_bytes(data)
    return folder, content


def reads_fail(store, scratch):
    """One disk cannot be read. What has a second copy is read from it; the rest is reported, and is there again when the
    disk is."""
    store.start()
    store("bucket", "create", "one")
    store("bucket", "create", "two", "--copies", 2)
    folder, content = files(scratch, "in", 8, 3 * MIB, 1)
    for i in range(8):
        store("put", folder / f"f{i}", f"cairn://two/f{i}")
    copies = 32  # each at one of three directories: some are at the faulty one, but for one run in 400,000
    for i in range(copies):
        store("put", folder / f"f{i % 8}", f"cairn://one/{i}")
    store("ckpt", "save", "two/r", "--step", 1, folder)
    out = scratch / "got"
    with store.disks[0].fault("fail-read"):
        for name, data in content.items():
            store("get", f"cairn://two/{name}", out)
            check(out.read_bytes() == data, f"two/{name} came back with other bytes")
        store.restores("two/r", 1, content)
        reported = 0
        for i in range(copies):
            got = store.cairn(store.daemon, "get", f"cairn://one/{i}", scratch / "one", check=False)
            if got.returncode == 0:
                check((scratch / "one").read_bytes() == content[f"f{i % 8}"], f"one/{i} came back with other bytes")
                continue
            check(got.returncode == 6, f"get one/{i}: exit {got.returncode}: {got.stderr}")
            check("Input/output error" in got.stderr and got.stderr.count("\n") == 1, got.stderr)
            reported += 1
        check(0 < reported < copies, f"{reported} of {copies} objects with one copy could not be read")
        check(store.daemon.metric("cairn_chunks_reads_elsewhere_total") > 0, "no read went to the other copy")
        # Reads prove nothing about writes: the directory stays.
        check(set(store.states().values()) == {"serving"}, f"states: {store.states()}")
        store("put", folder / "f0", "cairn://two/new")
        check(store.log_has("event=block_bad", str(store.data[0])), store.daemon.log_tail())

    def all_is_there():
        for key, name in [(f"two/{name}", name) for name in content] + [(f"one/{i}", f"f{i % 8}") for i in range(copies)]:
            store("get", f"cairn://{key}", out)
            check(out.read_bytes() == content[name], f"{key} came back with other bytes")

    all_is_there()
    # A directory that cannot be read at a start is left out, and comes back with a later one.
    store.daemon.stop()
    bad = str(store.data[0])
    with store.disks[0].fault("fail-read"):
        store.start()
        check(store.log_has("level=error", bad, "Input/output error"), store.daemon.log_tail())
        check(store.states()[bad] == "missing", f"states: {store.states()}")
        check("degraded" in store.page("/readyz")[1], f"/readyz: {store.page('/readyz')}")
        store.restores("two/r", 1, content)
        store("put", folder / "f1", "cairn://two/new")
        store.daemon.stop()
    store.start()
    eventually("the directory is brought up", lambda: set(store.states().values()) == {"serving"})
    all_is_there()
    store("get", "cairn://two/new", out)
    check(out.read_bytes() == content["f1"], "two/new is not what was put last")
    store.daemon.stop()


def fails_during_a_save(fault):
    def scenario(store, scratch):
        """Writes or flushes of one disk of two begin to fail in the middle of a save: it is out, loudly, the save goes
        on, and after a repair and a restart it is brought up and serves."""
        store.start()
        store("bucket", "create", "two", "--copies", 2)
        before, first = files(scratch, "before", 3, MIB, 1)
        store("ckpt", "save", "two/r", "--step", 1, before)
        folder, content = files(scratch, "in", 8, 32 * MIB, 2)
        start = store.daemon.metric("cairn_daemon_put_bytes_total")
        save = store.begin("ckpt", "save", "two/r", "--step", 2, folder)
        eventually("a part of the save is there",
                   lambda: store.daemon.metric("cairn_daemon_put_bytes_total") > start + 64 * MIB)
        bad, name = store.disks[0], str(store.data[0])
        with bad.fault(fault):
            check(save.poll() is None, "the save ended before its disk failed")
            store.end(save)
            check(store.states() == {name: "failed", str(store.data[1]): "serving"}, f"states: {store.states()}")
            check(store.tells_failure(name), "no target_failed line: " + store.daemon.log_tail())
            status, text = store.page("/readyz")
            check(status == 200 and "degraded" in text and name in text, f"/readyz: {status} {text}")
            store.restores("two/r", 2, content)
            store("ckpt", "save", "two/r", "--step", 3, before)
            store("ckpt", "rm", "two/r", "--step", 1)
        # It stays out: nobody knows what reached it.
        store("put", before / "f0", "cairn://two/k")
        check(store.states()[name] == "failed", f"states: {store.states()}")
        store.daemon.stop()
        bad.heal()
        store.start()
        eventually("the disk is brought up", lambda: set(store.states().values()) == {"serving"})
        check(store.page("/readyz") == (200, "ready\n"), f"/readyz: {store.page('/readyz')}")
        with store.disks[1].fault("fail-read"):  # so that what was brought up is read
            store.restores("two/r", 2, content)
            store.restores("two/r", 3, first)
        store.daemon.stop()

    return scenario


def the_only_disk_fails(fault):
    def scenario(store, scratch):
        """The only directory: nothing more is acknowledged, which is said everywhere, and reads go on. After a repair
        and a restart, what was acknowledged is there."""
        store.start()
        store("bucket", "create", "b")
        folder, content = files(scratch, "in", 3, 5 * MIB, 1)
        store("ckpt", "save", "b/r", "--step", 1, folder)
        store("put", folder / "f0", "cairn://b/k")
        check(store.page("/readyz")[0] == 200, "/readyz before the fault")
        with store.disks[0].fault(fault):
            for args in [["put", folder / "f1", "cairn://b/k"], ["ckpt", "save", "b/r", "--step", 2, folder]]:
                errors = store(*args, code=1).stderr
                check("has failed" in errors and errors.count("\n") == 1, errors)
            check(store.states() == {str(store.data[0]): "failed"}, f"states: {store.states()}")
            check(store.daemon.metric("cairn_committer_failed") == 1, "cairn_committer_failed")
            status, text = store.page("/readyz")
            check(status == 503 and "failed" in text, f"/readyz: {status} {text}")
            check(store.page("/healthz")[0] == 200, "/healthz")
            check(store.tells_failure(str(store.data[0])), "no target_failed line: " + store.daemon.log_tail())
            store.restores("b/r", 1, content)
        store("put", folder / "f1", "cairn://b/k", code=1)  # for good, also when the disk does well again
        store.daemon.stop()
        store.disks[0].heal()
        store.start()
        check(store.page("/readyz")[0] == 200, "/readyz after the restart")
        store.restores("b/r", 1, content)
        store("get", "cairn://b/k", scratch / "got")
        check((scratch / "got").read_bytes() in (content["f0"], content["f1"]), "the object is neither old nor new")
        check([s["step"] for s in store.cairn.json_lines(store.daemon, "ckpt", "ls", "b/r")] == [1], "steps")
        store("ckpt", "save", "b/r", "--step", 2, folder)
        store.daemon.stop()

    return scenario


def stalls(store, scratch):
    """One disk of two stands still, for a second and for 20 s, while a step is saved and objects are put and got: they
    wait, nothing fails, nothing is taken out, and the daemon answers meanwhile."""
    store.start()
    store("bucket", "create", "two", "--copies", 2)
    folder, content = files(scratch, "in", 8, 16 * MIB, 1)
    store("ckpt", "save", "two/r", "--step", 1, folder)
    store("put", folder / "f0", "cairn://two/k")
    longest = 0.0
    for step, seconds in [(2, 1), (3, 1), (4, 20)]:
        start = store.daemon.metric("cairn_daemon_put_bytes_total")
        save = store.begin("ckpt", "save", "two/r", "--step", step, folder)
        eventually("a part of the save is there",
                   lambda: store.daemon.metric("cairn_daemon_put_bytes_total") > start + 16 * MIB)
        with store.disks[0].fault("stall"):
            ends = time.monotonic() + seconds
            put = store.begin("put", folder / "f1", f"cairn://two/k{step}")
            get = store.begin("get", "cairn://two/k", scratch / f"got{step}")
            restore = store.begin("ckpt", "restore", "two/r", scratch / f"out{step}", "--step", 1)
            while time.monotonic() < ends:
                asked = time.monotonic()
                check(store.page("/healthz")[0] == 200, "/healthz")
                check(store.page("/readyz")[0] == 200, "/readyz")
                longest = max(longest, time.monotonic() - asked)
                time.sleep(0.1)
            check(save.poll() is None, "the save ended although its disk stood still")
        for process in [save, put, get, restore]:
            store.end(process)
        check((scratch / f"got{step}").read_bytes() == content["f0"], "got other bytes")
        for name, data in content.items():
            check((scratch / f"out{step}" / name).read_bytes() == data, f"restored {name} with other bytes")
        store.restores("two/r", step, content)
        check(set(store.states().values()) == {"serving"}, f"states: {store.states()}")
    print(f"longest answer of /healthz and /readyz during a stall: {longest:.3f} s")
    check(not store.log_has("level=error"), store.daemon.log_tail())
    store.daemon.stop()


SCENARIOS = {  # name: scenario, disks that can fail, plain directories
    "reads": (reads_fail, 1, 2),
    "writes": (fails_during_a_save("fail-write"), 2, 0),
    "flushes": (fails_during_a_save("fail-flush"), 2, 0),
    "only-writes": (the_only_disk_fails("fail-write"), 1, 0),
    "only-flushes": (the_only_disk_fails("fail-flush"), 1, 0),
    "stalls": (stalls, 1, 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    parser.add_argument("--daemon", required=True, help="the cairnd program")
    parser.add_argument("--cairn", required=True, help="the cairn program")
    parser.add_argument("--writer", help="not used")
    parser.add_argument("--filter", default="", help="the filter for nbdkit, cairn_nbdkit_faults.so")
    options = parser.parse_args()
    faulty_disk.require(options.filter)
    for name, (scenario, disks, plain) in SCENARIOS.items():
        if options.scenario not in (name, "all"):
            continue
        with Scratch("disk-faults") as scratch:
            store = Store(options, scratch, disks, plain)
            try:
                scenario(store, scratch)
            except Failure as failure:
                print(f"{name}: {failure}")
                return 1
            finally:
                store.close()
        print(f"{name}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
