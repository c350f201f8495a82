"""A real daemon and the command line, for tests of what users' scripts see."""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import unittest
import urllib.request

BIN = pathlib.Path(os.environ.get("BIN", "build/release/bin")).resolve()
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "U8": 8, "I8": 8, "F8_E4M3": 8, "I16": 16, "BF16": 16, "F16": 16, "I32": 32,
        "F32": 32, "C64": 64, "F64": 64, "I64": 64}


def safetensors(tensors, metadata=None, seed=0, pad=0):
    """Bytes of a file with tensors {name: (dtype, shape)} in that order, of random content."""
    rng = random.Random(seed)
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        size = count * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += rng.randbytes(size)
    text = json.dumps(header).encode() + b" " * pad  # with spaces after ',' and ':', unlike Cairn's own writer
    return struct.pack("<Q", len(text)) + text + data


def tree(folder):
    """Relative path -> bytes of all files."""
    folder = pathlib.Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class CliCase(unittest.TestCase):
    """One daemon for all tests of a class, a folder and a bucket name for each."""

    @classmethod
    def setUpClass(cls):
        cls.work = pathlib.Path(tempfile.mkdtemp(prefix="cairn-cli-"))
        cls.daemon_log = open(cls.work / "cairnd.log", "wb")
        cls.daemon = subprocess.Popen(
            [BIN / "cairnd", "--data", cls.work / "data", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"],
            stdout=subprocess.PIPE, stderr=cls.daemon_log, text=True)
        line = cls.daemon.stdout.readline()
        if not line.startswith("cairnd ready"):
            cls.daemon.kill()
            raise RuntimeError(f"no ready line: {line!r} {(cls.work / 'cairnd.log').read_text()}")
        words = dict(word.split("=", 1) for word in line.split()[2:])
        cls.server, cls.http = words["listen"], words["http"]

    @classmethod
    def tearDownClass(cls):
        cls.daemon.send_signal(signal.SIGTERM)
        code = cls.daemon.wait(timeout=60)
        cls.daemon.stdout.close()
        cls.daemon_log.close()
        shutil.rmtree(cls.work)
        assert code == 0, f"cairnd ended with {code}"

    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(dir=self.work))
        self.bucket = self.dir.name.replace("_", "-")

    def run_cairn(self, *args, code=0, stdin=b"", server=None, warnings=()):
        """`warnings`: texts of which one each stands on the lines of stderr of a command that does well."""
        env = dict(os.environ, CAIRN_SERVER=server or self.server)
        done = subprocess.run([BIN / "cairn", *map(str, args)], input=stdin, capture_output=True, env=env, timeout=120)
        self.assertEqual(done.returncode, code, f"cairn {args}: {done.stderr.decode()}")
        if code != 0:
            self.assertEqual(done.stderr.count(b"\n"), 1, done.stderr)  # errors are one line
            self.assertTrue(done.stderr.startswith(b"cairn"), done.stderr)
        else:
            lines = done.stderr.decode().splitlines()
            self.assertEqual(len(lines), len(warnings), done.stderr)
            for line, warning in zip(lines, warnings):
                self.assertTrue(line.startswith("cairn: warning: ") and warning in line, line)
        return done

    def text(self, *args, **kwargs):
        return self.run_cairn(*args, **kwargs).stdout.decode()

    def error(self, *args, code):
        return self.run_cairn(*args, code=code).stderr.decode()

    def json(self, *args):
        return json.loads(self.text(*args, "--json"))

    def json_lines(self, *args):
        return [json.loads(line) for line in self.text(*args, "--json").splitlines()]

    def metrics(self):
        text = urllib.request.urlopen(f"http://{self.http}/metrics", timeout=30).read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(cairn_\w+) (\S+)$", text, re.M)}

    def make_bucket(self):
        self.run_cairn("bucket", "create", self.bucket)
        return self.bucket

    def write(self, name, data):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path
