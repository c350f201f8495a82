"""What the fault tests share: a daemon, writers that report acknowledgements, and a file system that can lose power.

Only the standard library. Everything lives in one temporary directory; every process and mount ends with the test, also
when the test itself is killed (parent-death signal, private mount namespace).
"""

import collections
import ctypes
import fcntl
import json
import os
import pathlib
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

SKIP = 77  # ctest's SKIP_RETURN_CODE
_libc = ctypes.CDLL(None, use_errno=True)


def skip(why):
    print(f"skipped: {why}")
    sys.exit(SKIP)


class Failure(Exception):
    """A broken promise, or a daemon that does not come up."""


def _die_with_parent():
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def spawn(args, **kwargs):
    return subprocess.Popen([str(a) for a in args], preexec_fn=_die_with_parent, **kwargs)


def run(args, timeout=120, check=True, **kwargs):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=timeout, **kwargs)
    if check and done.returncode != 0:
        raise Failure(f"{' '.join(map(str, args))}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done


class Lines:
    """Lines of a process's output. Nothing is read ahead: what available() returns is all that was written by then."""

    def __init__(self, stream):
        self._stream, self._partial, self._lines, self._ended = stream, b"", collections.deque(), False
        os.set_blocking(stream.fileno(), False)

    def _fill(self, timeout):
        """Reads what is there, waiting up to `timeout` for the first of it. False: nothing came."""
        if self._ended or not select.select([self._stream], [], [], timeout)[0]:
            return False
        data = os.read(self._stream.fileno(), 1 << 20)
        self._ended = not data  # what follows the last newline is dropped: the writer died within a line
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._lines.extend(line.decode(errors="replace") for line in lines)
        return True

    def next(self, timeout):
        """The next line; None at the end of the stream."""
        deadline = time.monotonic() + timeout
        while not self._lines and not self._ended:
            if not self._fill(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise Failure(f"no line within {timeout} s")
        return self._lines.popleft() if self._lines else None

    def available(self):
        """What has been written so far, without waiting."""
        while self._fill(0):
            pass
        lines = list(self._lines)
        self._lines.clear()
        return lines

    def rest(self):
        """Everything up to the end of the stream, which must be near."""
        while not self._ended:
            if not self._fill(30):
                raise Failure("a process has ended, its output has not")
        return self.available()


def freeze(pid):
    """SIGSTOP, and waits until every thread stands still."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        states = set()
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                stat = pathlib.Path(f"/proc/{pid}/task/{task}/stat").read_text()
            except FileNotFoundError:
                continue
            name, rest = stat.split("(", 1)[1].rsplit(")", 1)
            if not name.startswith("iou-"):  # the ring's helpers in the kernel do not stop, and acknowledge nothing
                states.add(rest.split()[0])
        if states == {"T"} or "Z" in states:
            return
        time.sleep(0.001)
    raise Failure(f"process {pid} does not stop: thread states {states}")


class Daemon:
    """One cairnd process on a data directory."""

    def __init__(self, program, data, log, flags=(), environment=None, listen="127.0.0.1:0"):
        self.log_path = log
        started = time.monotonic()
        with open(log, "ab") as log_file:
            self.process = spawn(
                [program, "--data", data, "--listen", listen, "--http", "127.0.0.1:0", *flags],
                stdout=subprocess.PIPE, stderr=log_file, env={**os.environ, **(environment or {})})
        self._lines = Lines(self.process.stdout)
        line = self._lines.next(timeout=60)
        if line is None or not line.startswith("cairnd ready "):
            self.kill()
            raise Failure(f"daemon did not become ready: {line!r}; its log ends: {self.log_tail()}")
        words = dict(word.split("=", 1) for word in line.split()[2:])
        self.server, self.http = words["listen"], words["http"]
        self.seconds_to_ready = time.monotonic() - started

    def log_tail(self):
        return pathlib.Path(self.log_path).read_text(errors="replace")[-3000:]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM: must end by itself with 0."""
        self.process.terminate()
        try:
            status = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure("daemon did not end within 60 s of SIGTERM") from None
        if status != 0:
            raise Failure(f"daemon ended with {status} after SIGTERM; its log ends: {self.log_tail()}")

    def metrics(self):
        """Each metric, summed over its labels."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        values = collections.defaultdict(float)
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name.split("{", 1)[0]] += float(value)
        return dict(values)

    def metric(self, name):
        values = self.metrics()
        if name not in values:
            raise Failure(f"/metrics has no {name}")
        return values[name]


class Writer:
    """An ack_writer process and what it has reported."""

    def __init__(self, program, *args, stdin=None):
        self.process = spawn([program, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        if stdin is not None:
            self.process.stdin.write(stdin.encode())
            self.process.stdin.close()
        self.lines = Lines(self.process.stdout)
        self._errors = Lines(self.process.stderr)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def errors(self):
        return " | ".join(self._errors.available()[-3:])


class Scratch:
    """The test's temporary directory."""

    def __init__(self, name):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"cairn-{name}."))

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


class Volume:
    """A file system on a loop mount that can lose power: whatever was not flushed is gone."""

    SHUTDOWN = 0x8004587D  # _IOR('X', 125, u32): ext4 and XFS
    NO_LOG_FLUSH = 2

    def __init__(self, kind, image, mountpoint, size):
        self.image, self.mountpoint = image, mountpoint
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        with open(self.image, "wb") as image:
            image.truncate(size)
        run([f"mkfs.{kind}", "-q", self.image])
        self.mount()

    @staticmethod
    def require(kind):
        """Skips the test where such mounts are impossible; enters a private mount namespace."""
        if os.geteuid() != 0:
            skip("power cuts need root, to mount file systems")
        if shutil.which(f"mkfs.{kind}") is None:
            skip(f"no mkfs.{kind} here")
        CLONE_NEWNS = 0x00020000
        if _libc.unshare(CLONE_NEWNS) != 0:
            skip("no private mount namespace allowed here")
        run(["mount", "--make-rprivate", "/"])
        with Scratch("probe") as probe:
            image, mountpoint = probe / "image", probe / "mnt"
            mountpoint.mkdir()
            with open(image, "wb") as file:
                file.truncate(400 << 20)
            run([f"mkfs.{kind}", "-q", image])
            done = run(["mount", "-o", "loop", image, mountpoint], check=False)
            if done.returncode != 0:
                skip(f"no loop mounts of {kind} here: {done.stderr.strip()}")
            run(["umount", mountpoint])

    def mount(self):
        run(["mount", "-o", "loop", self.image, self.mountpoint])

    def cut_power(self):
        fd = os.open(self.mountpoint, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, self.SHUTDOWN, struct.pack("I", self.NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self):
        deadline = time.monotonic() + 60
        while True:
            done = run(["umount", self.mountpoint], check=False)
            if done.returncode == 0:
                return
            # Requests of a killed process's ring may hold the mount for a moment.
            if time.monotonic() > deadline:
                raise Failure(f"cannot unmount: {done.stderr.strip()}")
            time.sleep(0.02)

    def close(self):
        run(["umount", "-l", self.mountpoint], check=False)


class Cairn:
    """The command line, with --json."""

    def __init__(self, program):
        self.program = program

    def __call__(self, daemon, *args, check=True):
        return run([self.program, *args, "--server", daemon.server], check=check)

    def json_lines(self, daemon, *args):
        return [json.loads(line) for line in self(daemon, *args, "--json").stdout.splitlines() if line.strip()]
