#!/usr/bin/env bash
# Switches off one rule of correctness after the other (integration-tests/mutants/*.patch) and runs the
# tests each patch names: one of them must fail. A rule whose loss no test sees is a rule nobody checks.
set -euo pipefail
cd "$(dirname "$0")/.."
git diff --quiet || { echo "mutants: commit or stash your changes first: the patches are taken back with git" >&2; exit 1; }
survived=()
for patch in integration-tests/mutants/${1:-*}.patch; do
    name=$(basename "$patch" .patch)
    tests=$(sed -n 's/^# tests: //p' "$patch")
    trap 'git apply -R "$patch"' EXIT
    git apply "$patch"
    # Unit tests of one package need nothing else to be built.
    package=$(sed -n 's/^# package: //p' "$patch")
    if [ -n "$package" ]; then
        built=(--package "$package" --tests) run=(--package "$package")
    else
        built=(--workspace --bins --tests) run=(--workspace)
    fi
    cargo build "${built[@]}" 2>&1 | grep -E '^error' && { echo "mutants: $name does not build" >&2; exit 1; }
    if cargo nextest run "${run[@]}" --no-fail-fast -E "$tests" >/tmp/pgrejoin-mutant.log 2>&1; then
        survived+=("$name")
        echo "$name: NOT NOTICED by $tests"
    else
        grep -q 'tests\? run' /tmp/pgrejoin-mutant.log || { cat /tmp/pgrejoin-mutant.log; exit 1; }
        echo "$name: noticed ($(grep -c '^ *FAIL ' /tmp/pgrejoin-mutant.log) lines)"
    fi
    git apply -R "$patch"
    trap - EXIT
done
[ ${#survived[@]} -eq 0 ] || { echo "mutants: ${#survived[@]} not noticed: ${survived[*]}" >&2; exit 1; }
