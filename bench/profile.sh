#!/usr/bin/env bash
# Where the CPU time of saves or restores goes, by perf: seconds per GB, by process and kind of work.
#
#   bench/profile.sh DIR save|restore shm|unix|tcp [BYTES] [ROUNDS]
#
# Needs perf and leave to sample the whole machine. Only cairnd and the ranks are counted, from the second round on; what
# the benchmark itself does stands apart. A round of "restore" is a save and a restore.
set -euo pipefail
cd "$(dirname "$0")/.."
dir="${1:?usage: bench/profile.sh DIR save|restore shm|unix|tcp [BYTES] [ROUNDS]}" mode="$2" transport="$3"
bytes="${4:-1GiB}" rounds="${5:-5}"
mkdir -p "$dir"
build/release/bin/cairn-bench checkpoint --mode "$mode" --bytes "$bytes" --ranks 4 --transport "$transport" \
  --data "$dir/run" --rounds "$rounds" --json > "$dir/profile.json" 2> "$dir/profile.log" &
pid=$!
until grep -q "attempt_begun.* step=2 " "$dir/profile.log" || ! kill -0 $pid 2> /dev/null; do sleep 0.05; done
perf record -q -a -e cpu-clock -F 1999 -o "$dir/perf.data" -- tail --pid=$pid -f /dev/null > "$dir/perf.log" 2>&1
wait $pid
rm -rf "$dir/run"
perf script -i "$dir/perf.data" -F comm,period,ip,sym 2> /dev/null | python3 -c '
import json, re, sys
run = json.load(open(sys.argv[1]))
gigabytes = run["bytes"]["median"] / 1e9 * run["rounds"]
kinds = [
    ("benchmark itself", r"bench::|like_weights|memcmp|^__memset|__memmove_avx512_unaligned_erms@bench"),
    ("copy + CRC in one pass", r"copy_block|CopyPass"),
    ("CRC", r"crc32"),
    ("copy", r"memmove|memcpy"),
    ("memory of the kernel: faults, clearing, huge pages", r"clear_page|clear_huge|fault|alloc_pages|folio|collapse|copy_mc|zap_|unmap|shmem|rmqueue|charge|lru"),
    ("kernel network", r"tcp|skb|sock|unix_|_copy_to_iter|_copy_from_iter|inet|ip_|rep_movs|copy_user|csum|napi|net_|epoll|ep_|sendmsg|recvmsg"),
    ("kernel disk", r"blk|bio|ext4|iomap|io_uring|io_|virtio|vring|virtqueue|iowrite|dio|jbd2|gup|pin_user|iov_iter|submit|mq_|sbitmap|scsi|sg_"),
    ("index", r"rocksdb"),
    ("wake-ups and scheduling", r"sched|wake|futex|try_to|finish_task|switch|pick_|update_|enqueue|dequeue|idle|hrtimer|tick|timer|spin_unlock|rcu|softirq|irq"),
]
total = {}
for line in sys.stdin:
    m = re.match(r"\s*(\S.*?)\s+(\d+)\s+[0-9a-f]+\s+(.*?)\s*$", line)
    if not m or not m[1].startswith(("cairnd", "cairn-bench")):
        continue
    who, seconds, symbol = m[1][:11], int(m[2]) / 1e9, m[3]
    kind = next((k for k, pattern in kinds if re.search(pattern, symbol)), "other")
    if who == "cairn-bench" and kind == "copy" and sys.argv[2] == "save":
        kind = "benchmark itself"  # its memcpy to compare with; staging does not use it
    total[(who, kind)] = total.get((who, kind), 0) + seconds
    if kind == "other":
        total.setdefault("others", {}).setdefault(symbol, 0)
        total["others"][symbol] += seconds
others = total.pop("others", {})
rounds, load = run["rounds"], run["load_average"]
print(f"{sys.argv[2]}, {sys.argv[3]}: CPU-seconds per GB, {rounds} rounds; load {load}")
for (who, kind), seconds in sorted(total.items(), key=lambda item: (item[0][0], -item[1])):
    print(f"  {who:<12} {kind:<52} {seconds / gigabytes:7.4f}")
print("  other, largest: " + ", ".join(f"{s} {t / gigabytes:.4f}" for s, t in sorted(others.items(), key=lambda i: -i[1])[:6]))
' "$dir/profile.json" "$mode" "$transport"
