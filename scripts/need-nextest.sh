#!/usr/bin/env bash
# Installs cargo-nextest if it is missing.
set -euo pipefail
cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest
