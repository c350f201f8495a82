#!/usr/bin/env python3
"""cairn-bench plan at a small size: the step of many ranks commits, single ranks read their elements, the figures are there.

  tests/bench/plan_test.py BIN [RANKS [TENSORS]]
"""
import json
import subprocess
import sys

binaries = sys.argv[1]
ranks, tensors = (int(word) for word in (sys.argv[2:] + ["300", "50"])[:2])
done = subprocess.run([f"{binaries}/cairn-bench", "plan", "--ranks", str(ranks), "--tensors", str(tensors), "--rounds", "2",
                       "--json"], capture_output=True, text=True, check=False)
assert done.returncode == 0, done.stderr
figures = json.loads(done.stdout)
assert figures["ranks"] == ranks and figures["tensors"] == tensors and figures["entries"] == ranks * tensors, figures
for name in ("open_seconds", "plan_seconds", "open_and_plan_seconds", "commit_seconds", "save_seconds", "read_seconds",
             "index_bytes", "index_bytes_read", "rss_bytes_max", "rss_bytes_max_server", "limit_write_seconds"):
    assert figures[name] > 0, (name, figures)
refused = subprocess.run([f"{binaries}/cairn-bench", "plan", "--ranks", "0"], capture_output=True, text=True, check=False)
assert refused.returncode != 0 and "--ranks" in refused.stderr, refused
print(done.stdout)
