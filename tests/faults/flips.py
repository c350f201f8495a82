#!/usr/bin/env python3
"""Flips single bits in every file of a real store, and reads everything back: the right bytes, or damage that is told.

A daemon makes the store: objects, checkpoints, things removed, ends of every kind, so that the index has logs, tables
and a MANIFEST. Then each flip in a copy: most are read with the engine (store_reader), some with a daemon and `cairn`.

    flips.py --daemon cairnd --cairn cairn --reader store_reader [--flips 2000] [--daemon-flips 60] [--seed 1]
"""
import argparse
import collections
import ctypes
import json
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys

import harness

KINDS = [("superblock", r"superblock"), ("mark", r"mark"), ("segment", r"segment-.*"), ("CURRENT", r"index/CURRENT"),
         ("IDENTITY", r"index/IDENTITY"), ("MANIFEST", r"index/MANIFEST-.*"), ("OPTIONS", r"index/OPTIONS-.*"),
         ("table", r"index/.*\.sst"), ("log", r"index/.*\.log")]
DAMAGED = 6  # the exit code of DATA_LOSS


def kind_of(name):
    return next((kind for kind, pattern in KINDS if re.fullmatch(pattern, name)), None)


def safetensors(rng, tensors):
    header, data = {}, b""
    for name, count in tensors.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [len(data), len(data) + 4 * count]}
        data += rng.randbytes(4 * count)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class SmallDisk:
    """A file system in memory, so small that segments are, too: each flip needs a copy of all files."""

    def __init__(self, path, size=256 << 20):
        self.path = path
        path.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size},mode=0700".encode()) != 0:
            harness.skip(f"no right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        harness.run(["umount", "-l", self.path], check=False)


class Store:
    """A store of a real daemon, and what it must hold."""

    def __init__(self, args, scratch, rng):
        self.args, self.scratch, self.data = args, scratch, scratch / "disk" / "store"
        self.cairn = harness.Cairn(args.cairn)
        self.objects, self.steps = {}, {}
        self.made = 0
        # Several starts and ends: a start replays the log into tables, and enough tables are merged.
        for life in range(7):
            daemon = self.start(self.data)
            if life == 0:
                self.cairn(daemon, "bucket", "create", "b", "--keep-last", "9")
                self.cairn(daemon, "bucket", "create", "empty")
            for _ in range(6):
                self.put(daemon, rng, rng.choice([0, 17, 4096, 70_000]))
            self.put(daemon, rng, 300_000)
            self.save(daemon, rng, life + 1)
            if life % 2:
                self.remove(daemon, rng)
            if life == 3:
                self.put_many(daemon, 150)
            daemon.kill() if life % 3 == 2 else daemon.stop()
        # The newest log has more than a start writes.
        daemon = self.start(self.data)
        for _ in range(4):
            self.put(daemon, rng, 1000)
        self.remove(daemon, rng)
        daemon.kill()
        (self.data / "cairn.sock").unlink(missing_ok=True)

    def start(self, data):
        return harness.Daemon(self.args.daemon, data, self.scratch / "log",
                              flags=["--memory", "64MiB", "--garbage-grace", "50ms", "--garbage-interval", "50ms",
                                     "--reader-ttl", "1s", "--log-level", "error"])

    def put(self, daemon, rng, size):
        self.made += 1
        name, content = f"folder{self.made % 3}/object{self.made}", rng.randbytes(size)
        path = self.scratch / "content"
        path.write_bytes(content)
        self.cairn(daemon, "put", path, f"cairn://b/{name}")
        self.objects[name] = content

    def put_many(self, daemon, count):
        """Small objects, so many that tables have several blocks, an index of them, and filters."""
        for begin in range(0, count, 8):
            puts = []
            for i in range(begin, min(begin + 8, count)):
                name, content = f"many/{i:04}", f"content of object {i} ".encode() * (1 + i % 9)
                path = self.scratch / f"content{i - begin}"
                path.write_bytes(content)
                puts.append(harness.spawn([self.args.cairn, "put", path, f"cairn://b/{name}", "--server", daemon.server]))
                self.objects[name] = content
            if any(put.wait() != 0 for put in puts):
                raise harness.Failure("a put failed")

    def save(self, daemon, rng, step):
        folder = self.scratch / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(safetensors(rng, {"w": 5000, "norm": 10, "x": 30_000}))
        (folder / "notes.txt").write_bytes(rng.randbytes(100))
        self.cairn(daemon, "ckpt", "save", "b/run", folder, "--step", step)
        self.steps[step] = {p.name: p.read_bytes() for p in folder.iterdir()}

    def remove(self, daemon, rng):
        name = rng.choice(sorted(self.objects))
        self.cairn(daemon, "rm", f"cairn://b/{name}")
        del self.objects[name]
        if len(self.steps) > 2:
            step = rng.choice(sorted(self.steps)[:-1])
            self.cairn(daemon, "ckpt", "rm", "b/run", "--step", step)
            del self.steps[step]

    def files(self):
        return {str(p.relative_to(self.data)): p for p in sorted(self.data.rglob("*")) if p.is_file()}

    # ---- Reading back with a daemon and the command line
    def look(self, data):
        """What a user sees of `data`: "same", "damaged ...", or what is wrong. Raises when something is wrong."""
        try:
            daemon = self.start(data)
        except harness.Failure as failed:
            code = self.exit_code(data)
            if code != DAMAGED:
                raise harness.Failure(f"a start ends with {code}, not {DAMAGED}: {failed}") from None
            return "damaged: refused at the start"
        try:
            return self.read(daemon)
        finally:
            daemon.kill()

    def exit_code(self, data):
        done = harness.run([self.args.daemon, "--data", data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"], check=False)
        return done.returncode

    def read(self, daemon):
        damaged = []

        def cairn(*words):
            done = self.cairn(daemon, *words, check=False)
            if done.returncode == 0:
                return done.stdout
            if done.returncode != DAMAGED:
                raise harness.Failure(f"cairn {words} ends with {done.returncode}: {done.stderr}")
            damaged.append(done.stderr.strip())
            return None

        listed = cairn("ls", "cairn://b/", "--json")
        if listed is not None:
            keys = {json.loads(line)["key"] for line in listed.splitlines() if '"key"' in line}
            if keys != set(self.objects):
                raise harness.Failure(f"a listing lacks {set(self.objects) - keys}, and has {keys - set(self.objects)} beside")
        out = self.scratch / "got"
        for name, content in self.objects.items():
            if name.startswith("many/") and int(name[-4:]) % 25:
                continue  # the engine has read all of them
            out.unlink(missing_ok=True)
            if cairn("get", f"cairn://b/{name}", out) is not None and out.read_bytes() != content:
                raise harness.Failure(f"{name} has other bytes")
        folder = self.scratch / "restored"
        for step, files in self.steps.items():
            shutil.rmtree(folder, ignore_errors=True)
            if cairn("ckpt", "restore", "b/run", folder, "--step", step) is None:
                continue
            found = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            for name, content in files.items():
                if name not in found:
                    raise harness.Failure(f"step {step}: {name} is not there, but {sorted(found)}")
                # Headers may be written anew: the tensors stand at the end.
                size = len(content) if name.endswith(".txt") else 4 * 35_010
                if found[name][-size:] != content[-size:]:
                    raise harness.Failure(f"step {step}: {name} has other bytes")
        return f"damaged: {damaged[0]}" if damaged else "same"


class Reader:
    """A store_reader process; a new one when it has died."""

    def __init__(self, args, store, scratch):
        self.start = lambda: subprocess.Popen([args.reader, store.data, scratch / "copies" / "copy"], stdin=subprocess.PIPE,
                                              stdout=subprocess.PIPE, text=True)
        self.process = None

    def ask(self, flip):
        if self.process is None:
            self.process = self.start()
            ready = self.process.stdout.readline().strip()
            if ready != "ready":
                raise harness.Failure(f"store_reader: {ready}")
        self.process.stdin.write(f"{flip[0]} {flip[1]} {flip[2]}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer:
            return answer
        code, self.process = self.process.wait(), None
        return f"WRONG the engine has died with {code}"

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def written_bytes(path):
    """Places in the file that hold something: segments are allocated far ahead."""
    with open(path, "rb") as file:
        content = file.read()
    return len(content.rstrip(b"\0")) + 8 if path.name.startswith("segment-") else len(content)


def choose(store, count, rng):
    """`count` flips: of each kind of file as many, or all bits that there are; of logs their end twice as often."""
    places = collections.defaultdict(list)
    for name, path in store.files().items():
        size = min(written_bytes(path), path.stat().st_size)
        kind = kind_of(name)
        if kind is None:
            if size and name not in ("LOCK",):
                raise harness.Failure(f"{name} is of no kind that this test knows")
            continue
        places[kind].append((name, size))
    flips = []
    left = count
    for turn, kind in enumerate(sorted(places, key=lambda kind: sum(size for _, size in places[kind]))):
        files = [(name, size) for name, size in places[kind] if size]
        share = left // (len(places) - turn)
        total = sum(size for _, size in files)
        if total * 8 <= share:
            chosen = [(name, at, bit) for name, size in files for at in range(size) for bit in range(8)]
        else:
            chosen = set()
            while len(chosen) < share:
                # Small tables have mostly what is not data: each file is as likely as each byte.
                name, size = rng.choice(files) if rng.random() < 0.5 else rng.choices(files, [s for _, s in files])[0]
                at = rng.randrange(size)
                if kind in ("log", "MANIFEST") and rng.random() < 0.3:
                    at = size - 1 - rng.randrange(min(size, 300))
                if kind == "table" and rng.random() < 0.3:
                    at = size - 1 - rng.randrange(min(size, 1500))
                chosen.add((name, at, rng.randrange(8)))
            chosen = sorted(chosen)
        flips += [(kind, *flip) for flip in chosen]
        left -= len(chosen)
    return flips


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--cairn", required=True)
    parser.add_argument("--reader", required=True)
    parser.add_argument("--flips", type=int, default=int(os.environ.get("CAIRN_FLIPS", "2000")))
    parser.add_argument("--daemon-flips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", help="leave the store in this folder")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong = []
    with harness.Scratch("flips") as scratch, SmallDisk(scratch / "disk"), SmallDisk(scratch / "copies"):
        store = Store(args, scratch, rng)
        if args.keep:
            shutil.copytree(store.data, args.keep)
        flips = choose(store, args.flips, rng)
        tally = collections.defaultdict(collections.Counter)
        reader = Reader(args, store, scratch)
        for kind, *flip in flips:
            answer = reader.ask(flip)
            word = answer.split(" ", 1)[0]
            tally[kind][word] += 1
            if word not in ("same", "damaged"):
                wrong.append(f"{flip[0]} byte {flip[1]} bit {flip[2]}: {answer}")
        reader.close()
        for kind, _ in KINDS:
            if not tally[kind]:
                wrong.append(f"the store has no file of kind {kind}")
            print(f"{kind:12} {sum(tally[kind].values()):5} flips: " + ", ".join(f"{n} {w}" for w, n in sorted(tally[kind].items())))

        # The same with whole processes, as a user sees it.
        seen = collections.Counter()
        for kind, *flip in rng.sample(flips, min(args.daemon_flips, len(flips))):
            copy = scratch / "copies" / "daemon-copy"
            shutil.rmtree(copy, ignore_errors=True)
            harness.run(["cp", "-a", "--sparse=always", store.data, copy])
            with open(copy / flip[0], "r+b") as file:
                file.seek(flip[1])
                before = file.read(1)[0]
                file.seek(flip[1])
                file.write(bytes([before ^ (1 << flip[2])]))
            try:
                seen[store.look(copy).split(":")[0]] += 1
            except harness.Failure as failed:
                wrong.append(f"{flip[0]} byte {flip[1]} bit {flip[2]}, with a daemon: {failed}")
        print(f"with a daemon {sum(seen.values())} flips: " + ", ".join(f"{n} {w}" for w, n in sorted(seen.items())))
    if wrong:
        print(f"\nBROKEN, seed {args.seed}: {len(wrong)} flips")
        print("\n".join(wrong[:60]))
        return 1
    print(f"{len(flips)} flips: right bytes, or damage that was told")
    return 0


if __name__ == "__main__":
    sys.exit(main())
