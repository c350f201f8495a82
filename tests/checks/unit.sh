#!/usr/bin/env bash
# The systemd unit has no unknown key and leaves the daemon few rights (exposure at most 2.0 of 10).
#   tests/checks/unit.sh [UNIT]
set -euo pipefail
unit="${1:-$(dirname "$0")/../../deploy/cairnd.service}"
command -v systemd-analyze > /dev/null || { echo "skipped: no systemd-analyze here"; exit 77; }

copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
# verify wants the program to exist.
sed 's#^ExecStart=[^ ]*#ExecStart=/bin/true#' "$unit" > "$copy/cairnd.service"

# It exits 0 on unknown keys, and only prints them.
said="$(systemd-analyze verify "$copy/cairnd.service" 2>&1 | grep -F "cairnd.service" || true)"
if [ -n "$said" ]; then
  echo "$said"
  exit 1
fi
systemd-analyze security --offline=true --threshold=20 "$copy/cairnd.service" > "$copy/report" || {
  grep -v '^✓' "$copy/report"
  exit 1
}
