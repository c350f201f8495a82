#!/usr/bin/env bash
# Measures everything that docs/benchmarks.md shows, and writes its table and plots, and README's table, anew.
#
#   bench/report.sh DIR [ROUNDS]     # DIR on the disk to measure, with 20 GiB free; the build is build/release
#   bench/report.sh --render         # only writes tables and plots from the figures in docs/benchmarks/*.json
#
# Runs one after the other: a machine with nothing else to do, please. With 10 rounds it takes about three quarters of an hour.
# BYTES (default 4GiB; none: only 8b at scale 0.01) and RANKS (default "4 8") make it shorter.
# MACHINE=NAME keeps the figures in docs/benchmarks/NAME, for the table of that machine.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" != --render ]; then
  dir="${1:?usage: bench/report.sh DIR [ROUNDS] | --render}" rounds="${2:-10}"
  bench="${BENCH:-build/release/bin/cairn-bench}" bytes="${BYTES:-4GiB}"
  figures="docs/benchmarks${MACHINE:+/$MACHINE}"
  mkdir -p "$figures" "$dir"
  keep() {  # NAME ARGUMENTS...: a run that fails leaves the figures of before
    local name="$1"; shift
    echo "$(date -u +%H:%M:%S) $name: cairn-bench $*" >&2
    "$bench" "$@" --rounds "$rounds" --json > "$figures/$name.json.new" 2> "$dir/$name.log" ||
      { echo "failed; see $dir/$name.log" >&2; tail -3 "$dir/$name.log" >&2; exit 1; }
    mv "$figures/$name.json.new" "$figures/$name.json"
    rm -rf "$dir/run"
  }
  for ranks in ${RANKS:-4 8}; do
    for transport in shm unix tcp; do
      [ "$bytes" = none ] || keep "$transport-$ranks" checkpoint --bytes "$bytes" --ranks "$ranks" --transport "$transport" --data "$dir/run" \
        --peer files,odirect
      keep "$transport-$ranks-8b" checkpoint --model 8b --scale 0.01 --ranks "$ranks" --transport "$transport" \
        --data "$dir/run" --peer files,odirect
    done
    keep "async-$ranks" checkpoint --mode async --bytes 2GiB --ranks "$ranks" --transport shm --data "$dir/run"
  done
  keep async-1 checkpoint --mode async --bytes 2GiB --ranks 1 --transport shm --data "$dir/run"
  keep steady checkpoint --mode save --steady --bytes 2GiB --ranks 4 --transport shm --data "$dir/run" --peer odirect
  keep disk disk --bytes 2GiB --streams 4 --data "$dir/run"
  keep tiny tiny --transport unix --data "$dir/run"
  keep open open --data "$dir/run"
  keep plan plan --data "$dir/run"
fi
exec python3 bench/plot.py
