#!/usr/bin/env python3
"""Hostile peers and small limits against a live daemon, on loopback, while an honest client puts and gets.

    tests/faults/hostile.py --daemon build/release/bin/cairnd --cairn build/release/bin/cairn [--seed N] [-v] [name ...]

Every attack is bounded in number and time. Whatever peers do, the honest client's bytes come back, the daemon stays
inside its memory budget, gives its descriptors back, and writes a bounded number of log lines.
"""
import argparse
import errno
import fcntl
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

ARGS = None
MIB = 1 << 20
HELLO, HELLO_REPLY, REQUEST, REPLY, ERROR, DATA, CREDIT, CANCEL, PING, PONG = range(1, 11)
MAP, PUT_CHUNK, OBJECT_LIST = 1, 10, 33
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 2, 4

CRC = []
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    CRC.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def header(kind, call=0, method=0, message_bytes=0, payload_bytes=0, message_crc=0):
    start = b"CRN1" + struct.pack("<BBHQIII", kind, 0, method, call, message_bytes, payload_bytes, message_crc)
    return start + struct.pack("<I", crc32c(start))


def frame(kind, message=b"", call=0, method=0, payload=b""):
    return header(kind, call, method, len(message), len(payload), crc32c(message)) + message + payload


def hello(low=1, high=1, name=b"hostile"):
    return frame(HELLO, bytes([8, low, 16, high]) + bytes([34, len(name)]) + name)


class Daemon:
    def __init__(self, data, *flags, under=()):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([*under, ARGS.daemon, "--data", data, "--listen", "127.0.0.1:0", "--http",
                                         "127.0.0.1:0", *flags], stdout=subprocess.PIPE, stderr=self.log, text=True)
        ready = self.process.stdout.readline()
        if not ready.startswith("cairnd ready"):
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError(f"no ready line: {ready!r} {self.text()}")
        self.fields = dict(word.split("=", 1) for word in ready.split()[2:])
        self.unix = pathlib.Path(data) / "cairn.sock"

    @property
    def pid(self):
        return self.process.pid

    def address(self):
        host, port = self.fields["listen"].rsplit(":", 1)
        return host, int(port)

    def connect(self, timeout=30):
        peer = socket.create_connection(self.address(), timeout=timeout)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer

    def greeted(self):
        peer = self.connect()
        peer.sendall(hello())
        if read_frame(peer)[0] != HELLO_REPLY:
            raise AssertionError("no hello reply")
        return peer

    def text(self):
        # Not by seeking: the daemon writes where this descriptor stands.
        fd = self.log.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()

    def status(self, name):
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])

    def rss(self):
        return self.status("VmRSS") * 1024

    def peak(self):
        return self.status("VmHWM") * 1024

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def http(self, path):
        with urllib.request.urlopen(f"http://{self.fields['http']}{path}", timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name):
        return float(re.search(rf"^{name} (\S+)$", self.http("/metrics"), re.M)[1])

    def alive(self):
        return self.process.poll() is None

    def end(self, sig=signal.SIGTERM):
        if self.alive():
            self.process.send_signal(sig)
        code = self.process.wait(timeout=90)
        self.process.stdout.close()
        return code


def read_exactly(peer, size):
    out = b""
    while len(out) < size:
        part = peer.recv(size - len(out))
        if not part:
            raise ConnectionError("closed")
        out += part
    return out


def read_frame(peer):
    head = read_exactly(peer, 32)
    kind, _, method, call, message, payload, _ = struct.unpack("<BBHQIII", head[4:28])
    return kind, call, read_exactly(peer, message), read_exactly(peer, payload)


def send(peer, data):
    """As much as the daemon takes; it may close the connection at any time."""
    try:
        peer.sendall(data)
        return True
    except OSError:
        return False


def closed(peer, within=60):
    """Waits until the daemon closes the connection; what it says before is dropped."""
    peer.settimeout(within)
    try:
        while peer.recv(1 << 16):
            pass
        return True
    except ConnectionError:
        return True
    except (TimeoutError, socket.timeout):
        return False


