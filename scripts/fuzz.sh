#!/usr/bin/env bash
# Runs every fuzz target for so many seconds, from the seeds in fuzz/corpus. What a run finds new is
# kept in fuzz/run; what makes a target fail lies in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?seconds for each target}
rustup toolchain list | grep -q '^nightly' || { echo "fuzz: a nightly toolchain is needed: rustup toolchain install nightly" >&2; exit 1; }
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
cargo +nightly fuzz build
for target in $(cargo +nightly fuzz list); do
    mkdir -p "fuzz/run/$target"
    echo "== $target, $seconds seconds"
    cargo +nightly fuzz run "$target" "fuzz/run/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 2>&1 \
        | grep -E 'stat::number_of_executed_units|stat::new_units|ERROR|panicked|SUMMARY|DONE' \
        || { echo "fuzz: $target failed: see fuzz/artifacts/$target" >&2; exit 1; }
    # grep hides the exit code: a failure leaves an artifact.
    if compgen -G "fuzz/artifacts/$target/*" >/dev/null; then
        echo "fuzz: $target failed: see fuzz/artifacts/$target" >&2
        exit 1
    fi
done
