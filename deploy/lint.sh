#!/usr/bin/env bash
# clang-format and clang-tidy on the C++ files that differ from a base commit, uncommitted changes included.
#
#   deploy/lint.sh                 against the merge base with main (on main itself: its parent)
#   deploy/lint.sh --base REF      against another commit
#   deploy/lint.sh --all           the whole tree
#   deploy/lint.sh --fix           formats the files instead of complaining
#   deploy/lint.sh --format | --tidy    only one of the two
#
# clang-tidy reads how each source is compiled from build/lint, which this script configures and does not build.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' deploy/lint.sh; }

base= all= fix= do_format=1 do_tidy=1
while [ $# -gt 0 ]; do
  case "$1" in
    --base) base="${2:?--base takes a commit}"; shift ;;
    --all) all=1 ;;
    --fix) fix=1 ;;
    --format) do_tidy= ;;
    --tidy) do_format= ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

default_base() {
  local main fork
  for main in origin/main main; do
    fork="$(git merge-base HEAD "$main" 2> /dev/null)" || continue
    if [ "$fork" != "$(git rev-parse HEAD)" ]; then
      echo "$fork"
      return
    fi
  done
  git rev-parse -q --verify HEAD~1 || true
}

if [ -z "$all" ] && [ -z "$base" ]; then
  base="$(default_base)"
  [ -n "$base" ] || all=1 # a history of one commit
fi

if [ -n "$all" ]; then
  mapfile -t files < <(git ls-files -co --exclude-standard -- '*.h' '*.cc')
else
  mapfile -t files < <({ git diff --name-only --diff-filter=d "$base" -- '*.h' '*.cc'
                         git ls-files -o --exclude-standard -- '*.h' '*.cc'; } | sort -u)
fi
[ ${#files[@]} -gt 0 ] || exit 0

status=0
if [ -n "$do_format" ]; then
  if [ -n "$fix" ]; then
    clang-format-19 -i "${files[@]}"
  else
    clang-format-19 --dry-run --Werror "${files[@]}" || status=1
  fi
fi

if [ -n "$do_tidy" ]; then
  # Preset debug is no unity build: there the commands are those of files that include many sources.
  commands=build/lint
  if ! said="$(cmake --preset debug -B $commands 2>&1 &&
               cmake --build $commands --target generated 2>&1)"; then
    echo "$said" >&2
    echo "lint: $commands could not be configured" >&2
    exit 1
  fi
  # A header is seen through the sources that include it.
  sources=()
  for file in "${files[@]}"; do
    if [[ "$file" == *.cc ]] && grep -qF "$PWD/$file\"" $commands/compile_commands.json; then sources+=("$file"); fi
  done
  if [ ${#sources[@]} -gt 0 ]; then
    extra=()
    if [ ${#sources[@]} -gt 40 ]; then
      # The static analyzer takes two thirds of the time; on a large change the sanitizers must do.
      extra=("--checks=-clang-analyzer-*")
    fi
    echo "clang-tidy: ${#sources[@]} sources${extra[*]:+, without the static analyzer}"
    printf '%s\0' "${sources[@]}" |
      xargs -0 -n 1 -P "$(nproc)" clang-tidy-19 -p $commands --quiet "${extra[@]}" --warnings-as-errors='*' 2> >(
        grep -vE '^[0-9]+ warnings? (generated|treated)|^$' >&2) || status=1
  fi
fi
exit $status
