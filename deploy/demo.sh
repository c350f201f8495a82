#!/usr/bin/env bash
# Shows a training job that loses all of its processes, and the storage daemon, in the middle of a save, and goes on as
# if nothing had happened. Everything is stopped and removed at the end, also after Ctrl-C.
#
#   BIN=build/release/bin deploy/demo.sh        (deploy/quickstart.sh builds first and calls this)
#
#   BIN     folder of the built programs
#   WORK    an empty folder on a real disk for data and logs (default: a new one, removed at the end); about 1 GB
#   ROWS    size of the model's table (16381 rows: a checkpoint of 35 MiB)
set -euo pipefail
export LC_ALL=C # numbers with a point

case "${1:-}" in
  "") ;;
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) echo "demo: no arguments are taken: $1 (see --help)" >&2; exit 2 ;;
esac
BIN="${BIN:-$(cd "$(dirname "$0")/.." && pwd)/build/release/bin}"
ROWS="${ROWS:-16381}"
for program in cairnd cairn cairn_char_lm; do
  if [ ! -x "$BIN/$program" ]; then
    echo "demo: no $BIN/$program; deploy/quickstart.sh builds it" >&2
    exit 1
  fi
done
made_work=
if [ -z "${WORK:-}" ]; then
  WORK="$(mktemp -d "${TMPDIR:-/tmp}/cairn-demo.XXXXXX")"
  made_work=1
fi
mkdir -p "$WORK/data"

