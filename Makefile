# make serve   serve a volume in the foreground (URL=… serves that one), built first where that is needed
# make test    everything that is checked: format, lints, licences, unit tests, end-to-end tests
# make build   the plugin and the command line, in target/release
# make install   what was built, below PREFIX (/usr/local) and in nbdkit's directory of plugins; `make uninstall` undoes it
# make package   a Debian package and an RPM of it, in target/package, and tries them (PACKAGE_ARGS=--no-build: of what was built)
# make book    docs/ as a book with search, in target/book
# make test-kernel   `hypernbd attach` under Debian's kernel, in a virtual machine, while the server is killed (KERNEL_ARGS=--rounds 20)
# make bench   the benchmarks (BENCH_ARGS=… is passed on, BENCH_ARGS=--quick tries them all); results in tests/bench/results
# make fuzz    the readers of what is stored, given anything, a minute each (FUZZ_ARGS="SECONDS READER…")
# make clean   build output; the cache of built tools (~/.cache/hypernbd) and ./data stay

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

PYTHON := /usr/bin/python3
PYTEST_ARGS ?=
# End-to-end tests under way at once: they wait more than they compute.
E2E_JOBS ?= $(shell expr $$(nproc) + 2)
# What they test: `debug`, which the unit tests have built, or `release`.
E2E_BUILD ?= debug
BENCH_ARGS ?=
FUZZ_ARGS ?=
KERNEL_ARGS ?=
SERVE_ARGS ?=
PACKAGE_ARGS ?=
URL ?=
BUILT := $(or $(CARGO_TARGET_DIR),target)/release

.PHONY: deps build serve install uninstall package book test lint licences unit e2e built-debug built-release test-kernel bench fuzz clean

deps:
	@scripts/install-deps.sh

# What the sources were is kept beside what was made of them: `make serve` need not build that again.
build:
	@scripts/install-deps.sh build
	@sources=$$(scripts/sources.sh); \
	echo "cargo build --release --locked"; \
	cargo build --release --locked; \
	echo "$$sources" >"$(BUILT)/hypernbd.sources"

serve:
	@scripts/install-deps.sh serve
	@scripts/serve.sh "$(URL)" $(SERVE_ARGS)

# By themselves these build nothing, since they are often root's: `make build` does.
install uninstall:
	@scripts/install.sh $@

package:
	@scripts/package.sh $(PACKAGE_ARGS)

book:
	@mdbook=$$(scripts/build-cargo-tool.sh mdbook); \
	said=$$("$$mdbook" build docs --dest-dir "$(CURDIR)/target/book" 2>&1); \
	echo "$$said"; \
	! grep -q WARN <<<"$$said"

# One after the other, quick checks first; the end-to-end tests close the output with pytest's own summary.
test:
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory licences
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory e2e

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

# Advisories need a download and change by the day: the GitHub workflow checks them.
licences:
	@deny=$$(scripts/build-cargo-tool.sh cargo-deny); \
	echo "cargo deny check bans licenses sources"; \
	"$$deny" --locked check --hide-inclusion-graph bans licenses sources

# The store's tests run against the local store, and against the MinIO started for them.
# Futures of a build that is not optimised take much stack: more than the 2 MiB of a test thread, should they grow again.
unit:
	RUST_MIN_STACK=8388608 scripts/with-minio.sh cargo test --workspace --locked
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/bench

# With all targets, as the unit tests have them: with other features of the same crates each would be built again.
built-debug: deps
	cargo build --workspace --all-targets --locked

built-release: build

# Where CI is set, pytest prints whole differences and messages: the names of what failed would be lost above them.
e2e: deps built-$(E2E_BUILD)
	@unset CI BUILD_NUMBER; \
	nbdkit=$$(scripts/build-nbdkit.sh); minio=$$(scripts/build-minio.sh); \
	HYPERNBD_BUILD=$(E2E_BUILD) \
	NBDKIT=$$nbdkit MINIO=$$minio $(PYTHON) -m pytest -n $(E2E_JOBS) tests/e2e $(PYTEST_ARGS)

# Emulated: two minutes. Needs root once, for QEMU and the like.
test-kernel: deps build
	@nbdkit=$$(scripts/build-nbdkit.sh); NBDKIT=$$nbdkit $(PYTHON) tests/kernel/restarts.py $(KERNEL_ARGS)

# A minute for each reader of what is stored; needs no other compiler.
fuzz:
	@scripts/fuzz.sh $(FUZZ_ARGS)

bench: deps build
	@nbdkit=$$(scripts/build-nbdkit.sh); minio=$$(scripts/build-minio.sh); \
	NBDKIT=$$nbdkit MINIO=$$minio $(PYTHON) tests/bench/run.py $(BENCH_ARGS)

clean:
	cargo clean
	rm -rf tests/bench/results
