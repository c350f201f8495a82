#!/usr/bin/env bash
# Fuzzes every decoder for a while, two at once. Needs the build of the preset `fuzz`. The last line says how many passed.
#
#   tests/fuzz/run.sh                      every target for 60 seconds (or CAIRN_FUZZ_SECONDS)
#   tests/fuzz/run.sh --seconds 600 http   one, longer
#   tests/fuzz/run.sh --keep               what reaches something new goes into tests/fuzz/corpus (at most 64 inputs each, named by
#                                          their hash; others stay)
#   build/fuzz/bin/cairn-fuzz --target=http FILE    one input again
set -uo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' tests/fuzz/run.sh; }

program=build/fuzz/bin/cairn-fuzz
seconds="${CAIRN_FUZZ_SECONDS:-60}" keep=
targets=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) seconds="${2:?--seconds takes a number}"; shift ;;
    --keep) keep=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; exit 2 ;;
    *) targets+=("$1") ;;
  esac
  shift
done
[ -x $program ] || { echo "fuzz: $program is missing: cmake --preset fuzz && cmake --build --preset fuzz" >&2; exit 1; }
declare -A bytes_max
while read -r name size; do bytes_max[$name]=$size; done < <($program --list)
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(printf '%s\n' "${!bytes_max[@]}" | sort)

[ ${#targets[@]} -gt 0 ] || { echo "fuzz: $program names no target" >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
found=build/fuzz/found # what broke a target stays here
mkdir -p "$found"

# A small quarantine: a whole daemon is made and destroyed for each input.
export ASAN_OPTIONS=detect_stack_use_after_return=1:quarantine_size_mb=16:malloc_context_size=8
export UBSAN_OPTIONS=print_stacktrace=1

# fuzz TARGET: its log and status go to $work.
fuzz() {
  local target="$1" status=0
  local seeds="$work/$target" corpus="tests/fuzz/corpus/$target"
  mkdir -p "$seeds" "$corpus"
  $program --target="$target" --seeds="$seeds" &&
    $program --target="$target" -max_total_time="$seconds" -max_len="${bytes_max[$target]}" -timeout=20 -rss_limit_mb=1024 \
      -malloc_limit_mb=256 -reload=0 -print_final_stats=1 -artifact_prefix="$found/$target-" "$seeds" "$corpus" || status=$?
  if [ -n "$keep" ] && [ $status = 0 ]; then
    local small="$work/$target.small" kept="$work/$target.kept"
    mkdir -p "$small" "$kept"
    find "$seeds" -size -2k -name '????????????????????????????????????????' -exec cp -t "$small" {} +
    # By edges alone: that a loop ran once more is not worth a file.
    $program --target="$target" -set_cover_merge=1 -use_counters=0 -max_len="${bytes_max[$target]}" "$kept" "$corpus" "$small" || status=$?
    # Names are hashes: the first are as good as any.
    find "$kept" -type f | sort | tail -n +65 | xargs -r rm
    find "$corpus" -type f -name '????????????????????????????????????????' -delete
    cp -rT "$kept" "$corpus"
  fi
  echo $status > "$work/$target.status"
}

for target in "${targets[@]}"; do
  [ -n "${bytes_max[$target]:-}" ] || { echo "fuzz: no target $target; there are: ${!bytes_max[*]}" >&2; exit 2; }
  while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  fuzz "$target" > "$work/$target.log" 2>&1 < /dev/null &
done
wait

passed=0 failed=0
for target in "${targets[@]}"; do
  log="$work/$target.log"
  if [ "$(cat "$work/$target.status")" = 0 ]; then
    passed=$((passed + 1))
    runs="$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | head -n 1)"
    cover="$(sed -nE 's/^#[0-9]+\s+DONE\s+cov: ([0-9]+).*/\1/p' "$log" | head -n 1)"
    printf '  %-14s ok       %9s runs, %6s edges\n' "$target" "$runs" "$cover"
    continue
  fi
  failed=$((failed + 1))
  printf '  %-14s FAILED\n' "$target"
  tail -n 80 "$log"
  input="$(sed -nE 's/.*Test unit written to (.*)$/\1/p' "$log" | tail -n 1)"
  if [ -n "$input" ] && [ -f "$input" ]; then
    echo "the input, in $input ($(stat -c %s "$input") bytes), as base64:"
    base64 "$input"
    echo "again: $program --target=$target $input"
  fi
done
printf '%d passed, %d failed\n' $passed $failed
[ $failed = 0 ]
