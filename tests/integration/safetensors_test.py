#!/usr/bin/env python3
"""safetensors files and folders through the command line and a real daemon: what is malformed is refused with its
reason and leaves no trace, what is large or many comes back with bounded memory and descriptors.

    BIN=build/release/bin tests/integration/safetensors_test.py [-v] [Strict|Large]
"""
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import unittest

from cli_case import BIN, CliCase, safetensors, tree

U8 = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def file(header, data=b""):
    """A file with this header text, its length in front and `data` behind."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def one(dtype="U8", shape="[1]", offsets="[0,1]", data=b"x"):
    return file(f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}', data)


# Every reason for which the format refuses a file: what the message must name, and files that are refused for it.
MALFORMED = {
    "HeaderTooSmall": [b"", b"short", struct.pack("<Q", 0), struct.pack("<Q", 1) + b"{"],
    "HeaderTooLarge": [struct.pack("<Q", 100_000_001) + b"{}", struct.pack("<Q", 2**64 - 1)],
    "InvalidHeaderLength": [struct.pack("<Q", 999) + b"{}", struct.pack("<Q", 3) + b"{}"],
    "InvalidHeaderStart": [file("[]"), file(" {}"), file("\ufeff{}")],
    "InvalidHeaderDeserialization": [file("{}\n"), file("{}x")],
    "invalid JSON or UTF-8": [file('{"x":}'), file("{'x':1}"), file('{"x":%s,}' % U8, b"x"), file(b'{"\xff":1}'), file(b'{"x\xc0\x80":1}'),
                              file('{"\\ud800":1}'), file("{} {}")],
    "NUL": [file('{"x\0":1}')],
    "duplicate key": [file(f'{{"x":{U8},"x":{U8}}}', b"x"), file(f'{{"x":{U8},"\\u0078":{U8}}}', b"x"),
                      file('{"x":{"dtype":"U8","shape":[1],"dtype":"U8","data_offsets":[0,1]}}', b"x"),
                      file('{"__metadata__":{"a":"1","a":"2"}}')],
    "__metadata__": [file('{"__metadata__":{"a":1}}'), file('{"__metadata__":{"a":{}}}'), file('{"__metadata__":7}')],
    "TensorInvalidInfo": [file('{"x":1}'), file('{"x":{}}', b""), file('{"x":{"dtype":"U8","shape":[1]}}', b"x"),
                          one(dtype="F7"), one(shape="[-1]"), one(shape="[1.5]"), one(shape='["1"]'), one(shape="7"),
                          one(shape="[2]"), one(offsets="[0,18446744073709551616]")],
    "more than 32 dimensions": [one(shape="[" + ",".join(["1"] * 33) + "]")],
    "InvalidOffset": [one(offsets="[0]"), one(offsets="[0,1,1]"), one(offsets="[1,2]", data=b"xx"), one(offsets="[1,0]"),
                      file('{"x":%s,"y":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}' % U8, b"xxx"),  # a hole
                      file('{"x":%s,"y":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}' % U8, b"xx")],  # an overlap
    "MetadataIncompleteBuffer": [one(data=b"xy"), one(data=b""), file("{}", b"x")],
    "ValidationOverflow": [one(shape="[4294967296,4294967296]"), one(dtype="F64", shape="[4611686018427387904]")],
    "MisalignedSlice": [one(dtype="F4", shape="[3]"), one(dtype="F6_E2M3", shape="[1]")],
}


class Strict(CliCase):
    def refused(self, path):
        """The message with which a save of `path` is refused. The store must not have heard of it."""
        before = self.metrics()
        message = self.error("ckpt", "save", self.bucket + "/r", "--step", 1, path, code=2)
        after = self.metrics()
        for name in ["cairn_rpc_connections_total", "cairn_daemon_put_bytes_total", "cairn_chunk_store_live_bytes",
                     "cairn_checkpoints_open_attempts"]:
            self.assertEqual(after[name], before[name], (path, name))
        self.assertRegex(message, "; [^;]+\n$")  # what to do
        self.assertTrue(message[:-1].isprintable(), message)
        return message

    def test_every_malformed_file_is_refused_with_its_reason_and_no_trace(self):
        for reason, files in MALFORMED.items():
            for number, data in enumerate(files):
                with self.subTest(reason=reason, number=number):
                    message = self.refused(self.write("bad.safetensors", data))
                    self.assertIn(reason, message)
                    self.assertIn("bad.safetensors: ", message)
                    self.assertIn("copy or write the file again", message)
        # The run that they were meant for does not even exist.
        self.make_bucket()
        self.assertEqual(self.json_lines("ckpt", "ls", self.bucket), [])
        self.assertEqual(self.metrics()["cairn_checkpoints_failed_total"], 0)
        # One malformed file among good ones is as bad, under a name of its own it is bytes like any.
        self.write("in/a.safetensors", safetensors({"a": ("U8", [4])}))
        self.write("in/b.safetensors", one(data=b"xy"))
        self.assertIn("b.safetensors", self.refused(self.dir / "in"))
        (self.dir / "in/b.safetensors").rename(self.dir / "in/b.bin")
        self.run_cairn("ckpt", "save", self.bucket + "/r", "--step", 1, self.dir / "in")

    def test_bytes_that_are_not_utf8_and_escapes_never_reach_the_terminal(self):
        name = os.path.join(os.fsencode(self.dir), b"bad\xff\x1b[2J.safetensors")
        with open(name, "wb") as out:
            out.write(b"short")
        self.assertIn("bad??[2J.safetensors", self.refused(os.fsdecode(name)))
        for header in [b'{"\xff\x1b":1}', b'{"\\u001b[31m\\u202e":1}', b'{"x":{"dtype":"\xff"}}']:
            self.refused(self.write("bad.safetensors", file(header)))
        with open(name, "wb") as out:
            out.write(one())
        self.assertIn("UTF-8", self.refused(os.fsdecode(name)))  # as a name it cannot be saved

    def test_keys_that_the_format_does_not_name_are_no_reason_and_come_back(self):
        run = self.make_bucket() + "/r"
        self.write("in/m.safetensors", file('{"x":{"dtype":"U8","shape":[2],"quant":{"bits":[4,{"a":1}]},'
                                            '"data_offsets":[0,2]},"__metadata__":{"z":"1"}}   ', b"ab"))
        self.run_cairn("ckpt", "save", run, "--step", 1, self.dir / "in")
        self.run_cairn("ckpt", "restore", run, self.dir / "out")
        self.assertEqual(tree(self.dir / "out"), tree(self.dir / "in"))

    def test_an_index_must_fit_its_files(self):
        self.make_bucket()
        a, b = safetensors({"a": ("U8", [4])}), safetensors({"b": ("U8", [4]), "c": ("U8", [4])})
        self.write("in/a.safetensors", a)
        self.write("in/b.safetensors", b)
        folder, index = self.dir / "in", "in/model.safetensors.index.json"
        whole = {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"}
        for text, why in [
                ({"weight_map": {**whole, "d": "b.safetensors"}}, "tensor 'd' should be in 'b.safetensors' and is not"),
                ({"weight_map": {**whole, "d": "d.safetensors"}}, "the folder is not complete"),
                ({"weight_map": {**whole, "a": "b.safetensors", "b": "a.safetensors"}}, "'a' should be in 'b.safetensors' and is in 'in/a"),
                ({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}, "'c' of 'in/b.safetensors' is not in its"),
                ({"weight_map": {"a": "../a.safetensors"}}, "not the name of a file in the folder"),
                ({"weight_map": {"a": 1}}, "weight_map may hold file names only"),
                ({"weight_map": []}, "not an object"), ({}, "no weight_map"), ([], "not an object")]:
            with self.subTest(why=why):
                self.write(index, json.dumps(text).encode())
                # Two levels: the index speaks of the folder that it lies in.
                self.assertIn(why.replace("in/", ""), self.refused(folder))
                self.assertIn(why, self.refused(self.nested(folder)))
        self.write(index, b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}')
        self.assertIn("duplicate key 'a'", self.refused(folder))
        # total_size is nothing that readers use, and often wrong: told, and saved.
        run = self.bucket + "/r"
        self.write(index, json.dumps({"metadata": {"total_size": 11}, "weight_map": whole}).encode())
        self.run_cairn("ckpt", "save", run, "--step", 1, folder, warnings=["total_size is 11, and its tensors have 12 bytes"])
        self.write(index, json.dumps({"metadata": {"total_size": 12}, "weight_map": whole}).encode())
        self.run_cairn("ckpt", "save", run, "--step", 2, folder)

    def nested(self, folder):
        """A folder that holds `folder` under its name."""
        shutil.rmtree(self.dir / "outer", ignore_errors=True)
        shutil.copytree(folder, self.dir / "outer" / folder.name)
        return self.dir / "outer"

    def test_files_that_the_index_does_not_name_are_kept_as_they_are(self):
        run = self.make_bucket() + "/r"
        self.write("in/model-1.safetensors", safetensors({"a": ("U8", [4])}, seed=1))
        self.write("in/old.safetensors", safetensors({"a": ("U8", [4]), "b": ("F32", [70])}, seed=2))  # the name `a` again
        self.write("in/other/x.safetensors", safetensors({"x": ("U8", [4])}, seed=3))  # no index in its folder
        self.write("in/model.safetensors.index.json", b'{"weight_map":{"a":"model-1.safetensors"}}')
        self.run_cairn("ckpt", "save", run, "--step", 1, self.dir / "in", warnings=["does not name 'old.safetensors'"])
        shown = self.json("ckpt", "show", run)
        self.assertEqual({f["name"]: f["kind"] for f in shown["file_list"]},
                         {"model-1.safetensors": "safetensors", "old.safetensors": "blob", "other/x.safetensors": "safetensors",
                          "model.safetensors.index.json": "blob"})
        self.assertEqual([t["name"] for t in shown["tensor_list"]], ["a", "x"])
        self.run_cairn("ckpt", "restore", run, self.dir / "out")
        self.assertEqual(tree(self.dir / "out"), tree(self.dir / "in"))
        # Malformed it is refused all the same: kept like that it would be of use to nobody.
        self.write("in/old.safetensors", one(data=b"xy"))
        self.assertIn("MetadataIncompleteBuffer", self.refused(self.dir / "in"))

    def test_a_tensor_that_is_in_two_files_is_refused(self):
        self.write("in/one.safetensors", safetensors({"a": ("U8", [4]), "b": ("U8", [4])}))
        self.write("in/sub/two.safetensors", safetensors({"b": ("U8", [4])}))
        self.assertIn("tensor 'b' is in both 'one.safetensors' and 'sub/two.safetensors'", self.refused(self.dir / "in"))

    def test_more_files_than_descriptors_are_saved_and_restored(self):
        run = self.make_bucket() + "/r"
        for i in range(1500):
            if i % 3 == 0:
                self.write(f"in/{i % 7}/f{i}.bin", b"%d" % i)
            else:
                self.write(f"in/{i % 7}/f{i}.safetensors", safetensors({f"t{i}": ("U8", [i % 11])}, seed=i))
        def limited():
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        for args in [["save", run, "--step", 1, self.dir / "in"], ["restore", run, self.dir / "out"], ["verify", run]]:
            done = subprocess.run([BIN / "cairn", "ckpt", *map(str, args)], capture_output=True, preexec_fn=limited,
                                  env=dict(os.environ, CAIRN_SERVER=self.server), timeout=120)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(tree(self.dir / "out"), tree(self.dir / "in"))

    def test_fifty_thousand_tensors_in_a_file_come_back_whole_and_one_by_one(self):
        run = self.make_bucket() + "/r"
        rng = random.Random(5)
        names = [f"model.layers.{i // 500}.experts.{i % 500}.w" for i in range(50_000)]
        rng.shuffle(names)  # the order of the bytes is not that of the names
        path = self.write("in/m.safetensors", safetensors({name: ("BF16", [2, 1 + i % 3]) for i, name in enumerate(names)}))
        saved = self.json("ckpt", "save", run, "--step", 1, path)
        self.assertEqual(saved["tensors"], 50_000)
        self.run_cairn("ckpt", "restore", run, self.dir / "out")
        self.assertEqual(tree(self.dir / "out"), tree(self.dir / "in"))
        self.run_cairn("ckpt", "restore", run, self.dir / "some", "--tensor", "model.layers.7?.experts.49[89].w")
        self.assertEqual(self.tensors_of(self.dir / "some/m.safetensors"),
                         {name: data for name, data in self.tensors_of(path).items()
                          if name.startswith("model.layers.7") and name[14] != "." and name.endswith(("498.w", "499.w"))})
        self.assertEqual(len(self.tensors_of(self.dir / "some/m.safetensors")), 20)

    @staticmethod
    def tensors_of(path):
        """Name -> bytes."""
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:8 + length])
        header.pop("__metadata__", None)
        return {name: raw[8 + length + info["data_offsets"][0]:8 + length + info["data_offsets"][1]]
                for name, info in header.items()}


class Large(CliCase):
    """Files of many GB. Sparse ones, so that they cost no disk; what the store makes of them does."""

    def test_a_file_of_several_gb_needs_little_memory(self):
        run = self.make_bucket() + "/r"
        gib, mib = 1 << 30, 1 << 20
        big = 5 * gib
        header = json.dumps({"big": {"dtype": "F16", "shape": [big // 8192, 4096], "data_offsets": [0, big]},
                             "tail": {"dtype": "U8", "shape": [5], "data_offsets": [big, big + 5]}}).encode()
        path = self.dir / "big.safetensors"
        rng = random.Random(1)
        marks = {offset: rng.randbytes(100) for offset in [0, 4 * gib - 50, big - 100]}
        with open(path, "wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            start = out.tell()
            for offset, data in marks.items():
                out.seek(start + offset)
                out.write(data)
            out.write(b"tail!")

        def measured(*args):
            """The most memory that the command had, in bytes."""
            process = subprocess.Popen([BIN / "cairn", "ckpt", *map(str, args)], stderr=subprocess.PIPE, text=True,
                                       stdout=subprocess.DEVNULL, env=dict(os.environ, CAIRN_SERVER=self.server))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with process.stderr as errors:
                self.assertEqual((process.returncode, errors.read()), (0, ""))
            return usage.ru_maxrss * 1024

        rss = {"save": measured("save", run, "--step", 1, path), "verify": measured("verify", run),
               "restore": measured("restore", run, self.dir / "out"),
               "restore --tensor": measured("restore", run, self.dir / "tail", "--tensor", "t*")}
        print(json.dumps({"file_bytes": path.stat().st_size, "rss_bytes": rss}))
        with open(self.dir / "out/big.safetensors", "rb") as out:
            self.assertEqual(os.fstat(out.fileno()).st_size, path.stat().st_size)
            for offset, data in marks.items():
                out.seek(start + offset)
                self.assertEqual(out.read(100), data)
            self.assertEqual(out.read(), b"tail!")
        self.assertTrue((self.dir / "tail/big.safetensors").read_bytes().endswith(b"tail!"))
        for command, most in rss.items():
            self.assertLess(most, 384 * mib, command)


if __name__ == "__main__":
    sys.exit(unittest.main())
