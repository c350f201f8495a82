#!/usr/bin/env python3
"""cairn-bench checkpoint and disk at a small size: every figure that is promised is there, and the bytes were right.

  tests/bench/checkpoint_test.py BIN
"""
import json
import pathlib
import subprocess
import sys
import tempfile

BENCH = f"{sys.argv[1]}/cairn-bench"
COMMON = ("save_seconds stall_seconds memcpy_seconds bytes gib_per_s cpu_seconds_client cpu_seconds_server "
          "rss_bytes_max").split()
RESTORE = "restore_seconds bytes_wanted bytes_moved bytes_from_disk".split()
PEERS = "save_vs_files save_vs_odirect restore_vs_files restore_vs_odirect".split()


def run(*args):
    done = subprocess.run([BENCH, *args, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout)
    for figure in out.values():
        if isinstance(figure, dict):
            assert figure["min"] <= figure["median"] <= figure["max"] and "first_round" in figure, figure
    return out


def has(out, *names):
    for name in names:
        assert out[name]["median"] >= 0, name


with tempfile.TemporaryDirectory(prefix="cairn-bench-") as folder:
    for transport in ("shm", "unix", "tcp"):
        out = run("checkpoint", "--bytes", "32MiB", "--ranks", "2", "--rounds", "1", "--transport", transport, "--data",
                  folder, "--peer", "files,odirect")
        has(out, *COMMON, *RESTORE, *PEERS)
        assert out["ranks"] == out["processes"] == 2 and "daemon restarted" in out["cold"], out
        wanted = out["bytes"]["median"]  # what moves is a little more: pages of the index
        assert out["bytes_wanted"]["median"] == wanted <= out["bytes_moved"]["median"] <= 1.01 * wanted, out
    # What the daemon has in its page tables of its clients' memory does not add up: their arenas are 8 x 288 MiB.
    out = run("checkpoint", "--bytes", "1GiB", "--ranks", "8", "--processes", "4", "--rounds", "1", "--mode", "save",
              "--transport", "shm", "--data", folder)
    has(out, *COMMON)
    assert out["processes"] == 4 and out["rss_bytes_max"]["max"] <= 512 << 20, out["rss_bytes_max"]
    out = run("checkpoint", "--model", "70b", "--scale", "0.00003", "--ranks", "4", "--layout", "2,1,2", "--rounds", "1",
              "--mode", "async", "--content", "random", "--data", folder)
    has(out, *COMMON, "stall_vs_memcpy")
    out = run("disk", "--data", folder, "--bytes", "32MiB", "--chunk-bytes", "4MiB", "--streams", "2", "--rounds", "1")
    has(out, "write_seconds", "read_seconds", "write_cpu_seconds_per_gb", "read_cpu_seconds_per_gb", "write_vs_odirect",
        "read_vs_odirect", "odirect_write_seconds", "odirect_read_seconds")
    assert not (pathlib.Path(folder) / "engine").exists()
