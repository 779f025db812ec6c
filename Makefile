# The commands of the project. Two of them do all set-up on a fresh machine: `make demo`, `make test`.
SHELL := /bin/bash
export CARGO_TERM_COLOR ?= auto
MINUTES ?= 10
KILLS ?= 250
FUZZ_SECONDS ?= 60

.PHONY: demo test test-fast check messages faults torture kills mutants fuzz bench bench-quick postgres bins

postgres:
	scripts/get-postgres.sh

bins:
	cargo build --workspace --bins

# A primary and a standby, a failover, and the old primary's way back, before your eyes.
demo: bins
	scripts/get-postgres.sh 15
	scripts/demo.sh

# Programs and tests are built in one go: apart, cargo would build what they share twice.
test: postgres
	scripts/need-cargo-tool.sh nextest 0.9.148
	scripts/need-strace.sh
	cargo build --workspace --bins --tests
	cargo nextest run --workspace
	cargo test --workspace --doc

# Unit tests, and whole rewinds on PostgreSQL 15 alone: what one runs between two edits.
test-fast:
	scripts/get-postgres.sh 15
	scripts/need-cargo-tool.sh nextest 0.9.148
	cargo build --workspace --bins --tests
	cargo nextest run --workspace -E '(kind(lib) | kind(bin)) | test(/^rewind::basic::pg15/) | test(/^refusals::/) | binary(tidy)'

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps
	cargo test --workspace --test tidy
	scripts/need-cargo-tool.sh deny 0.20.2
	scripts/check-dependencies.sh

# What of the documentation is made of the code: docs/MESSAGES.md and the end of docs/FORMATS.md.
messages:
	PGREJOIN_WRITE_MESSAGES=1 cargo test -p integration-tests --test tidy -- messages:: bodies::

# Every state in which a disk can be left, where an ordinary test run tries a part of them.
faults:
	cargo build --workspace --bins --tests
	PGREJOIN_FAULTS=all cargo test -p integration-tests --test it faults:: -- --nocapture

# Random lives for MINUTES on each major; PGREJOIN_SEED=n begins with that one, PGREJOIN_LIVES=n lives so many.
torture: postgres
	cargo build --workspace --bins --tests
	PGREJOIN_TORTURE_MINUTES=$(MINUTES) cargo test -p integration-tests --test it torture:: -- --nocapture

# KILLS kills in each of two tests, at any system call that changes a disk and at any moment.
kills: postgres
	scripts/need-strace.sh
	cargo build --workspace --bins --tests
	PGREJOIN_KILLS=$(KILLS) cargo test -p integration-tests --test it kills:: -- --nocapture

# Switches rules of correctness off, one after the other: a test must fail each time.
mutants: postgres
	scripts/need-cargo-tool.sh nextest 0.9.148
	scripts/mutants.sh

# Every reader of bytes from a disk or a peer, FUZZ_SECONDS each, from the seeds in fuzz/corpus.
fuzz:
	scripts/fuzz.sh $(FUZZ_SECONDS)

# Beside pg_rewind, pg_basebackup and rsync, over emulated long links (these take root) and the loopback.
# PGREJOIN_BENCH_LINKS, _FORKS, _SOURCES, _TOOLS, _ROUNDS, _SCALE, _MAJOR choose something else
# (benches/link/settings.rs has the names).
bench:
	scripts/get-postgres.sh 15 $(PGREJOIN_BENCH_MAJOR)
	scripts/need-bench-tools.sh
	cargo build --release --workspace --bins
	cargo bench -p integration-tests --bench link

# The same in less than ten minutes.
bench-quick:
	PGREJOIN_BENCH_QUICK=1 $(MAKE) bench
