#!/usr/bin/env bash
# Builds and passes the tests: checks of the sources, then release, address+undefined and thread sanitizer builds, then
# every decoder under libFuzzer.
# Installs missing Debian packages first. The last line says how many passed.
#
#   tests/run.sh                    everything, as CI does
#   tests/run.sh --quick            only the release build and its tests, without the fault tests
#   tests/run.sh --only PHASE       checks, release, asan, tsan or fuzz; may be repeated
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' tests/run.sh; }

phases=()
quick=
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=1 phases=(release) ;;
    --only)
      case "${2:-}" in
        checks | release | asan | tsan | fuzz) phases+=("$2") ;;
        *) echo "tests/run.sh: --only takes checks, release, asan, tsan or fuzz" >&2; exit 2 ;;
      esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
[ ${#phases[@]} -gt 0 ] || phases=(checks release asan tsan fuzz)

deploy/setup.sh build test || exit 1

jobs="$(nproc)"
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
passed=0 failed=0 skipped=0
failures=()
table=()

has_phase() { [[ " ${phases[*]} " == *" $1 "* ]]; }

# timed NAME COMMAND...: runs it, adds a row to the table of times. Returns its status.
timed() {
  local name="$1" start=$SECONDS status=0
  shift
  echo "== $name"
  "$@" < /dev/null || status=$?
  table+=("$(printf '%-28s %5d s  %s' "$name" $((SECONDS - start)) "$([ $status = 0 ] && echo ok || echo FAILED)")")
  return $status
}

# check NAME COMMAND...: a step that counts as one test.
check() {
  if timed "$@"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    failures+=("$1")
  fi
}

build() { # preset [target]
  # ON is said aloud: deploy/quickstart.sh configures the same folder without tests.
  if ! cmake --preset "$1" -DBUILD_TESTING=ON > "$logs/cmake" 2>&1; then
    cat "$logs/cmake"
    return 1
  fi
  # One line per target would bury a failure.
  cmake --build "build/$1" --target "${2:-all}" --parallel "$jobs" -- --quiet
}

# run_ctest PRESET ARGUMENTS...: runs the tests of a build and adds up their totals.
run_ctest() {
  local preset="$1" log="$logs/ctest" status summary bad total lost
  shift
  # One more than there are cores: tests with daemons wait for disks and clocks half of their time.
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --parallel $((jobs + 1)) "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  summary="$(sed -nE 's/^[0-9]+% tests passed, ([0-9]+) tests failed out of ([0-9]+).*/\1 \2/p' "$log")"
  read -r bad total <<< "${summary:-1 1}"
  lost="$(grep -c '\*\*\*Skipped' "$log")"
  # ctest that ended badly without counting a failure (crashed, found no tests) is a failure all the same.
  if [ "$status" != 0 ] && [ "$bad" = 0 ]; then bad=1 total=$((total + 1)); fi
  passed=$((passed + total - bad - lost))
  failed=$((failed + bad))
  skipped=$((skipped + lost))
  [ "$bad" = 0 ] || mapfile -t -O "${#failures[@]}" failures < <(sed -nE "s/^\s*[0-9]+ - (.*) \(.*\)$/$preset: \1/p" "$log" | sort -u)
  figures "build/$preset/Testing/Temporary/LastTest.log"
  return "$status"
}

# figures LOG: what tests that passed have counted and measured, which ctest does not show.
figures() {
  [ -f "$1" ] || return 0
  awk '/^[0-9]+\/[0-9]+ Test: / { sub(/^[0-9]+\/[0-9]+ Test: /, ""); name = $0 }
       /seeds a minute and core/ && name ~ /^sim_bug_/ { next }
       /seeds a minute and core|caught after [0-9]+ seeds|acknowledged operations|ready again after|was noticed at/ {
         print "  " name ": " substr($0, 1, 160)
       }' "$1"
}

# build_and_test PRESET CTEST-ARGUMENTS...
build_and_test() {
  local preset="$1"
  shift
  if timed "build $preset" build "$preset"; then
    timed "test $preset" run_ctest "$preset" "$@"
  else
    failed=$((failed + 1))
    failures+=("build $preset")
  fi
}

# run_fuzzers: each target counts as a test.
run_fuzzers() {
  local log="$logs/fuzz" good bad
  # Regressions near the corpus show soon; the search for new ones is run by hand, for longer.
  CAIRN_FUZZ_SECONDS="${CAIRN_FUZZ_SECONDS:-20}" tests/fuzz/run.sh 2>&1 | tee "$log"
  read -r good bad < <(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$log" | tail -n 1)
  passed=$((passed + ${good:-0}))
  failed=$((failed + ${bad:-1}))
  [ "${bad:-1}" = 0 ] || mapfile -t -O "${#failures[@]}" failures < <(sed -nE 's/^  (\S+) +FAILED$/fuzz: \1/p' "$log")
  [ "${bad:-1}" = 0 ]
}

if has_phase checks; then
  check "format" tests/checks/format.sh
  check "layers" tests/checks/layers.sh
  check "forbidden calls" tests/checks/forbidden.sh
  check "test names" tests/checks/test_names.sh
  check "checks catch violations" tests/checks/self_test.sh
fi

if has_phase release; then
  if [ -n "$quick" ]; then
    build_and_test release --label-exclude 'faults|checks'
  else
    # The checks ran above, once is enough.
    build_and_test release --label-exclude checks
  fi
fi

if has_phase checks; then
  check "clang-tidy" deploy/lint.sh --tidy
fi

# Fault tests are about real disks and processes and prove nothing more under a sanitizer; "long" ones are too slow.
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp second_deadlock_stack=1"
# Preset fuzz has the sanitizers of asan, and counts what is reached: one build serves both phases.
if has_phase asan; then build_and_test fuzz --label-exclude 'faults|checks|long|release_only'; fi
# The simulator has one thread.
if has_phase tsan; then build_and_test tsan --label-exclude 'faults|checks|long|release_only|sim'; fi
if has_phase fuzz; then
  if timed "build fuzzers" build fuzz fuzzers; then
    timed "fuzz" run_fuzzers
  else
    failed=$((failed + 1))
    failures+=("build fuzzers")
  fi
fi

echo
printf '%s\n' "${table[@]}"
if [ ${#failures[@]} -gt 0 ]; then
  echo
  echo "failed:"
  printf '  %s\n' "${failures[@]}"
fi
echo
printf '%d passed, %d failed' "$passed" "$failed"
[ "$skipped" = 0 ] || printf ', %d skipped' "$skipped"
echo
[ "$failed" = 0 ]
