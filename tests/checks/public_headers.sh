#!/usr/bin/env bash
# Each public header of the client compiles alone, as C++20, with g++ 12 and nothing else of the tree on the path.
#   tests/checks/public_headers.sh [INCLUDE-FOLDER...]
set -euo pipefail
top="$(cd "$(dirname "$0")/../.." && pwd)"
[ $# -gt 0 ] || set -- "$top/client/api/include" "$top/proto/common/include"

compiler=g++
if command -v g++-12 > /dev/null; then compiler=g++-12; fi
shopt -s nullglob
path=("${@/#/-I}")
status=0 headers=0
for include in "$@"; do
  for file in "$include"/cairn/*.h; do
    name="cairn/${file##*/}"
    headers=$((headers + 1))
    # Twice: it must also bear being included again.
    printf '#include "%s"\n#include "%s"\n' "$name" "$name" |
      "$compiler" -std=c++20 -Wall -Wextra -Werror -fsyntax-only "${path[@]}" -x c++ - || {
      echo "public headers: $name does not compile alone with $compiler as C++20"
      status=1
    }
  done
done
if [ "$headers" = 0 ]; then
  echo "public headers: none in $*"
  exit 1
fi
exit $status
