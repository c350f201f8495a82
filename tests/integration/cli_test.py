#!/usr/bin/env python3
"""The command line against a real daemon, as a user's scripts see it: files in, the same bytes out, exit codes, JSON.

    BIN=build/release/bin tests/integration/cli_test.py [-v] [Cli.test_name]
"""
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import unittest

from cli_case import BIN, CliCase, safetensors, tree


class Cli(CliCase):
    # ---- usage ----

    def test_every_command_has_help_with_an_example(self):
        for words in ["", "bucket", "bucket create", "bucket set", "bucket ls", "bucket show", "bucket rm", "put", "get", "ls", "stat",
                      "rm", "ckpt", "ckpt save", "ckpt restore", "ckpt ls", "ckpt show", "ckpt verify", "ckpt pin",
                      "ckpt unpin", "ckpt rm"]:
            self.assertIn("Example: cairn", self.text(*words.split(), "--help"), words)

    def test_wrong_usage_is_exit_2(self):
        for words in ["", "frob", "bucket", "bucket frob", "put x", "ckpt save b/r x", "ckpt save b/r --step -1 x",
                      "ckpt save b/r --step 99999999999999999999 x", "ckpt save b/r --step 1.5 x", "ckpt rm b/r",
                      "ckpt rm b/r --step 1 --after 2", "ckpt ls b c", "ls b/k", "ckpt show b",
                      "ckpt restore b/../r d", "bucket create a/b", "bucket set b", "bucket set b --keep-last -1", "ckpt pin b/r", "get cairn://b/k - --range 9-5"]:
            self.run_cairn(*words.split(), code=2)

    def test_no_daemon_is_exit_7_and_says_where_it_looked(self):
        self.assertIn("127.0.0.1:1", self.error("bucket", "ls", "--server", "127.0.0.1:1", code=7))

    # ---- buckets ----

    def test_buckets(self):
        self.run_cairn("bucket", "create", self.bucket)
        self.run_cairn("bucket", "create", self.bucket, code=4)
        self.assertIn(self.bucket, [b["bucket"] for b in self.json_lines("bucket", "ls")])
        self.assertIn(self.bucket, self.text("bucket", "ls"))
        self.assertEqual(self.json("bucket", "show", self.bucket)["copies"], 1)
        self.assertIn(self.bucket, self.text("bucket", "show", self.bucket))
        self.run_cairn("put", "-", f"cairn://{self.bucket}/k", stdin=b"x")
        self.run_cairn("bucket", "rm", self.bucket, code=4)
        self.run_cairn("rm", f"cairn://{self.bucket}/k")
        self.run_cairn("bucket", "rm", self.bucket)
        self.run_cairn("bucket", "show", self.bucket, code=3)
        self.run_cairn("put", "-", f"cairn://{self.bucket}/k", code=3)

    # ---- objects ----

    def test_objects_of_any_size_come_back(self):
        url = f"cairn://{self.make_bucket()}/"
        rng = random.Random(1)
        for size in [0, 1, 65535, 65536, 65537, 3_000_001, 40_000_000]:
            data = rng.randbytes(size)
            source = self.write("in", data)
            self.run_cairn("put", source, f"{url}k{size}")
            self.run_cairn("get", f"{url}k{size}", self.dir / "out")
            self.assertEqual((self.dir / "out").read_bytes(), data)
            self.assertEqual(self.json("stat", f"{url}k{size}")["size"], size)
            if size < 4_000_000:
                self.assertEqual(self.run_cairn("get", f"{url}k{size}", "-").stdout, data)
                a, b = size // 3, size - size // 4
                self.assertEqual(self.run_cairn("get", f"{url}k{size}", "-", "--range", f"{a}-{b}").stdout, data[a:b])
                self.assertEqual(self.run_cairn("get", f"{url}k{size}", "-", "--range", f"{a}-").stdout, data[a:])
        self.run_cairn("get", f"{url}k1", "-", "--range", "2-3", code=2)
        self.assertEqual(self.run_cairn("get", f"{url}k{size}", "-", "--range=-7").stdout, data[-7:])
        self.assertEqual(self.run_cairn("get", f"{url}k1", "-", "--range=-7").stdout, self.run_cairn("get", f"{url}k1", "-").stdout)

    def test_objects_are_put_from_stdin_once_if_asked_listed_and_removed(self):
        url = f"cairn://{self.make_bucket()}/"
        self.run_cairn("put", "-", url + "a/1", stdin=b"one")
        self.run_cairn("put", "-", url + "a/2", stdin=b"two")
        self.run_cairn("put", "-", url + "b", stdin=b"three")
        self.run_cairn("put", "-", url + "b", "--if-absent", code=4)
        self.run_cairn("put", "-", url + "b", stdin=b"four")
        self.assertEqual([o["key"] for o in self.json_lines("ls", url)], ["a/1", "a/2", "b"])
        self.assertEqual([o["size"] for o in self.json_lines("ls", url + "a/")], [3, 3])
        self.assertIn("a/2", self.text("ls", url))
        self.assertEqual(self.run_cairn("get", url + "b", "-").stdout, b"four")
        self.run_cairn("rm", url + "b")
        for command in [["get", url + "b", "-"], ["stat", url + "b"]]:
            self.run_cairn(*command, code=3)

    def test_versions_folders_and_quotas(self):
        bucket = self.make_bucket()
        url = f"cairn://{bucket}/"
        self.run_cairn("put", "-", url + "d/k", stdin=b"one")
        version = self.json("stat", url + "d/k")["version"]
        self.run_cairn("put", "-", url + "d/k", "--if-version", version, stdin=b"two")
        self.run_cairn("put", "-", url + "d/k", "--if-version", version, stdin=b"three", code=4)
        self.run_cairn("rm", url + "d/k", "--if-version", version, code=4)
        self.assertEqual(self.run_cairn("get", url + "d/k", "-").stdout, b"two")
        self.run_cairn("put", "-", url + "e", stdin=b"four")
        self.assertEqual([o.get("prefix") or o["key"] for o in self.json_lines("ls", url, "--delimiter", "/")], ["d/", "e"])
        self.assertEqual([o["key"] for o in self.json_lines("ls", url, "--after", "d/k")], ["e"])

        shown = self.json("bucket", "set", bucket, "--quota", "1MiB")
        self.assertEqual((shown["quota_bytes"], shown["used_bytes"], shown["objects"]), (1 << 20, 7, 2))
        data = bytes(range(256)) * 4096  # as much as the quota: too much with the rest
        self.run_cairn("put", self.write("in", data), url + "f", code=8)
        refused = self.run_cairn("put", "-", url + "f", stdin=data, code=8)
        self.assertRegex(refused.stderr.decode(), "limit 1048576 bytes, used 7.*asked 1048576")
        self.run_cairn("ckpt", "save", bucket + "/r", "--step", 1, self.dir / "in", code=8)
        self.run_cairn("bucket", "set", bucket, "--quota", "2MiB")
        self.run_cairn("ckpt", "save", bucket + "/r", "--step", 1, self.dir / "in")
        shown = self.json("bucket", "show", bucket)
        self.assertEqual((shown["used_bytes"], shown["steps"], shown["reserved_bytes"]), (7 + len(data), 1, 0))
        self.run_cairn("put", self.dir / "in", url + "f", code=8)
        self.run_cairn("bucket", "set", bucket, "--quota", "none")
        self.run_cairn("put", self.dir / "in", url + "f")

    def test_a_failed_get_leaves_the_old_file_and_nothing_else(self):
        url = f"cairn://{self.make_bucket()}/"
        self.write("out", b"old")
        self.run_cairn("get", url + "absent", self.dir / "out", code=3)
        self.assertEqual(tree(self.dir), {"out": b"old"})
        self.run_cairn("put", self.dir / "nothing", url + "k", code=3)
        self.run_cairn("put", self.dir, url + "k", code=2)

    def test_a_put_stopped_by_a_signal_leaves_nothing(self):
        url = f"cairn://{self.make_bucket()}/k"
        put = subprocess.Popen([BIN / "cairn", "put", "-", url], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, CAIRN_SERVER=self.server))
        put.stdin.write(bytes(1 << 20))  # more than a pipe holds: once written, the program is reading
        put.stdin.flush()
        put.send_signal(signal.SIGINT)
        message = put.stderr.read()
        self.assertEqual(put.wait(timeout=60), 1)
        self.assertIn(b"stopped", message)
        put.stdin.close()
        put.stderr.close()
        self.run_cairn("stat", url, code=3)

    # ---- checkpoints ----

    def sharded_folder(self):
        one = {"embed": ("BF16", [128, 64]), "scalar": ("F32", []), "empty": ("I64", [0, 7]), "h.0": ("F32", [33, 5])}
        two = {"h.1": ("F32", [33, 5]), "tiny": ("F4", [6]), "six": ("F6_E2M3", [4]), "flag": ("BOOL", [3, 1]),
               "h.caf\u00e9": ("F8_E4M3", [2, 2])}
        self.write("in/model-00001-of-00002.safetensors", safetensors(one, {"format": "pt", "z": "\u00e9\n"}, 1))
        self.write("in/model-00002-of-00002.safetensors", safetensors(two, None, 2, pad=5))
        index = {"metadata": {"total_size": 17721}, "weight_map":
                 {**{t: "model-00001-of-00002.safetensors" for t in one}, **{t: "model-00002-of-00002.safetensors" for t in two}}}
        self.write("in/model.safetensors.index.json", json.dumps(index).encode())
        self.write("in/config.json", b'{"a": 1}')
        self.write("in/tokenizer/vocab.txt", b"a\nb\n")
        self.write("in/tokenizer/nothing", b"")
        return self.dir / "in"

    def test_a_sharded_folder_comes_back_byte_for_byte(self):
        run = self.make_bucket() + "/jobs/llama"
        folder = self.sharded_folder()
        saved = self.json("ckpt", "save", run, "--step", 7, folder)
        self.assertEqual((saved["step"], saved["files"], saved["tensors"]), (7, 6, 9))
        self.run_cairn("ckpt", "restore", run, self.dir / "out")
        self.assertEqual(tree(self.dir / "out"), tree(folder))
        self.assertEqual(sorted(os.listdir(self.dir)), ["in", "out"])  # no temporary names are left
        # Into an empty folder too, but not over what is there.
        (self.dir / "empty").mkdir()
        self.run_cairn("ckpt", "restore", run, self.dir / "empty", "--step", 7)
        self.assertEqual(tree(self.dir / "empty"), tree(folder))
        self.run_cairn("ckpt", "restore", run, self.dir / "out", code=4)
        self.run_cairn("ckpt", "restore", run, self.dir / "in/config.json", code=4)
        self.assertEqual(tree(self.dir / "out"), tree(folder))

    def test_steps_are_listed_shown_verified_and_removed(self):
        bucket = self.make_bucket()
        run = bucket + "/r"
        folder = self.sharded_folder()
        for step in [3, 10, 20, 30]:
            self.run_cairn("ckpt", "save", run, "--step", step, folder)
        self.run_cairn("ckpt", "save", bucket + "/other", "--step", 1, folder / "config.json")
        self.assertEqual([(s["run"], s["step"]) for s in self.json_lines("ckpt", "ls", run)],
                         [(run, 3), (run, 10), (run, 20), (run, 30)])
        self.assertEqual({(s["run"], s["step"]) for s in self.json_lines("ckpt", "ls", bucket)},
                         {(run, 3), (run, 10), (run, 20), (run, 30), (bucket + "/other", 1)})
        self.assertIn("30", self.text("ckpt", "ls", run))
        shown = self.json("ckpt", "show", run)
        self.assertEqual(shown["step"], 30)
        self.assertEqual({t["name"]: t["shape"] for t in shown["tensor_list"]}["h.1"], [33, 5])
        self.assertEqual({f["name"]: f["kind"] for f in shown["file_list"]}["config.json"], "blob")
        self.assertIn("embed", self.text("ckpt", "show", run, "--step", 3))
        self.assertEqual([(s["step"], s["ok"]) for s in self.json_lines("ckpt", "verify", run)],
                         [(3, True), (10, True), (20, True), (30, True)])
        self.assertIn("step 10: ok", self.text("ckpt", "verify", run, "--step", 10))
        self.run_cairn("ckpt", "rm", run, "--step", 3)
        self.assertEqual(self.json("ckpt", "rm", run, "--after", 10)["removed"], 2)
        self.assertEqual([s["step"] for s in self.json_lines("ckpt", "ls", run)], [10])
        for command in [["rm", run, "--step", 3], ["show", run, "--step", 3], ["verify", run, "--step", 3],
                        ["restore", run, self.dir / "x", "--step", 3], ["show", bucket + "/none"],
                        ["verify", bucket + "/none"]]:
            self.run_cairn("ckpt", *command, code=3)
        self.assertFalse((self.dir / "x").exists())

    def test_retention_keeps_what_the_rules_and_pins_name(self):
        def steps():
            return [s["step"] for s in self.json_lines("ckpt", "ls", run)]

        def eventually(wanted):  # the service removes in the background
            for _ in range(300):
                if steps() == wanted:
                    break
                time.sleep(0.1)
            self.assertEqual(steps(), wanted)

        self.run_cairn("bucket", "create", self.bucket, "--keep-last", 3, "--keep-every", 10)
        shown = self.json("bucket", "show", self.bucket)
        self.assertEqual((shown["keep_last"], shown["keep_every"], shown["keep_days"]), (3, 10, 0))
        self.assertIn("last 3, every 10", self.text("bucket", "show", self.bucket))
        run = self.bucket + "/r"
        file = self.write("f", b"some bytes")
        for step in [1, 10, 11, 12, 13]:
            self.run_cairn("ckpt", "save", run, "--step", step, file)
        eventually([10, 11, 12, 13])
        self.run_cairn("ckpt", "pin", run, "--step", 11)
        self.run_cairn("ckpt", "pin", run, "--step", 11)  # done already is done
        self.assertEqual([s["step"] for s in self.json_lines("ckpt", "ls", run) if s["pinned"]], [11])
        self.assertEqual(self.json("bucket", "set", self.bucket, "--keep-last", 1, "--keep-every", 0)["keep_last"], 1)
        eventually([11, 13])
        self.assertIn("pinned", self.error("ckpt", "rm", run, "--step", 11, code=4))
        self.assertIn("pinned", self.error("ckpt", "rm", run, "--after", 1, code=4))
        self.run_cairn("ckpt", "save", run, "--step", 11, file, "--overwrite", code=4)
        self.assertEqual(steps(), [11, 13])
        self.run_cairn("ckpt", "unpin", run, "--step", 11)
        eventually([13])
        self.run_cairn("ckpt", "pin", run, "--step", 11, code=3)
        self.assertIn("all", self.text("bucket", "set", self.bucket, "--keep-last", 0))

    def test_a_committed_step_is_replaced_only_when_asked(self):
        run = self.make_bucket() + "/r"
        a, b = self.write("a/f", b"first"), self.write("b/f", b"second")
        self.run_cairn("ckpt", "save", run, "--step", 1, a)
        self.run_cairn("ckpt", "save", run, "--step", 1, b, code=4)
        self.run_cairn("ckpt", "restore", run, self.dir / "o1")
        self.assertEqual(tree(self.dir / "o1"), {"f": b"first"})
        self.run_cairn("ckpt", "save", run, "--step", 1, b, "--overwrite")
        self.run_cairn("ckpt", "restore", run, self.dir / "o2")
        self.assertEqual(tree(self.dir / "o2"), {"f": b"second"})

    def test_tensors_can_be_chosen(self):
        run = self.make_bucket() + "/r"
        folder = self.sharded_folder()
        self.run_cairn("ckpt", "save", run, "--step", 1, folder)
        self.run_cairn("ckpt", "restore", run, self.dir / "out", "--tensor", "h.*", "--tensor", "tiny")
        out = tree(self.dir / "out")
        self.assertEqual(sorted(out), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                       "model.safetensors.index.json"])
        found = {}
        for name in list(out)[:2]:
            length = struct.unpack("<Q", out[name][:8])[0]
            header = json.loads(out[name][8:8 + length])
            source = tree(folder)[name]
            source_length = struct.unpack("<Q", source[:8])[0]
            source_header = json.loads(source[8:8 + source_length])
            self.assertEqual(header.pop("__metadata__", None), source_header.get("__metadata__"))
            for tensor, info in header.items():
                a, b = info["data_offsets"]
                c, d = source_header[tensor]["data_offsets"]
                self.assertEqual(out[name][8 + length + a:8 + length + b], source[8 + source_length + c:8 + source_length + d])
                found[tensor] = name
        self.assertEqual(sorted(found), ["h.0", "h.1", "h.caf\u00e9", "tiny"])
        self.assertEqual(json.loads(out["model.safetensors.index.json"])["weight_map"], found)
        self.run_cairn("ckpt", "restore", run, self.dir / "none", "--tensor", "nothing*", code=3)
        self.assertFalse((self.dir / "none").exists())

    def test_files_larger_than_a_piece_come_back(self):
        run = self.make_bucket() + "/r"
        rng = random.Random(3)
        self.write("in/big.bin", rng.randbytes(70_000_000))
        big = safetensors({"a": ("F32", [3, 1000, 6000]), "b": ("U8", [5])}, None, 4)
        self.write("in/big.safetensors", big)
        self.run_cairn("ckpt", "save", run, "--step", 1, self.dir / "in")
        self.run_cairn("ckpt", "verify", run)
        self.run_cairn("ckpt", "restore", run, self.dir / "out")
        for name, data in tree(self.dir / "in").items():
            self.assertEqual(hashlib.sha256((self.dir / "out" / name).read_bytes()).hexdigest(),
                             hashlib.sha256(data).hexdigest(), name)

    def test_a_file_that_is_written_to_while_it_is_saved_is_no_torn_step(self):
        run = self.make_bucket() + "/r"
        path = self.write("w.safetensors", safetensors({"a": ("U8", [4 << 20])}))
        done = threading.Event()

        def write_again_and_again():
            stamp = 10**18
            while not done.is_set():
                stamp += 1
                os.utime(path, ns=(stamp, stamp))

        writer = threading.Thread(target=write_again_and_again)
        writer.start()
        try:
            message = self.error("ckpt", "save", run, "--step", 1, path, code=1)
        finally:
            done.set()
            writer.join()
        self.assertIn("w.safetensors' was written to or replaced while it was being saved", message)
        self.assertEqual(self.json_lines("ckpt", "ls", self.bucket), [])
        self.run_cairn("ckpt", "save", run, "--step", 1, path)

    def test_a_command_that_has_read_leaves_no_registration_behind(self):
        bucket = self.make_bucket()
        path = self.write("f", b"x" * 100)
        self.run_cairn("put", path, f"cairn://{bucket}/k")
        self.run_cairn("ckpt", "save", bucket + "/r", "--step", 1, path)
        for command in [["get", f"cairn://{bucket}/k", self.dir / "got"], ["ckpt", "restore", bucket + "/r", self.dir / "out"],
                        ["ckpt", "verify", bucket + "/r"], ["ckpt", "show", bucket + "/r"]]:
            self.run_cairn(*command)
            self.assertEqual(self.metrics()["cairn_readers_open"], 0, command)  # or removal would wait for its ttl

    def test_an_older_launch_of_a_job_is_refused(self):
        run = self.make_bucket() + "/r"
        path = self.write("f", b"x")
        self.run_cairn("ckpt", "save", run, "--step", 1, path, "--launch", "job:2")
        self.run_cairn("ckpt", "save", run, "--step", 2, path, "--launch", "job:1", code=4)
        self.run_cairn("ckpt", "save", run, "--step", 2, path, "--launch", "job:2")
        self.run_cairn("ckpt", "save", run, "--step", 3, path, "--launch", "job:x", code=2)
        self.assertEqual([s["step"] for s in self.json_lines("ckpt", "ls", run)], [1, 2])

    def test_an_unknown_bucket_is_not_found(self):
        path = self.write("f", b"x")
        for command in [["ckpt", "save", "absent/r", "--step", 1, path], ["ckpt", "ls", "absent"], ["ckpt", "ls", "absent/r"],
                        ["ckpt", "show", "absent/r"], ["ls", "cairn://absent/"]]:
            self.run_cairn(*command, code=3)


if __name__ == "__main__":
    sys.exit(unittest.main())
