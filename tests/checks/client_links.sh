#!/usr/bin/env bash
# Client programs carry none of the server's libraries.
#   tests/checks/client_links.sh PROGRAM...
set -euo pipefail
[ $# -gt 0 ] || { echo "client_links: no program given"; exit 1; }
status=0
for program in "$@"; do
  libraries="$(ldd "$program")"
  if found="$(grep -oE 'lib(rocksdb|uring)[^ ]*' <<< "$libraries")"; then
    echo "$program links $(sort -u <<< "$found" | tr '\n' ' ')"
    status=1
  fi
done
exit $status
