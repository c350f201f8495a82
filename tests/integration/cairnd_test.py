#!/usr/bin/env python3
"""The daemon as a program: its flags, what it refuses and how it ends.

    BIN=build/release/bin tests/integration/cairnd_test.py [-v] [Cairnd.test_name]
"""
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

BIN = pathlib.Path(os.environ.get("BIN", "build/release/bin")).resolve()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tree(folder):
    """Names, kinds and bytes of everything under a folder, but for the lock, which tells who holds it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else stat.S_IFMT(p.lstat().st_mode)
            for p in sorted(pathlib.Path(folder).rglob("*")) if p.name != "LOCK"}


def uuid_in(directory):
    """The id of a target, as its superblock has it."""
    return (pathlib.Path(directory) / "superblock").read_bytes()[16:32].hex()


class Daemon:
    def __init__(self, data, *flags):
        self.log = tempfile.TemporaryFile()
        if data is not None:
            flags += ("--data", data)
        for flag in ("--listen", "--http"):
            if flag not in flags and "--config" not in flags:
                flags += (flag, "127.0.0.1:0")
        self.process = subprocess.Popen(
            [BIN / "cairnd", *flags],
            stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.ready = self.process.stdout.readline()
        if not self.ready.startswith("cairnd ready"):
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"no ready line: {self.ready!r} {self.text()}")
        self.fields = dict(word.split("=", 1) for word in self.ready.split()[2:])

    def text(self):
        # Not by seeking: the daemon writes where this descriptor stands.
        fd = self.log.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()

    def http(self, path):
        try:
            with urllib.request.urlopen(f"http://{self.fields['http']}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name):
        return float(re.search(rf"^{name} (\S+)$", self.http("/metrics")[1], re.M)[1])

    def metric_lines(self, name, part):
        """How many samples of a metric have `part` among their labels."""
        return sum(line.startswith(name + "{") and part in line for line in self.http("/metrics")[1].splitlines())

    def stop(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)
        return self.wait()

    def wait(self):
        code = self.process.wait(timeout=90)
        self.process.stdout.close()
        return code


class Cairnd(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="cairnd-"))
        self.daemons = []

    def tearDown(self):
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.stop(signal.SIGKILL)
            daemon.log.close()
        shutil.rmtree(self.dir)

    def start(self, *flags, data=None):
        self.daemons.append(Daemon(data or self.dir / "data", *flags))
        return self.daemons[-1]

    def cairn(self, daemon, *args, code=0, stdin=None):
        done = subprocess.run([BIN / "cairn", *map(str, args)], input=stdin, capture_output=True, timeout=120,
                              env=dict(os.environ, CAIRN_SERVER=daemon.fields["listen"]))
        self.assertEqual(done.returncode, code, f"cairn {args}: {done.stderr.decode()}")
        return done.stdout

    def refused(self, *flags, code, says, **popen):
        done = subprocess.run([BIN / "cairnd", *map(str, flags)], capture_output=True, timeout=60, **popen)
        error = done.stderr.decode()
        self.assertEqual(done.returncode, code, error)
        self.assertEqual(error.count("\n"), 1, error)
        self.assertTrue(error.startswith("cairnd: "), error)
        self.assertIn(says, error)
        self.assertEqual(done.stdout, b"")

    def free(self, *flags):
        return ["--data", self.dir / "data", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags]

    def test_help_and_version(self):
        done = subprocess.run([BIN / "cairnd", "--help"], capture_output=True, text=True, check=True)
        for part in ("--data", "--listen", "--insecure-listen", "--garbage-grace", "Example:", "cairnd ready listen="):
            self.assertIn(part, done.stdout)
        done = subprocess.run([BIN / "cairnd", "--version"], capture_output=True, text=True, check=True)
        self.assertRegex(done.stdout, r"^cairnd \d+\.\d+\.\d+\n$")

    def test_wrong_usage_is_one_line_and_changes_nothing(self):
        self.refused(code=2, says="--data")
        self.refused("--data", self.dir / "a", "--data", self.dir / "a", code=2, says="is given twice")
        self.refused(*self.free("--flag-that-is-not"), code=2, says="--flag-that-is-not")
        self.refused(*self.free("--memory", "lots"), code=2, says="--memory")
        self.refused(*self.free("--memory", "1MiB"), code=2, says="64MiB")
        self.refused(*self.free("--memory", "-1"), code=2, says="--memory")
        self.refused(*self.free("--garbage-grace", "10"), code=2, says="not a duration")
        self.refused(*self.free("--garbage-grace", "-1s"), code=2, says="not a duration")
        self.refused(*self.free("--garbage-grace", "99999999999999999999s"), code=2, says="not a duration")
        self.refused(*self.free("--io", "magic"), code=2, says="--io")
        self.refused(*self.free("--node", "a b"), code=2, says="--node")
        self.refused("--data", self.dir / "data", "--listen", "nowhere", code=2, says="nowhere")
        self.refused("--data", self.dir / "data", "--listen", "127.0.0.1:99999", code=2, says="99999")
        self.assertEqual(tree(self.dir), {})

    def printed(self, *flags):
        return subprocess.run([BIN / "cairnd", *map(str, flags), "--print-config"], capture_output=True, text=True,
                              check=True).stdout

    def checked(self, *flags):
        done = subprocess.run([BIN / "cairnd", *map(str, flags), "--check-config"], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def test_the_configuration_file(self):
        file = self.dir / "cairnd.toml"
        file.write_text(self.printed("--data", self.dir / "data", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0",
                                     "--node", "from-file", "--garbage-grace", "90s"))
        self.assertEqual(self.checked("--config", file), (0, "ok\n", ""))
        self.assertEqual(self.printed("--config", file), file.read_text())
        # Flags override the file, and the file is enough to start with.
        self.assertIn('\nnode = "from-flag"\n', self.printed("--config", file, "--node", "from-flag"))
        daemon = Daemon(None, "--config", file)
        self.assertEqual(daemon.fields["node"], "from-file")
        self.assertEqual(daemon.stop(), 0)
        # All mistakes at once, of file and flags, and nothing is started.
        file.write_text('nodde = "x"\nmemory = "1MiB"\n')
        code, out, error = self.checked("--config", file, "--io", "magic")
        self.assertEqual((code, out), (2, ""))
        self.assertEqual(error.splitlines(), [
            f"cairnd: {file}:1: nodde: no such key; the nearest is node",
            f"cairnd: {file}:2: memory: 1MiB is out of range; allowed: 64MiB to 1TiB",
            "cairnd: --io: 'magic' is not one of them; allowed: auto, uring or threads"])
        self.assertEqual(self.checked("--config", self.dir / "none.toml")[0], 2)
        self.assertEqual(self.checked("--config", self.dir)[0], 2)
        self.assertFalse((self.dir / "data2").exists())
        self.refused("--config", self.dir / "none.toml", "--data", self.dir / "data2", code=2, says="No such file")
        self.assertFalse((self.dir / "data2").exists())

    def test_sighup_takes_over_what_can_change_and_a_broken_file_changes_nothing(self):
        file = self.dir / "cairnd.toml"
        common = f'data = ["{self.dir}/data"]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n'
        file.write_text(common)
        daemon = Daemon(None, "--config", file, "--log-lines", "1000")
        self.daemons.append(daemon)

        def hangup(text, until):
            """Sends SIGHUP and returns the lines that the log has gained."""
            before = len(daemon.text())
            file.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            while until not in daemon.text()[before:]:
                self.assertIsNone(daemon.process.poll(), daemon.text())
                time.sleep(0.01)
            return daemon.text()[before:]

        said = hangup(common + 'node = "other"\n[log]\nlevel = "debug"\nlines = 7\n[limits]\nconnections_per_peer = 1\n',
                      "event=config_read")
        self.assertIn("event=config_changed key=log.level before=info after=debug", said)
        self.assertIn("event=config_changed key=limits.connections_per_peer before=1024 after=1", said)
        self.assertIn('event=config_needs_restart key=node before="" after=other', said)
        self.assertNotIn("log.lines", said)  # the flag overrides it
        self.assertIn("changed=3", said)
        # It holds at once: the second connection of one address is refused.
        host, port = daemon.fields["listen"].rsplit(":", 1)
        with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as second:
            self.assertEqual(second.recv(1), b"")
        # A broken file changes nothing, and says so.
        said = hangup(common + "[log]\nlevel = 'loud'\nnonsense = 1\n", "event=config_kept")
        self.assertEqual(said.count("event=config_mistake"), 2)
        self.assertNotIn("config_changed", said)
        said = hangup(common, "event=config_read")
        self.assertIn("event=config_changed key=log.level before=debug after=info", said)
        self.cairn(daemon, "bucket", "create", "b")
        # JSON from the next line on.
        hangup(common + "[log]\nformat = 'json'\n", "config_read")
        self.assertEqual(daemon.stop(), 0)
        last = json.loads(daemon.text().splitlines()[-1])
        self.assertEqual((last["event"], last["level"]), ("cairnd_stopped", "info"))

    def test_other_addresses_than_loopback_need_the_flag(self):
        for address in ("0.0.0.0:0", "[::]:0"):
            self.refused("--data", self.dir / "data", "--listen", address, "--http", "127.0.0.1:0", code=5,
                         says="--insecure-listen")
            self.refused("--data", self.dir / "data", "--listen", "127.0.0.1:0", "--http", address, code=5,
                         says="--insecure-listen")
        self.assertEqual(tree(self.dir), {})
        daemon = self.start("--insecure-listen", "--listen", "0.0.0.0:0", "--http", "127.0.0.1:0")
        self.assertTrue(daemon.fields["listen"].startswith("0.0.0.0:"))
        self.assertEqual(daemon.stop(), 0)

    def test_a_port_in_use(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = f"127.0.0.1:{other.getsockname()[1]}"
            self.refused("--data", self.dir / "data", "--listen", taken, "--http", "127.0.0.1:0", code=7, says=taken)
            self.refused("--data", self.dir / "data", "--listen", "127.0.0.1:0", "--http", taken, code=7, says=taken)
        self.assertEqual(tree(self.dir), {})

    def test_directories_that_cannot_be_used(self):
        self.refused("--data", self.dir / "no" / "data", *self.free()[2:], code=3, says="no/data")
        (self.dir / "file").write_text("x")
        self.refused("--data", self.dir / "file", *self.free()[2:], code=2, says="file")
        (self.dir / "full").mkdir(mode=0o700)
        (self.dir / "full" / "letter.txt").write_text("mine")
        before = tree(self.dir / "full")
        self.refused("--data", self.dir / "full", *self.free()[2:], code=2, says="letter.txt")
        self.assertEqual(tree(self.dir / "full"), before)

    def test_a_directory_that_is_not_writable(self):
        locked = self.dir / "locked"
        locked.mkdir(mode=0o555)
        popen = {}
        if os.geteuid() == 0:
            # Root may write everywhere: become nobody, with a copy of the program that nobody can reach.
            self.dir.chmod(0o755)
            shutil.copy(BIN / "cairnd", self.dir / "cairnd")
            (self.dir / "cairnd").chmod(0o755)
            popen = {"user": 65534, "group": 65534, "extra_groups": [], "executable": str(self.dir / "cairnd")}
        self.refused("--data", locked, *self.free()[2:], code=5, says="locked", **popen)
        self.refused("--data", locked / "data", *self.free()[2:], code=5, says="locked", **popen)
        self.assertEqual(tree(locked), {})

    def test_a_directory_of_a_newer_version(self):
        daemon = self.start()
        self.cairn(daemon, "bucket", "create", "b")
        self.assertEqual(daemon.stop(), 0)
        superblock = self.dir / "data" / "superblock"
        original = superblock.read_bytes()
        newer = bytearray(original)
        newer[8:16] = struct.pack("<II", 7, 7)
        newer[4092:] = struct.pack("<I", crc32c(newer[:4092]))
        superblock.write_bytes(newer)
        before = tree(self.dir)
        self.refused(*self.free(), code=2, says="format version 7")
        self.assertEqual(tree(self.dir), before)
        damaged = bytearray(original)
        damaged[100] ^= 1
        superblock.write_bytes(damaged)
        before = tree(self.dir)
        self.refused(*self.free(), code=6, says="superblock")
        self.assertEqual(tree(self.dir), before)
        superblock.write_bytes(original)
        self.cairn(self.start(), "bucket", "show", "b")

    def test_two_daemons_on_one_directory(self):
        daemon = self.start()
        self.cairn(daemon, "bucket", "create", "b")
        self.refused(*self.free(), code=7, says="data")
        self.cairn(daemon, "bucket", "show", "b")
        self.assertEqual(daemon.stop(), 0)

    def test_stops_in_order_and_starts_again_with_everything(self):
        daemon = self.start("--node", "n-1")
        self.assertRegex(daemon.ready, r"^cairnd ready listen=127\.0\.0\.1:\d+ http=127\.0\.0\.1:\d+ node=n-1\n$")
        self.cairn(daemon, "bucket", "create", "b")
        self.cairn(daemon, "put", "-", "cairn://b/k", stdin=b"hello")
        for name, mode in (("", 0o700), ("superblock", 0o600), ("cairn.sock", 0o600), ("index", 0o700)):
            self.assertEqual(stat.S_IMODE((self.dir / "data" / name).stat().st_mode) & 0o077, 0, name)
        self.assertEqual(daemon.stop(), 0)
        for end in (signal.SIGKILL, signal.SIGINT):
            daemon = self.start()
            self.assertEqual(self.cairn(daemon, "get", "cairn://b/k", "-"), b"hello")
            self.assertEqual(daemon.stop(end), -9 if end == signal.SIGKILL else 0)

    def test_without_a_unix_socket(self):
        daemon = self.start("--unix-socket", "none", "--io", "threads")
        self.cairn(daemon, "bucket", "create", "b")
        self.assertFalse((self.dir / "data" / "cairn.sock").exists())
        self.assertEqual(daemon.stop(), 0)
        # A data directory with a path too long for a socket is no reason not to serve.
        deep = self.dir / ("x" * 120)
        deep.mkdir()
        daemon = self.start(data=deep / "data")
        self.cairn(daemon, "bucket", "create", "b")
        self.assertIn("no_unix_socket", daemon.text())
        self.assertEqual(daemon.stop(), 0)
        self.refused(*self.free("--unix-socket", "/" + "x" * 200), code=2, says="--unix-socket")

    def test_health_and_metrics(self):
        daemon = self.start()
        self.assertEqual(daemon.http("/healthz")[0], 200)
        self.assertEqual(daemon.http("/readyz")[0], 200)
        self.assertEqual(daemon.http("/else")[0], 404)
        self.cairn(daemon, "bucket", "create", "b")
        self.cairn(daemon, "put", "-", "cairn://b/k", stdin=b"x" * 100_000)
        status, text = daemon.http("/metrics")
        self.assertEqual(status, 200)
        for line in text.splitlines():
            self.assertRegex(line, r'^(# (HELP|TYPE) cairn_\w+ .+|cairn_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+)$')
        self.assertGreaterEqual(daemon.metric("cairn_chunk_store_live_bytes"), 100_000)
        self.assertEqual(daemon.metric("cairn_chunk_store_orphaned_bytes"), 0)
        self.assertGreater(daemon.metric("cairn_process_cpu_seconds_total"), 0)
        self.assertGreater(daemon.metric("cairn_process_resident_bytes"), 1_000_000)

    def test_a_target_that_fails_says_so_and_acknowledges_nothing_more(self):
        daemon = self.start()
        self.cairn(daemon, "bucket", "create", "b")
        self.cairn(daemon, "put", "-", "cairn://b/k", stdin=b"hello")
        # From here on no file of the daemon may grow: the next batch of the index fails.
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1, 1))
        done = subprocess.run([BIN / "cairn", "bucket", "create", "c"], capture_output=True, timeout=120,
                              env=dict(os.environ, CAIRN_SERVER=daemon.fields["listen"]))
        self.assertNotEqual(done.returncode, 0)
        status, text = daemon.http("/readyz")
        self.assertEqual(status, 503)
        self.assertIn("the target has failed", text)
        self.assertEqual(daemon.http("/healthz")[0], 200)
        self.assertEqual(daemon.metric("cairn_committer_failed"), 1)
        daemon.stop(signal.SIGKILL)
        daemon = self.start()
        self.assertEqual(self.cairn(daemon, "get", "cairn://b/k", "-"), b"hello")
        self.assertEqual(daemon.http("/readyz")[0], 200)

    def test_a_directory_that_is_lost_is_replaced_by_an_empty_one(self):
        a, b, c = (str(self.dir / name) for name in "abc")
        daemon = self.start("--data", b, data=a)
        self.cairn(daemon, "bucket", "create", "twice", "--copies", "2")
        self.cairn(daemon, "put", "-", "cairn://twice/k", stdin=b"precious" * 100_000)
        self.assertEqual(daemon.metric_lines("cairn_target_state", 'state="serving"'), 2)
        daemon.stop()
        lost = uuid_in(b)
        shutil.rmtree(b)

        # One of two may be stale: refused, with the way out in one line.
        self.refused("--data", a, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", code=7,
                     says=f"--lost-target {lost}")
        daemon = self.start("--data", c, "--lost-target", lost, data=a)
        self.assertEqual(self.cairn(daemon, "get", "cairn://twice/k", "-"), b"precious" * 100_000)
        deadline = time.monotonic() + 60
        while daemon.metric_lines("cairn_target_state", 'state="serving"') < 2:
            self.assertLess(time.monotonic(), deadline, "the new directory is never brought up to date")
            time.sleep(0.05)
        daemon.stop()

        # The copies are back: now the first one may go.
        daemon = self.start("--lost-target", uuid_in(a), data=c)
        self.assertEqual(self.cairn(daemon, "get", "cairn://twice/k", "-"), b"precious" * 100_000)

    def test_a_second_sigterm_does_not_wait_for_what_is_in_flight(self):
        daemon = self.start("--unix-socket", "none")
        self.cairn(daemon, "bucket", "create", "b")
        # A call that cannot end: its client stands still in the middle of its bytes.
        big = self.dir / "big"
        with open(big, "wb") as file:
            file.truncate(400 << 20)
        client = subprocess.Popen([BIN / "cairn", "put", big, "cairn://b/big"],
                                  env=dict(os.environ, CAIRN_SERVER=daemon.fields["listen"]),
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while client.poll() is None:
                client.send_signal(signal.SIGSTOP)
                time.sleep(0.05)  # what is on its way may arrive; then nothing moves any more
                if daemon.metric("cairn_rpc_calls_running") > 0:
                    break
                client.send_signal(signal.SIGCONT)
                time.sleep(0.001)
            self.assertIsNone(client.poll(), "the put was over before it could be stopped")
            daemon.process.send_signal(signal.SIGTERM)
            while "cairnd_stopping" not in daemon.text():
                time.sleep(0.01)
            self.assertIsNone(daemon.process.poll())
            daemon.process.send_signal(signal.SIGTERM)
            self.assertEqual(daemon.wait(), 1)
        finally:
            client.kill()
            client.wait()


if __name__ == "__main__":
    unittest.main()