class Honest:
    """Puts and gets all along; the first failure is kept."""

    def __init__(self, daemon, work):
        self.daemon, self.work = daemon, pathlib.Path(work)
        self.done, self.failure, self.slowest = 0, None, 0.0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        rng = random.Random(ARGS.seed)
        while not self.stopping.is_set() and self.failure is None:
            began = time.monotonic()
            content = rng.randbytes(rng.choice([10, 100_000, 3 * MIB]))
            put = cairn(self.daemon, "put", "-", f"cairn://b/honest/{self.done % 5}", stdin=content)
            got = cairn(self.daemon, "get", f"cairn://b/honest/{self.done % 5}", "-")
            if put.returncode != 0 or got.returncode != 0 or got.stdout != content:
                self.failure = (put.stderr + got.stderr).decode() or "other bytes came back"
                return
            self.done += 1
            self.slowest = max(self.slowest, time.monotonic() - began)

    def stop(self):
        self.stopping.set()
        self.thread.join()


# Memory that clients share with the daemon is theirs, but counts in its peak where it is mapped.
os.environ["CAIRN_TRANSPORT"] = "unix"


def cairn(daemon, *args, stdin=None):
    return subprocess.run([ARGS.cairn, *map(str, args)], input=stdin, capture_output=True, timeout=120,
                          env=dict(os.environ, CAIRN_SERVER=daemon.fields["listen"]))


# Short limits, so that every one of them is met within the test.
LIMITS = ("--limits-handshake", "1s", "--limits-header", "1s", "--limits-idle", "10s", "--limits-body-window", "2s",
          "--limits-connections-unknown", "200", "--limits-connections-per-peer", "3000", "--log-lines", "5")


