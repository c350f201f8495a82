#!/usr/bin/env python3
"""The judge of the fault tests: what it lets pass, and what it must notice. Readers are stand-ins that print fixed lines."""

import os
import pathlib
import sys
import tempfile
import unittest

from expected import Expected
from harness import Failure


class Daemon:
    server = "nowhere"


def found(*lines):
    """A program in place of `ack_writer verify` that has found these things."""
    descriptor, name = tempfile.mkstemp(prefix="cairn-reader.")
    os.close(descriptor)
    program = pathlib.Path(name)
    status = 1 if any(line.startswith("bad ") for line in lines) else 0
    program.write_text("#!/bin/sh\ncat > /dev/null\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
    program.chmod(0o755)
    return program


class ExpectedTest(unittest.TestCase):
    def setUp(self):
        self.expected = Expected()

    def verify(self, *lines):
        program = found(*lines)
        try:
            self.expected.verify(program, Daemon, "bucket", "bucket/run")
        finally:
            program.unlink()

    def note(self, *lines, certain=True):
        for line in lines:
            self.expected.note(line, certain)

    def test_a_committed_step_that_is_gone_is_noticed(self):
        self.note("start step 1 0 rank 0", "ack step 1 0 rank 0")
        self.verify("visible 1 0")
        with self.assertRaisesRegex(Failure, "step 1: acknowledged, and gone"):
            self.verify()

    def test_an_acknowledgement_after_the_cut_proves_nothing(self):
        self.note("start step 1 0 rank 0")
        self.note("ack step 1 0 rank 0", certain=False)
        self.verify()

    def test_a_step_that_was_once_seen_must_stay(self):
        self.note("start step 1 0 rank 0")
        self.verify("visible 1 0")
        with self.assertRaises(Failure):
            self.verify()

    def test_a_step_that_nobody_has_saved_is_noticed(self):
        with self.assertRaisesRegex(Failure, "nobody has saved"):
            self.verify("visible 7 0")

    def test_a_sealed_attempt_may_be_committed_later(self):
        self.note("start step 1 0 rank 0")
        self.verify()
        self.verify("visible 1 0")

    def test_a_removed_step_that_is_back_is_noticed(self):
        self.note("ack step 1 0 rank 0", "start rmstep 1", "ack rmstep 1", "ack step 1 0 rank 1")
        with self.assertRaisesRegex(Failure, "removed, and back"):
            self.verify("visible 1 0")

    def test_a_removal_under_way_may_have_happened_or_not(self):
        self.note("ack step 1 0 rank 0", "start rmstep 1")
        self.verify("visible 1 0")
        self.verify()
        with self.assertRaises(Failure):
            self.verify("visible 1 0")

    def test_a_step_of_a_fenced_launch_is_noticed(self):
        self.note("start step 1 0 rank 0", "start step 2 0 rank 0")
        self.verify("visible 1 0")
        self.expected.resumes[1] = 1
        self.verify("visible 1 0")
        with self.assertRaisesRegex(Failure, "of launch 0, although launch 1"):
            self.verify("visible 1 0", "visible 2 0")

    def test_what_the_reader_calls_bad_fails(self):
        with self.assertRaisesRegex(Failure, "wrong bytes"):
            self.verify("bad bucket/run step 1: wrong bytes in tensor w")

    def test_a_reader_that_crashes_fails(self):
        with self.assertRaises(Failure):
            self.expected.verify("/bin/false", Daemon, "bucket", "bucket/run")

    def test_an_object_has_the_acknowledged_version_or_a_later_one(self):
        self.note("start put k 1", "ack put k 1", "start put k 2")
        self.assertEqual(self.expected.objects["k"], {1, 2})
        self.verify("object k 2")
        self.assertEqual(self.expected.objects["k"], {2})
        self.note("start rm k 3", "ack rm k 3")
        self.assertEqual(self.expected.objects["k"], {0})


if __name__ == "__main__":
    sys.exit(unittest.main())