steps=60 every=10 kill_at=40
daemon="" launcher=""
stop() {
  local status=$?
  trap - EXIT INT TERM
  # The ranks die with their launcher.
  for pid in $launcher $daemon; do kill "$pid" 2> /dev/null || true; done
  for pid in $launcher $daemon; do wait "$pid" 2> /dev/null || true; done
  if [ -n "$made_work" ]; then rm -rf "$WORK"; fi
  exit $status
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold="" plain=""
if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi
title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
# A command as a reader would type it.
shown() {
  echo "\$ $*"
  "$BIN/$1" "${@:2}"
}
die() {
  echo "demo: $*" >&2
  exit 1
}

start_daemon() {
  rm -f "$WORK/cairnd.out" # or the line of the daemon before could be read
  "$BIN/cairnd" --data "$WORK/data" --listen 127.0.0.1:0 --http 127.0.0.1:0 > "$WORK/cairnd.out" 2>> "$WORK/cairnd.log" &
  daemon=$!
  local address=
  while [ -z "$address" ]; do
    address="$(sed -nE 's/^cairnd ready listen=([^ ]+) .*/\1/p' "$WORK/cairnd.out" 2> /dev/null || true)"
    if [ -z "$address" ] && ! kill -0 "$daemon" 2> /dev/null; then
      cat "$WORK/cairnd.out" "$WORK/cairnd.log" >&2
      daemon=
      die "the daemon did not start"
    fi
    sleep 0.05
  done
  export CAIRN_SERVER="$address"
  echo "cairnd runs at $address (process $daemon)"
}

# train LOG ARGUMENTS...: runs the job, shows what it says and keeps it. In the background: a signal ends it at once.
train() {
  local log="$1" status=0 reader
  shift
  echo "\$ cairn_char_lm $*"
  : > "$log" # before tail opens it: the line below runs in another process
  "$BIN/cairn_char_lm" "$@" >> "$log" 2>&1 &
  launcher=$!
  tail -n +1 -f -s 0.1 --pid=$launcher "$log" &
  reader=$!
  wait "$launcher" || status=$?
  launcher=
  wait "$reader"
  [ $status = 0 ] || die "the training failed"
}

weights_of() { sed -nE 's/^weights sha256 //p' "$1"; }

cat << TEXT
A small language model learns the licence texts of this machine. It runs as several processes (ranks) that divide its
optimizer state among them; what they know lives only in memory, and in checkpoints in Cairn. Training is deterministic:
the same steps give the same bits, on any number of ranks. So the weights at the end tell whether anything was lost.
TEXT

title "1. A daemon with an empty data folder, and a bucket"
start_daemon
shown cairn bucket create demo

title "2. For reference: $steps steps on 4 ranks, with nothing in the way"
train "$WORK/reference.out" --run demo/reference --ranks 4 --steps $steps --save-every $every --table-rows "$ROWS"

title "3. The same training again. At step $kill_at everything dies in the middle of a save"
echo "All 4 ranks report when their part of step $kill_at is staged, on its way to the daemon; the last rank holds one tensor"
echo "back, so that the step cannot have been committed. Then all ranks and the daemon get kill -9."
status="$WORK/status"
arguments=(--run demo/resumed --ranks 4 --steps "$steps" --save-every "$every" --table-rows "$ROWS" --launch demo:0
  --stop-in-save "$kill_at" --status-file "$status")
echo "\$ cairn_char_lm ${arguments[*]}"
"$BIN/cairn_char_lm" "${arguments[@]}" > "$WORK/killed.out" 2>&1 &
launcher=$!
while [ "$(grep -cE "^rank=[0-9]+ step=$kill_at staged$" "$status" 2> /dev/null)" != 4 ]; do
  kill -0 "$launcher" 2> /dev/null || { cat "$WORK/killed.out" >&2; launcher=; die "the training ended too early"; }
  sleep 0.05
done
cat "$WORK/killed.out"
echo "the ranks say:"
grep staged "$status" | sed 's/^/  /'
mapfile -t ranks < <(sed -nE 's/^rank=[0-9]+ pid=//p' "$status")
echo "\$ kill -9 ${ranks[*]} $daemon"
{
  kill -9 "${ranks[@]}" "$daemon"
  wait "$launcher" "$daemon"
} 2> /dev/null || true # the shell's own words on jobs that were killed
launcher="" daemon=""
tail -n 1 "$WORK/killed.out"

title "4. The daemon starts again on the same folder. What is there?"
start_daemon
shown cairn ckpt ls demo/resumed
listed="$("$BIN/cairn" ckpt ls demo/resumed --json)"
last=$((kill_at - every))
grep -qE "\"step\": ?$last\b" <<< "$listed" || die "step $last was committed, and is gone"
! grep -qE "\"step\": ?$kill_at\b" <<< "$listed" || die "step $kill_at is listed, but was never committed"
echo "Step $last is the last one that was committed; of step $kill_at nothing is to be seen."

title "5. The job starts again, on 3 ranks instead of 4, and goes on from step $last"
train "$WORK/resumed.out" --run demo/resumed --ranks 3 --steps $steps --save-every $every --table-rows "$ROWS" --launch demo:1
shown cairn ckpt verify demo/resumed

title "6. Are the weights equal?"
reference="$(weights_of "$WORK/reference.out")"
resumed="$(weights_of "$WORK/resumed.out")"
printf 'uninterrupted, 4 ranks:                       %s\n' "$reference"
printf 'killed at step %d on 4 ranks, resumed on 3:   %s\n' $kill_at "$resumed"
if [ -z "$reference" ] || [ "$reference" != "$resumed" ]; then die "the weights differ"; fi
echo "Equal, bit for bit."

title "7. How fast"
# Rounds in turn, so that both see the same disk. The last save of a training has the machine for itself.
weights="$(sed -nE '1s/.* ([0-9]+) weights .*/\1/p' "$WORK/reference.out")"
bytes=$((weights * 14))
head -c $((bytes / 4)) /dev/urandom > "$WORK/part"
save_files() {
  local start="${EPOCHREALTIME/./}" part writers=()
  for part in 0 1 2 3; do
    dd if="$WORK/part" of="$WORK/plain.$part" bs=1M conv=fsync status=none &
    writers+=($!)
  done
  for part in "${writers[@]}"; do wait "$part"; done
  echo $((${EPOCHREALTIME/./} - start)) | awk '{ printf "%.3f\n", $1 / 1e6 }'
  rm -f "$WORK"/plain.?
}
save_cairn() { # round
  "$BIN/cairn_char_lm" --run "demo/speed.$1" --ranks 4 --steps 3 --save-every 1 --table-rows "$ROWS" |
    sed -nE 's/^saved step 3: .* committed after ([0-9.]+) s$/\1/p'
}
middle() { sort -n | sed -n 3p; }
files=() saves=()
for round in 1 2 3 4 5; do
  files+=("$(save_files)")
  saves+=("$(save_cairn $round)")
done
files_middle="$(printf '%s\n' "${files[@]}" | middle)"
saves_middle="$(printf '%s\n' "${saves[@]}" | middle)"
mib=$(((bytes + 524288) >> 20))
cat << TEXT
One checkpoint ($mib MiB) by 4 processes, nothing else running, middle of 5 rounds (cairn-bench measures more and larger ones):
  Cairn, durable and committed              $saves_middle s   (${saves[*]})
  the same bytes as plain files, fsynced    $files_middle s   (${files[*]})
  ratio                                     $(awk "BEGIN { printf \"%.2f\", $saves_middle / $files_middle }")
While training, on 4 ranks (training and saving share the processors):
  $(sed -nE 's/^[0-9]+ saves of (.*) by 4 ranks: (.*)$/\2/p' "$WORK/reference.out")
Restore on 3 ranks:
  $(sed -nE 's/^resumes from step [0-9]+: //p' "$WORK/resumed.out")
TEXT

title "8. The daemon stops"
kill "$daemon"
wait "$daemon" || die "the daemon exited with $?"
daemon=
echo "Done."
