#!/usr/bin/env bash
# Installs the Debian packages of deploy/packages.txt that are missing. Does nothing, and needs no network and no
# rights, when all are there.
#
#   deploy/setup.sh build          what building and running needs
#   deploy/setup.sh build test     and what the tests need
#   deploy/setup.sh --list build   prints the names
set -euo pipefail

list="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/packages.txt"

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

packages_of() { # section
  awk -v want="[$1]" '{ sub(/#.*/, "") } $1 ~ /^\[/ { on = ($1 == want); next } on && NF { print $1 }' "$list"
}

list_only=
sections=()
for arg in "$@"; do
  case "$arg" in
    --list) list_only=1 ;;
    -h | --help) usage; exit 0 ;;
    *)
      if [ -z "$(packages_of "$arg")" ]; then
        echo "setup: no section [$arg] in $list" >&2
        exit 2
      fi
      sections+=("$arg")
      ;;
  esac
done
[ ${#sections[@]} -gt 0 ] || sections=(build)

wanted=()
for section in "${sections[@]}"; do
  mapfile -t -O "${#wanted[@]}" wanted < <(packages_of "$section")
done
if [ -n "$list_only" ]; then
  printf '%s\n' "${wanted[@]}"
  exit 0
fi

if ! command -v dpkg-query > /dev/null; then
  echo "setup: not a Debian system; install the counterparts of: ${wanted[*]}" >&2
  exit 1
fi

missing_now() {
  local package
  for package in "${wanted[@]}"; do
    # A foreign or half-installed package counts as missing.
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null)" = installed ] || echo "$package"
  done
}

mapfile -t missing < <(missing_now)
[ ${#missing[@]} -gt 0 ] || exit 0

echo "setup: installing ${missing[*]}"
as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo > /dev/null; then
    echo "setup: not root and no sudo here. As root, run: apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)

# A failing update is not the end: the lists that are there may do.
"${apt[@]}" update < /dev/null || echo "setup: apt-get update failed; trying with the package lists at hand" >&2
if ! "${apt[@]}" install --no-install-recommends "${missing[@]}" < /dev/null; then
  echo "setup: could not install: ${missing[*]}" >&2
  echo "setup: it takes Debian 12 with its main, updates and security archives reachable, and root or sudo" >&2
  exit 1
fi
