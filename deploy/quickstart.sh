#!/usr/bin/env bash
# From a fresh Debian 12 to a training job that is killed and resumes: installs what is missing, builds the programs,
# runs deploy/demo.sh. Can be run again at no harm; arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."

deploy/setup.sh build

build=build/release
# Another user's build (root's, say) is left alone.
if ! mkdir -p "$build" 2> /dev/null || [ ! -w "$build" ]; then
  build="${XDG_CACHE_HOME:-$HOME/.cache}/cairn/build"
  mkdir -p "$build"
fi
build="$(cd "$build" && pwd)"

log="$build/quickstart.log"
echo "quickstart: building the programs in $build (some minutes the first time)"
if ! cmake --preset release -B "$build" -DBUILD_TESTING=OFF > "$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi
if [ -t 1 ]; then
  cmake --build "$build" --target programs
elif ! cmake --build "$build" --target programs > "$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi

WORK="$(mktemp -d "${TMPDIR:-/tmp}/cairn-quickstart.XXXXXX")"
trap 'rm -rf "$WORK"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
export WORK BIN="$build/bin"
deploy/demo.sh "$@"
