#!/usr/bin/env bash
# Every C++ file of the tree is formatted. Prints what is not; `deploy/lint.sh --all --format --fix` formats.
#   tests/checks/format.sh [ROOT]
set -euo pipefail
cd "${1:-$(dirname "$0")/../..}"

mapfile -d '' files < <(find proto storage server client bench tests -name '*.h' -print0 -o -name '*.cc' -print0 2> /dev/null)
[ ${#files[@]} -gt 0 ] || { echo "format: no sources in $PWD"; exit 1; }
clang-format-19 --dry-run --Werror "${files[@]}"
