#!/usr/bin/env python3
"""`cairn verify` and `cairn job` on real daemons whose segment files are damaged under them.

    BIN=build/release/bin tests/integration/verify_test.py [-v] [Verify.test_name]
"""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import urllib.request

BIN = pathlib.Path(os.environ.get("BIN", "build/release/bin")).resolve()
MIB = 1 << 20


def until(condition, limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Daemon:
    def __init__(self, directories, log, *flags):
        self.directories, self.log, self.flags = directories, log, flags
        data = [word for directory in directories for word in ("--data", directory)]
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [BIN / "cairnd", *data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--memory", "128MiB", *flags],
                stdout=subprocess.PIPE, stderr=out, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("cairnd ready"):
            self.kill()
            raise RuntimeError(f"{line!r} {pathlib.Path(log).read_text()}")
        words = dict(word.split("=", 1) for word in line.split()[2:])
        self.server, self.http = words["listen"], words["http"]

    def run(self, *args):
        return subprocess.run([BIN / "cairn", *map(str, args)], capture_output=True, timeout=120, text=True,
                              env=dict(os.environ, CAIRN_SERVER=self.server))

    def cairn(self, *args, code=0):
        done = self.run(*args)
        assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
        return done

    def verify(self, *args, code=0):
        return json.loads(self.cairn("verify", "--json", *args, code=code).stdout)

    def jobs(self):
        return {job["id"]: job for job in map(json.loads, self.cairn("job", "ls", "--json").stdout.splitlines())}

    def metric(self, name, directory):
        text = urllib.request.urlopen(f"http://{self.http}/metrics").read().decode()
        return float(re.search(rf'^{name}{{[^}}]*directory="{directory}"[^}}]*}} (\S+)$', text, re.M)[1])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0, pathlib.Path(self.log).read_text()
        self.process.stdout.close()

    def restarted(self, how="stop"):
        getattr(self, how)()
        return Daemon(self.directories, self.log, *self.flags)


class Verify(unittest.TestCase):
    def setUp(self):
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="cairn-verify-"))
        self.addCleanup(shutil.rmtree, self.work)
        self.rng = random.Random(1)

    def start(self, directories, *flags):
        daemon = Daemon([str(self.work / name) for name in directories], str(self.work / "log"), *flags)
        self.daemon = daemon
        self.addCleanup(lambda: self.daemon.process.poll() is None and self.daemon.kill())
        return daemon

    def file(self, name, size):
        path = self.work / name
        path.write_bytes(self.rng.randbytes(size))
        return path

    def find(self, directory, needle):
        """Where some bytes lie in a directory's segments: file and offset."""
        for path in sorted((self.work / directory).glob("segment-*")):
            at = path.read_bytes().find(needle)
            if at >= 0:
                return path, at
        raise AssertionError(f"not in {directory}")

    def flip(self, directory, content, offset):
        """Flips a bit `offset` bytes into stored content; everything before the next chunk lies in one piece."""
        path, at = self.find(directory, content[offset:offset + 64])
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))
            file.flush()
            os.fsync(file.fileno())

    def test_two_directories(self):
        d = self.start(["a", "b"])
        d.cairn("bucket", "create", "m", "--copies", 2)
        object_file, blob = self.file("object.bin", 3 * MIB), self.file("weights.bin", 2 * MIB)
        d.cairn("put", object_file, "cairn://m/some/key")
        d.cairn("ckpt", "save", "m/run", "--step", 7, blob)
        clean = d.verify()
        self.assertTrue(clean["ok"])
        self.assertEqual(clean["damage"], [])
        self.assertEqual(sorted(job["directory"] for job in clean["jobs"]), [str(self.work / n) for n in "ab"])
        self.assertGreaterEqual(clean["jobs"][0]["bytes"], 5 * MIB)

        content = object_file.read_bytes()
        self.flip("b", content, 70_000)
        self.flip("b", content, MIB + 5)
        self.flip("a", blob.read_bytes(), 1000)
        report = d.verify()
        self.assertTrue(report["ok"])
        self.assertEqual((report["repaired"], report["left"]), (2, 0))
        by_kind = {one["kind"]: one for one in report["damage"]}
        hit = by_kind["object"]
        self.assertEqual((hit["bucket"], hit["key"], hit["directory"]), ("m", "some/key", str(self.work / "b")))
        self.assertEqual(hit["offsets"], [65536, MIB])
        self.assertRegex(hit["chunk"], r"^[0-9a-f]{32}/[0-9a-f]{16}/\d+$")
        self.assertIn("segment-", hit["reason"])
        self.assertTrue(hit["repaired"])
        hit = by_kind["step"]
        self.assertEqual((hit["run"], hit["step"], hit["parts"]), ("m/run", 7, ["weights.bin"]))

        self.assertEqual(d.verify()["damage"], [])
        self.assertEqual(d.metric("cairn_scrub_repaired_chunks_total", self.work / "b"), 1)
        self.assertEqual(d.metric("cairn_scrub_damaged_chunks", self.work / "b"), 0)
        self.assertGreater(d.metric("cairn_scrub_last_full_pass_timestamp_seconds", self.work / "b"), time.time() - 600)
        for directory in "ab":  # each copy alone
            self.find(directory, content[:MIB])
        d = self.daemon = d.restarted("kill")
        self.assertEqual(d.verify()["damage"], [])
        d.stop()

    def test_for_people_and_by_directory(self):
        d = self.start(["a", "b"])
        d.cairn("bucket", "create", "m", "--copies", 2)
        file = self.file("object.bin", MIB)
        d.cairn("put", file, "cairn://m/k")
        self.flip("a", file.read_bytes(), 0)
        only_b = d.cairn("verify", "--target", self.work / "b").stdout
        self.assertRegex(only_b, r"1 chunk, 1\.00 MiB, in 1 directory: 0 repaired, 0 left damaged")
        both = d.cairn("verify").stdout
        self.assertRegex(both, r"repaired  cairn://m/k: chunk \S+ offset 0 in \S+/a: segment-\S+ at offset \d+: bytes do not "
                               r"match their CRC\n")
        self.assertRegex(both, r"2 chunks, 2\.00 MiB, in 2 directories: 1 repaired, 0 left damaged")
        self.assertIn("neither a directory of the daemon nor its id", d.cairn("verify", "--target", "/no", code=3).stderr)
        self.assertIn("is not a size", d.cairn("verify", "--pace", "fast", code=2).stderr)
        jobs = d.cairn("job", "ls").stdout.splitlines()
        self.assertEqual(len(jobs), 3)
        self.assertRegex(jobs[1], r"^scrub-[0-9a-f]{8} +done +\S+/a ")
        job = jobs[1].split()[0]
        self.assertIn("1 found, 1 repaired, 0 left there now", d.cairn("job", "show", job).stdout)
        self.assertIn("not running", d.cairn("job", "pause", job, code=4).stderr)
        self.assertIn("no such job", d.cairn("job", "show", "scrub-x", code=3).stderr)
        d.stop()

    def test_one_directory(self):
        d = self.start(["a"], "--reader-ttl", "1s", "--garbage-grace", "20ms", "--garbage-interval", "20ms")
        d.cairn("bucket", "create", "m")
        file = self.file("object.bin", 2 * MIB)
        d.cairn("put", file, "cairn://m/lost")
        d.cairn("put", self.file("good.bin", MIB), "cairn://m/good")
        self.flip("a", file.read_bytes(), MIB + 70_000)
        for again in range(2):
            done = d.cairn("verify", code=6)
            self.assertRegex(done.stdout, rf"DAMAGED   cairn://m/lost: chunk \S+ offset {MIB + 65536} in ")
            self.assertIn("1 damaged chunk without a good copy (data loss)", done.stderr)
        report = d.verify(code=6)
        self.assertFalse(report["ok"])
        self.assertEqual([(one["key"], one["repaired"]) for one in report["damage"]], [("lost", False)])
        self.assertEqual(d.metric("cairn_scrub_damaged_chunks", self.work / "a"), 1)
        repair = next(job for job in d.jobs() if job.startswith("repair-"))
        self.assertEqual(d.jobs()[repair]["left"], 1)
        # What is removed is no damage any more.
        d.cairn("rm", "cairn://m/lost")
        until(lambda: d.run("verify").returncode == 0)
        self.assertEqual(d.verify()["damage"], [])
        self.assertEqual(d.metric("cairn_scrub_damaged_chunks", self.work / "a"), 0)
        d.stop()

    def test_pause_resume_cancel_and_restart_in_the_middle(self):
        d = self.start(["a"], "--scrub-pace", "2MiB")
        d.cairn("bucket", "create", "m")
        for i in range(12):
            d.cairn("put", self.file("f.bin", MIB), f"cairn://m/{i}")
        waiting = subprocess.Popen([BIN / "cairn", "verify", "--pace", "configured", "--json"], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True, env=dict(os.environ, CAIRN_SERVER=d.server))
        self.addCleanup(waiting.wait)
        self.addCleanup(waiting.stdout.close)

        def chunks():
            jobs = d.jobs()
            return next(iter(jobs.values()))["chunks"] if jobs else 0

        until(lambda: chunks() >= 3)
        job, = d.jobs()
        d.cairn("job", "pause", job)
        waiting.kill()
        paused = json.loads(d.cairn("job", "show", job, "--json").stdout)
        self.assertEqual(paused["state"], "paused")
        d = self.daemon = d.restarted("kill")
        now = d.jobs()[job]
        self.assertEqual(now["state"], "paused")
        self.assertGreaterEqual(now["chunks"], 3)  # pausing has made it durable
        d.cairn("job", "resume", job)
        until(lambda: chunks() >= 5)
        d = self.daemon = d.restarted("stop")  # in the middle of it
        now = d.jobs()[job]
        self.assertEqual(now["state"], "running")
        self.assertGreaterEqual(now["chunks"], 5)
        until(lambda: d.jobs()[job]["state"] == "done")
        self.assertEqual(d.jobs()[job]["chunks"], 12)
        self.assertLess(d.metric("cairn_scrub_read_bytes_total", self.work / "a"), 8 * MIB)

        waiting = subprocess.Popen([BIN / "cairn", "verify", "--pace", "1MiB"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, env=dict(os.environ, CAIRN_SERVER=d.server))
        until(lambda: d.jobs()[job]["state"] == "running" and chunks() >= 1)
        d.cairn("job", "cancel", job)
        error = waiting.communicate(timeout=60)[1]
        self.assertEqual(waiting.returncode, 1)
        self.assertIn("was cancelled", error)
        self.assertEqual(d.jobs()[job]["state"], "cancelled")
        d.stop()


if __name__ == "__main__":
    unittest.main()
