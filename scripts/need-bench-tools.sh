#!/usr/bin/env bash
# The other tools of the benchmark.
set -euo pipefail
missing=()
for tool in iperf3:iperf3 rsync:rsync ping:iputils-ping ip:iproute2; do
    command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
[ "$(id -u)" = 0 ] || { echo "need-bench-tools: ${missing[*]} missing, and only root can install" >&2; exit 1; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null \
    || { echo "need-bench-tools: could not install ${missing[*]}" >&2; exit 1; }