class Hostile(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="cairn-hostile-"))
        self.peers, self.children, self.daemons = [], [], []
        self.rng = random.Random(ARGS.seed)
        self.honest = None
        signal.signal(signal.SIGALRM, self.stuck)
        signal.alarm(120)

    def stuck(self, *_):
        raise AssertionError("stuck: " + (self.daemons[-1].text()[-3000:] if self.daemons else ""))

    def tearDown(self):
        signal.alarm(0)
        if self.honest:
            self.honest.stop()
        for child in self.children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe:
                    pipe.close()
        for peer in self.peers:
            peer.close()
        for daemon in self.daemons:
            if daemon.alive():
                daemon.end(signal.SIGKILL)
            daemon.log.close()
        shutil.rmtree(self.dir)

    def start(self, *flags, under=()):
        daemon = Daemon(self.dir / "data", *flags, under=under)
        self.daemons.append(daemon)
        return daemon

    def started(self, *flags):
        """A daemon with a bucket, and an honest client at work."""
        limits = dict(zip(LIMITS[::2], LIMITS[1::2])) | dict(zip(flags[::2], flags[1::2]))
        daemon = self.start("--memory", "128MiB", *(word for pair in limits.items() for word in pair))
        self.assertEqual(cairn(daemon, "bucket", "create", "b").returncode, 0)
        self.honest = Honest(daemon, self.dir)
        self.rounds(1)
        return daemon

    def keep(self, peer):
        self.peers.append(peer)
        return peer

    def rounds(self, count):
        """Until the honest client has gone `count` rounds further."""
        until = self.honest.done + count
        while self.honest.done < until and self.honest.failure is None:
            time.sleep(0.01)
        self.assertIsNone(self.honest.failure)

    def ended(self, daemon, fds, budget=128 * MIB):
        """What must hold after every attack."""
        self.rounds(2)
        self.honest.stop()
        self.assertIsNone(self.honest.failure)
        for peer in self.peers:
            peer.close()
        for child in self.children:
            child.kill()
            child.wait()
        deadline = time.monotonic() + 60
        while (daemon.fds() > fds + 8 or daemon.metric("cairn_rpc_connections") > 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(daemon.metric("cairn_rpc_connections"), 0)
        self.assertLessEqual(daemon.fds(), fds + 8)
        self.assertLessEqual(daemon.peak(), budget)
        print(f"  {self.id().split('.')[-1]}: honest rounds {self.honest.done}, slowest {self.honest.slowest:.2f} s, "
              f"peak {daemon.peak() / MIB:.0f} MiB of {budget // MIB}, log lines {daemon.text().count(chr(10))}")
        self.assertEqual(daemon.end(), 0)

    def lines(self, daemon, seconds):
        """A bounded number of lines for each kind of event and second, whatever happened."""
        text = daemon.text()
        kinds = set(re.findall(r" event=(\w+)", text))
        self.assertLessEqual(text.count("\n"), 6 * len(kinds) * (seconds + 2), text[-2000:])

    def test_garbage_half_frames_and_wrong_hellos(self):
        daemon = self.started()
        fds, began = daemon.fds(), time.monotonic()
        whole = hello() + frame(REQUEST, b"", 1, MAP) + frame(PING)
        for i in range(400):
            peer = daemon.connect()
            kind = i % 5
            if kind == 0:
                send(peer, self.rng.randbytes(self.rng.randrange(1, 5000)))
            elif kind == 1:
                send(peer, b"GET / HTTP/1.1\r\nHost: \x1b[2J\r\n\r\n")
            elif kind == 2:  # cut anywhere
                send(peer, whole[:self.rng.randrange(len(whole))])
            elif kind == 3:  # a flipped bit anywhere
                bad = bytearray(whole)
                bad[self.rng.randrange(len(bad))] ^= 1 << self.rng.randrange(8)
                send(peer, bad)
            else:  # another version: the answer names both
                send(peer, hello(100, 101, b"\x1b]0;x\x07 \xe2\x80\xae name"))
                kind, _, message, _ = read_frame(peer)
                self.assertEqual(kind, ERROR)
                self.assertIn(b"100", message)
                self.assertTrue(closed(peer))
            peer.close()
        self.lines(daemon, time.monotonic() - began)
        self.assertNotIn("\x1b", daemon.text())
        self.ended(daemon, fds)

    def test_memory_that_could_be_taken_away_is_not_mapped(self):
        """A client offers memory with its hello: unsealed, shrunk to nothing, a file, a pipe; then the right kind."""
        daemon = self.started()
        fds = daemon.fds()
        # features (field 3): bit 0 says that memory comes with the hello
        offer = bytes([8, 1, 16, 1, 24, 1, 34, 7]) + b"hostile"

        def answered(fd):
            peer = self.keep(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            peer.settimeout(30)
            peer.connect(str(daemon.unix))
            socket.send_fds(peer, [frame(HELLO, offer)], [fd])
            os.close(fd)
            kind, _, message, _ = read_frame(peer)
            self.assertEqual(kind, HELLO_REPLY)
            return message[:4]  # version, features

        def memory(size, seals):
            fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, F_ADD_SEALS, seals)
            return fd

        reader, writer = os.pipe()
        os.close(writer)
        plain, name = tempfile.mkstemp(dir=self.dir)
        os.unlink(name)
        refused = [memory(MIB, 0), memory(MIB, F_SEAL_GROW), memory(0, F_SEAL_SHRINK), memory(MIB + 1, F_SEAL_SHRINK),
                   os.memfd_create("hostile", os.MFD_CLOEXEC), plain, reader]
        for fd in refused:
            answer = answered(fd)
            self.assertEqual(answer[:2], bytes([8, 1]))
            self.assertNotEqual(answer[2], 16)  # no features
        self.assertIn("event=shared_memory_refused", daemon.text())
        self.assertEqual(answered(memory(MIB, F_SEAL_SHRINK)), bytes([8, 1, 16, 1]))
        self.ended(daemon, fds)

    def test_giant_lengths_cost_nothing(self):
        daemon = self.started()
        fds = daemon.fds()
        self.honest.stop()  # its memory would hide what the lengths cost
        self.assertIsNone(self.honest.failure)
        giants = [1 << 20, (1 << 20) + 1, (8 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
        before = None
        for i in range(60):
            for size in giants:
                peer = daemon.connect()
                send(peer, header(HELLO, message_bytes=max(size, 20_000)))
                self.assertTrue(closed(peer))
                peer.close()
                peer = daemon.greeted()
                if size <= 1 << 20:
                    peer.close()
                    continue
                kind = self.rng.randrange(3)
                if kind == 0:
                    send(peer, header(REQUEST, 1, MAP, message_bytes=size))
                elif kind == 1:
                    send(peer, frame(REQUEST, b"", 1, PUT_CHUNK) + header(DATA, 1, payload_bytes=max(size, (8 << 20) + 1)))
                else:
                    send(peer, header(DATA, 1, message_bytes=size, payload_bytes=size))
                self.assertTrue(closed(peer))
                peer.close()
            if i == 9:
                before = daemon.rss()
        self.assertLess(daemon.rss() - before, MIB)
        self.honest = Honest(daemon, self.dir)
        self.ended(daemon, fds)

    def test_slow_headers_half_handshakes_and_idlers(self):
        daemon = self.started()
        fds, began = daemon.fds(), time.monotonic()
        silent = [self.keep(daemon.connect()) for _ in range(300)]  # more than may be unknown at once
        half = [self.keep(daemon.connect()) for _ in range(100)]
        for peer in half:
            send(peer, hello()[:self.rng.randrange(1, 40)])
        for peer in silent + half:
            self.assertTrue(closed(peer, 10))
        slow = [self.keep(daemon.greeted()) for _ in range(100)]
        for peer in slow:
            send(peer, frame(REQUEST, b"x" * 1000, 1, MAP)[:self.rng.randrange(1, 1000)])
        for peer in slow:
            self.assertTrue(closed(peer, 10))
        # A byte now and then does not help.
        drips = self.keep(daemon.connect())
        for byte in hello():
            if not send(drips, bytes([byte])):
                break
            time.sleep(0.1)
        self.assertTrue(closed(drips, 1))
        self.lines(daemon, time.monotonic() - began)
        self.ended(daemon, fds)

    def test_a_thousand_idle_connections(self):
        daemon = self.started("--limits-idle", "15s")
        fds, before = daemon.fds(), daemon.rss()
        idle = [self.keep(daemon.greeted()) for _ in range(1000)]
        self.assertGreaterEqual(daemon.metric("cairn_rpc_connections"), 1000)
        print(f"  1,000 idle connections: {(daemon.rss() - before) / 1000 / 1024:.1f} KiB each")
        self.rounds(5)
        # They are still there, and are answered.
        for peer in idle[::100]:
            send(peer, frame(PING))
            self.assertEqual(read_frame(peer)[0], PONG)
        for peer in idle:
            self.assertTrue(closed(peer, 60))
        self.ended(daemon, fds)

    def test_peers_that_never_read_and_bodies_that_never_come(self):
        daemon = self.started()
        big = self.dir / "big"
        big.write_bytes(self.rng.randbytes(8 * MIB) * 16)
        self.assertEqual(cairn(daemon, "put", big, "cairn://b/big").returncode, 0)
        fds = daemon.fds()
        # By TCP: what lies in shared memory is taken by the daemon itself, also from one that stands still.
        env = dict(os.environ, CAIRN_SERVER=daemon.fields["listen"], CAIRN_TRANSPORT="tcp")
        # Real clients that stand still: gets that take no bytes, puts that send none. Which of them the signal meets in the
        # middle of a call is chance, so more come until enough were given up.
        for _ in range(8):
            if daemon.metric("cairn_rpc_refused_total") >= 4:
                break
            puts = [subprocess.Popen([ARGS.cairn, "put", big, f"cairn://b/big{i}"], env=env, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL) for i in range(6)]
            gets = [subprocess.Popen([ARGS.cairn, "get", "cairn://b/big", "-"], env=env, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL) for _ in range(6)]
            self.children += puts + gets
            while daemon.metric("cairn_rpc_calls_running") < 4 and any(put.poll() is None for put in puts):
                time.sleep(0.01)
            for child in puts + gets:
                child.send_signal(signal.SIGSTOP)
            time.sleep(3)  # longer than a body may take
        self.assertGreaterEqual(daemon.metric("cairn_rpc_refused_total"), 4)
        # Calls whose replies are never taken: the whole of what one connection may have, again and again.
        for _ in range(20):
            peer = self.keep(daemon.greeted())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(0.2)
            request = b"".join(frame(REQUEST, b"", call, MAP) for call in range(1, 200))
            send(peer, request)
            # An upload that is announced, with a message that makes no sense, and data for it.
            send(peer, frame(REQUEST, self.rng.randbytes(60), 1000, PUT_CHUNK))
            send(peer, frame(DATA, b"", 1000, payload=b"x" * 1000))
        self.rounds(5)
        # They are given up, not waited for: what they held is free again while they still stand there.
        while daemon.metric("cairn_rpc_calls_running") > 1:  # the honest client's
            time.sleep(0.01)
        self.ended(daemon, fds)

    def test_http_slow_and_large_heads_and_many_connections(self):
        daemon = self.started("--limits-http-connections", "16", "--limits-http-head", "2KiB")
        fds = daemon.fds()
        host, port = daemon.fields["http"].rsplit(":", 1)

        def dial():
            return self.keep(socket.create_connection((host, int(port)), timeout=30))
        for _ in range(100):
            send(dial(), b"GET /met")
        for _ in range(20):  # none of them keeps the operator out
            self.assertEqual(daemon.http("/healthz"), "ok\n")
        large = dial()
        send(large, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 5000 + b"\r\n\r\n")
        self.assertIn(b"431", large.recv(100))
        for _ in range(100):
            send(dial(), self.rng.randbytes(300) + b"\r\n\r\n")
        self.assertEqual(daemon.http("/healthz"), "ok\n")
        self.ended(daemon, fds)

    def test_descriptors_run_out_and_come_back(self):
        daemon = self.started()
        self.honest.stop()
        fds = daemon.fds()
        # A client that is connected goes on while no other gets in.
        env = dict(os.environ, CAIRN_SERVER=daemon.fields["listen"])
        put = subprocess.Popen([ARGS.cairn, "put", "-", "cairn://b/through"], env=env, stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.children.append(put)
        content = self.rng.randbytes(MIB) * 8
        put.stdin.write(content[:MIB])
        put.stdin.flush()
        while daemon.metric("cairn_rpc_connections") == 0:
            time.sleep(0.01)
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.fds() + 2, before[1]))
        waiting = [self.keep(daemon.connect()) for _ in range(20)]  # in the kernel's queue
        put.stdin.write(content[MIB:])
        put.stdin.close()
        self.assertEqual(put.wait(60), 0, put.stderr.read())
        self.assertTrue(daemon.alive())
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        for peer in waiting[-3:]:
            send(peer, hello())
            self.assertEqual(read_frame(peer)[0], HELLO_REPLY)
        self.assertEqual(cairn(daemon, "get", "cairn://b/through", "-").stdout, content)
        self.honest = Honest(daemon, self.dir)
        self.ended(daemon, fds)

    def test_started_with_few_descriptors(self):
        daemon = self.start("--memory", "128MiB", *LIMITS, under=("prlimit", "--nofile=700:700"))
        self.assertEqual(cairn(daemon, "bucket", "create", "b").returncode, 0)
        self.honest = Honest(daemon, self.dir)
        fds = daemon.fds()
        greeted = []
        for _ in range(300):
            peer = self.keep(daemon.connect())
            send(peer, hello())
            greeted.append(peer)
        self.assertTrue(daemon.alive())
        self.honest.stop()  # it may have been refused: that many are connected
        self.honest = None
        for peer in greeted:
            peer.close()
        while daemon.metric("cairn_rpc_connections") > 0:
            time.sleep(0.01)
        self.honest = Honest(daemon, self.dir)
        self.ended(daemon, fds)

    def test_memory_stays_inside_a_small_budget(self):
        daemon = self.start("--memory", "128MiB")  # 64 units
        self.assertEqual(cairn(daemon, "bucket", "create", "b").returncode, 0)
        fds = daemon.fds()
        self.honest = Honest(daemon, self.dir)
        file = self.dir / "file"
        file.write_bytes(self.rng.randbytes(8 * MIB) * 12)
        env = dict(os.environ, CAIRN_SERVER=daemon.fields["listen"])
        for turn in (["put", file, "cairn://b/s{}"], ["get", "cairn://b/s{}", "/dev/null"]):
            streams = [subprocess.Popen([ARGS.cairn, *[str(word).format(i) for word in turn]], env=env,
                                        stderr=subprocess.PIPE) for i in range(8)]
            for stream in streams:
                self.assertEqual(stream.wait(120), 0, stream.stderr.read())
                stream.stderr.close()
        self.ended(daemon, fds)

    def test_memory_of_a_cgroup(self):
        root = pathlib.Path("/sys/fs/cgroup")
        version2 = (root / "cgroup.controllers").exists()
        group = (root if version2 else root / "memory") / f"cairn-hostile-{os.getpid()}"
        limit, kills = (("memory.max", "memory.events") if version2 else
                        ("memory.limit_in_bytes", "memory.oom_control"))
        try:
            group.mkdir()
        except OSError as error:
            self.skipTest(f"no cgroup can be made here: {error}")

        def leave():
            while True:
                try:
                    return group.rmdir()
                except OSError as error:  # the kernel counts the processes that have ended a little later
                    if error.errno != errno.EBUSY:
                        raise
                    time.sleep(0.01)
        self.addCleanup(leave)
        try:
            if not (group / limit).exists():
                self.skipTest("the memory controller is not there for us")
            (group / limit).write_text(str(160 * MIB))
        except OSError as error:
            self.skipTest(f"memory cannot be limited here: {error}")
        daemon = self.start("--memory", "128MiB")
        (group / "cgroup.procs").write_text(str(daemon.pid))
        self.assertEqual(cairn(daemon, "bucket", "create", "b").returncode, 0)
        self.honest = Honest(daemon, self.dir)
        self.rounds(30)
        self.assertIn("oom_kill 0", (group / kills).read_text())
        self.ended(daemon, daemon.fds())

    def test_memory_that_cannot_be_had_loses_nothing(self):
        # The budget is what bounds memory. Beyond it there is no second line: an allocation that fails ends the process,
        # as kill -9 does. Whether it comes to that here depends on what the process still has.
        daemon = self.start("--memory", "64MiB")
        self.assertEqual(cairn(daemon, "bucket", "create", "b").returncode, 0)
        kept = {}
        for i in range(5):
            kept[i] = self.rng.randbytes(300_000)
            self.assertEqual(cairn(daemon, "put", "-", f"cairn://b/{i}", stdin=kept[i]).returncode, 0)
        size = daemon.status("VmSize") * 1024
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (size, size))
        for _ in range(5):
            if not daemon.alive():
                break
            peers = []
            try:
                for _ in range(40):
                    peer = daemon.connect(2)
                    send(peer, hello())
                    send(peer, header(REQUEST, 1, MAP, message_bytes=1 << 20) + b"x" * 900_000)
                    peers.append(peer)
            except OSError:
                pass
            for peer in peers:
                peer.close()
        print(f"  without memory: {'lives' if daemon.alive() else 'ended ' + str(daemon.process.returncode)}")
        daemon.end(signal.SIGKILL)
        daemon = self.start("--memory", "64MiB")
        for i, content in kept.items():
            self.assertEqual(cairn(daemon, "get", f"cairn://b/{i}", "-").stdout, content)
        self.assertEqual(daemon.end(), 0)


def main():
    global ARGS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--cairn", required=True)
    parser.add_argument("--writer", help="not used: all fault tests are called alike")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    ARGS, rest = parser.parse_known_args()
    ARGS.daemon, ARGS.cairn = (str(pathlib.Path(p).resolve()) for p in (ARGS.daemon, ARGS.cairn))
    print(f"seed {ARGS.seed}; to repeat: --seed {ARGS.seed}", flush=True)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
