#!/usr/bin/env python3
"""A real cairnd on a small tmpfs that fills up: what fails, what goes on, and that the space comes back.

usage: full_disk_test.py BIN [CYCLES]    (needs the right to mount; skipped, exit 77, without)
"""
import ctypes
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

BIN = pathlib.Path(sys.argv[1])
CYCLES = int(sys.argv[2]) if len(sys.argv) > 2 else int(os.environ.get("CAIRN_FULL_DISK_CYCLES", "8"))
MIB = 1 << 20
DISK = 224 * MIB
libc = ctypes.CDLL(None, use_errno=True)


def mount(path):
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, f"size={DISK},mode=0700".encode()) != 0:
        print(f"skipped: no right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")
        shutil.rmtree(path.parent)
        sys.exit(77)


class Daemon:
    running = []

    def __init__(self, data, log):
        self.log = open(log, "ab")
        self.process = subprocess.Popen(
            [BIN / "cairnd", "--data", data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--memory", "64MiB",
             "--garbage-grace", "20ms", "--garbage-interval", "20ms", "--reader-ttl", "1s"], stdout=subprocess.PIPE, stderr=self.log, text=True)
        Daemon.running.append(self.process)
        line = self.process.stdout.readline()
        assert line.startswith("cairnd ready"), (line, pathlib.Path(log).read_text())
        words = dict(word.split("=", 1) for word in line.split()[2:])
        self.server, self.http = words["listen"], words["http"]

    def cairn(self, *args, code=0, stdin=None):
        done = subprocess.run([BIN / "cairn", *map(str, args)], input=stdin, capture_output=True, timeout=300,
                              env=dict(os.environ, CAIRN_SERVER=self.server))
        assert done.returncode == code, (args, done.returncode, done.stderr)
        return done

    def metrics(self):
        text = urllib.request.urlopen(f"http://{self.http}/metrics").read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(cairn_\w+) (\S+)$", text, re.M)}

    def ready(self):
        return urllib.request.urlopen(f"http://{self.http}/readyz").status == 200

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0
        Daemon.running.remove(self.process)
        self.log.close()


def eventually(what, condition, limit=60):
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {limit} s"
        time.sleep(0.01)


def main(work):
    disk = work / "disk"
    disk.mkdir()
    mount(disk)
    try:
        run(work, disk)
    finally:
        for daemon in Daemon.running:
            daemon.kill()
            daemon.wait()
        subprocess.run(["umount", disk], check=True)


def run(work, disk):
    rng = random.Random(1)
    kept = work / "kept.bin"
    kept.write_bytes(rng.randbytes(20 * MIB))
    big = work / "big.bin"
    big.write_bytes(rng.randbytes(64 * MIB))
    daemon = Daemon(disk / "data", work / "cairnd.log")
    daemon.cairn("bucket", "create", "b")
    daemon.cairn("ckpt", "save", "b/r", "--step", 1, kept)

    def used():
        space = os.statvfs(disk)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    def kept_is_there():
        out = work / "out"
        daemon.cairn("ckpt", "restore", "b/r", out, "--step", 1)
        assert (out / "kept.bin").read_bytes() == kept.read_bytes()
        shutil.rmtree(out)

    def calm():
        metrics = daemon.metrics()
        return metrics["cairn_chunk_store_live_bytes"] < 21 * MIB and metrics["cairn_usage_available_bytes"] > 125 * MIB

    # A save that would not fit is refused before any of its bytes are sent, with the numbers.
    huge = work / "huge.bin"
    with open(huge, "wb") as file:
        file.truncate(DISK)
    before = daemon.metrics()["cairn_daemon_put_bytes_total"]
    refused = daemon.cairn("ckpt", "save", "b/r", "--step", 2, huge, code=8)
    assert re.search(rb"no room: asked \d+ bytes, free \d+, of which \d+ are kept", refused.stderr), refused.stderr
    assert daemon.metrics()["cairn_daemon_put_bytes_total"] == before
    huge.unlink()

    levels = []
    for cycle in range(CYCLES):
        # The disk fills in the middle of an upload whose size nobody knew: it alone fails, and says so.
        failed = daemon.cairn("put", "-", "cairn://b/stream", stdin=rng.randbytes(8 * MIB) * (DISK // (8 * MIB)), code=8)
        assert failed.stderr.count(b"\n") == 1, failed.stderr
        assert daemon.ready()
        if cycle % 10 == 0:
            kept_is_there()
            daemon.cairn("get", "cairn://b/stream", "-", code=3)
        eventually("the space of the failed upload comes back", calm)
        # What fits is saved again, and removed, while the disk is nearly full.
        daemon.cairn("ckpt", "save", "b/r", "--step", 3, big)
        daemon.cairn("ckpt", "rm", "b/r", "--step", 3)
        eventually("the space of the removed step comes back", calm)
        if cycle % 10 == 9:
            daemon.stop()
            daemon = Daemon(disk / "data", work / "cairnd.log")
        levels.append(daemon.metrics()["cairn_chunk_store_live_bytes"])
        assert daemon.metrics()["cairn_usage_reserved_bytes"] == 0
    # A segment stays open for the next chunk; a restart closes it. What is left is the kept step and the index.
    daemon.stop()
    daemon = Daemon(disk / "data", work / "cairnd.log")
    index = sum(f.stat().st_blocks * 512 for f in (disk / "data/index").iterdir())  # RocksDB allocates ahead
    eventually("all is given back", lambda: used() < 21 * MIB + index + MIB)
    assert levels[-1] == levels[0], levels
    kept_is_there()

    # Somebody else fills the disk to the last byte. Reads and removals go on, and what is removed is freed.
    for i in range(20):
        daemon.cairn("put", "-", f"cairn://b/s{i}", stdin=rng.randbytes(100_000))
    live = daemon.metrics()["cairn_chunk_store_live_bytes"]
    filler = open(disk / "filler", "wb")
    try:
        while True:
            filler.write(bytes(MIB))
            filler.flush()
    except OSError:
        pass
    kept_is_there()
    daemon.cairn("put", kept, "cairn://b/k", code=8)
    assert os.statvfs(disk).f_bavail < 256
    for i in range(20):
        daemon.cairn("rm", f"cairn://b/s{i}")
    eventually("garbage is freed", lambda: daemon.metrics()["cairn_chunk_store_live_bytes"] < live - 1_900_000)
    assert daemon.ready()
    os.unlink(disk / "filler")
    filler.raw.close()
    kept_is_there()
    eventually("there is room", lambda: daemon.metrics()["cairn_usage_available_bytes"] > 64 * MIB)
    daemon.cairn("ckpt", "save", "b/r", "--step", 4, big)
    daemon.stop()
    log = (work / "cairnd.log").read_text()
    assert "event=space_" in log or CYCLES < 5, log
    print(json.dumps({"cycles": CYCLES, "live_bytes": levels[-1], "leak_bytes": levels[-1] - levels[0]}))


if __name__ == "__main__":
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cairn-full-"))
    main(folder)
    shutil.rmtree(folder)
