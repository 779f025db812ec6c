#!/usr/bin/env bash
# The tests kill programs at chosen system calls with strace; a Debian machine gets it from its packages.
set -euo pipefail
command -v strace >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -y -qq strace >/dev/null || { apt-get update -qq && apt-get install -y -qq strace >/dev/null; }
    exit 0
fi
echo "strace is missing: install it with the packages of this machine (apt-get install strace)" >&2
exit 1
