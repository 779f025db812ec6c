#!/usr/bin/env bash
# Licences, banned crates and sources; advisories where a copy of their database is given by ADVISORY_DB=.
set -euo pipefail
cd "$(dirname "$0")/.."
# It looks at the crates of every platform, also those that are not built here.
cargo fetch --locked
cargo deny --offline check bans licenses sources
if [ -z "${ADVISORY_DB:-}" ]; then
    echo "advisories were NOT checked: ADVISORY_DB names no copy of their database"
    exit 0
fi
config=$(mktemp --suffix=.toml)
trap 'rm -f "$config"' EXIT
{ cat deny.toml; printf '\n[advisories]\ndb-path = "%s"\n' "$ADVISORY_DB"; } >"$config"
cargo deny --offline check --config "$config" advisories
