#!/usr/bin/env bash
# A failover and the old primary's way back, in one temporary directory that is removed at the end.
# PostgreSQL and pgrejoin refuse root: run as root, everything here runs as the user postgres.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$(mktemp -d /tmp/pgrejoin-demo.XXXXX)
cp target/debug/pgrejoin target/debug/pgrejoin-server target/debug/pgrejoin-certs "$home"
cp scripts/demo-steps.sh "$home"
clean() { rm -rf "$home"; }
trap clean EXIT
if [ "$(id -u)" = 0 ]; then
    chown -R postgres: "$home"
    setpriv --reuid postgres --regid postgres --init-groups bash "$home/demo-steps.sh" "$home"
else
    bash "$home/demo-steps.sh" "$home"
fi
