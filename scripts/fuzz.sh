#!/usr/bin/env bash
# Fuzzes the readers of what is stored: fuzz.sh [SECONDS [READER…]], a minute each and all of them unless said.
#
# libFuzzer on the stable compiler: coverage comes from LLVM's own pass. What was found stays in fuzz/artifacts, what was
# learnt in fuzz/corpus.
. "$(dirname "$0")/lib.sh"

seconds=${1:-60}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../fuzz"
need cargo "install Rust (https://rustup.rs)"

flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 --cfg fuzzing -Cdebug-assertions -Coverflow-checks"
target=$(rustc -vV | sed -n 's/^host: //p')
# With a target named, build scripts are built without the flags.
say "building the fuzz targets (some minutes)"
RUSTFLAGS=$flags cargo build --release --locked --target "$target"
built=target/$target/release

fuzz() { # NAME BINARY
    say "fuzzing $1 for $seconds s"
    mkdir -p "corpus/$1" artifacts
    "$built/$2" -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=10 -verbosity=0 -print_final_stats=1 \
        -artifact_prefix="artifacts/$1-" "corpus/$1"
}

readers=("$@")
if [ ${#readers[@]} -eq 0 ]; then
    mapfile -t readers < <(sed -n 's/^ *name: "\([a-z-]*\)",$/\1/p' ../crates/volume/src/readers.rs)
    fuzz log-replay log_record
fi
for reader in "${readers[@]}"; do
    HYPERNBD_READER=$reader fuzz "$reader" stored
done
