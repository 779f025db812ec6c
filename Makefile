# The commands of the project. Two of them do all set-up on a fresh machine: `make demo`, `make test`.
SHELL := /bin/bash
export CARGO_TERM_COLOR ?= auto
MINUTES ?= 10

.PHONY: demo test check torture postgres bins

postgres:
	scripts/get-postgres.sh

bins:
	cargo build --workspace --bins

# A primary and a standby, a failover, and the old primary's way back, before your eyes.
demo: bins
	scripts/get-postgres.sh 15
	scripts/demo.sh

test: postgres
	scripts/need-nextest.sh
	cargo build --workspace --bins
	cargo nextest run --workspace
	cargo test --workspace --doc

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps
	cargo test -p integration-tests --test tidy
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
	else echo "cargo-deny is not installed: licences, bans and sources were NOT checked"; fi

# Random forks without end; PGREJOIN_SEED=n repeats one.
torture: postgres
	cargo build --workspace --bins
	PGREJOIN_TORTURE_MINUTES=$(MINUTES) cargo test -p integration-tests --test torture -- --nocapture
